"""Reads recorded traces: those of ``--record-trace``, and public ones with the same fields.

The public ones are Mooncake's (https://github.com/kvcache-ai/Mooncake: blocks of 512 tokens,
milliseconds) and Alibaba's (https://github.com/alibaba-edu/qwen-bailian-usagetraces-anon:
blocks of 16 tokens, seconds). They do not tell the tokens of the answers, so that no prompt is
known to go on after one.
"""

import json
from collections import Counter
from dataclasses import replace
from itertools import count
from pathlib import Path
from typing import (
    Any,
    Callable,
    Dict,
    Iterator,
    List,
    Optional,
    Sequence,
    Set,
    Tuple,
    TypeVar,
)

from mlx_lm_ext.bench.arrivals import Arrival, Outcome, Runs, length
from mlx_lm_ext.interfaces import RequestStats

T = TypeVar("T")

# What the fields of a line are: their types, and the least and the largest number.
NUMBERS: Dict[str, Tuple[Tuple[type, ...], float, float]] = {
    "timestamp": ((int, float), 0, 1e14),
    "input_length": ((int,), 1, 10**7),
    "output_length": ((int,), 0, 10**7),
    "block_size": ((int,), 1, 10**7),
    "max_tokens": ((int,), 0, 10**9),
    "priority": ((int, float), -1e9, 1e9),
    "cached_tokens": ((int,), 0, 10**7),
    "queue_ms": ((int, float), 0, 1e12),
    "ttft_ms": ((int, float), 0, 1e12),
    "total_ms": ((int, float), 0, 1e12),
}
# A request that was never served has none of these.
MAY_BE_NULL = {"queue_ms", "ttft_ms", "total_ms"}
OTHERS: Dict[str, type] = {
    "hash_ids": list,
    "output_hash_ids": list,
    "segments": list,
    "token_hashes": str,
}
# Seconds between the first and the last request.
MOST_SECONDS = 366 * 86400


def check(line: Any) -> None:
    """Check what is in a line.

    Raises:
        ValueError: If a field is wrong. Names it.
    """
    if type(line) is not dict:
        raise ValueError("not an object of JSON")
    for name, (kinds, least, most) in NUMBERS.items():
        value = line.get(name, least)
        if value is None and name in MAY_BE_NULL:
            continue
        # Not ``value < least or ...``: NaN must fail too.
        if type(value) not in kinds or not least <= value <= most:
            what = "a number" if float in kinds else "an integer"
            raise ValueError(
                f"{name} must be {what} from {least:g} to {most:g}, not {value!r:.40}"
            )
    for name, kind in OTHERS.items():
        if name in line and type(line[name]) is not kind:
            what = "a text" if kind is str else "a list"
            raise ValueError(f"{name} must be {what}, not {line[name]!r:.40}")


def read_trace(path: Path) -> List[Arrival]:
    """The requests of a trace, in the order in which they came.

    Args:
        path (Path): A file with an object of JSON in each line.

    Raises:
        ValueError: If it is no trace, or has no requests. Names the line.
        OSError: If it cannot be read.
    """
    try:
        lines = path.read_text(encoding="utf-8").splitlines()
    except UnicodeDecodeError:
        raise ValueError(f"{path} is not a text in UTF-8")
    numbered = [(n, line) for n, line in enumerate(lines, 1) if line.strip()]

    def of_each(read: Callable[[Any], T], values: Sequence[Any]) -> List[T]:
        found = []
        for (n, _), value in zip(numbered, values):
            try:
                found.append(read(value))
            except KeyError as e:
                raise ValueError(f"{path}, line {n}: there is no {e.args[0]}")
            except (TypeError, ValueError, AttributeError) as e:
                raise ValueError(f"{path}, line {n}: {e}")
        return found

    def parse(line: str) -> Any:
        try:
            value = json.loads(line)
        except (ValueError, RecursionError) as e:
            raise ValueError(f"not an object of JSON ({e})")
        check(value)
        return value

    objects = of_each(parse, [line for _, line in numbered])
    if not objects:
        raise ValueError(f"{path} has no requests")
    reader = TraceReader()
    of_each(reader.note, objects)
    arrivals = of_each(reader.read, objects)
    first, last = (f(a.seconds for a in arrivals) for f in (min, max))
    if last - first > MOST_SECONDS:
        raise ValueError(f"{path}: the timestamps are more than a year apart")
    moved = [replace(a, seconds=a.seconds - first) for a in arrivals]
    return sorted(moved, key=lambda a: a.seconds)


