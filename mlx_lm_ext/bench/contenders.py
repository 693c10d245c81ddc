"""The servers of a comparison, and the turns that they take.

Rules:
1. All get the same requests, each started anew for them.
2. Outcomes are compared only if no request failed and all answers have the same length.
"""

import argparse
import asyncio
import shlex
from contextlib import nullcontext
from functools import partial
from importlib.metadata import version
from random import Random
from typing import Callable, ContextManager, List, NamedTuple, Optional, Tuple

from mlx_lm_ext import demo_model
from mlx_lm_ext.bench import servers, timings
from mlx_lm_ext.bench.chat_client import Client
from mlx_lm_ext.bench.outcomes import Outcome
from mlx_lm_ext.bench.servers import Server
from mlx_lm_ext.bench.workloads import Plan, Run

try:
    import aiohttp
except ImportError as e:
    raise SystemExit(f"error: {e}; pip install 'mlx-lm-ext[bench]'")


class Contender(NamedTuple):
    """A server to compare: its name, how to run it, and the model it is asked for."""

    name: str
    serve: Callable[[], ContextManager[Server]]
    model: str = "default_model"


def add_contender_arguments(parser: argparse.ArgumentParser) -> None:
    """The arguments that name the model and the servers."""
    add = parser.add_argument
    add("--model", help=f"path of the model; without it, {demo_model.NAME}")
    add(
        "--server",
        default=servers.OURS,
        metavar="COMMAND",
        help="command of this server; --model and --port are added to it",
    )
    add(
        "--other",
        default=servers.THEIRS,
        metavar="COMMAND",
        help="command of the other server; --model and --port are added to it, unless "
        "{model} and {port} in it are their places",
    )
    add(
        "--against",
        metavar="URL",
        help="compare with a server that runs already at this base URL",
    )
    add("--other-model", default="default_model", help="model to ask the other for")
    add("--api-key", default="EMPTY", help="key that the other server asks for")
    add("--seed", type=int, default=0, help="determines all prompts")


def make_contenders(args: argparse.Namespace) -> Tuple[str, Contender, Contender]:
    """The model, this server and the other one, by the arguments."""
    model = args.model
    if model is None:
        import mlx.core as mx

        model = str(demo_model.ensure(mx.default_device() != mx.cpu))
    ours = Contender(
        f"mlx_lm.batch_server {version('mlx-lm-ext')}",
        partial(servers.start, args.server, model),
    )
    theirs = Contender(
        f"mlx_lm.server {version('mlx-lm')}",
        partial(servers.start, args.other, model),
        args.other_model,
    )
    if args.against:
        asyncio.run(check(args.against, args.api_key))
        running = Server(args.against)
        theirs = theirs._replace(name=args.against, serve=lambda: nullcontext(running))
    elif args.other != servers.THEIRS:
        theirs = theirs._replace(name=shlex.split(args.other)[0])
    return model, ours, theirs


async def check(url: str, key: str) -> None:
    """Exit with one line if no server answers at ``url``."""
    try:
        async with session(key) as s, s.get(f"{url}/models") as response:
            if response.status in (401, 403):
                raise SystemExit(
                    f"error: {url} refuses the key: HTTP {response.status}"
                )
    except (aiohttp.ClientError, OSError) as e:
        raise SystemExit(f"error: no server answers at {url} ({e})")


def session(key: str) -> aiohttp.ClientSession:
    return aiohttp.ClientSession(
        headers={"Authorization": f"Bearer {key}"},
        connector=aiohttp.TCPConnector(limit=0),
        timeout=aiohttp.ClientTimeout(None),
    )


async def measure(
    server: Server, model: str, key: str, plan: Plan, run: Run, seed: str
) -> Outcome:
    """Run one workload on a server that is ready."""
    async with session(key) as s:
        client = Client(s, server.url, model)
        hello = [{"role": "user", "content": "Hello"}]
        await client.chat(hello, 2)  # the model may still be loading
        outcome = await run(plan, client, Random(seed))
        # mlx_lm.server logs the size of its cache when a request arrives.
        await client.chat(hello, 2)
        outcome.cache_bytes = server.cache_bytes()
        outcome.peak_memory = server.peak_memory()
        return outcome


def take_turns(
    contenders: List[Contender], key: str, plan: Plan, run: Run, seed: str
) -> List[Outcome]:
    """Run one workload on each contender, which is started for it.

    Raises:
        RuntimeError: If the outcomes cannot be compared.
    """
    outcomes = []
    for contender in contenders:
        with contender.serve() as server:
            outcomes.append(
                asyncio.run(measure(server, contender.model, key, plan, run, seed))
            )
    if reason := objection([c.name for c in contenders], outcomes):
        raise RuntimeError(reason)
    return outcomes


def objection(names: List[str], outcomes: List[Outcome]) -> Optional[str]:
    """Why the outcomes of one turn cannot be compared, or ``None`` if they can."""
    for name, outcome in zip(names, outcomes):
        if errors := [t.error for t in outcome.timings if t.error is not None]:
            n = len(outcome.timings)
            return f"{len(errors)} of {n} requests to {name} failed: {errors[0]}"
    lengths = [timings.generated_tokens(o.timings) for o in outcomes]
    if len(set(lengths)) > 1:
        told = " and ".join(f"{n} from {name}" for name, n in zip(names, lengths))
        return f"different numbers of tokens: {told}"
    return None
