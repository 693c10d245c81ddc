"""Tools that measure a server; they need the ``bench`` extra."""
