"""Samplers of the rows of a batch: one call for all rows that use the same class.

Rules:
1. The tokens of a plugin's sampler are checked: a shape when they are made, a range
   when they are evaluated.
2. Nothing is evaluated here, but by a sampler that wants to.
"""

import argparse
import time
from typing import Any, Callable, Dict, List, Tuple

import mlx.core as mx

from ..interfaces import RequestInfo
from .penalties import Row

Slot = Any


def apply_by_rows(parts: List[Tuple[Callable, List[int]]], logits: mx.array):
    """Sample each part of the rows with its sampler.

    Args:
        parts (List[Tuple[Callable, List[int]]]): Samplers and their rows, which
          together are all rows.
        logits (mx.array): Of shape (rows, vocabulary).

    Returns:
        mx.array: Token ids of shape (rows,), in the order of the rows.
    """
    if len(parts) == 1:
        return parts[0][0](logits)
    tokens = [sample(logits[mx.array(rows)]) for sample, rows in parts]
    places = {row: i for i, row in enumerate(r for _, rows in parts for r in rows)}
    return mx.concatenate(tokens)[mx.array([places[i] for i in range(len(places))])]


class RowSampler:
    """The sampler of some rows, guarded: of one request at first.

    Args:
        slot (Slot): The class that the request asked for.
        args (argparse.Namespace): The command line.
        request (RequestInfo): The request.
        tokenizer (TokenizerWrapper): The model's tokenizer.
    """

    def __init__(
        self, slot: Slot, args: argparse.Namespace, request: RequestInfo, tokenizer: Any
    ):
        self.slot = slot
        self.args = args
        self.tokenizer = tokenizer
        self.requests = [request]
        # How many top log probabilities the request wants; None: none at all.
        self.n_top = request.args.top_logprobs if request.args.logprobs else None
        row = Row.make(request.args.logits)
        # None: upstream's processors make them.
        self.penalties = row if row.is_short else None
        self.sampler = slot.make(args, request, tokenizer)

    def extend(self, other: "RowSampler") -> None:
        self.requests += other.requests
        self.change(lambda: self.sampler.extend(other.sampler), other.sampler)

    def filter(self, keep: List[int]) -> None:
        self.requests = [self.requests[i] for i in keep]
        self.change(lambda: self.sampler.filter(keep))

    def change(self, change: Callable[[], None], *others: Any) -> None:
        """Change the rows of the sampler, or make it again if that fails."""
        start = time.perf_counter()
        try:
            # One of them may have been replaced.
            if any(type(other) is not type(self.sampler) for other in others):
                self.make_again()
            else:
                change()
        except BaseException as e:
            self.replace(e)
        self.slot.seconds += time.perf_counter() - start

    def replace(self, error: BaseException) -> None:
        self.slot.fail(type(self.sampler), error)
        self.make_again()

    def make_again(self) -> None:
        """Make the sampler of all rows from their requests."""
        samplers = [self.slot.make(self.args, r, self.tokenizer) for r in self.requests]
        self.sampler = samplers[0]
        for other in samplers[1:]:
            self.sampler.extend(other)

    def __call__(self, logits: mx.array) -> mx.array:
        start = time.perf_counter()
        try:
            tokens = self.sample(logits)
        except BaseException as e:
            self.replace(e)
            tokens = self.sample(logits)
        # The built-in one may wait for the logits.
        if type(self.sampler) is not self.slot.default:
            self.slot.seconds += time.perf_counter() - start
        return tokens

    def sample(self, logits: mx.array) -> mx.array:
        x = logits
        if self.sampler.needs_logprobs:
            x = x - mx.logsumexp(x, axis=-1, keepdims=True)
        tokens = self.sampler(x)
        if type(self.sampler) is self.slot.default:
            return tokens
        if tokens.shape != x.shape[:1] or not mx.issubdtype(tokens.dtype, mx.integer):
            raise ValueError(
                f"it gave {tokens.dtype} of shape {tokens.shape} for "
                f"{x.shape[0]} rows"
            )
        # A token that is not there would be read from beyond the embedding.
        return mx.minimum(tokens.astype(mx.uint32), x.shape[-1] - 1)


class RowSamplers:
    """The samplers of a batch, called as one.

    Args:
        samplers (List[RowSampler]): One of each row.
    """

    def __init__(self, samplers: List[RowSampler]):
        self.samplers: Dict[Slot, RowSampler] = {}
        self.rows: Dict[Slot, List[int]] = {}
        self.n_rows = 0
        for sampler in samplers:
            self.add(sampler, [0])
            self.n_rows += 1

    def add(self, sampler: RowSampler, rows: List[int]) -> None:
        """Add a sampler of these rows, counted from those that there are."""
        slot = sampler.slot
        if slot in self.samplers:
            self.samplers[slot].extend(sampler)
        else:
            self.samplers[slot], self.rows[slot] = sampler, []
        self.rows[slot] += [self.n_rows + row for row in rows]

    def extend(self, other: "RowSamplers") -> None:
        """Add the rows of another batch after these."""
        for slot, sampler in other.samplers.items():
            self.add(sampler, other.rows[slot])
        self.n_rows += other.n_rows

    def filter(self, keep: List[int]) -> None:
        """Keep only these rows, in this order."""
        new_rows = {row: i for i, row in enumerate(keep)}
        for slot, rows in list(self.rows.items()):
            kept = [i for i, row in enumerate(rows) if row in new_rows]
            if not kept:
                del self.samplers[slot], self.rows[slot]
                continue
            kept.sort(key=lambda i: new_rows[rows[i]])
            if kept != [*range(len(rows))]:
                self.samplers[slot].filter(kept)
            self.rows[slot] = [new_rows[rows[i]] for i in kept]
        self.n_rows = len(keep)

    def __call__(self, logits: mx.array) -> mx.array:
        return apply_by_rows(
            [(s, self.rows[slot]) for slot, s in self.samplers.items()], logits
        )
