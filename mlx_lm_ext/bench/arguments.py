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
    """An argument type: a file to write when all is done."""
    path = Path(text)
    if path.is_dir() or not path.parent.is_dir():
        raise argparse.ArgumentTypeError(f"{text!r} is no file in an existing folder")
    return path


def plot_file(text: str) -> Path:
    """An argument type: the file of a picture."""
    path = output_file(text)
    if path.suffix not in (".png", ".svg"):
        raise argparse.ArgumentTypeError(f"{text!r} must end in .png or .svg")
    return path


def names(known: Dict[str, Any]) -> Callable[[str], List[str]]:
    """An argument type: names with commas between them, ``all`` or ``none``."""

    def parse(text: str) -> List[str]:
        if text in ("all", "none"):
            return list(known) if text == "all" else []
        chosen = text.split(",")
        if unknown := set(chosen) - set(known):
            raise argparse.ArgumentTypeError(
                f"{', '.join(sorted(unknown))} is none of {', '.join(known)}"
            )
        return chosen

    return parse


def counts(text: str) -> List[int]:
    """An argument type: numbers of clients with commas between them."""
    return [number(int, 1)(part) for part in text.split(",")]