class TraceReader:
    """Makes requests of the lines of a trace. All of them have to be noted before the first is
    read."""

    def __init__(self) -> None:
        self.ids = count(1)
        # The tokens by what tells them from others.
        self.tokens: Dict[Any, int] = {}
        # The blocks that follow a block, as the letters of their tokens, and how many of them
        # begin with some letters.
        self.blocks: Set[Tuple[int, str]] = set()
        self.counts: "Counter[Tuple[int, str]]" = Counter()

    def note(self, line: Dict[str, Any]) -> None:
        """Note the blocks of a line."""
        for block in letter_blocks(line):
            if block not in self.blocks:
                self.blocks.add(block)
                before, letters = block
                self.counts.update(
                    (before, letters[: i + 1]) for i in range(len(letters))
                )

    def read(self, line: Dict[str, Any]) -> Arrival:
        """The request of a line.

        Raises:
            KeyError, TypeError, ValueError: If a field is missing or wrong.
        """
        n_prompt, n_answer = line["input_length"], max(1, line["output_length"])
        if "token_hashes" in line:
            runs = [run for block in letter_blocks(line) for run in self.parts(*block)]
        else:
            size = line.get("block_size", 16 if "chat_id" in line else 512)
            runs = self.whole_blocks(line["hash_ids"], size, n_prompt)
        prompt, answer = cut(runs, 0, n_prompt), cut(runs, n_prompt, length(runs))
        # What is not known is like nothing else.
        if n_more := n_prompt - length(prompt):
            prompt.append((next(self.ids), n_more))
        if n_more := n_answer - length(answer):
            answer.append((next(self.ids), n_more))
        segments = tuple((kind, n) for kind, n in line.get("segments", ()))
        if segments and length(segments) != n_prompt:
            raise ValueError(
                f"segments do not have the {n_prompt} tokens of the prompt"
            )
        seconds = line["timestamp"] / (1 if "chat_id" in line else 1000)
        return Arrival(
            seconds,
            prompt,
            answer,
            user=line.get("user"),
            priority=line.get("priority", 0),
            max_tokens=max(line.get("max_tokens", 0), n_answer),
            segments=segments,
            measured=measured(line, seconds),
        )

    def token(self, key: Any) -> int:
        if key not in self.tokens:
            self.tokens[key] = next(self.ids)
        return self.tokens[key]

    def whole_blocks(self, hashes: List[int], size: int, n_tokens: int) -> Runs:
        """The runs of blocks of ``size`` tokens, up to ``n_tokens``."""
        sizes = (min(size, n_tokens - i * size) for i in range(len(hashes)))
        return [(self.token(h), n) for h, n in zip(hashes, sizes) if n > 0]

    def parts(self, before: int, letters: str) -> Runs:
        """The runs of a block. Each ends where another block parts from this one, or ends."""
        runs, start = [], 0
        for end in range(1, len(letters) + 1):
            is_common = end < len(letters) and (
                self.counts[before, letters[:end]]
                == self.counts[before, letters[: end + 1]]
            )
            if not is_common:
                runs.append((self.token((before, letters[: start + 1])), end - start))
                start = end
        return runs


def letter_blocks(line: Dict[str, Any]) -> Iterator[Tuple[int, str]]:
    """The blocks of a line of this server's: the hash of what comes before, and the letters of
    the tokens. None for other lines."""
    letters = line.get("token_hashes")
    if letters is None:
        return
    size = line["block_size"]
    n_whole = line["input_length"] // size
    hashes = line["hash_ids"][:n_whole] + line["output_hash_ids"]
    for i, before in enumerate([line["cache_key"], *hashes]):
        if block := letters[i * size : (i + 1) * size]:
            yield before, block


def cut(runs: Runs, start: int, stop: int) -> Runs:
    """The tokens from ``start`` to ``stop``."""
    found, place = [], 0
    for token, n in runs:
        first, end = max(place, start), min(place + n, stop)
        if first < end:
            found.append((token, end - first))
        place += n
    return found


def measured(line: Dict[str, Any], arrival: float) -> Optional[Outcome]:
    """How a request went that this server has recorded; None for others."""
    if line.get("total_ms") is None:
        return None
    queue, ttft, total = (
        None if line[name] is None else line[name] / 1000
        for name in ("queue_ms", "ttft_ms", "total_ms")
    )
    stats = RequestStats(
        line["finish_reason"],
        queue,
        ttft,
        total,
        line["input_length"],
        line["cached_tokens"],
        line["output_length"],
    )
    return Outcome(arrival, line.get("user"), stats)
