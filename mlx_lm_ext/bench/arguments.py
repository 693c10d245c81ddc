"""Arguments that the measuring tools share."""

import argparse
from pathlib import Path
from typing import Any, Callable, Dict, List

from mlx_lm_ext.arguments import number


def add_server_arguments(parser: argparse.ArgumentParser) -> None:
    """The arguments that name the server and how many use it at a time."""
    add = parser.add_argument
    add("--base-url", default="http://localhost:8080/v1", help="where the server is")
    add("--api-key", default="EMPTY", help="key that the server asks for")
    add("--model", default="default_model", help="model to ask for")
    add("--concurrency", type=number(int, 1), default=4, help="users at a time")


def output_file(text: str) -> Path:
    """An argument type: a file to write at the end."""
    path = Path(text)
    if path.is_dir() or not path.parent.is_dir():
        raise argparse.ArgumentTypeError(
            f"{text!r} is not a file in an existing folder"
        )
    return path


def plot_file(text: str) -> Path:
    """An argument type: an image file to write at the end."""
    path = output_file(text)
    if path.suffix not in (".png", ".svg"):
        raise argparse.ArgumentTypeError(f"{text!r} must end in .png or .svg")
    return path


def some_of(known: Dict[str, Any]) -> Callable[[str], List[str]]:
    """An argument type: known names, separated by commas, or ``all`` or ``none``."""

    def parse(text: str) -> List[str]:
        if text in ("all", "none"):
            return list(known) if text == "all" else []
        chosen = text.split(",")
        if unknown := set(chosen) - set(known):
            raise argparse.ArgumentTypeError(
                f"unknown: {', '.join(sorted(unknown))}; choose from {', '.join(known)}"
            )
        return chosen

    return parse


def counts(text: str) -> List[int]:
    """An argument type: numbers of clients, separated by commas."""
    return [number(int, 1)(part) for part in text.split(",")]
