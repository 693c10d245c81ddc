"""The radix tree: nodes that hold the KV of token runs.

Rules:
1. A node has a run of tokens and, for each layer, the segment of exactly that run, or
   none. A layer that has a segment in a node has one in all nodes above.
2. Layers without a segment can be frozen at a node's end. A prompt is resumed at any
   token of a node that has all segments, or at the end of one that is frozen.
"""

import logging
from copy import copy as shallow_copy
from dataclasses import dataclass, replace
from typing import Any, Dict, List, NamedTuple, Optional, Tuple

from ..interfaces import Entry
from .kinds import Layout, copy, nbytes_of_layers
from .segmented import Arrays, SegmentedKVCache


def n_common(run: List[int], tokens: List[int], start: int = 0) -> int:
    """How many of the first tokens of ``run`` are those of ``tokens`` from ``start``."""
    if tokens[start : start + len(run)] == run:
        return len(run)
    low, high = 0, min(len(run), len(tokens) - start)
    while low < high:
        middle = (low + high + 1) // 2
        if run[low:middle] == tokens[start + low : start + middle]:
            low = middle
        else:
            high = middle - 1
    return low


class Match(NamedTuple):
    """What the tree has of a prompt.

    Args:
        node (Optional["Node"]): Where it is resumed.
        n_tokens (int): How many of its tokens need not run.
        n_common (int): How many are in the tree, and could be had if it were frozen.
    """

    node: Optional["Node"] = None
    n_tokens: int = 0
    n_common: int = 0


