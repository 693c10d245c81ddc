"""The generation thread and what handlers call to reach it: models by name, the warm-up,
and requests that are served alone."""
