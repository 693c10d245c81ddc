"""The hooks that a plugin may implement.

A plugin is a module, or an object with methods, whose functions are named like the
functions below and marked with ``@mlx_lm_ext.hookimpl``. It is found through the
entry-point group ``mlx_lm_ext``, or loaded with ``-p MODULE``.

Each docstring below is the contract of its hook: what the hook gives, when and on which
thread it is called, and what happens if it raises. What the registered classes must
provide is in ``interfaces.py``, and what routes are given and return in ``routes.py``.

Rules:
1. Hooks register and observe. None is called for each step, row or cache entry: there the
   server calls the methods of the objects that were registered.
2. The order in which plugins were installed chooses nothing. A class is used when the
   command line or a request names it, and two classes with the same name end the start.
3. A hook of several plugins is called for all of them, in the order of pluggy: last
   registered first, ``@hookimpl(tryfirst=True)`` before and ``trylast=True`` after the
   others.
4. A function may leave out arguments that it does not need. Hook wrappers are refused.
"""

import argparse
from typing import TYPE_CHECKING, Any, Callable, List, Optional, Type

from pluggy import HookspecMarker

from .interfaces import (
    BatchSampler,
    Constraint,
    EvictionPolicy,
    RequestInfo,
    RequestStats,
    SchedulerPolicy,
)
from .routes import Route

if TYPE_CHECKING:
    import mlx.core as mx

hookspec = HookspecMarker("mlx_lm_ext")


@hookspec
def mlx_lm_add_arguments(parser: argparse.ArgumentParser) -> None:
    """Adds flags to the command line.

    Called once at the start, before the arguments are parsed, on the main thread. The
    registered classes get the parsed arguments as ``args``.

    It may only add. A flag that exists already, and anything that the hook raises, ends
    the start with exit code 2. What it returns is ignored::

        @hookimpl
        def mlx_lm_add_arguments(parser):
            parser.add_argument("--cost-weight", type=float, default=1.0)
    """


@hookspec
def mlx_lm_register_eviction_policies() -> List[Type[EvictionPolicy]]:
    """Gives classes for ``--eviction-policy``: what leaves the full prompt cache.

    Called once at the start, after the arguments are parsed, on the main thread.

    It returns a list of classes that derive from ``interfaces.EvictionPolicy``, and makes
    no objects of them. What it raises ends the start with exit code 2, and so does a class
    without a name, or one that lacks an abstract method. If a policy raises while the
    server runs, ``lru`` replaces it::

        class LargestFirst(EvictionPolicy):
            name = "largest"
            def priority(self, entry): return -entry.nbytes

        @hookimpl
        def mlx_lm_register_eviction_policies():
            return [LargestFirst]
    """


@hookspec
def mlx_lm_register_scheduler_policies() -> List[Type[SchedulerPolicy]]:
    """Gives classes for ``--scheduler``: which request starts next.

    Called once at the start, after the arguments are parsed, on the main thread.

    It returns a list of classes that derive from ``interfaces.SchedulerPolicy``, and makes
    no objects of them. What it raises ends the start with exit code 2, and so does a class
    without a name. If a policy raises while the server runs, or ``order`` returns a
    request twice or one that does not wait, ``fcfs`` replaces it::

        class ShortestFirst(SchedulerPolicy):
            name = "shortest"
            def order(self, waiting, view): return sorted(waiting, key=lambda r: r.n_prompt)

        @hookimpl
        def mlx_lm_register_scheduler_policies():
            return [ShortestFirst]
    """


@hookspec
def mlx_lm_register_samplers() -> List[Type[BatchSampler]]:
    """Gives classes for ``--sampler``, or ``"sampler"`` in a request: how tokens are chosen.

    Called once at the start, after the arguments are parsed, on the main thread.

    It returns a list of classes that derive from ``interfaces.BatchSampler``, and makes no
    objects of them. What it raises ends the start with exit code 2, and so does a class
    without a name, or one that lacks an abstract method. If a sampler raises while the
    server runs, or returns an array of another shape, ``default`` replaces it for all rows
    that use it::

        class Coldest(BatchSampler):
            name = "coldest"
            def __call__(self, logprobs): return mx.argmax(logprobs, axis=-1)

        @hookimpl
        def mlx_lm_register_samplers():
            return [Coldest]
    """


