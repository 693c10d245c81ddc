"""Compare this server with another one on the same model.

    mlx_lm.batch_compare --plot comparison.svg

Rules:
1. The servers take turns, A B A B, so that a change of the machine's speed affects both.
2. The result is the ratio within a turn. It is printed with its spread.
"""

import argparse
import json
import shlex
import subprocess
import sys
import time
from functools import partial
from pathlib import Path
from typing import Any, Dict, List, Optional, Tuple

from mlx_lm_ext.arguments import ArgumentParser, number
from mlx_lm_ext.bench import timings
from mlx_lm_ext.bench.arguments import counts, output_file, plot_file, some_of
from mlx_lm_ext.bench.contenders import (
    Contender,
    add_contender_arguments,
    make_contenders,
    take_turns,
)
from mlx_lm_ext.bench.outcomes import Figure, Outcome
from mlx_lm_ext.bench.workloads import SWEEP_FIGURES, SWEEPS, WORKLOADS, Plan, Run
from mlx_lm_ext.descriptors import limit_kept

try:
    from tqdm import tqdm
except ImportError as e:
    raise SystemExit(f"error: {e}; pip install 'mlx-lm-ext[bench]'")


def make_parser() -> argparse.ArgumentParser:
    parser = ArgumentParser(
        prog="mlx_lm.batch_compare",
        description="Compare mlx_lm.batch_server with another OpenAI-compatible server.",
        formatter_class=argparse.ArgumentDefaultsHelpFormatter,
    )
    add_contender_arguments(parser)
    add = parser.add_argument
    add(
        "--workloads",
        type=some_of(WORKLOADS),
        default=",".join(name for name, w in WORKLOADS.items() if not w.heavy),
        help=f"all, none, or some of {','.join(WORKLOADS)}",
    )
    add(
        "--sweeps",
        type=some_of(SWEEPS),
        default="none",
        help=f"all, none, or some of {','.join(SWEEPS)}: how the figures change with a "
        "size, in one turn",
    )
    add(
        "--rounds",
        type=number(int, 1),
        default=2,
        help="turns of each server with each workload",
    )
    add(
        "--clients",
        type=counts,
        default="1,8,32",
        help="numbers of clients that send short chats",
    )
    add("--max-tokens", type=number(int, 2), default=64, help="length of the answers")
    add(
        "--markdown",
        type=output_file,
        metavar="FILE",
        help="write the table to this file too",
    )
    add("--json", type=output_file, metavar="FILE", help="write all figures")
    add(
        "--plot",
        type=plot_file,
        metavar="FILE",
        help="plot the figures as .png or .svg",
    )
    return parser


# Measuring


def run_bare(model: str, clients: List[int], max_tokens: int, seed: str) -> Dict:
    """Run ``bare_engine.py`` in a process of its own."""
    command = [sys.executable, "-m", "mlx_lm_ext.bench.bare_engine"]
    command += ["--model", model, "--max-tokens", str(max_tokens), "--seed", seed]
    command += ["--clients", *map(str, clients)]
    process = subprocess.run(command, capture_output=True, text=True)
    if process.returncode != 0:
        reason = process.stderr.strip().splitlines() or ["no output"]
        raise RuntimeError(f"the bare engine cannot run {model}: {reason[-1]}")
    return json.loads(process.stdout)


def make_plan(
    model: str, clients: List[int], max_tokens: int
) -> Tuple[Plan, Dict[str, Any]]:
    """The plan for a model, and what the bare engine says of it and of the machine.

    Raises:
        RuntimeError: If the model cannot be run.
    """
    # For the servers that are started later.
    with limit_kept():
        from mlx_lm.utils import load_tokenizer

    about = run_bare(model, [], 2, "")
    sizes = (about["bytes_per_token"], about["context_length"])
    plan = Plan(clients, max_tokens, load_tokenizer(model), *sizes)
    if plan.tokenizer.chat_template is None:
        raise RuntimeError(f"{model} has no chat template")
    return plan, about


def compare(args: argparse.Namespace, model: str, ours: Contender, theirs: Contender):
    """Run the chosen workloads and sweeps, and return the report as plain values for JSON.

    Raises:
        RuntimeError: If the model cannot be run.
    """
    plan, about = make_plan(model, args.clients, args.max_tokens)
    report = {
        "servers": {"ours": ours.name, "theirs": theirs.name},
        "model": Path(model).name,
        "rounds": args.rounds,
        "command": shlex.join(["mlx_lm.batch_compare", *sys.argv[1:]]),
        **{key: about[key] for key in ("device", "blas", "versions")},
        "workloads": [],
        "sweeps": [],
    }
    # A server that was running before may have cached the prompts of an earlier run.
    salt = time.time_ns() if args.against else ""
    n_sizes = sum(len(SWEEPS[name].sizes) for name in args.sweeps)
    n_turns = len(args.workloads) * args.rounds + n_sizes
    bar = tqdm(total=n_turns, unit="turn", file=sys.stderr)

    def show(title: str, part: Dict[str, Any]) -> None:
        """Print a turn when it ends, so that it is not lost if the rest is interrupted."""
        for line in [header(report), *table_rows(title, part)]:
            bar.write(line, file=sys.stderr)

    def take(name: str, run: Run, figures: List[Figure], rounds: int) -> Dict[str, Any]:
        """The figures of some turns, or why there are none."""
        turns, bare = [], []
        bar.set_description(name)
        for i in range(rounds):
            seed = f"{args.seed} {name} {i} {salt}"
            try:
                turns.append(take_turns([ours, theirs], args.api_key, plan, run, seed))
                if any(f.bare for f in figures):
                    result = run_bare(model, args.clients, args.max_tokens, seed)
                    bare.append(result["throughput"])
            except RuntimeError as e:
                part = {"refused": str(e), "figures": []}
                show(f"{name}, turn {i + 1}", part)
                bar.update(rounds - i)
                return part
            turn = tabulate(figures, turns[-1:], bare[-1:])
            show(f"{name}, turn {i + 1}", {"refused": None, "figures": turn})
            bar.update()
        return {"refused": None, "figures": tabulate(figures, turns, bare)}

    with bar:
        for name in args.workloads:
            workload = WORKLOADS[name]
            part = take(name, workload.run, workload.figures(plan), args.rounds)
            report["workloads"].append({"title": workload.title, **part})
        for name in args.sweeps:
            sweep = SWEEPS[name]
            points = []
            for size in sweep.sizes:
                run = partial(sweep.run, n=size)
                part = take(f"{name} {size}", run, SWEEP_FIGURES, rounds=1)
                points.append({"size": size, **part})
            report["sweeps"].append({"title": sweep.title, "points": points})
    return report


