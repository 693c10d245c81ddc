"""The most tokens that any prompt cache could have known of a series of prompts."""

from typing import Any, Dict, List


class Prefixes:
    """A tree of all token sequences that were computed."""

    def __init__(self) -> None:
        self.root: Dict[int, Any] = {}
        self.n_tokens = 0

    def match(self, tokens: List[int]) -> int:
        """How many of the first tokens of a prompt were computed before, without its last
        token: at least one token has to run."""
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
