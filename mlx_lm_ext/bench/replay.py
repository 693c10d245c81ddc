"""Replay the requests of a trace with several policies, without a model and in simulated time.

    python -m mlx_lm_ext.bench.replay trace.jsonl --eviction-policy lru,gdsf --scheduler fcfs,fair

The engine is that of the server, with the flags of its batch, its cache and its plugins; see
``simulated_engine.py``.
"""

import argparse
import logging
from contextlib import contextmanager
from itertools import product
from pathlib import Path
from typing import Any, Dict, Iterator, List, Optional, Sequence, Tuple

from mlx_lm_ext.arguments import (
    ArgumentParser,
    add_batch_arguments,
    add_cache_arguments,
    add_plugin_arguments,
)
from mlx_lm_ext.arguments import make_parser as make_server_parser
from mlx_lm_ext.arguments import names, number
from mlx_lm_ext.bench.arguments import plot_file
from mlx_lm_ext.bench.arrivals import Arrival, Outcome
from mlx_lm_ext.bench.fit_costs import MIN_STEP, fit_costs
from mlx_lm_ext.bench.generators import GENERATORS, generate
from mlx_lm_ext.bench.replay_figures import figures
from mlx_lm_ext.bench.simulated_engine import Costs, replay
from mlx_lm_ext.bench.traces import read_trace
from mlx_lm_ext.policies.loading import PluginError, Plugins

# The default model in float32 on two cores, from the tables of the README: 21.4 tokens a second
# of one client and 164 of 32, and 6.4 seconds for a prompt of 1,500 tokens. Its KV: keys and
# values of 30 layers, with 3 heads of 64 values of 4 bytes.
DEFAULT_COSTS = Costs(step=0.042, row=0.0048, token=0.0043)
DEFAULT_KV_BYTES = 2 * 30 * 3 * 64 * 4

# The row of a trace that was recorded here.
RECORDED = "recorded"
# What a row of the table has: the name of its policies, and how the requests went.
Run = Tuple[str, List[Outcome]]
# The figures of each row by their names. One that cannot be computed is None.
Rows = Dict[str, Dict[str, Optional[float]]]


def policy_names(text: str) -> List[str]:
    """An argument type: names of policies, separated by commas."""
    if not all(name.strip() for name in text.split(",")):
        raise argparse.ArgumentTypeError(f"{text!r} has an empty name")
    return names(text)


def make_parser() -> argparse.ArgumentParser:
    parser = ArgumentParser(
        prog="replay",
        description="Replay the requests of a trace with several policies, without a model.",
        formatter_class=argparse.ArgumentDefaultsHelpFormatter,
        # Several policies may be named here.
        conflict_handler="resolve",
    )
    parser.add_argument(
        "trace",
        metavar="TRACE",
        help="a file of --record-trace or a public one (see traces.py), or generated "
        f"requests: {', '.join(GENERATORS)} (see generators.py)",
    )
    add_batch_arguments(parser)
    add_cache_arguments(parser)
    add_plugin_arguments(parser)
    add = parser.add_argument_group("replay").add_argument
    for flag, what in (
        ("--eviction-policy", "eviction policies"),
        ("--scheduler", "scheduler policies"),
    ):
        add(
            flag,
            type=policy_names,
            action="extend",
            metavar="NAME",
            help=f"{what}, with commas between them or repeated: each runs with each of the "
            "other kind; unset, that of the server",
        )
    seconds = number(float, 0, 1e6)
    add(
        "--step-seconds",
        # Time has to pass.
        type=number(float, MIN_STEP, 1e6),
        default=DEFAULT_COSTS.step,
        help="what a call of the model takes at least",
    )
    add(
        "--row-seconds",
        type=seconds,
        default=DEFAULT_COSTS.row,
        help="what each request adds to a decode step",
    )
    add(
        "--token-seconds",
        type=seconds,
        default=DEFAULT_COSTS.token,
        help="what a token of a prompt takes",
    )
    add(
        "--fit-costs",
        action="store_true",
        help="take these three from the times that were recorded, see fit_costs.py",
    )
    add(
        "--kv-bytes-per-token",
        type=number(int, 1),
        default=DEFAULT_KV_BYTES,
        metavar="BYTES",
        help="what the KV of a token takes, for the limits in bytes",
    )
    add(
        "--requests",
        type=number(int, 1),
        default=500,
        help="generated requests",
    )
    add(
        "--rate",
        type=number(float, 1e-6),
        default=0.3,
        help="generated chats, or single requests, a second",
    )
    add(
        "--length-scale",
        type=number(float, 1e-6, 1e3),
        default=1.0,
        help="what the lengths of generated prompts and answers are multiplied by",
    )
    add("--seed", type=int, default=0, help="of what is generated")
    add(
        "--window",
        type=number(float, 0.1),
        default=10.0,
        metavar="SECONDS",
        help="windows of time for the fairness, see replay_figures.py",
    )
    add("--plot", type=plot_file, metavar="FILE", help="write a .png or .svg")
    return parser


