"""The picture of gaps against TTFT, on servers of this process."""

import json
from contextlib import nullcontext
from functools import partial

import pytest

from mlx_lm_ext.bench import plots, servers, tradeoff
from mlx_lm_ext.bench.servers import Server
from mlx_lm_ext.bench.workloads import WORKLOADS, Workload, wave

AXES = [tradeoff.FIGURES[name] for name in ("p99 gap", "median TTFT")]


def point(name, gaps, ttfts, ours=True):
    figures = {"p99 gap": gaps, "median TTFT": ttfts}
    return {"name": name, "ours": ours, "figures": figures}


@pytest.fixture
def started(start_server, monkeypatch):
    """The commands that were started, in place of which a server of this process answers."""
    engine, port = start_server()
    commands = []

    def start(command, model):
        commands.append(command)
        return nullcontext(Server(f"http://127.0.0.1:{port}/v1"))

    monkeypatch.setattr(servers, "start", start)
    return commands


def test_each_of_the_flags_takes_turns_with_the_other_server(
    started, model_folder, monkeypatch, tmp_path, capsys
):
    few = Workload("two chats", partial(wave, n=2), lambda plan: [])
    monkeypatch.setitem(WORKLOADS, "mixed", few)
    files = ["--json", str(tmp_path / "points.json"), "--plot", str(tmp_path / "a.svg")]
    flags = ["--flags", "--prefill-budget 64", "--prefill-budget 128", "--flags=--a"]
    sizes = ["--rounds", "2", "--max-tokens", "4"]
    argv = ["--model", str(model_folder()), "--server", "us", "--other", "them"]
    tradeoff.main([*argv, *flags, *sizes, *files])
    ours = ["", " --prefill-budget 64", " --prefill-budget 128", " --a"]
    assert started == [*(f"us{flags}" for flags in ours), "them"] * 2
    points = json.loads((tmp_path / "points.json").read_text())
    assert [p["name"] for p in points] == [
        "no flags",
        "--prefill-budget 64",
        "--prefill-budget 128",
        "--a",
        "them",
    ]
    assert [p["ours"] for p in points] == [True] * 4 + [False]
    assert all(len(p["figures"]["p99 gap"]) == 2 for p in points)
    table = capsys.readouterr().out.splitlines()
    assert len(table) == 2 + len(points)
    assert table[3].startswith("| --prefill-budget 64 | ")
    assert "<svg" in (tmp_path / "a.svg").read_text()


def test_a_point_for_each_server_is_drawn_with_its_name(tmp_path, monkeypatch):
    drawn = []
    monkeypatch.setattr(plots, "save", lambda figure, path: drawn.append(figure))
    points = [
        point("no flags", [100, 300], [2, 4]),
        point("--max-gap 50", [50], [5]),
        point("no streams", [None], [5]),
        point("them", [900], [1], ours=False),
    ]
    plots.save_tradeoff(points, "chats", *AXES, tmp_path / "a.svg")
    (axis,) = drawn[0].axes
    assert {t.get_text(): t.xy for t in axis.texts} == {
        "no flags": (200, 3),
        "--max-gap 50": (50, 5),
        "them": (900, 1),
    }
    assert (axis.get_xlabel(), axis.get_ylabel()) == ("p99 gap (ms)", "median TTFT (s)")


def test_without_flags_there_is_nothing_to_choose_from(capsys):
    with pytest.raises(SystemExit) as exit:
        tradeoff.main([])
    assert exit.value.code == 2
    assert "--flags" in capsys.readouterr().err
