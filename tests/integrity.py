"""Checks that a prompt cache and its trees obey their rules.

Rule: the checks change nothing and evaluate no array.
"""

from typing import Any

from mlx_lm_ext.cache.kinds import nbytes_of_layers
from mlx_lm_ext.cache.tree import Node


def check(cache: Any, is_evaluated: bool = True) -> None:
    """Check the rules of a ``RadixPromptCache``.

    Args:
        cache (RadixPromptCache): The cache.
        is_evaluated (bool): Whether it has no copies left to evaluate.

    Raises:
        AssertionError: If one is broken.
    """
    seen = []
    for model, roots in cache.roots.items():
        for key, root in roots.items():
            assert root.layout.key == key, "a tree of another layout"
            for node in root.subtree:
                check_node(node)
                if node is not root:
                    seen.append(node.entry)
                    assert cache.nodes.get(node.entry) is node, "an unknown entry"
                    assert node.entry.model_key == model, "another model's entry"
    assert len(seen) == len(cache.nodes), "an entry that is in no tree"
    assert sum(entry.nbytes for entry in seen) == cache.nbytes, "wrong bytes in all"
    assert len(cache) <= cache.max_size, "more entries than the bound"
    bytes_fit = cache.nbytes + cache.reserved <= cache.max_bytes
    assert bytes_fit or not cache.nodes, "more bytes than the bound"
    assert not (is_evaluated and cache.unevaluated), "copies that were not made"


def check_node(node: Node) -> None:
    """Check the rules of a node and of its place in the tree.

    Raises:
        AssertionError: If one is broken.
    """
    entry, parent, kinds = node.entry, node.parent, node.layout.kinds
    for first, child in node.children.items():
        assert child.parent is node, "a child of another parent"
        assert child.tokens[0] == first, "a child in a wrong place"
    if parent is None:
        assert node.children and not node.tokens, "an empty root"
        return
    assert entry.n_tokens == len(node.tokens) > 0, "a wrong number of tokens"
    assert entry.depth == parent.end + entry.n_tokens, "a wrong depth"
    held = nbytes_of_layers(node.segments) + node.snapshot_nbytes
    assert entry.nbytes == held, "wrong bytes"
    assert node.children or node.is_resumable, "a leaf of no use"
    if parent.entry:
        assert parent.entry.last_hit >= entry.last_hit, "used after its parent"
    snapshot = node.snapshot or [None] * len(kinds)
    for kind, above, own, state in zip(kinds, parent.segments, node.segments, snapshot):
        assert own is None or above is not None, "a segment without one above"
        for x in own or ():
            assert x.shape[-2] == entry.n_tokens, "a segment of a wrong length"
        if node.snapshot is not None:
            assert (own is None) != (state is None), "not either a segment or a state"
        for x in state or ():
            kept = kind.n_kept(entry.depth)
            assert kept in (None, x.shape[-2]), "a state of a wrong length"