class Node:
    """A run of tokens that follows its parent's.

    Args:
        layout (Layout): The kinds of the layers.
        parent (Optional[Node]): None at the root.
        tokens (List[int]): The run; empty at the root.
        segments (List[Optional[Arrays]]): The KV of the run, for each layer.
        entry (Optional[Entry]): What policies see; None at the root.
    """

    def __init__(
        self,
        layout: Layout,
        parent: Optional["Node"] = None,
        tokens: Optional[List[int]] = None,
        segments: Optional[List[Optional[Arrays]]] = None,
        entry: Optional[Entry] = None,
    ):
        self.layout = layout
        self.parent = parent
        self.tokens = tokens or []
        self.segments = segments or [[] for _ in layout.kinds]
        # For each layer without a segment, its state after the run.
        self.frozen: Optional[List[Optional[Arrays]]] = None
        self.entry = entry
        self.children: Dict[int, Node] = {}

    @property
    def end(self) -> int:
        """Tokens from the start of the prompt to the end of the run."""
        return self.entry.depth if self.entry else 0

    @property
    def start(self) -> int:
        return self.end - len(self.tokens)

    @property
    def is_complete(self) -> bool:
        """Whether a prompt can be resumed at each of its tokens."""
        return None not in self.segments

    @property
    def is_resumable(self) -> bool:
        """Whether a prompt can be resumed at its end."""
        return self.frozen is not None or self.is_complete

    @property
    def frozen_nbytes(self) -> int:
        return nbytes_of_layers(self.frozen or ())

    @property
    def is_passed(self) -> bool:
        """Whether the state after it is of one prompt only, and may be superseded."""
        shared = len(self.children) > 1 or self.entry.cache_type == "system"
        return self.frozen is not None and not shared

    @property
    def path(self) -> List["Node"]:
        """The nodes from below the root to this one."""
        nodes, node = [], self
        while node.parent is not None:
            nodes.append(node)
            node = node.parent
        return nodes[::-1]

    @property
    def subtree(self) -> List["Node"]:
        """This node and all below it, each after its parent."""
        nodes = [self]
        for node in nodes:
            nodes += node.children.values()
        return nodes

    @property
    def bytes_saved(self) -> int:
        """What the sequences of all leaves below would take in addition, each whole."""
        saved, n_leaves = 0, {}
        for node in self.subtree[:0:-1]:
            n_leaves[node] = sum(n_leaves[c] for c in node.children.values()) or 1
            saved += (n_leaves[node] - 1) * node.entry.nbytes
        return saved

    @property
    def superseded(self) -> List["Node"]:
        """Nodes below whose states will hardly be asked for again: three later ones of
        the same prompt follow, as many as a turn of a chat leaves."""
        found, seen = [], set()
        for leaf in self.subtree[:0:-1]:
            node, n_later = leaf, 0
            while not leaf.children and node not in seen and node is not self:
                seen.add(node)
                if n_later >= 3 and node.is_passed:
                    found.append(node)
                n_later += node.frozen is not None
                node = node.parent
        return found

    def match(self, tokens: List[int]) -> int:
        """How many tokens of the run are found at the same place of ``tokens``."""
        return n_common(self.tokens, tokens, self.start)

    def descend(self, tokens: List[int]) -> Tuple["Node", int]:
        """The last node on the way of ``tokens``, and how many of them it takes."""
        node, n = self, 0
        while n == node.end and n < len(tokens) and tokens[n] in node.children:
            node = node.children[tokens[n]]
            n += node.match(tokens)
        return node, n

    def search(self, tokens: List[int]) -> Match:
        """How much of a prompt is below this root; one token of it has to run."""
        node, n_common = self.descend(tokens[: len(tokens) - 1])
        while node.parent is not None:
            if node.is_complete:
                return Match(node, min(node.end, n_common), n_common)
            if node.frozen is not None and node.end <= n_common:
                return Match(node, node.end, n_common)
            node = node.parent
        return Match(None, 0, n_common)

    def restore(self, n: int, n_to_come: int) -> Optional[List[Any]]:
        """The model's caches after the prompt's first ``n`` tokens.

        Args:
            n (int): At most as many as this node ends at.
            n_to_come (int): Tokens that will follow.

        Returns:
            Optional[List[Any]]: ``None`` if a layer does not hold just those tokens.
        """
        path = self.path
        layers = []
        for i, kind in enumerate(self.layout.kinds):
            if self.segments[i] is None:
                is_right = kind.holds(self.frozen[i], n)
                cache = kind.thaw(self.frozen[i], n) if is_right else None
            else:
                parts = [node.segments[i] for node in path]
                is_right = sum(part[0].shape[-2] for part in parts) == self.end
                cache = kind.join(parts, n) if is_right else None
            if cache is None:
                logging.error(f"The prompt cache is wrong in layer {i} at token {n}")
                return None
            if isinstance(cache, SegmentedKVCache):
                cache.n_to_come = n_to_come
            layers.append(cache)
        return self.layout.nest(layers)

    def lacking(
        self, arrays: List[Arrays], start: int, n: int
    ) -> Tuple[List[Optional[Arrays]], List[Optional[Arrays]]]:
        """What has to be kept of a sequence, the first ``start`` tokens of which end
        in this node.

        Args:
            arrays (List[Arrays]): What each layer has of its ``n`` tokens.
            start (int): Tokens that are in the tree.
            n (int): Tokens of the sequence.

        Returns:
            Tuple: For each layer a segment of the rest, or its state, and ``None`` for
            the other: copies that are not evaluated.
        """
        segments, frozen = [], []
        for kind, above, a in zip(self.layout.kinds, self.segments, arrays):
            has_segment = above is not None and (start == n or kind.can_cut(n))
            segments.append(copy(a, start, n) if has_segment else None)
            frozen.append(None if has_segment else copy(a))
        return segments, frozen

    def split(self, n: int) -> "Node":
        """Put a new node above that takes over the tokens up to the prompt's ``n``-th.

        Returns:
            Node: The new one. Each of the two holds copies of its part, which are not
            evaluated yet.
        """
        entry, n_upper = self.entry, n - self.start

        def cut(start: int, stop: int) -> List[Optional[Arrays]]:
            return [None if a is None else copy(a, start, stop) for a in self.segments]

        above, below = cut(0, n_upper), cut(n_upper, entry.n_tokens)
        upper = replace(
            entry,
            n_tokens=n_upper,
            nbytes=nbytes_of_layers(above),
            depth=n,
            recompute_cost=n_upper,
            data=shallow_copy(entry.data),
        )
        node = Node(self.layout, self.parent, self.tokens[:n_upper], above, upper)
        node.parent.children[node.tokens[0]] = node
        node.children[self.tokens[n_upper]] = self
        entry.n_tokens -= n_upper
        entry.nbytes -= upper.nbytes
        entry.recompute_cost = entry.n_tokens
        self.parent, self.tokens, self.segments = node, self.tokens[n_upper:], below
        return node


@dataclass
class CacheStats:
    """What the cache holds and what it was good for.

    Args:
        nodes (int): Entries.
        tokens (int): Tokens of which it holds KV, shared ones once.
        bytes (int): Bytes that it holds.
        bytes_saved (int): What whole sequences would take in addition.
        hits (int): Lookups that found something.
        misses (int): Lookups that did not.
        hit_tokens (int): Tokens that were found.
        evictions (Dict[str, int]): Entries that left, by reason; of those that were
          "superseded", only the state after them has left.
    """

    nodes: int
    tokens: int
    bytes: int
    bytes_saved: int
    hits: int
    misses: int
    hit_tokens: int
    evictions: Dict[str, int]

    def __str__(self):
        left = ", ".join(f"{n} {reason}" for reason, n in self.evictions.items() if n)
        return (
            f"{self.nodes} entries, {self.bytes / 1e6:.1f} MB for {self.tokens} tokens "
            f"({self.bytes_saved / 1e6:.1f} MB saved by sharing), {self.hits} hits with "
            f"{self.hit_tokens} tokens, {self.misses} misses, {left or '0 evicted'}"
        )
