"""Tools that measure this server and others. They need the ``bench`` extra."""
