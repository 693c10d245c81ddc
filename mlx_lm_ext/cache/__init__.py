"""The radix prompt cache: its tree, how each of mlx-lm's cache types is cut and put together
again, and batch caches that rows join and leave in place. It knows no plugins: whoever
makes a prompt cache may give it an eviction policy."""
