"""What the model costs, from how the requests of a recorded trace went.

While an answer is made, each of its tokens is a step; the tokens of all answers together are the
rows of these steps, and the prompts that run meanwhile are the rest of the time. Prompts and
answers are taken to be spread evenly over their time. Prompts of a few tokens take so little of
it that the cost of a token may come out as 0.
"""

from typing import List, Sequence

import numpy as np

from mlx_lm_ext.bench.arrivals import Outcome
from mlx_lm_ext.bench.replay_figures import started
from mlx_lm_ext.bench.simulated_engine import Costs

# Answers with fewer tokens say little about a step.
MIN_TOKENS = 4
# Answers from which the costs can be told.
MIN_ANSWERS = 8
# Seconds of a step, at least.
MIN_STEP = 1e-6


def fit_costs(outcomes: Sequence[Outcome]) -> Costs:
    """The costs with which the answers take the time that they have taken.

    Args:
        outcomes (Sequence[Outcome]): How the requests went.

    Raises:
        ValueError: If there are too few answers.
    """
    done = [o for o in outcomes if o.stats.ttft is not None]
    fitted = [i for i, o in enumerate(done) if o.stats.completion_tokens >= MIN_TOKENS]
    if len(fitted) < MIN_ANSWERS:
        raise ValueError(
            f"the costs can be told from {MIN_ANSWERS} or more recorded answers of "
            f"{MIN_TOKENS} or more tokens, and there are {len(fitted)}"
        )
    starts = np.array([started(o) for o in done])
    firsts = np.array([o.arrival + o.stats.ttft for o in done])
    ends = np.array([o.arrival + o.stats.seconds for o in done])
    prompts = np.array(
        [o.stats.prompt_tokens - o.stats.cached_tokens for o in done], float
    )
    answers = np.array([o.stats.completion_tokens - 1 for o in done], float)
    rows = []
    for i in fitted:
        within = firsts[i], ends[i]
        rows.append(
            [
                answers[i],
                answers @ overlap(firsts, ends, *within),
                prompts @ overlap(starts, firsts, *within),
            ]
        )
    seconds = ends[fitted] - firsts[fitted]
    step, row, token = least_squares(np.array(rows), seconds)
    return Costs(max(step, MIN_STEP), row, token)


def overlap(
    starts: np.ndarray, ends: np.ndarray, start: float, end: float
) -> np.ndarray:
    """The share of each interval that is between ``start`` and ``end``."""
    common = np.minimum(ends, end) - np.maximum(starts, start)
    return np.clip(common, 0, None) / np.maximum(ends - starts, 1e-9)


def least_squares(rows: np.ndarray, values: np.ndarray) -> List[float]:
    """The factors of the columns that give the values best. Those that would be negative are
    0."""
    # In relation to the values: long answers are not worth more than short ones.
    rows, values = rows / values[:, None], np.ones(len(values))
    columns = list(range(rows.shape[1]))
    while True:
        found, *_ = np.linalg.lstsq(rows[:, columns], values, rcond=None)
        if all(found >= 0):
            break
        columns.pop(int(np.argmin(found)))
    factors = [0.0] * rows.shape[1]
    for column, factor in zip(columns, found):
        factors[column] = float(factor)
    return factors
