"""What comes to a server and when: the requests of a trace, without their text.

Rules:
1. A token is a number that says where it is from. Two prompts begin alike as far as their
   numbers are equal.
2. Long prompts are kept as runs of equal numbers, and written out when they are needed.
"""

from dataclasses import dataclass
from typing import Iterable, List, NamedTuple, Optional, Tuple

from mlx_lm_ext.interfaces import RequestStats

# Runs of tokens: a number, and how many tokens it stands for.
Runs = List[Tuple[int, int]]

# The token that ends an answer before its ``max_tokens``. No run has it.
END = 0


def expand(runs: Iterable[Tuple[int, int]]) -> List[int]:
    """The tokens of some runs."""
    tokens: List[int] = []
    for token, n in runs:
        tokens += [token] * n
    return tokens


def length(runs: Iterable[Tuple[int, int]]) -> int:
    return sum(n for _, n in runs)


class Outcome(NamedTuple):
    """How a request went.

    Args:
        arrival (float): When it came, in seconds.
        user (Optional[str]): Whom it was for.
        stats (RequestStats): The rest.
    """

    arrival: float
    user: Optional[str]
    stats: RequestStats


@dataclass(frozen=True)
class Arrival:
    """A request of a trace.

    Args:
        seconds (float): When it comes, from the first one on.
        prompt (Runs): Its prompt.
        answer (Runs): Its answer: at least one token.
        user (Optional[str]): Whom it is for.
        priority (int): The field ``priority``.
        max_tokens (Optional[int]): The most tokens that its answer may have. Without it, as
          many as it has.
        segments (Tuple): The cache type and the tokens of each segment of the prompt. Without
          them, it is one of the type "user".
        measured (Optional[Outcome]): How it went when it was recorded.
    """

    seconds: float
    prompt: Runs
    answer: Runs
    user: Optional[str] = None
    priority: int = 0
    max_tokens: Optional[int] = None
    segments: Tuple[Tuple[str, int], ...] = ()
    measured: Optional[Outcome] = None
