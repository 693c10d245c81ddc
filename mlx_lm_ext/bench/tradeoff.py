"""Draw how long streams stall against how long new requests wait, for flags of this server.

    python -m mlx_lm_ext.bench.tradeoff --flags "--prefill-budget 64" --plot tradeoff.svg

Rules:
1. This server runs without flags, then with each of them. The other server comes last.
2. They take turns, as in a comparison.
"""

import argparse
import json
import time
from functools import partial
from typing import Any, Dict, List, Optional

from mlx_lm_ext.arguments import ArgumentParser, number
from mlx_lm_ext.bench import plots, servers
from mlx_lm_ext.bench.arguments import output_file, plot_file
from mlx_lm_ext.bench.compare import digits, make_plan
from mlx_lm_ext.bench.contenders import (
    add_contender_arguments,
    make_contenders,
    take_turns,
)
from mlx_lm_ext.bench.outcomes import pace_figures
from mlx_lm_ext.bench.workloads import WORKLOADS

FIGURES = {f.name: f for f in pace_figures()}


def make_parser() -> argparse.ArgumentParser:
    parser = ArgumentParser(
        prog="tradeoff",
        description="Measure this server with several flags, beside another server.",
        formatter_class=argparse.ArgumentDefaultsHelpFormatter,
    )
    add_contender_arguments(parser)
    add = parser.add_argument
    add(
        "--flags",
        nargs="+",
        action="extend",
        required=True,
        metavar="FLAGS",
        help="flags to add to --server, each in quotes with its value; --flags=FLAG for "
        "one without a value",
    )
    add("--workload", choices=WORKLOADS, default="mixed", help="what to measure")
    add("--rounds", type=number(int, 1), default=2, help="turns of each server")
    add("--max-tokens", type=number(int, 2), default=64, help="length of answers")
    add("--json", type=output_file, metavar="FILE", help="write all figures")
    add("--plot", type=plot_file, metavar="FILE", help="write a .png or .svg")
    return parser


def measure(args: argparse.Namespace) -> List[Dict[str, Any]]:
    """The figures of each server in each turn.

    Raises:
        RuntimeError: If the servers cannot be compared.
    """
    model, ours, theirs = make_contenders(args)
    contenders = [ours._replace(name="no flags")]
    contenders += [
        ours._replace(
            name=flags, serve=partial(servers.start, f"{args.server} {flags}", model)
        )
        for flags in args.flags
    ]
    contenders.append(theirs)
    plan, _ = make_plan(model, [], args.max_tokens)
    run = WORKLOADS[args.workload].run
    # A server that was running before may have cached the prompts of an earlier run.
    salt = time.time_ns() if args.against else ""
    turns = [
        take_turns(contenders, args.api_key, plan, run, f"{args.seed} {i} {salt}")
        for i in range(args.rounds)
    ]
    return [
        {
            "name": contender.name,
            "ours": contender is not theirs,
            "figures": {n: [f.of(o) for o in outcomes] for n, f in FIGURES.items()},
        }
        for contender, outcomes in zip(contenders, zip(*turns))
    ]


def table(points: List[Dict[str, Any]]) -> str:
    """A row for each server, with the medians of its turns."""
    names = [f"{f.name} ({f.unit})" if f.unit else f.name for f in FIGURES.values()]
    rows = [["", *names], ["---"] * (1 + len(names))]
    rows += [[p["name"], *map(digits, p["figures"].values())] for p in points]
    return "\n".join(f"| {' | '.join(row)} |" for row in rows)


def main(argv: Optional[List[str]] = None) -> None:
    """Measure, print the table, and write the files."""
    args = make_parser().parse_args(argv)
    try:
        points = measure(args)
    except (RuntimeError, OSError) as e:
        raise SystemExit(f"error: {e}")
    except KeyboardInterrupt:
        raise SystemExit("interrupted")
    print(table(points))
    if args.json:
        args.json.write_text(json.dumps(points, indent=2) + "\n")
    if args.plot:
        title = WORKLOADS[args.workload].title
        axes = (FIGURES["p99 gap"], FIGURES["median TTFT"])
        plots.save_tradeoff(points, title, *axes, args.plot)


if __name__ == "__main__":
    main()
