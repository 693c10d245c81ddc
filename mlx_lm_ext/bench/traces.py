"""Reads recorded traces: those of ``--record-trace``, and public ones with the same fields.

The public ones are Mooncake's (https://github.com/kvcache-ai/Mooncake: blocks of 512 tokens,
milliseconds) and Alibaba's (https://github.com/alibaba-edu/qwen-bailian-usagetraces-anon:
blocks of 16 tokens, seconds). They do not tell the tokens of the answers, so that no prompt is
known to go on after one.
"""

import json
from dataclasses import replace
from itertools import count
from pathlib import Path
from typing import Any, Dict, List, Optional

from mlx_lm_ext.bench.arrivals import Arrival, Outcome, Runs, length
from mlx_lm_ext.interfaces import RequestStats


def read_trace(path: Path) -> List[Arrival]:
    """The requests of a trace, in the order in which they came.

    Args:
        path (Path): A file with an object of JSON in each line.

    Raises:
        ValueError: If it is no trace, or has no requests. Names the line.
        OSError: If it cannot be read.
    """
    reader = TraceReader()
    arrivals = []
    for n, line in enumerate(path.read_text(encoding="utf-8").splitlines(), 1):
        if not line.strip():
            continue
        try:
            arrivals.append(reader.read(json.loads(line)))
        except KeyError as e:
            raise ValueError(f"{path}, line {n}: there is no {e.args[0]}")
        except (TypeError, ValueError, AttributeError) as e:
            raise ValueError(f"{path}, line {n}: {e}")
    if not arrivals:
        raise ValueError(f"{path} has no requests")
    first = min(a.seconds for a in arrivals)
    moved = [replace(a, seconds=a.seconds - first) for a in arrivals]
    return sorted(moved, key=lambda a: a.seconds)


class TraceReader:
    """Makes requests of the lines of a trace."""

    def __init__(self) -> None:
        self.ids = count(1)
        # The tokens of the blocks, by their hashes.
        self.tokens: Dict[int, int] = {}

    def read(self, line: Dict[str, Any]) -> Arrival:
        """The request of a line.

        Raises:
            KeyError, TypeError, ValueError: If a field is missing or wrong.
        """
        n_prompt, n_answer = line["input_length"], max(1, line["output_length"])
        if type(n_prompt) is not int or n_prompt < 1:
            raise ValueError(f"input_length must be at least 1, not {n_prompt!r}")
        size = line.get("block_size", 16 if "chat_id" in line else 512)
        hashes = list(line["hash_ids"])
        if "output_hash_ids" in line:
            # These go on from the first block that is not full of the prompt.
            hashes[n_prompt // size :] = line["output_hash_ids"]
        whole = self.runs(hashes, size, n_prompt + n_answer)
        prompt = cut(whole, 0, n_prompt)
        answer = cut(whole, n_prompt, n_prompt + n_answer)
        if "output_hash_ids" not in line:
            answer = [(next(self.ids), n_answer)]
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

    def runs(self, hashes: List[int], size: int, n_tokens: int) -> Runs:
        """The runs of blocks of ``size`` tokens. What is missing of ``n_tokens`` is like
        nothing else."""
        runs = []
        for h in hashes:
            n = min(size, n_tokens)
            if n > 0:
                if h not in self.tokens:
                    self.tokens[h] = next(self.ids)
                runs.append((self.tokens[h], n))
            n_tokens -= n
        if n_tokens > 0:
            runs.append((next(self.ids), n_tokens))
        return runs


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
