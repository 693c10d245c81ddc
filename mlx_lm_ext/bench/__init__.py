"""Tools that measure this server and others. Some need the ``bench`` extra."""