def parse_arguments(argv: Optional[List[str]]) -> Tuple[argparse.Namespace, Plugins]:
    """The command line, with the flags of plugins, and the plugins."""
    parser = make_parser()
    first = ArgumentParser(prog=parser.prog, add_help=False, allow_abbrev=False)
    first.add_argument("-p", action="append", default=[])
    try:
        plugins = Plugins(first.parse_known_args(argv)[0].p)
        plugins.add_arguments(parser)
    except PluginError as e:
        parser.error(str(e))
    # What the engine reads of the other flags of the server has its default.
    defaults = make_server_parser().parse_args([])
    del defaults.eviction_policy, defaults.scheduler
    args = parser.parse_args(argv, defaults)
    if args.kv_bits is not None:
        parser.error("--kv-bits: requests that run one at a time cannot be replayed")
    if args.list_plugins:
        print(plugins.describe(args))
        parser.exit()
    return args, plugins


def read_arrivals(args: argparse.Namespace) -> List[Arrival]:
    """The requests that the command line names.

    Raises:
        OSError, ValueError: If they cannot be read.
    """
    if args.trace in GENERATORS:
        return generate(
            args.trace, args.requests, args.rate, args.length_scale, args.seed
        )
    try:
        return read_trace(Path(args.trace))
    except FileNotFoundError:
        known = ", ".join(GENERATORS)
        raise ValueError(f"there is no file {args.trace}; what is generated is {known}")


def run_all(args: argparse.Namespace, plugins: Plugins) -> List[Run]:
    """Replay the requests with all policies. If it is known how they went when they were
    recorded, this comes first.

    Raises:
        OSError, ValueError: If the trace cannot be read.
        PluginError: If a policy cannot be used.
        RuntimeError: If a replay fails.
    """
    arrivals = read_arrivals(args)
    runs: List[Run] = []
    measured = [a.measured for a in arrivals if a.measured is not None]
    costs = Costs(args.step_seconds, args.row_seconds, args.token_seconds)
    if args.fit_costs:
        costs = fit_costs(measured)
        fitted = (
            f"--{name}-seconds {value:.3g}" for name, value in costs._asdict().items()
        )
        print(f"fitted: {' '.join(fitted)}\n")
    if measured:
        runs.append((RECORDED, measured))
    for eviction, scheduler in product(
        dict.fromkeys(args.eviction_policy or ["lru"]),
        dict.fromkeys(args.scheduler or ["fcfs"]),
    ):
        policies = dict(eviction_policy=eviction, scheduler=scheduler)
        own = argparse.Namespace(**vars(args) | policies)
        outcomes = replay(arrivals, own, plugins, costs, args.kv_bytes_per_token)
        runs.append((f"{eviction}, {scheduler}", outcomes))
    return runs


def table(found: Rows, columns: Sequence[str]) -> str:
    """A row of Markdown for each run."""
    rows = [["policies", *columns], ["---"] * (1 + len(columns))]
    for name, values in found.items():
        cells = ("" if v is None else f"{v:.3g}" for v in values.values())
        rows.append([name, *cells])
    return "\n".join(f"| {' | '.join(row)} |" for row in rows)


def failures(runs: Sequence[Run]) -> List[str]:
    """A line for each run in which requests have failed."""
    counts: Dict[str, int] = {
        name: sum(o.stats.finish_reason == "error" for o in outcomes)
        for name, outcomes in runs
    }
    return [
        f"{name}: {n} of the requests had no room or no time for their answers"
        for name, n in counts.items()
        if n
    ]


def hints(args: argparse.Namespace, found: Rows) -> List[str]:
    """Why a figure cannot be compared, and what would help."""
    lines = []
    if all(values["fairness"] is None for values in found.values()):
        lines.append(
            "fairness: there is none, because no two users have waited at the same time"
        )
    if RECORDED in found and not args.fit_costs:
        lines.append(
            "recorded: the other rows do not have the costs of this row's server; "
            "--fit-costs finds them in its times"
        )
    return lines


@contextmanager
def only_errors() -> Iterator[None]:
    """Log errors only: warnings speak of bytes, which are scaled here."""
    package = logging.getLogger("mlx_lm_ext")
    level = package.level
    package.setLevel(logging.ERROR)
    try:
        yield
    finally:
        package.setLevel(level)


def main(argv: Optional[List[str]] = None) -> None:
    """Replay, print the table, and write the plot."""
    args, plugins = parse_arguments(argv)
    plots: Any = None
    if args.plot:
        # It needs matplotlib, which the table does not.
        from mlx_lm_ext.bench import plots
    try:
        with only_errors():
            runs = run_all(args, plugins)
    except (OSError, PluginError, RuntimeError, ValueError) as e:
        raise SystemExit(f"error: {e}")
    except KeyboardInterrupt:
        raise SystemExit("interrupted")
    columns = figures(args.window)
    found = {name: {f.name: f.of(o) for f in columns} for name, o in runs}
    titles = [f.name for f in columns]
    print(table(found, titles))
    for line in [*failures(runs), *hints(args, found)]:
        print(line)
    if args.plot:
        values = {name: [*row.values()] for name, row in found.items()}
        plots.save_replay(titles, values, args.plot)


if __name__ == "__main__":
    main()
