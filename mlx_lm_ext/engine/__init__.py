"""The generation thread, the client through which handlers reach it, the models, their check and
their warm-up, and requests that are served one at a time."""
