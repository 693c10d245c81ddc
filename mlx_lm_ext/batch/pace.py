"""How long the steps of the batch take, and how many tokens of prompts fit between two tokens of
the streams that run.

Rules:
1. The times are those of real steps, smoothed. A step is timed from the moment when the device
   has nothing left to do to the same moment in the next step. So the time is that of the prompts
   that the first step has handed to the device, and of the decoding of the second.
2. A step with prompts does not show what its decoding takes. Now and then the prompts are left
   out of a step for that: it is as long as the decoding, which has to run in any case.
"""

from typing import Dict, List, Optional

from ..device import on_cpu

# Without ``--max-gap``, a gap is as long as so many decode steps, or so many seconds if that is
# longer: nobody reads faster.
GAP_STEPS = 4
MIN_GAP = 0.1
# While so many tokens of prompts are left, it has more steps, because long prompts wait for each
# decode step beside them. On a CPU, with 5 steps the answer to a prompt of 3,000 words beside 4
# streams begins 1.2 times as late as with mlx_lm.server, which stops them, and with 7 as early.
MANY_LEFT = 1024
LONG_GAP_STEPS = 5
LONG_GAP_STEPS_ON_CPU = 7
# The part of the gap that is planned: steps take more and less time than the ones before.
PLANNED = 0.8
# Tokens of the first chunk, of which nothing is known.
FIRST_CHUNK = 64
# How many steps with prompts follow each other before one without.
MAX_MIXED = 32
# The weight of the newest time. If it and the smoothed one differ by more than this factor, the
# longer one counts as so many times the shorter one: a step that copies rows, or compiles
# kernels, is longer than others of its kind.
WEIGHT = 0.3
MAX_EXCESS = 2


class Pace:
    """The times of decode steps and of prompts.

    Args:
        max_gap (Optional[float]): Seconds between two tokens of a stream (``--max-gap``).
        limit (int): The most tokens of prompts in a step.
        least (int): However short the gap is to be, prompts get as much time as the decoding,
          and so many tokens.
    """

    def __init__(self, max_gap: Optional[float], limit: int, least: int = 1):
        self.max_gap = max_gap
        self.limit = limit
        self.least = min(least, limit)
        # Seconds of a step that decodes rows, and of a token of a chunk of prompts: by the
        # number of bits of the number of rows, and of tokens.
        self.of_step: Dict[int, float] = {}
        self.of_token: Dict[int, float] = {}
        self.n_mixed = 0

    def note(self, n_rows: int, chunks: List[int], seconds: float) -> None:
        """In so many seconds, chunks of so many tokens of prompts were run, padding included,
        and then one token of each of ``n_rows``."""
        decoding = self.of_step.get(n_rows.bit_length()) if n_rows else 0.0
        if chunks and decoding is not None:
            # The decoding may have been thought to take longer than it does.
            seconds = max(seconds / 10, seconds - decoding)
            shares = [n * self.token_seconds(n) for n in chunks]
            total = sum(shares)
            for n, share in zip(chunks, shares):
                share = share / total if total else 1 / len(chunks)
                smooth(self.of_token, n.bit_length(), seconds * share / n)
        if n_rows and not chunks:
            smooth(self.of_step, n_rows.bit_length(), seconds)
        self.n_mixed = self.n_mixed + 1 if n_rows and chunks else 0

    def must_measure(self, n_rows: int) -> bool:
        """Whether the next step should only decode its ``n_rows``, so that it shows how long
        that takes."""
        if not n_rows:
            return False
        return self.n_mixed >= MAX_MIXED or n_rows.bit_length() not in self.of_step

    def gap_tokens(self, n_rows: int, n_left: int = 0) -> int:
        """How many tokens of prompts fit into a step beside the decoding of ``n_rows``.

        Args:
            n_left (int): Tokens that are left of the prompts that have begun.
        """
        decoding = self.of_step.get(n_rows.bit_length(), 0.0)
        gap = self.max_gap
        if gap is None:
            n_steps = GAP_STEPS
            if n_left >= MANY_LEFT:
                n_steps = LONG_GAP_STEPS_ON_CPU if on_cpu() else LONG_GAP_STEPS
            gap = max(n_steps * decoding, MIN_GAP)
        n = self.n_within(max(PLANNED * gap - decoding, decoding))
        return max(n, self.least)

    def n_within(self, seconds: float) -> int:
        """How many tokens of prompts take so long, at least one. A token of a long chunk takes
        less time than one of a short chunk."""
        if not self.of_token:
            return min(self.limit, max(FIRST_CHUNK, self.least))
        for bits in range(self.limit.bit_length(), 0, -1):
            longest = min((1 << bits) - 1, self.limit)
            cost = self.token_seconds(longest)
            n = longest if cost * longest <= seconds else int(seconds / cost)
            if n >= 1 << (bits - 1):
                return n
        return 1

    def cost(self, budget: int, n: int) -> int:
        """How many tokens of a budget a chunk of ``n`` tokens takes."""
        of_budget = self.token_seconds(budget)
        return max(1, round(n * self.token_seconds(n) / of_budget)) if of_budget else n

    def token_seconds(self, n: int) -> float:
        """Seconds that a token of a chunk of ``n`` tokens takes, as far as is known: as in the
        chunks of the most similar size, and so that the chunk takes as long as a token at
        least."""
        if not self.of_token:
            return 0.0
        bits = n.bit_length()
        known = min(self.of_token, key=lambda k: (abs(k - bits), k))
        return max(self.of_token[known], self.of_step.get(1, 0.0) / n)


def smooth(times: Dict[int, float], key: int, new: float) -> None:
    """Bring a smoothed time up to date with a new one."""
    old = times.setdefault(key, new)
    new, old = min(new, MAX_EXCESS * old), min(old, MAX_EXCESS * new)
    times[key] = old + WEIGHT * (new - old)
