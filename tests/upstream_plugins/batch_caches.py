"""Plugin of pytest: mlx-lm's tests of caches run on this package's caches."""

from mlx_lm.models import cache

from mlx_lm_ext.cache.kinds import make_segmented_cache
from mlx_lm_ext.cache.segmented import BatchSegmentedKVCache, SegmentedKVCache, slices
from mlx_lm_ext.cache.sliding import BatchSlidingKVCache, SlidingKVCache


class HitKVCache(SegmentedKVCache):
    """A ``SegmentedKVCache`` that always has its tokens in segments, as one from the prompt
    cache has."""

    def update_and_fetch(self, keys, values):
        fetched = super().update_and_fetch(keys, values)
        n, arrays = self.offset, [self.keys, self.values]
        ends = [0, n // 2, n]
        self.segments = [slices(arrays, i, j) for i, j in zip(ends, ends[1:]) if i < j]
        return fetched


def make_prompt_cache(model):
    made = make_segmented_cache(model)
    return [HitKVCache() if type(c) is SegmentedKVCache else c for c in made]


CLASSES = {
    "KVCache": HitKVCache,
    "BatchKVCache": BatchSegmentedKVCache,
    "RotatingKVCache": SlidingKVCache,
    "BatchRotatingKVCache": BatchSlidingKVCache,
}
for cls in CLASSES.values():
    # Where ``load_prompt_cache`` finds the classes of what was saved.
    setattr(cache, cls.__name__, cls)


def pytest_collection_modifyitems(items):
    (module,) = {item.module for item in items}
    for name, part in dict(CLASSES, make_prompt_cache=make_prompt_cache).items():
        assert hasattr(module, name)
        setattr(module, name, part)
