"""Restricts the tokens of an answer that is served alone."""

from functools import cached_property
from typing import Any, Callable

import mlx.core as mx

from ..sampling.constraints import Constraints, RowConstraint


class ConstrainedModel:
    """A model as ``generate_step`` calls it, for one answer: its logits of what the answer may
    not have are minus infinity. mlx-lm's server takes no logits processors that could do it.

    Args:
        model (Any): The model.
        constraint (RowConstraint): What restricts the answer.
        n_prompt (Callable): Gives how many tokens of the prompt are run before the answer, once
          the first ones are.
    """

    def __init__(
        self, model: Any, constraint: RowConstraint, n_prompt: Callable[[], int]
    ):
        self.model = model
        self.constraint = constraint
        self.n_prompt = n_prompt
        self.n_run = 0

    @cached_property
    def constraints(self) -> Constraints:
        """Made when the prompt runs: it may not be known before how a prompt with images ends."""
        return Constraints([self.constraint], [[]])

    def __getattr__(self, name: str) -> Any:
        return getattr(self.model, name)

    def __call__(self, inputs: mx.array, *args: Any, **kwargs: Any) -> mx.array:
        """Run tokens of shape (1, n).

        Returns:
            mx.array: Of shape (1, n, vocabulary), or (1, 1, vocabulary) with those of the last
            token from the end of the prompt on.

        Raises:
            Exception: What has failed in the constraint before these tokens. An answer that has
              ended is not run on, and it does not matter what a constraint makes of its end.
        """
        (error,) = self.constraints.errors
        if error is not None:
            raise error
        if self.n_run >= self.n_prompt():
            self.constraints.advance(inputs.tolist())
        self.n_run += inputs.shape[1]
        logits = self.model(inputs, *args, **kwargs)
        if self.n_run < self.n_prompt():
            return logits
        return self.constraints(logits[:, -1, :])[:, None]
