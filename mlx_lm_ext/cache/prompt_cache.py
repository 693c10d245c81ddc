"""The KV that is kept between requests: radix trees of a bounded size.

Rules:
1. The bound in bytes counts the trees and the running batch. Room is made before anything
   is kept.
2. Superseded snapshots leave first, then leaves in the order of the eviction policy. So
   what prompts begin with outlives what follows it.
3. What a lookup gives was checked: each layer holds exactly the tokens that it should.
"""

import heapq
import logging
import time
import zlib
from argparse import Namespace
from collections import Counter
from dataclasses import dataclass, field
from itertools import count
from typing import (
    Any,
    Callable,
    Collection,
    Dict,
    List,
    NamedTuple,
    Optional,
    Set,
    Tuple,
)

import mlx.core as mx
from mlx_lm.models.cache import LRUPromptCache

from ..distributed.group import ONE_PROCESS, Agree
from ..interfaces import Clock, Entry, EvictionPolicy
from .kinds import Layout, nbytes_of_layers, without_segments
from .lru import LRU
from .segmented import Arrays
from .tree import CacheStats, Match, Node

logger = logging.getLogger(__name__)

UNBOUNDED = 1 << 63

# A snapshot at a branch is worth its memory, which may be that of thousands of tokens, if
# it saves at least so many tokens of prefill.
BRANCH_GAIN = 16


def set_cache_type(entry: Entry, cache_type: str) -> None:
    """Give an entry another type, except that a system prompt stays one."""
    if entry.cache_type != "system":
        entry.cache_type = cache_type


class KVSequence(NamedTuple):
    """What is inserted: the tokens of a prompt and their KV.

    Args:
        model (Any): What made the KV.
        layout (Layout): The kinds of the model's caches.
        tokens (List[int]): The tokens.
        arrays (List[Arrays]): For each layer, what its cache holds after the tokens.
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
        n_known (int): How many tokens of the sequence are in the tree.
        splits (bool): Whether ``node`` is split after these.
        adds (bool): Whether a node is added for the tokens that follow.
        segments (List[Optional[Arrays]]): For each layer, the segment of the new node.
        snapshot (List[Optional[Arrays]]): For each layer without a segment, its state
          after the sequence.
    """

    root: Node
    node: Node
    n_known: int
    splits: bool = False
    adds: bool = False
    segments: List[Optional[Arrays]] = field(default_factory=list)
    snapshot: List[Optional[Arrays]] = field(default_factory=list)

    @property
    def n_bytes(self) -> int:
        """Bytes of what is added."""
        return nbytes_of_layers((*self.segments, *self.snapshot))

    @property
    def is_empty(self) -> bool:
        """Whether the tree has the whole sequence already."""
        return not (self.segments or self.snapshot)


