"""Plots of a run, a comparison, a trade-off and a replay."""

from pathlib import Path
from textwrap import fill
from typing import Any, Dict, List, Optional

from mlx_lm_ext.bench import timings
from mlx_lm_ext.bench.outcomes import Figure
from mlx_lm_ext.bench.timings import Timing

try:
    import matplotlib
except ImportError as e:
    raise SystemExit(f"error: {e}; pip install 'mlx-lm-ext[bench]'")

matplotlib.use("agg")  # works without a screen
import matplotlib.pyplot as plt
import numpy as np
from matplotlib.ticker import LogLocator

OURS, THEIRS = "tab:blue", "tab:orange"


def save(figure: plt.Figure, path: Path) -> None:
    # Makes the file depend on the figures only.
    plt.rcParams["svg.hashsalt"] = "mlx-lm-ext"
    figure.savefig(
        path, dpi=100, metadata={"Date": None} if path.suffix == ".svg" else {}
    )
    plt.close(figure)


def save_run(run: List[Timing], path: Path) -> None:
    """Plot throughput and running requests over time, and histograms of TTFT and ITL."""
    figure, axes = plt.subplots(2, 2, figsize=(10, 6.5), layout="constrained")
    (speed, ttft), (running, itl) = axes

    edges, rates = timings.throughput_over_time(run)
    speed.stairs(rates, edges, fill=True, color=OURS)
    speed.set(title="Throughput", xlabel="seconds", ylabel="tokens / s", ylim=(0, None))
    times, counts = timings.running_over_time(run)
    running.step(times, counts, where="post", color=OURS)
    running.set(
        title="Running requests", xlabel="seconds", ylabel="requests", ylim=(0, None)
    )

    done = timings.succeeded(run)
    for axis, name, of, scale, unit in (
        (ttft, "TTFT", lambda t: t.ttft, 1, "seconds"),
        (itl, "ITL", lambda t: t.itl, 1000, "milliseconds"),
    ):
        values = [of(t) * scale for t in done if of(t) is not None]
        axis.set(title=name, xlabel=unit, ylabel="requests")
        if values:
            axis.hist(values, bins=20, color=OURS)
        else:
            axis.text(0.5, 0.5, "not known without --stream", ha="center")
            axis.set(xticks=[], yticks=[])
    save(figure, path)


def save_comparison(report: Dict[str, Any], path: Path) -> None:
    """Plot the gains of all figures as bars, and each sweep as a column of curves."""
    rows = [
        (fill(f"{part['title']}: {row['figure']}", 48), timings.spread(row["gain"]))
        for part in report["workloads"]
        for row in part["figures"]
        if None not in row["gain"]
    ]
    sweeps = report["sweeps"]
    heights = [1 + 0.4 * len(rows)] * bool(rows) + [7] * bool(sweeps)
    figure = plt.figure(figsize=(10, sum(heights) or 1), layout="constrained")
    parts = list(
        figure.subfigures(len(heights), 1, height_ratios=heights, squeeze=False).flat
    )
    if rows:
        draw_gains(parts.pop(0).subplots(), rows, report["servers"])
    if sweeps:
        draw_sweeps(parts.pop(0), sweeps, report["servers"])
    save(figure, path)


def save_tradeoff(
    points: List[Dict[str, Any]], title: str, x: Figure, y: Figure, path: Path
) -> None:
    """Plot one figure against another: a point for each server, with the spread of its turns.

    Args:
        points (List[Dict[str, Any]]): Of each server the ``name``, whether it is ``ours``, and
          its ``figures``: by their names, the values in all turns.
    """
    figure, axis = plt.subplots(figsize=(8, 6), layout="constrained")
    for point in points:
        values = [point["figures"][f.name] for f in (x, y)]
        # What is not known has no place.
        if None in values[0] + values[1]:
            continue
        spreads = [timings.spread(v) for v in values]
        at = [median for median, _, _ in spreads]
        x_error, y_error = (
            [[median - low], [high - median]] for median, low, high in spreads
        )
        color = OURS if point["ours"] else THEIRS
        axis.errorbar(*at, y_error, x_error, fmt="o", color=color, elinewidth=0.5)
        axis.annotate(point["name"], at, (5, 5), textcoords="offset points")
    axis.set(
        title=title,
        xscale="log",
        yscale="log",
        xlabel=f"{x.name} ({x.unit})",
        ylabel=f"{y.name} ({y.unit})",
    )
    axis.margins(0.2)
    axis.minorticks_off()
    for one in (axis.xaxis, axis.yaxis):
        one.set_major_locator(LogLocator(subs=(1, 2, 5)))
        one.set_major_formatter("{x:g}")
    save(figure, path)


def save_replay(
    names: List[str], values: Dict[str, List[Optional[float]]], path: Path
) -> None:
    """Plot the figures of a replay: a panel for each, with a bar for each run.

    Args:
        names (List[str]): The names of the figures.
        values (Dict[str, List[Optional[float]]]): The figures of each run, by its name.
    """
    size = (3.2 * len(names), 1.2 + 0.4 * len(values))
    figure, axes = plt.subplots(
        1, len(names), figsize=size, layout="constrained", sharey=True, squeeze=False
    )
    runs = list(reversed(values))
    for i, (axis, name) in enumerate(zip(axes[0], names)):
        # What is not known has no bar.
        lengths = [np.nan if (v := values[run][i]) is None else v for run in runs]
        bars = axis.barh(runs, lengths, color=OURS)
        texts = ["" if np.isnan(v) else f"{v:.3g}" for v in lengths]
        axis.bar_label(bars, texts, padding=2)
        axis.set(title=name)
        # Room for the longest text.
        axis.margins(x=0.3)
        axis.set_xlim(left=0)
    save(figure, path)


def draw_gains(axis: plt.Axes, rows: List[Any], servers: Dict[str, str]) -> None:
    names, spreads = zip(*reversed(rows))
    medians = [median for median, _, _ in spreads]
    errors = [
        [median - low for median, low, _ in spreads],
        [high - median for median, _, high in spreads],
    ]
    axis.barh(names, [m - 1 for m in medians], left=1, xerr=errors, color=OURS)
    axis.axvline(1, color="black", linewidth=1)
    axis.set(
        xscale="log",
        xlabel=f"gain over {servers['theirs']} (right of 1: better)",
    )
    axis.xaxis.set_major_formatter("{x:g}")
    axis.xaxis.set_minor_formatter("{x:g}")


def draw_sweeps(figure: Any, sweeps: List[Any], servers: Dict[str, str]) -> None:
    n_figures = max(len(p["figures"]) for s in sweeps for p in s["points"])
    axes = figure.subplots(n_figures, len(sweeps), squeeze=False)
    for column, sweep in enumerate(sweeps):
        points = [p for p in sweep["points"] if not p["refused"]]
        sizes = [p["size"] for p in points]
        for row in range(n_figures if points else 0):
            axis = axes[row][column]
            curves = [p["figures"][row] for p in points]
            for side, color in (("theirs", THEIRS), ("ours", OURS)):
                # An unknown value leaves a gap in the curve.
                values = [
                    np.median([np.nan if v is None else v for v in c[side]])
                    for c in curves
                ]
                axis.plot(sizes, values, "o-", color=color, label=servers[side])
            axis.set(
                xscale="log",
                ylim=(0, None),
                xlabel=sweep["title"],
                ylabel=f"{curves[0]['figure']} ({curves[0]['unit']})",
            )
            axis.set_xticks(sizes, [str(s) for s in sizes])
            axis.minorticks_off()
    axes[0][0].legend()
