"""KV kept between requests: radix trees within a bound.

Rules:
1. The bound counts the trees and the running batch. Room is made before anything is kept.
2. States that later ones supersede leave first. Then leaves do, those of the lowest
   priority first: what prompts begin with outlives what follows it.
3. What a lookup gives was checked: each layer holds just the tokens that it says.
"""

import heapq
import logging
import time
from argparse import Namespace
from collections import Counter
from dataclasses import dataclass, field
from itertools import count
from typing import Any, Collection, Dict, List, NamedTuple, Optional, Set, Tuple

import mlx.core as mx
from mlx_lm.models.cache import LRUPromptCache

from ..interfaces import Clock, Entry, EvictionPolicy
from .kinds import Layout, nbytes_of_layers
from .lru import LRU
from .segmented import Arrays
from .tree import CacheStats, Match, Node

UNBOUNDED = 1 << 63

# Tokens that a state at a branch has to save, for it costs as much as one for thousands.
BRANCH_GAIN = 16


def become(entry: Entry, cache_type: str) -> None:
    """Give an entry another type, except that a system prompt stays one."""
    if entry.cache_type != "system":
        entry.cache_type = cache_type


class Sequence(NamedTuple):
    """What is inserted: the tokens of a prompt, and the KV of exactly these.

    Args:
        model (Any): What made the KV.
        layout (Layout): The kinds of the model's caches.
        tokens (List[int]): The tokens.
        arrays (List[Arrays]): What the cache of each layer holds.
        cache_type (str): "system", "user" or "assistant".
    """

    model: Any
    layout: Layout
    tokens: List[int]
    arrays: List[Arrays]
    cache_type: str


@dataclass
class Plan:
    """What an insertion changes in the tree.

    Args:
        root (Node): The root of the tree, which may be new.
        node (Node): The last node that has tokens of the sequence.
        n_known (int): How many of the first tokens of the sequence are in the tree.
        splits (bool): Whether ``node`` is split after these.
        adds (bool): Whether a node is added for the tokens that follow.
        segments (List[Optional[Arrays]]): For each layer, the segment of the new node.
        frozen (List[Optional[Arrays]]): For each layer, its state after the sequence.
    """

    root: Node
    node: Node
    n_known: int
    splits: bool = False
    adds: bool = False
    segments: List[Optional[Arrays]] = field(default_factory=list)
    frozen: List[Optional[Arrays]] = field(default_factory=list)

    @property
    def n_bytes(self) -> int:
        """Bytes of what is added."""
        return nbytes_of_layers((*self.segments, *self.frozen))

    @property
    def is_empty(self) -> bool:
        """Whether the tree has all of the sequence already."""
        return not (self.segments or self.frozen)


