"""Lets a model reason before its answer is restricted.

Rules:
1. In the reasoning all tokens are allowed, those that end the text too.
2. The reasoning ends where its mark stands in the text, however that was tokenized: the text
   of the answer is found in the same way. A token that ends the mark and goes on is allowed if
   the answer may begin with the rest of it.
3. Some models call without ending it. Where calls are restricted, their token ends it, too.
"""

from typing import Any, Dict, List, Optional, Sequence, cast

import numpy as np

from ..interfaces import Constraint, RequestInfo
from .grammars import GrammarConstraint


class AfterReasoning(Constraint):
    """The tokens that a grammar allows, after a reasoning.

    If the prompt does not end within a reasoning, the answer may begin with one, or with what
    the grammar allows.

    Args:
        request (RequestInfo): The request. Whether its prompt ends within a reasoning is read
          when the first token is due.
        tokenizer (TokenizerWrapper): The model's tokenizer, which ``has_thinking``.
        answer (GrammarConstraint): What restricts the answer.
        call (Optional[int]): The token that begins a call, if the answer may be one.
    """

    def __init__(
        self,
        request: RequestInfo,
        tokenizer: Any,
        answer: GrammarConstraint,
        call: Optional[int] = None,
    ):
        self.request = request
        self.start: Sequence[int] = tokenizer.think_start_tokens
        self.end: bytes = tokenizer.think_end.encode()
        self.answer, self.call = answer, call
        self.running_on = answer.grammars.running_on(self.end)
        # Those of them that are not allowed, as soon as one of them could come.
        self.forbidden: Dict[int, List[int]] = {}
        # How many tokens of the mark of the start have come.
        self.n_started = 0
        # The end of the text of the reasoning. None before and after it.
        self.tail: Optional[bytes] = None
        self.is_first, self.is_answer = True, False

    def copy(self) -> "AfterReasoning":
        other = AfterReasoning.__new__(AfterReasoning)
        other.__dict__.update(self.__dict__)
        other.answer = self.answer.copy()
        return other

    def begin(self) -> None:
        """Look where the prompt ends, before the first token."""
        if self.is_first:
            self.is_first = False
            if self.request.begins_in_reasoning:
                self.tail = b""

    @property
    def takes_start(self) -> bool:
        """Whether the next token may be one of the mark of the start."""
        return self.tail is None and not self.is_answer

    def advance(self, token: int) -> None:
        self.begin()
        if self.tail is not None and token != self.call:
            self.reason(token)
        elif self.takes_start and token == self.start[self.n_started]:
            self.n_started += 1
            if self.n_started == len(self.start):
                self.tail = b""
        else:
            self.tail, self.is_answer = None, True
            self.answer.advance(token)

    def reason(self, token: int) -> None:
        """Take a token of the reasoning."""
        text = cast(bytes, self.tail) + self.answer.grammars.text([token])
        _, end, rest = text.partition(self.end)
        if end:
            self.tail, self.is_answer = None, True
            for begun in self.answer.grammars.tokens(rest):
                self.answer.advance(begun)
        else:
            self.tail = text[1 - len(self.end) :] if len(self.end) > 1 else b""

    def forbid_wrong_ends(self, mask: np.ndarray) -> None:
        """Forbid the tokens that end the mark and go on with what is no answer."""
        for n_before, tokens in self.running_on.items():
            if not cast(bytes, self.tail).endswith(self.end[:n_before]):
                continue
            if n_before not in self.forbidden:
                takes = self.answer.takes
                self.forbidden[n_before] = [t for t, rest in tokens if not takes(rest)]
            for token in self.forbidden[n_before]:
                forbid(mask, token)

    def fill(self, mask: np.ndarray) -> None:
        self.fill_all([self], mask[None])

    @classmethod
    def fill_all(cls, constraints: Sequence[Constraint], masks: np.ndarray) -> None:
        rows = cast(Sequence[AfterReasoning], constraints)
        restricted: List[int] = []
        for i, row in enumerate(rows):
            row.begin()
            if row.n_started and row.takes_start:
                masks[i] = 0
                allow(masks[i], row.start[row.n_started])
            elif row.tail is None:
                restricted.append(i)
            else:
                row.forbid_wrong_ends(masks[i])
        if restricted:
            answers = [rows[i].answer for i in restricted]
            filled = masks[restricted]
            GrammarConstraint.fill_all(answers, filled)
            masks[restricted] = filled
        for i in restricted:
            if not rows[i].is_answer:
                allow(masks[i], rows[i].start[0])


def allow(mask: np.ndarray, token: int) -> None:
    """Allow a token."""
    mask[token // 32] |= np.uint32(1 << token % 32)


def forbid(mask: np.ndarray, token: int) -> None:
    """Forbid a token."""
    mask[token // 32] &= ~np.uint32(1 << token % 32)
