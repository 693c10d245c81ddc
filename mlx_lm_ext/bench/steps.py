"""How long the steps of a batch take."""

import time

import mlx.core as mx

from mlx_lm_ext.batch.batch import Batch


def seconds_of_step(batch: Batch, n_steps: int) -> float:
    """Seconds that a step takes, on average over ``n_steps``."""
    start = time.perf_counter()
    for _ in range(n_steps):
        batch.step()
    # On a GPU the last step is still running.
    mx.synchronize()
    return (time.perf_counter() - start) / n_steps
