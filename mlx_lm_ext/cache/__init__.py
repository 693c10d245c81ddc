"""The radix prompt cache: its tree, how the KV of each cache type of mlx-lm is cut and
joined, and the KV of a batch that rows join in place. Knows no plugins."""
