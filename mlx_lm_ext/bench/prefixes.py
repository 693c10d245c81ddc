"""What an ideal prompt cache would have."""

from typing import Any, Dict, List


class Prefixes:
    """The token sequences that some request has computed, as a tree."""

    def __init__(self):
        self.root: Dict[int, Any] = {}
        self.n_tokens = 0

    def match(self, tokens: List[int]) -> int:
        """How many of the first ``tokens`` need no computing; one has to run."""
        node, n = self.root, 0
        while n < len(tokens) - 1 and tokens[n] in node:
            node = node[tokens[n]]
            n += 1
        return n

    def add(self, tokens: List[int]) -> None:
        node = self.root
        for token in tokens:
            if token not in node:
                node[token] = {}
                self.n_tokens += 1
            node = node[token]
