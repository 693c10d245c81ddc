"""The plugin contract: the hooks, and what the classes they register must do.

A plugin is a module, or an object with methods, whose functions are named like the
hooks below and marked with ``@mlx_lm_ext.hookimpl``. It is found through the
entry-point group ``mlx_lm_ext``, or loaded with ``-p MODULE``.

Rules:
1. Hooks register and observe. None fires for each step, row or cache entry: what runs
   there are the methods of the classes in ``mlx_lm_ext.interfaces``.
2. The order of installation chooses nothing: a policy is used when its name is asked
   for, and no two may have the same. Hooks are called in pluggy's order: last
   registered first, ``@hookimpl(tryfirst=True)`` before and ``trylast=True`` after all.
3. A function may leave out arguments that it does not need. Wrappers are refused.
"""

import argparse
from typing import TYPE_CHECKING, Any, Callable, List, Optional, Type

from pluggy import HookspecMarker

from .interfaces import (
    BatchSampler,
    EvictionPolicy,
    RequestInfo,
    RequestStats,
    SchedulerPolicy,
)

if TYPE_CHECKING:
    import mlx.core as mx

hookspec = HookspecMarker("mlx_lm_ext")


@hookspec
def mlx_lm_add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add flags to the command line.

    Fires once at the start, on the main thread, before the arguments are parsed. What
    was given reaches the classes below as ``args``.

    It may only add: a flag that exists already, or anything else that it raises, ends
    the start with exit code 2. What it returns is ignored::

        @hookimpl
        def mlx_lm_add_arguments(parser):
            parser.add_argument("--cost-weight", type=float, default=1.0)
    """


@hookspec
def mlx_lm_register_eviction_policies() -> List[Type[EvictionPolicy]]:
    """Give classes that decide what leaves the prompt cache; ``--eviction-policy NAME``.

    Fires once at the start, on the main thread, after the arguments are parsed. It
    returns a list of classes, and may not make objects of them. What it raises ends
    the start with exit code 2, and so does a class without a name or a method.

    A class derives from ``mlx_lm_ext.interfaces.EvictionPolicy``. Only ``name`` and
    ``priority`` have no default::

        __init__(self, args, clock)   # call super's: it keeps clock() as self.clock
        priority(self, entry)         # the entry with the lowest leaves first; O(1)
        evictable(self, entry)        # False pins an entry, while others can leave
        on_insert(self, entry)
        on_hit(self, entry, n_tokens) # for each entry that a request takes tokens of
        on_split(self, parent, child) # child keeps the history; parent is new, a copy
        on_remove(self, entry, reason)  # "evicted" or "expired"
        expired(self, now)            # a list of entries to drop although there is room

    An ``entry`` has ``n_tokens, nbytes, depth, hits, created, last_hit,
    recompute_cost, cache_type, model_key`` and ``data``, which is the policy's own and
    None at first. ``created`` and ``last_hit`` are seconds of the clock, equal until the
    first use; ``nbytes`` can be 0 and can change; ``cache_type`` is "system", "user" or "assistant". Entries can be keys of
    a dictionary.

    The cache is a radix tree. An entry is a run of tokens that follows its parent's, and
    a prompt has the entries from the first to its last: a system prompt, a question, an
    answer, and so on. Where two prompts part, an entry is cut in two. Only an entry that
    nothing follows is asked for its ``priority`` and can be evicted, so that what many
    prompts begin with leaves last. An entry that expires takes what follows it along.

    ``expired`` is asked every ten seconds or so, idle or not, and pins do not hold it
    back: keep the entries of ``on_insert`` and of ``on_split`` (its parent) until their
    ``on_remove``, which comes for each that leaves.

    All methods run on the generation thread, only with ``--use-prompt-cache``; when one
    raises, ``lru`` replaces the policy::

        class LargestFirst(EvictionPolicy):
            name = "largest"
            def priority(self, entry): return -entry.nbytes

        @hookimpl
        def mlx_lm_register_eviction_policies():
            return [LargestFirst]
    """


@hookspec
def mlx_lm_register_scheduler_policies() -> List[Type[SchedulerPolicy]]:
    """Give classes that decide which request starts next; ``--scheduler NAME``.

    Fires, and may do, what ``mlx_lm_register_eviction_policies`` does.

    A class derives from ``mlx_lm_ext.interfaces.SchedulerPolicy``. Only ``name`` has no
    default::

        __init__(self, args, clock)
        order(self, waiting, view)    # the same requests, who goes first; None: as they came
        prefill_tokens(self, view)    # tokens of prompts a step may process; None: no limit
        on_tokens(self, counts)       # once a step: [(request, tokens generated)]
        on_finish(self, request)
        most_matched = 0              # n_matched is looked up for so many that wait

    A ``request`` has ``id, args, body, arrival, n_prompt, n_matched, n_generated,
    max_tokens, stream, priority`` and ``user``; ``view`` has ``now``, ``running`` and
    ``batch_size``. Its methods run on the generation thread; when one raises, or
    ``order`` gives a request twice or one that does not wait, ``fcfs`` replaces the
    policy::

        class ShortestFirst(SchedulerPolicy):
            name = "shortest"
            def order(self, waiting, view): return sorted(waiting, key=lambda r: r.n_prompt)
    """


@hookspec
def mlx_lm_register_samplers() -> List[Type[BatchSampler]]:
    """Give classes that choose the next tokens; ``--sampler NAME``, or ``"sampler": NAME``
    in a request.

    Fires, and may do, what ``mlx_lm_register_eviction_policies`` does.

    A class derives from ``mlx_lm_ext.interfaces.BatchSampler``. One object is made for
    each request; then all rows that use the class are joined in one::

        __init__(self, args, request, tokenizer)
        __call__(self, logprobs)      # (rows, vocabulary) -> (rows,); lazy, no evaluation
        extend(self, other)           # the rows of other come after its own
        filter(self, keep)            # keep the rows of these indices, in this order

    A sampler that keeps nothing for each row needs ``name`` and ``__call__`` only. It
    runs on the generation thread; when it raises, or gives another shape, ``default``
    samples for its rows from then on::

        class Coldest(BatchSampler):
            name = "coldest"
            def __call__(self, logprobs): return mx.argmax(logprobs, axis=-1)
    """


@hookspec
def mlx_lm_make_logits_processors(
    request: RequestInfo, tokenizer: Any, args: argparse.Namespace
) -> Optional[List[Callable[["mx.array", "mx.array"], "mx.array"]]]:
    """Give logits processors for one request.

    Fires each time a request starts to run (again if a step failed and it goes on), on
    the generation thread, with the model's ``TokenizerWrapper`` and the command line. It
    may not block.

    It returns a list of mlx-lm's logits processors, ``processor(tokens, logits)``, with
    the tokens so far of shape (n,) and logits of shape (1, vocabulary); None or an
    empty list for a request that it leaves alone. Those of all plugins run in the order
    of the calls, after the request's own penalties. When it raises, or a processor
    does, that request fails: what it was to forbid must not be generated::

        @hookimpl
        def mlx_lm_make_logits_processors(request, tokenizer):
            return [lambda tokens, logits: logits * 0.5] if request.user == "shy" else None
    """


@hookspec
def mlx_lm_request_finished(
    request: RequestInfo, stats: RequestStats, args: argparse.Namespace
) -> None:
    """Observe the end of a request.

    Fires once for each request that was taken to be served, when its answer was sent or
    has failed, on the thread of its connection: several at a time. ``stats`` has
    ``finish_reason, queue_seconds, ttft`` and ``seconds``; ``args`` is the command line.

    It may block, which delays only the next request of that connection. What it returns
    is ignored, and what it raises is logged::

        @hookimpl
        def mlx_lm_request_finished(request, stats):
            print(request.id, stats.finish_reason, request.n_generated)
    """
