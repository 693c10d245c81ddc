"""Plugin of pytest: mlx-lm's tests of caches run on this package's caches."""

from mlx_lm.models import cache

from mlx_lm_ext.cache.kinds import make_segmented_cache
from mlx_lm_ext.cache.segmented import BatchSegmentedKVCache, SegmentedKVCache
from mlx_lm_ext.cache.sliding import BatchSlidingKVCache, SlidingKVCache

OURS = {
    "KVCache": SegmentedKVCache,
    "BatchKVCache": BatchSegmentedKVCache,
    "RotatingKVCache": SlidingKVCache,
    "BatchRotatingKVCache": BatchSlidingKVCache,
    "make_prompt_cache": make_segmented_cache,
}
for part in OURS.values():
    # Where ``load_prompt_cache`` finds the classes of what was saved.
    setattr(cache, part.__name__, part)


def pytest_collection_modifyitems(items):
    (module,) = {item.module for item in items}
    for name, part in OURS.items():
        assert hasattr(module, name)
        setattr(module, name, part)
