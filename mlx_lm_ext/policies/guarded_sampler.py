"""The sampler of some rows of a batch, timed, and replaced if the plugin it is from fails.

Rules:
1. Only the plugin's own methods and the checks of their results are blamed on the plugin.
   What the server computes for them is outside of the ``try``, and is done once.
2. Once a class has failed, none of its objects is used again: the built-in sampler takes
   over all their rows.
"""

import argparse
import time
from copy import copy, deepcopy
from typing import Any, Callable, List

import mlx.core as mx

from ..interfaces import RequestInfo
from .policy_class import PolicyClass


class GuardedSampler:
    """One object of a registered sampler class, for the rows of one or more requests.

    It is a ``RowSampler`` of ``sampling/groups.py``.

    Args:
        policy_class (PolicyClass): The registered class.
        args (argparse.Namespace): The command line.
        request (RequestInfo): The request of its first row.
        tokenizer (TokenizerWrapper): The model's tokenizer.

    Raises:
        RequestError: If the sampler refuses the request.
    """

    def __init__(
        self,
        policy_class: PolicyClass,
        args: argparse.Namespace,
        request: RequestInfo,
        tokenizer: Any,
    ):
        self.policy_class = policy_class
        self.args = args
        self.tokenizer = tokenizer
        self.requests = [request]
        self.make()

    def make(self) -> None:
        """Make the sampler from the requests of its rows."""
        first, *others = (
            self.policy_class.make(self.args, request, self.tokenizer)
            for request in self.requests
        )
        for other in others:
            first.extend(other)
        self.sampler = first
        # The class that made it: that of ``policy_class`` changes when it fails.
        self.cls = self.policy_class.cls

    @property
    def group(self) -> PolicyClass:
        return self.policy_class

    @property
    def is_current(self) -> bool:
        """Whether the class of the sampler has not failed, here or for other rows."""
        return self.cls is self.policy_class.cls

    def extend(self, other: "GuardedSampler") -> None:
        self.requests += other.requests
        if self.is_current and other.is_current:
            self.attempt(lambda: self.sampler.extend(other.sampler))
        else:
            self.make()

    def filter(self, keep: List[int]) -> None:
        self.requests = [self.requests[i] for i in keep]
        if self.is_current:
            self.attempt(lambda: self.sampler.filter(list(keep)))
        else:
            self.make()

    def copy(self) -> "GuardedSampler":
        other = copy(self)
        other.requests = self.requests[:]
        shared = [self.args, self.tokenizer, *self.requests]
        try:
            other.sampler = deepcopy(self.sampler, {id(x): x for x in shared})
        except BaseException as e:
            # It is made anew, as after a wait for memory.
            self.policy_class.note_uncopied(e)
            other.make()
        return other

    def __call__(self, logits: mx.array) -> mx.array:
        if not self.is_current:
            self.make()
        sampler = self.sampler
        if self.cls is self.policy_class.default:
            # Not timed: on the CPU it waits for the logits.
            return sampler(normalize(logits) if sampler.needs_logprobs else logits)
        # MLX computes them only if the sampler uses them.
        logprobs = normalize(logits)
        # The slice is a copy as soon as the sampler writes into it.
        tokens = self.attempt(lambda: choose(sampler, logits[:], logprobs))
        if tokens is None:
            return self(logits)
        # For a token id that it lacks, the model would read beyond its embedding.
        return mx.minimum(tokens.astype(mx.uint32), logits.shape[-1] - 1)

    def attempt(self, use: Callable[[], Any]) -> Any:
        """Run and time what belongs to the plugin.

        Returns:
            What ``use`` gives, or None if it raised and the built-in sampler has taken
            over the rows.
        """
        start = time.perf_counter()
        try:
            return use()
        except BaseException as e:
            self.policy_class.fail(self.cls, e)
        finally:
            self.policy_class.seconds += time.perf_counter() - start
        self.make()
        return None


def normalize(logits: mx.array) -> mx.array:
    """The log probabilities of logits of shape (rows, vocabulary)."""
    return logits - mx.logsumexp(logits, axis=-1, keepdims=True)


def choose(sampler: Any, logits: mx.array, logprobs: mx.array) -> mx.array:
    """The tokens that a plugin's sampler gives.

    Raises:
        ValueError: If they are not one integer for each row.
    """
    tokens = sampler(logprobs if sampler.needs_logprobs else logits)
    n_rows = len(logits)
    if not isinstance(tokens, mx.array):
        raise ValueError(f"it returned {type(tokens).__name__}, not an mx.array")
    if tokens.shape != (n_rows,) or not mx.issubdtype(tokens.dtype, mx.integer):
        raise ValueError(
            f"it returned {tokens.dtype} of shape {tokens.shape}, not one token id for "
            f"each of {n_rows} rows"
        )
    return tokens