class RadixPromptCache(LRUPromptCache):
    """``LRUPromptCache`` that stores each prefix once and finds what prompts share.

    All methods run on the generation thread.

    Args:
        max_size (int): The most entries that it may hold; a chat has two for each turn.
        max_bytes (int): The most bytes that it and the running batch may hold.
        eviction (Optional[EvictionPolicy]): Says what is evicted first; LRU unless given.
          Its methods must not raise, and the keys of all calls of ``rank`` must be
          comparable with each other. Policies of plugins are wrapped in a guard that
          sees to this.
        clock (Clock): Gives seconds that never go back.
        agree (Callable): Lets one of several processes, whose trees are the same, decide what
          is evicted; see ``distributed.group``.
    """

    # Bytes of all nodes. ``LRUPromptCache`` computes it in a property.
    nbytes = 0

    def __init__(
        self,
        max_size: int = UNBOUNDED,
        max_bytes: int = UNBOUNDED,
        eviction: Optional[EvictionPolicy] = None,
        clock: Clock = time.monotonic,
        agree: Agree = ONE_PROCESS.agree,
    ):
        super().__init__(max_size, max_bytes)
        self.agree = agree
        # The numbers of the nodes, in the order in which they were made.
        self.numbers = count(1)
        # What has left since a decision was begun: why, and the number of the node.
        self.left: List[Tuple[str, int]] = []
        self.eviction = LRU(Namespace(), clock) if eviction is None else eviction
        self.clock = clock
        # By model, and then by layout: quantized KV and plain KV cannot be shared.
        self.roots: Dict[Any, Dict[Tuple, Node]] = {}
        self.nodes: Dict[Entry, Node] = {}
        # Nodes with copies that ``evaluate`` has to make.
        self.unevaluated: List[Node] = []
        # Bytes of the running batch.
        self.reserved = 0
        self.counts: Counter = Counter()
        # What was logged once and is not logged again.
        self.unknown_types: Set[str] = set()
        self.has_warned_of_full_batch = False

    def __len__(self):
        return len(self.nodes)

    @property
    def all_roots(self) -> List[Node]:
        return [root for roots in self.roots.values() for root in roots.values()]

    # Lookup

    def search(self, model: Any, tokens: List[int]) -> Match:
        """Find the longest prefix that is known: all but the last token at most."""
        found = [root.search(tokens) for root in self.roots.get(model, {}).values()]
        return max(found, key=lambda match: match.n_tokens, default=Match())

    def branch_point(self, model: Any, tokens: List[int]) -> Optional[int]:
        """After how many tokens the caches of a prompt should be inserted, so that the next
        prompt that branches off there can be resumed; ``None`` if that gains little."""
        match = self.search(model, tokens)
        is_worthwhile = match.n_common >= match.n_tokens + BRANCH_GAIN
        return match.n_common if is_worthwhile else None

    def fetch_nearest_cache(
        self, model: Any, tokens: List[int]
    ) -> Tuple[Optional[List[Any]], List[int]]:
        """``fetch_segmented_cache`` for mlx-lm's own batches: its caches are those that mlx-lm
        makes, with copies of the segments."""
        caches, rest = self.fetch_segmented_cache(model, tokens)
        return (None if caches is None else without_segments(caches)), rest

    def fetch_segmented_cache(
        self, model: Any, tokens: List[int]
    ) -> Tuple[Optional[List[Any]], List[int]]:
        """Make caches of the longest prefix that is known. They merge with those of
        ``make_segmented_cache``.

        Args:
            model (Any): What made the KV: entries of another model are not found.
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
            tokens (List[int]): The tokens that the caches have seen. If the caches hold
                fewer, as after speculative decoding, they hold the first of them.
            prompt_cache (List[Any]): A cache for each of the model's layers.
            cache_type (str): "system", "user" or "assistant".
        """
        self.insert(model, tokens, prompt_cache, cache_type)
        self.evaluate()

    def evaluate(self) -> None:
        """Make the copies that insertions have left. Several sequences share one call,
        as the generation thread waits for the device in each."""
        # Some may have been evicted to make room for the others.
        kept = [node for node in self.unevaluated if node.entry in self.nodes]
        self.unevaluated = []
        try:
            if kept:
                mx.eval([(node.segments, node.snapshot) for node in kept])
        except Exception:
            # Most likely there is no memory left. No running request needs what is kept.
            logger.exception("KV cannot be copied: the prompt cache is emptied")
            self.trim_to(n_bytes=0)

    def insert(
        self, model: Any, tokens: List[int], prompt_cache: List[Any], cache_type: str
    ) -> None:
        """``insert_cache`` without its last step: the caller calls ``evaluate``."""
        layout = self.layout_of(prompt_cache)
        n, arrays = layout.read(prompt_cache, len(tokens)) if layout else (0, [])
        if not n:
            return
        sequence = KVSequence(model, layout, tokens[:n], arrays, cache_type)
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
            # All that followed the node has left to make room: it is of no use now.
            self.remove(plan.node, "evicted")
            plan = self.plan(sequence)
            if not self.make_room(plan):
                return
        self.commit(sequence, plan)

    def plan(self, sequence: KVSequence) -> Plan:
        """Find out what an insertion has to change. Nothing is changed yet."""
        layout, tokens, n = sequence.layout, sequence.tokens, len(sequence.tokens)
        root = self.roots.get(sequence.model, {}).get(layout.key) or Node(layout)
        node, n_known = root.descend(tokens)
        splits = n_known < node.end
        if n_known == n:
            is_stored = node.is_complete if splits else node.is_resumable
            same_type = node.entry.cache_type == sequence.cache_type
            if is_stored and (same_type or not splits):
                return Plan(root, node, n_known)
        segments, snapshot = node.copy_missing(sequence.arrays, n_known, n)
        return Plan(root, node, n_known, splits, n_known < n, segments, snapshot)

    def make_room(self, plan: Plan) -> bool:
        """Evict what has to leave for an insertion.

        Returns:
            bool: Whether there is room. If not, nothing was evicted.
        """
        if plan.is_empty:
            return True
        path = plan.node.path
        n_bytes = self.max_bytes - self.reserved - plan.n_bytes
        n_nodes = self.max_size - plan.splits - plan.adds

        def places_of_losers() -> Optional[List[int]]:
            path_bytes = sum(node.entry.nbytes for node in path)
            # If the path itself is too large, its snapshots leave: a later one will follow.
            losers = []
            if path_bytes > n_bytes:
                losers = [i for i, node in enumerate(path) if node.can_lose_snapshot]
                path_bytes -= sum(path[i].snapshot_nbytes for i in losers)
            has_room = path_bytes <= n_bytes and len(path) <= n_nodes
            return losers if has_room else None

        losers = self.agree("room", places_of_losers)
        if losers is None:
            return False
        for i in losers:
            self.drop_snapshot(path[i])
        self.evict(n_bytes, n_nodes, path)
        return True

    def commit(self, sequence: KVSequence, plan: Plan) -> None:
        """Change the tree as planned. The copies are not evaluated yet."""
        model, layout, tokens = sequence.model, sequence.layout, sequence.tokens
        # The root is not there if it is new, or if all its nodes were evicted for this.
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
            node.number = next(self.numbers)
            node.parent.children[run[0]] = self.nodes[entry] = node
        if any(a is not None for a in plan.snapshot):
            node.snapshot = plan.snapshot
        set_cache_type(node.entry, sequence.cache_type)
        node.entry.nbytes += plan.n_bytes
        self.nbytes += plan.n_bytes
        for used in node.path:
            used.entry.last_hit = now
        if plan.adds:
            self.eviction.on_insert(node.entry)
        if not plan.is_empty:
            self.unevaluated.append(node)

    def layout_of(self, prompt_cache: List[Any]) -> Optional[Layout]:
        """The layout of a model's caches, or ``None`` if the type of one is unknown."""
        try:
            return Layout(prompt_cache)
        except TypeError as e:
            if str(e) not in self.unknown_types:
                self.unknown_types.add(str(e))
                logger.warning(f"The prompt cache cannot keep the KV of {e}")
            return None

    def split(self, node: Node, n: int) -> Node:
        """Split a node after the prompt's first ``n`` tokens.

        Returns:
            Node: The upper of the two nodes, which is new.
        """
        upper = node.split(n)
        upper.number = next(self.numbers)
        self.nodes[upper.entry] = upper
        self.unevaluated += [upper, node]
        self.eviction.on_split(upper.entry, node.entry)
        return upper

    # Eviction

    def reserve(self, n_bytes: int) -> None:
        """Make room for a running batch that now holds ``n_bytes``."""
        if n_bytes > self.max_bytes and not self.has_warned_of_full_batch:
            self.has_warned_of_full_batch = True
            logger.warning(
                f"The running requests hold {n_bytes / 1e6:.0f} MB of KV, and they and "
                f"the prompt cache may hold {self.max_bytes / 1e6:.0f}: nothing is kept; "
                "see --radix-cache-size"
            )
        self.reserved = n_bytes
        self.evict(self.max_bytes - n_bytes, self.max_size)

    def trim_to(
        self, *, n_sequences: Optional[int] = None, n_bytes: Optional[int] = None
    ) -> None:
        """Evict until at most so many entries, and so many bytes, are left."""
        self.evict(
            UNBOUNDED if n_bytes is None else n_bytes,
            UNBOUNDED if n_sequences is None else n_sequences,
        )

    def evict(self, n_bytes: int, n_nodes: int, keep: Collection[Node] = ()) -> None:
        """Drop superseded snapshots, and then remove leaves in the order of the policy.

        Args:
            n_bytes (int): The most bytes that may be left.
            n_nodes (int): The most nodes that may be left.
            keep (Collection[Node]): Nodes that stay, even if too much is left.
        """
        self.decide("evictions", lambda: self.evict_here(n_bytes, n_nodes, set(keep)))

    def evict_here(self, n_bytes: int, n_nodes: int, keep: Set[Node]) -> None:
        """``evict``, by the bytes and the policy of this process."""

        def fits() -> bool:
            return self.nbytes <= n_bytes and len(self) <= n_nodes

        if fits():
            return
        superseded = [node for root in self.all_roots for node in root.superseded]
        for node in sorted(superseded, key=lambda node: node.entry.created):
            if self.nbytes > n_bytes and self.eviction.evictable(node.entry):
                self.drop_snapshot(node)
        leaves = [n for n in self.nodes.values() if not n.children and n not in keep]
        keys = self.eviction.rank([leaf.entry for leaf in leaves])
        # Equal keys are compared no further than by this number.
        order = count()
        heap = [(key, next(order), leaf) for key, leaf in zip(keys, leaves)]
        heapq.heapify(heap)
        while heap and not fits():
            *_, leaf = heapq.heappop(heap)
            above = self.remove(leaf, "evicted", keep)
            if above.entry and not above.children and above not in keep:
                (key,) = self.eviction.rank([above.entry])
                heapq.heappush(heap, (key, next(order), above))

    def drop_snapshot(self, node: Node) -> None:
        """Drop the snapshot of a node. Its segments stay: longer prompts need them."""
        self.left.append(("superseded", node.number))
        self.nbytes -= node.snapshot_nbytes
        node.entry.nbytes -= node.snapshot_nbytes
        node.snapshot = None
        self.counts["superseded"] += 1

    def remove(self, node: Node, reason: str, keep: Collection[Node] = ()) -> Node:
        """Remove a leaf, and the nodes above it that are of no use without it.

        Args:
            node (Node): The leaf.
            reason (str): "evicted" or "expired".
            keep (Collection[Node]): Nodes that stay.

        Returns:
            Node: The lowest node above that is left, which may be the root.
        """
        above = self.remove_one(node, reason)
        while not (
            above.parent is None
            or above.children
            or above.is_resumable
            or above in keep
        ):
            above = self.remove_one(above, reason)
        return above

    def remove_one(self, node: Node, reason: str) -> Node:
        """Remove a leaf.

        Returns:
            Node: The node above it.
        """
        self.left.append((reason, node.number))
        entry, parent = node.entry, node.parent
        del self.nodes[entry]
        del parent.children[node.tokens[0]]
        self.nbytes -= entry.nbytes
        self.counts[reason] += 1
        if parent.parent is None and not parent.children:
            roots = self.roots[entry.model_key]
            del roots[parent.layout.key]
            if not roots:
                del self.roots[entry.model_key]
        self.eviction.on_remove(entry, reason)
        return parent

    def expire(self) -> None:
        """Remove the entries that the policy calls expired, and all that follows them."""
        self.decide("expiry", self.expire_here)

    def expire_here(self) -> None:
        """``expire``, by the clock and the policy of this process."""
        for entry in list(self.eviction.expired(self.clock())):
            if entry in self.nodes:
                for node in reversed(self.nodes[entry].subtree):
                    if node.entry in self.nodes:
                        self.remove(node, "expired")

    # Several processes

    def decide(self, kind: str, run: Callable[[], None]) -> None:
        """Let one process decide what leaves. The others, whose trees are the same, remove what
        it has removed.

        Args:
            kind (str): What is decided.
            run (Callable): Removes it.
        """
        is_mine = False

        def make() -> List[Tuple[str, int]]:
            nonlocal is_mine
            is_mine, self.left = True, []
            run()
            return self.left

        left = self.agree(kind, make)
        if is_mine:
            return
        nodes = {node.number: node for node in self.nodes.values()} if left else {}
        for reason, number in left:
            if reason == "superseded":
                self.drop_snapshot(nodes[number])
            else:
                self.remove_one(nodes[number], reason)
        # Nobody is told of it here.
        self.left = []

    @property
    def digest(self) -> int:
        """A number that differs if the trees of two processes differ, but for their arrays."""
        nodes = sorted(
            (node.number, node.end, node.parent.number, node.snapshot is None)
            for node in self.nodes.values()
        )
        return zlib.crc32(repr(nodes).encode())

    # Statistics

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

    @property
    def evictions(self) -> Dict[str, int]:
        """How many entries have left, and snapshots were dropped, for each reason."""
        return {r: self.counts[r] for r in ("evicted", "expired", "superseded")}

    def stats(self) -> CacheStats:
        """What it holds. This takes a time in proportion to the number of entries."""
        return CacheStats(
            nodes=len(self),
            tokens=sum(entry.n_tokens for entry in self.nodes),
            bytes=self.nbytes,
            bytes_saved=sum(root.bytes_saved for root in self.all_roots),
            hits=self.counts["hits"],
            misses=self.counts["misses"],
            hit_tokens=self.counts["hit_tokens"],
            evictions=self.evictions,
        )
