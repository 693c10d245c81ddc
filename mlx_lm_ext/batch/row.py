"""A row of the batch: a request that runs, and how far its prompt is."""

from dataclasses import dataclass, field
from typing import Dict

from ..request.request import Request


@dataclass(eq=False)
class Row:
    """A row of the batch.

    Args:
        request (Request): The request that it runs.
        uid (int): Its number in the ``BatchGenerator``.
        n_tokens (int): Tokens that it has when it starts: those of the prompt, and if it
          goes on after a pause, those of its answer so far.
        n_run (int): How many of them it has the KV of, while it is prefilling.
        is_prefilling (bool): Whether a part of the prompt is left to run.
        to_store (Dict[int, str]): After how many tokens of the prompt the KV is to be
          stored in the prompt cache, and as which cache type.
        n_start (int): How many of them it had the KV of when it started.
    """

    request: Request
    uid: int = -1
    n_run: int = 0
    is_prefilling: bool = True
    to_store: Dict[int, str] = field(default_factory=dict)
    n_tokens: int = field(init=False)
    n_start: int = field(init=False)

    def __post_init__(self) -> None:
        self.n_tokens = len(self.request.tokens)
        self.n_start = self.n_run
