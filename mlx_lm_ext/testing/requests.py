"""Requests as plugins see them, without a server."""

import argparse
import random
from copy import deepcopy
from dataclasses import dataclass
from typing import Any, Dict

from ..interfaces import RequestInfo
from ..request.fields import make_generation_arguments

# How many token ids the model has: more than the tokenizer, as many models do.
VOCABULARY = 320


@dataclass(eq=False)
class TraceRequest(RequestInfo):
    """A request of a trace."""

    @property
    def vocabulary_size(self) -> int:
        return VOCABULARY


def make_request(
    args: argparse.Namespace, body: Dict[str, Any], index: int, arrival: float = 0.0
) -> TraceRequest:
    """A request with this body.

    Raises:
        RequestError: If the server would refuse the body.
    """
    return TraceRequest(
        id=f"r{index}",
        args=make_generation_arguments(body, args),
        body=deepcopy(body),
        arrival=arrival,
    )


def random_sampling(rng: random.Random) -> Dict[str, Any]:
    """Fields that say how tokens are chosen; the request may be greedy, and has a seed."""
    return {
        "temperature": rng.choice([0.0, 0.5, 1.0, 2.0]),
        "top_p": rng.choice([1.0, 0.9]),
        "top_k": rng.choice([0, 5]),
        "min_p": rng.choice([0.0, 0.05]),
        "seed": rng.randrange(1 << 32),
    }
