"""The radix tree: nodes that hold the KV of runs of tokens.

Rules:
1. A node has a run of tokens. For each layer it has a segment, which is the KV of exactly
   that run, or none. A layer that has a segment in a node has one in all nodes above it.
2. A node can also have a snapshot: the state at its end of each layer without a segment.
3. A prompt can be resumed at any token of a node in which all layers have segments, and at
   the end of a node with a snapshot.
"""

import logging
from dataclasses import dataclass, replace
from typing import Any, Dict, List, NamedTuple, Optional, Tuple

from ..interfaces import Entry
from .kinds import Layout, copy_arrays, nbytes_of_layers
from .segmented import Arrays, SegmentedKVCache, n_tokens_of

logger = logging.getLogger(__name__)


def n_common(run: List[int], tokens: List[int], start: int = 0) -> int:
    """How many of the first tokens of ``run`` equal those of ``tokens`` from ``start``."""
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
        node (Optional["Node"]): The node in which the prompt can be resumed.
        n_tokens (int): After how many of its tokens it can be resumed.
        n_common (int): How many of its tokens are in the tree. It could be resumed after
          these if there were a snapshot.
    """

    node: Optional["Node"] = None
    n_tokens: int = 0
    n_common: int = 0


class Node:
    """A run of tokens that follows the run of its parent.

    Args:
        layout (Layout): The kinds of the layers.
        parent (Optional[Node]): ``None`` for the root.
        tokens (Optional[List[int]]): The run. The root has none.
        segments (Optional[List[Optional[Arrays]]]): For each layer, the KV of the run.
        entry (Optional[Entry]): What policies see of the node. The root has none.
    """

    # What it is called among processes whose trees are the same. The root is 0.
    number = 0

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
        self.snapshot: Optional[List[Optional[Arrays]]] = None
        self.entry = entry
        self.children: Dict[int, Node] = {}

    @property
    def end(self) -> int:
        """Tokens from the start of the prompt to the end of the run."""
        return self.entry.depth if self.entry else 0

    @property
    def start(self) -> int:
        """Tokens from the start of the prompt to the start of the run."""
        return self.end - len(self.tokens)

    @property
    def is_complete(self) -> bool:
        """Whether all layers have segments, so that any token can be resumed at."""
        return None not in self.segments

    @property
    def is_resumable(self) -> bool:
        """Whether a prompt can be resumed at the end of the run."""
        return self.snapshot is not None or self.is_complete

    @property
    def snapshot_nbytes(self) -> int:
        return nbytes_of_layers(self.snapshot or ())

    @property
    def can_lose_snapshot(self) -> bool:
        """Whether it has a snapshot that only one prompt needs, until later ones of the
        same prompt supersede it."""
        shared = len(self.children) > 1 or self.entry.cache_type == "system"
        return self.snapshot is not None and not shared

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
        """How many more bytes the prompts of all leaves below would take if each were
        stored whole."""
        saved, n_leaves = 0, {}
        for node in self.subtree[:0:-1]:
            n_leaves[node] = sum(n_leaves[c] for c in node.children.values()) or 1
            saved += (n_leaves[node] - 1) * node.entry.nbytes
        return saved

    @property
    def superseded(self) -> List["Node"]:
        """The nodes below whose snapshots will hardly be used again, because three later
        ones of the same prompt follow. One turn of a chat leaves up to three."""
        found, seen = [], set()
        for leaf in self.subtree[:0:-1]:
            node, n_later = leaf, 0
            while not leaf.children and node not in seen and node is not self:
                seen.add(node)
                if n_later >= 3 and node.can_lose_snapshot:
                    found.append(node)
                n_later += node.snapshot is not None
                node = node.parent
        return found

    def descend(self, tokens: List[int]) -> Tuple["Node", int]:
        """Follow a prompt down from this root.

        Returns:
            Tuple: The last node that has tokens of it, and how many of them are in the
            tree.
        """
        node, n = self, 0
        while n == node.end and n < len(tokens) and tokens[n] in node.children:
            node = node.children[tokens[n]]
            n += n_common(node.tokens, tokens, n)
        return node, n

    def search(self, tokens: List[int]) -> Match:
        """Find how much of a prompt is below this root. Its last token is left out, as
        at least one has to run."""
        node, n_found = self.descend(tokens[: len(tokens) - 1])
        while node.parent is not None:
            if node.is_complete:
                return Match(node, min(node.end, n_found), n_found)
            if node.snapshot is not None and node.end <= n_found:
                return Match(node, node.end, n_found)
            node = node.parent
        return Match(None, 0, n_found)

    def restore(self, n: int, n_to_come: int) -> Optional[List[Any]]:
        """Make the model's caches after the first ``n`` tokens of a prompt.

        Args:
            n (int): At most ``end`` of this node.
            n_to_come (int): How many tokens of the prompt will follow.

        Returns:
            Optional[List[Any]]: ``None`` if a layer does not hold exactly those tokens.
        """
        path = self.path
        layers = []
        for i, kind in enumerate(self.layout.kinds):
            cache = None
            if self.segments[i] is None:
                if kind.is_complete(self.snapshot[i], n):
                    cache = kind.from_snapshot(self.snapshot[i], n)
            else:
                segments = [node.segments[i] for node in path]
                if sum(map(n_tokens_of, segments)) == self.end:
                    cache = kind.from_segments(segments, n)
            if cache is None:
                logger.error(
                    f"The prompt cache does not hold {n} tokens in layer {i} although its "
                    "tree says so; the prompt is run from its start"
                )
                return None
            if isinstance(cache, SegmentedKVCache):
                cache.n_to_come = n_to_come
            layers.append(cache)
        return self.layout.unflatten(layers)

    def copy_missing(
        self, arrays: List[Arrays], start: int, n: int
    ) -> Tuple[List[Optional[Arrays]], List[Optional[Arrays]]]:
        """Copy what the tree lacks of a sequence. The copies are not evaluated.

        Args:
            arrays (List[Arrays]): For each layer, what its cache holds after ``n`` tokens.
            start (int): How many of them are in the tree; this node has the last.
            n (int): Tokens of the sequence.

        Returns:
            Tuple: The segments of the tokens that follow, and the snapshot after them.
            Each layer has one of the two, and ``None`` in the place of the other.
        """
        segments, snapshot = [], []
        for kind, above, a in zip(self.layout.kinds, self.segments, arrays):
            has_segment = above is not None and (start == n or kind.can_cut(n))
            segments.append(copy_arrays(a, start, n) if has_segment else None)
            snapshot.append(None if has_segment else copy_arrays(a))
        return segments, snapshot

    def split(self, n: int) -> "Node":
        """Put a new node above this one, which takes over the tokens up to the prompt's
        ``n``-th.

        Returns:
            Node: The new node. Each of the two has copies of its part, which are not
            evaluated.
        """
        entry, n_upper = self.entry, n - self.start

        def cut(start: int, stop: int) -> List[Optional[Arrays]]:
            return [
                None if a is None else copy_arrays(a, start, stop)
                for a in self.segments
            ]

        above, below = cut(0, n_upper), cut(n_upper, entry.n_tokens)
        upper = replace(
            entry,
            n_tokens=n_upper,
            nbytes=nbytes_of_layers(above),
            depth=n,
            recompute_cost=n_upper,
            data=None,
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
    """What the prompt cache holds, and what it was good for.

    Args:
        nodes (int): Entries.
        tokens (int): Tokens of which it holds KV; shared ones are counted once.
        bytes (int): Bytes that it holds.
        bytes_saved (int): How many more bytes it would hold if nothing were shared.
        hits (int): Lookups that found something.
        misses (int): Lookups that found nothing.
        hit_tokens (int): Tokens that were found.
        evictions (Dict[str, int]): Entries that left, by reason. The "superseded" ones
          have lost only their snapshots.
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
