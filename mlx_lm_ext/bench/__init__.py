"""What measures this server and others; needs the ``bench`` extra."""
