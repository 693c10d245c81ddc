"""An OpenAI-compatible batch server for mlx-lm. Importing this imports no MLX."""

from pluggy import HookimplMarker

__version__ = "0.1.0"

# Marks the functions of a plugin that implement hooks (hookspecs.py).
hookimpl = HookimplMarker("mlx_lm_ext")
