"""An OpenAI-compatible batch server for mlx-lm. Importing this imports no MLX."""

__version__ = "0.1.0"
