"""Decides which steps run each token twice, see ``LeanGenerationBatch.run_pairs``.

Rules:
1. With CUDA, attention with a mask has a fast kernel for two tokens of a row, and none for one.
   It is cuDNN's, which takes up to 0.1 s to plan each new shape of the KV.
2. So a shape is planned only when the steps of that shape without the fast kernel have together
   lost as much time as the plan takes. Shapes that last for a few steps, while rows join one by
   one, are never planned.
"""

from collections import Counter
from typing import Any
from typing import Counter as CounterType
from typing import List, Set, Tuple

import mlx.core as mx

from ..cache.segmented import BatchSegmentedKVCache
from ..device import device_kind

# Places of the KV from which on two tokens take less time than one. With 16 rows of 3,050 tokens
# of an 8B model, a step takes 20 ms on an H100 instead of 28. With 300 tokens it takes as long.
MIN_PAIRED = 1024
# A shape is planned after its steps have read so many bytes of KV. On an H100 a plan takes 50 to
# 100 ms, and a step without one that reads 7 GB takes 8 to 12 ms longer.
PLANNED_AFTER = 60 << 30

Shape = Tuple[int, ...]


def can_pair(caches: List[Any]) -> bool:
    """Whether the rows of these layers can run each token twice, and gain from it."""
    if device_kind() != "cuda":
        return False
    c = caches[0]
    return (
        all(type(other) is BatchSegmentedKVCache for other in caches)
        and c.end >= MIN_PAIRED
        and c.row_starts.left_padding is not None
        # The models that keep latents use the mask as a condition.
        and c.keys.shape == c.values.shape
        and c.keys.dtype in (mx.float16, mx.bfloat16)
    )


class PairedShapes:
    """The shapes of the KV that were met in steps of the loaded model."""

    def __init__(self) -> None:
        self.planned: Set[Shape] = set()
        # Bytes of KV that steps without pairs have read.
        self.n_read: CounterType[Shape] = Counter()

    def must_plan(self, caches: List[Any]) -> bool:
        """Whether the next step is the first of its shape that runs pairs."""
        if not can_pair(caches):
            return False
        shape = caches[0].keys.shape
        return shape not in self.planned and self.n_read[shape] >= PLANNED_AFTER

    def note_step(self, caches: List[Any]) -> bool:
        """Whether this step runs pairs. Called once in each step."""
        if not can_pair(caches):
            return False
        shape = caches[0].keys.shape
        if shape not in self.planned and self.n_read[shape] < PLANNED_AFTER:
            self.n_read[shape] += sum(c.nbytes for c in caches)
            return False
        self.planned.add(shape)
        return True

    def clear(self) -> None:
        """Forget all of them: another model is loaded."""
        self.planned.clear()
        self.n_read.clear()


# cuDNN's plans are those of the process.
PAIRED_SHAPES = PairedShapes()
