"""Plugin of pytest: mlx-lm's server has this package's prompt cache."""

import mlx_lm.server

from mlx_lm_ext.cache.prompt_cache import RadixPromptCache

mlx_lm.server.LRUPromptCache = RadixPromptCache