class RadixPromptCache(LRUPromptCache):
    """``LRUPromptCache`` that stores each prefix once and finds what prompts share.

    All methods run on the generation thread.

    Args:
        max_size (int): The most entries that it may hold; a chat has two for each turn.
        max_bytes (int): The most bytes that it and the running batch may hold.
        eviction (Optional[EvictionPolicy]): Says what is evicted first; LRU unless given.
          Its methods must not raise, and the keys of all calls of ``rank`` must be
          comparable with each other: who lets plugins in wraps a guard around theirs.
        clock (Clock): Seconds that never go back.
    """

    def __init__(
        self,
        max_size: int = UNBOUNDED,
        max_bytes: int = UNBOUNDED,
        eviction: Optional[EvictionPolicy] = None,
        clock: Clock = time.monotonic,
    ):
        super().__init__(max_size, max_bytes)
        self.eviction = LRU(Namespace(), clock) if eviction is None else eviction
        self.clock = clock
        # By model and layout: a quantised cache shares nothing with one that is not.
        self.roots: Dict[Any, Dict[Tuple, Node]] = {}
        self.nodes: Dict[Entry, Node] = {}
        self.lazy: List[Node] = []  # have copies that are not made yet
        self.held = 0
        self.active = 0
        self.counts: Counter = Counter()
        # What was said already.
        self.unknown: Set[str] = set()
        self.crowded_out = False

    def __len__(self):
        return len(self.nodes)

    @property
    def nbytes(self) -> int:
        return self.held

    @property
    def all_roots(self) -> List[Node]:
        return [root for roots in self.roots.values() for root in roots.values()]

    # Lookup

    def search(self, model: Any, tokens: List[int]) -> Match:
        """Find the longest prefix, one token short of the whole prompt at most."""
        found = [root.search(tokens) for root in self.roots.get(model, {}).values()]
        return max(found, key=lambda match: match.n_tokens, default=Match())

    def branch_point(self, model: Any, tokens: List[int]) -> Optional[int]:
        """After how many tokens a cache should be inserted, so that the next prompt with
        the same beginning is resumed there; ``None`` if nothing would be gained."""
        match = self.search(model, tokens)
        is_worthwhile = match.n_common >= match.n_tokens + BRANCH_GAIN
        return match.n_common if is_worthwhile else None

    def fetch_nearest_cache(
        self, model: Any, tokens: List[int]
    ) -> Tuple[Optional[List[Any]], List[int]]:
        """Caches of the longest prefix that is known.

        Args:
            model (Any): What made the KV: entries of another are not found.
            tokens (List[int]): A prompt.

        Returns:
            Tuple: The model's caches, or ``None``, and the tokens that are left to run:
            at least one.
        """
        node, n, _ = self.search(model, tokens)
        caches = node.restore(n, len(tokens) - n) if n else None
        if caches is None:
            self.counts["misses"] += 1
            return None, tokens
        self.counts["hits"] += 1
        self.counts["hit_tokens"] += n
        used = [node.entry for node in node.path]
        now = self.clock()
        for entry in used:
            entry.hits += 1
            entry.last_hit = now
        for entry in used:
            start = entry.depth - entry.n_tokens
            self.eviction.on_hit(entry, min(n, entry.depth) - start)
        return caches, tokens[n:]

    # Insertion

    def insert_cache(
        self,
        model: Any,
        tokens: List[int],
        prompt_cache: List[Any],
        *,
        cache_type: str = "assistant",
    ) -> None:
        """Keep what the tree lacks of a sequence, if there can be room for it.

        Args:
            model (Any): What made the KV.
            tokens (List[int]): The tokens that the caches have seen. If those hold fewer,
              as after speculative decoding, the first ones.
            prompt_cache (List[Any]): A cache for each of the model's layers.
            cache_type (str): "system", "user" or "assistant".
        """
        self.insert(model, tokens, prompt_cache, cache_type)
        self.evaluate()

    def evaluate(self) -> None:
        """Make the copies of what was inserted: those of several sequences in one call,
        for after each the generation thread stands behind the handlers."""
        # Some may have left for the others.
        there = [node for node in self.lazy if node.entry in self.nodes]
        self.lazy = []
        try:
            if there:
                mx.eval([(node.segments, node.frozen) for node in there])
        except Exception:
            # Memory has run out, most likely. Nobody's answer needs what is kept.
            logging.exception("KV cannot be copied: the prompt cache is emptied")
            self.trim_to(n_bytes=0)

    def insert(
        self, model: Any, tokens: List[int], prompt_cache: List[Any], cache_type: str
    ) -> None:
        """``insert_cache``, but for the copies: see ``evaluate``."""
        layout = self.layout_of(prompt_cache)
        n, arrays = layout.read(prompt_cache, len(tokens)) if layout else (0, [])
        if not n:
            return
        sequence = Sequence(model, layout, tokens[:n], arrays, cache_type)
        plan = self.plan(sequence)
        if not self.make_room(plan):
            if not plan.splits or len(self) >= self.max_size:
                return
            # Once the node is split, the part of it that the sequence lacks can leave.
            self.split(plan.node, plan.n_known)
            plan = self.plan(sequence)
            if not self.make_room(plan):
                return
        elif plan.splits and not (plan.node.children or plan.node.is_resumable):
            # All that followed the node has left to make room: it leads to nothing.
            self.drop(plan.node, "evicted")
            plan = self.plan(sequence)
            if not self.make_room(plan):
                return
        self.commit(sequence, plan)

    def plan(self, sequence: Sequence) -> Plan:
        """What has to change in the tree for a sequence; nothing is changed yet."""
        layout, tokens, n = sequence.layout, sequence.tokens, len(sequence.tokens)
        root = self.roots.get(sequence.model, {}).get(layout.key) or Node(layout)
        node, n_known = root.descend(tokens)
        splits = n_known < node.end
        if n_known == n:
            is_stored = node.is_complete if splits else node.is_resumable
            same_type = node.entry.cache_type == sequence.cache_type
            if is_stored and (same_type or not splits):
                return Plan(root, node, n_known)
        segments, frozen = node.lacking(sequence.arrays, n_known, n)
        return Plan(root, node, n_known, splits, n_known < n, segments, frozen)

    def make_room(self, plan: Plan) -> bool:
        """Evict all that has to leave for an insertion, if that is enough."""
        if plan.is_empty:
            return True
        keep = plan.node.path
        n_bytes = self.max_bytes - self.active - plan.n_bytes
        n_nodes = self.max_size - plan.splits - plan.adds
        # If the way itself is too large, the states on it go: a later one will follow.
        states = [n for n in keep if n.is_passed]
        held = sum(n.entry.nbytes for n in keep)
        if held <= n_bytes:
            states = []
        held -= sum(n.frozen_nbytes for n in states)
        if held > n_bytes or len(keep) > n_nodes:
            return False
        for passed in states:
            self.release(passed)
        self.evict(n_bytes, n_nodes, keep)
        return True

    def commit(self, sequence: Sequence, plan: Plan) -> None:
        """Change the tree as planned. The copies are not evaluated yet."""
        model, layout, tokens = sequence.model, sequence.layout, sequence.tokens
        # The root may be new, or have been dropped with the last of its nodes.
        self.roots.setdefault(model, {})[layout.key] = plan.root
        node, now = plan.node, self.clock()
        if plan.splits:
            node = self.split(node, plan.n_known)
        if plan.adds:
            n_tokens = len(tokens) - plan.n_known
            entry = Entry(
                n_tokens=n_tokens,
                nbytes=0,
                depth=len(tokens),
                cache_type=sequence.cache_type,
                model_key=model,
                created=now,
                last_hit=now,
                recompute_cost=n_tokens,
            )
            run = tokens[plan.n_known :]
            node = Node(layout, node, run, plan.segments, entry)
            node.parent.children[run[0]] = self.nodes[entry] = node
        if any(a is not None for a in plan.frozen):
            node.frozen = plan.frozen
        become(node.entry, sequence.cache_type)
        node.entry.nbytes += plan.n_bytes
        self.held += plan.n_bytes
        for used in node.path:
            used.entry.last_hit = now
        if plan.adds:
            self.eviction.on_insert(node.entry)
        if not plan.is_empty:
            self.lazy.append(node)

    def layout_of(self, prompt_cache: List[Any]) -> Optional[Layout]:
        """The layout of a model's caches, or ``None`` if one is unknown."""
        try:
            return Layout(prompt_cache)
        except TypeError as e:
            if str(e) not in self.unknown:
                self.unknown.add(str(e))
                logging.warning(f"The prompt cache cannot keep the KV of {e}")
            return None

    def split(self, node: Node, n: int) -> Node:
        """Cut a node after the prompt's first ``n`` tokens; gives the upper one."""
        upper = node.split(n)
        self.nodes[upper.entry] = upper
        self.lazy += [upper, node]
        self.eviction.on_split(upper.entry, node.entry)
        return upper

    # Eviction

    def reserve(self, n_bytes: int) -> None:
        """Make room for a running batch that now holds ``n_bytes``."""
        if n_bytes > self.max_bytes and not self.crowded_out:
            self.crowded_out = True
            logging.warning(
                f"The running requests hold {n_bytes / 1e6:.0f} MB of KV, and they and "
                f"the prompt cache may hold {self.max_bytes / 1e6:.0f}: nothing is kept; "
                "see --radix-cache-size"
            )
        self.active = n_bytes
        self.evict(self.max_bytes - n_bytes, self.max_size)

    def trim_to(
        self, *, n_sequences: Optional[int] = None, n_bytes: Optional[int] = None
    ) -> None:
        """Evict until so many entries, and so many bytes, are left at most."""
        self.evict(
            UNBOUNDED if n_bytes is None else n_bytes,
            UNBOUNDED if n_sequences is None else n_sequences,
        )

    def evict(self, n_bytes: int, n_nodes: int, keep: Collection[Node] = ()) -> None:
        """Drop superseded states, and then leaves: those of the lowest priority first,
        and the pinned ones last."""

        def fits() -> bool:
            return self.held <= n_bytes and len(self) <= n_nodes

        if fits():
            return
        states = [node for root in self.all_roots for node in root.superseded]
        for node in sorted(states, key=lambda node: node.entry.created):
            if self.held > n_bytes and self.eviction.evictable(node.entry):
                self.release(node)
        kept = set(keep)
        leaves = [n for n in self.nodes.values() if not n.children and n not in kept]
        order = count()
        keys = self.eviction.rank([leaf.entry for leaf in leaves])
        heap = [(key, next(order), leaf) for key, leaf in zip(keys, leaves)]
        heapq.heapify(heap)
        while heap and not fits():
            *_, leaf = heapq.heappop(heap)
            parent = self.drop(leaf, "evicted", kept)
            if parent.entry and not parent.children and parent not in kept:
                (key,) = self.eviction.rank([parent.entry])
                heapq.heappush(heap, (key, next(order), parent))

    def release(self, node: Node) -> None:
        """Drop the state after a node, and not what others need to get past it."""
        self.held -= node.frozen_nbytes
        node.entry.nbytes -= node.frozen_nbytes
        node.frozen = None
        self.counts["superseded"] += 1

    def drop(self, node: Node, reason: str, keep: Collection[Node] = ()) -> Node:
        """Remove a leaf, and those above that are of no use without it.

        Returns:
            Node: The one above that is left.
        """
        dropped = []
        while not dropped or not (
            node.parent is None or node.children or node.is_resumable or node in keep
        ):
            entry, parent = node.entry, node.parent
            dropped.append(entry)
            del self.nodes[entry]
            del parent.children[node.tokens[0]]
            self.held -= entry.nbytes
            self.counts[reason] += 1
            node = parent
        if node.parent is None and not node.children:
            roots = self.roots[entry.model_key]
            del roots[node.layout.key]
            if not roots:
                del self.roots[entry.model_key]
        for entry in dropped:
            self.eviction.on_remove(entry, reason)
        return node

    def expire(self) -> None:
        """Drop what the policy says is too old, with all that follows it."""
        for entry in list(self.eviction.expired(self.clock())):
            if entry in self.nodes:
                for node in reversed(self.nodes[entry].subtree):
                    if node.entry in self.nodes:
                        self.drop(node, "expired")

    # What there is

    def stats_by_type(self) -> Dict[str, Dict[str, int]]:
        """Entries and bytes of each cache type."""
        stats = {
            t: {"n_sequences": 0, "n_bytes": 0} for t in ("assistant", "user", "system")
        }
        for entry in self.nodes:
            of_type = stats[entry.cache_type]
            of_type["n_sequences"] += 1
            of_type["n_bytes"] += entry.nbytes
        return stats

    def stats(self) -> CacheStats:
        """Takes a time in proportion to the number of entries."""
        return CacheStats(
            nodes=len(self),
            tokens=sum(entry.n_tokens for entry in self.nodes),
            bytes=self.held,
            bytes_saved=sum(root.bytes_saved for root in self.all_roots),
            hits=self.counts["hits"],
            misses=self.counts["misses"],
            hit_tokens=self.counts["hit_tokens"],
            evictions={r: self.counts[r] for r in ("evicted", "expired", "superseded")},
        )