@hookspec
def mlx_lm_make_logits_processors(
    request: RequestInfo, tokenizer: Any, args: argparse.Namespace
) -> Optional[List[Callable[["mx.array", "mx.array"], "mx.array"]]]:
    """Gives mlx-lm's logits processors for one request.

    Called each time a request starts to run, on the generation thread, with the model's
    ``TokenizerWrapper`` and the command line. It may not block.

    It returns a list of functions ``processor(tokens, logits)`` that give logits of the same
    shape, or None for a request that it leaves alone. ``tokens`` are all tokens that the row
    has run, those of the prompt included, of shape (n,): the last one is the token that gave
    the logits. ``logits`` have the shape (1, vocabulary). The processors of all plugins run
    in the order of the calls, after the penalties of the request. They may not evaluate what
    they are given.

    When a step of the batch has failed, or there was no memory for its KV for a while, a
    request goes on after the tokens that it has, and the hook is called again for it. A
    processor with a state of its own has to rebuild it then: from the ``tokens`` of its first
    call, in which ``request.n_prompt`` tokens are the prompt and the rest is generated.

    A word has several spellings in tokens, as ``" yes"`` and ``"yes"``: a processor that
    forbids a word has to forbid each of them. If the hook raises, or a processor does, the
    request fails, because what it was to forbid must not be generated. A hook may raise
    ``mlx_lm_ext.errors.RequestError`` to refuse a request, with what the client is told::

        @hookimpl
        def mlx_lm_make_logits_processors(request, tokenizer):
            if "never" in request.body:
                word = request.body["never"]
                spellings = [tokenizer.encode(t, add_special_tokens=False) for t in (word, " " + word)]
                tokens = mx.array([ids[0] for ids in spellings if len(ids) == 1])
                return [lambda _, logits: logits.at[:, tokens].add(-mx.inf)]
    """


@hookspec
def mlx_lm_make_constraint(
    request: RequestInfo, tokenizer: Any, args: argparse.Namespace
) -> Optional[Constraint]:
    """Gives what restricts the tokens of one answer.

    Called once for each prompt of a request, when it has been tokenized, on the thread of the
    connection and in its turn: few requests are prepared at a time. It may take a while, such as
    to compile a grammar. Those that run go on meanwhile; those that wait for a turn wait longer.
    Requests with images are tokenized later.

    It returns an object of a class that derives from ``interfaces.Constraint``, or None for a
    request that it leaves alone. The object is not used itself: each answer (``n``) gets a
    copy. If two plugins give one, the request is refused; if the hook raises, it fails. A hook
    may raise ``mlx_lm_ext.errors.RequestError`` to refuse a request, with what the client is
    told::

        class Only(Constraint):
            def __init__(self, tokens): self.tokens = tokens
            def advance(self, token): pass
            def fill(self, mask):
                mask[:] = 0
                for token in self.tokens: mask[token // 32] |= 1 << token % 32

        @hookimpl
        def mlx_lm_make_constraint(request, tokenizer):
            if "only" in request.body:
                tokens = tokenizer.encode(request.body["only"], add_special_tokens=False)
                return Only({*tokens, *tokenizer.eos_token_ids})
    """


@hookspec
def mlx_lm_register_routes(args: argparse.Namespace) -> List[Route]:
    """Gives routes of HTTP: a protocol, a page, or figures.

    Called once at the start, after the arguments are parsed, on the main thread.

    It returns a list of ``routes.Route``, and may leave out those that the command line does
    not ask for. What it raises ends the start with exit code 2, and so does a route that the
    server or another plugin has already. The functions are called on the threads of the
    connections, several at a time. What one raises fails its request only::

        def count(request):
            return {"count": len(request.tokenize(request.json()))}

        @hookimpl
        def mlx_lm_register_routes():
            return [Route("POST", "/count", count)]
    """


@hookspec
def mlx_lm_request_finished(
    request: RequestInfo, stats: RequestStats, args: argparse.Namespace
) -> None:
    """Observes the end of a request.

    Called once for each request that the engine has taken, after its answer was sent or
    has failed, on the thread of its connection: several at a time.

    It may block, which delays only the next request of that connection. What it returns is
    ignored, and what it raises is logged::

        @hookimpl
        def mlx_lm_request_finished(request, stats):
            print(request.id, stats.finish_reason, stats.completion_tokens)
    """