# Reporting


def tabulate(
    figures: List[Figure], turns: List[List[Outcome]], bare: List[Dict[str, float]]
) -> List[Dict[str, Any]]:
    """The figures of a workload.

    Args:
        turns (List[List[Outcome]]): For each round, ours and theirs.
        bare (List[Dict[str, float]]): For each round, the bare engine's throughputs.
    """
    rows = []
    for figure in figures:
        ours, theirs = ([figure.of(o) for o in side] for side in zip(*turns))
        row: Dict[str, Any] = {"figure": figure.name, "unit": figure.unit}
        row |= {"ours": ours, "theirs": theirs}
        row["gain"] = [
            timings.gain(a, b, figure.higher_is_better) for a, b in zip(ours, theirs)
        ]
        if figure.bare is not None:
            row["bare"] = [speeds[figure.bare] for speeds in bare]
            row["of_bare"] = [a / b for a, b in zip(ours, row["bare"])]
        rows.append(row)
    return rows


def markdown(report: Dict[str, Any]) -> str:
    """The tables of a comparison, and how they were measured."""
    head = [header(report), "|---|---|---|---|---|"]
    lines = list(head) if report["workloads"] else []
    for part in report["workloads"]:
        lines += table_rows(part["title"], part)
    for sweep in report["sweeps"]:
        lines += ["", *head]
        for part in sweep["points"]:
            lines += table_rows(f"{part['size']} {sweep['title']}", part)
    versions = ", ".join(f"{k} {v}" for k, v in report["versions"].items())
    lines += [
        "",
        f"Medians of {report['rounds']} turns of each server, with the lowest and the "
        f"highest gain; above 1, {report['servers']['ours']} is better. "
        f"{report['model']} on {report['device']}; {versions}. {report['blas']}",
        "",
        f"    {report['command']}",
    ]
    return "\n".join(lines)


def header(report: Dict[str, Any]) -> str:
    return "| | {theirs} | {ours} | gain | bare engine |".format(**report["servers"])


def table_rows(title: str, part: Dict[str, Any]) -> List[str]:
    if part["refused"]:
        return [f"| {title} | | | not compared: {part['refused']} | |"]
    rows = []
    for row in part["figures"]:
        name = f"{row['figure']} ({row['unit']})" if row["unit"] else row["figure"]
        gain = ""
        if None not in row["gain"]:
            gain = "**{:.2f}** ({:.2f} to {:.2f})".format(*timings.spread(row["gain"]))
        bare = ""
        if "bare" in row:
            bare = (
                f"{digits(row['bare'])} (here {timings.spread(row['of_bare'])[0]:.0%})"
            )
        cells = [f"{title}: {name}", digits(row["theirs"]), digits(row["ours"]), gain]
        rows.append(f"| {' | '.join(cells)} | {bare} |")
    return rows


def digits(values: List[Optional[float]]) -> str:
    """The median with three digits."""
    if None in values:
        return "unknown"
    median = timings.spread(values)[0]
    return f"{median:,.0f}" if median >= 100 else f"{median:.3g}"


def main(argv: Optional[List[str]] = None) -> None:
    """Compare, and exit with 1 if something could not be compared."""
    args = make_parser().parse_args(argv)
    model, ours, theirs = make_contenders(args)
    try:
        report = compare(args, model, ours, theirs)
    except (RuntimeError, OSError) as e:
        raise SystemExit(f"error: {e}")
    except KeyboardInterrupt:
        raise SystemExit("interrupted")
    table = markdown(report)
    print(table)
    if args.markdown:
        args.markdown.write_text(table + "\n")
    if args.json:
        args.json.write_text(json.dumps(report, indent=2) + "\n")
    if args.plot:
        from mlx_lm_ext.bench import plots

        plots.save_comparison(report, args.plot)
    parts = report["workloads"] + [p for s in report["sweeps"] for p in s["points"]]
    if any(part["refused"] for part in parts):
        raise SystemExit(1)


if __name__ == "__main__":
    main()
