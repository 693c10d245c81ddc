"""``--record-trace FILE``: what came to this server and when, for ``mlx_lm_ext.bench.replay``.

Rules:
1. No text and no token is written. Blocks of tokens are hashed together with all that comes
   before them, with a salt that is never written: two requests have equal hashes where the one
   could use the KV of the other.
2. ``timestamp``, ``input_length``, ``output_length`` and ``hash_ids`` are those of Mooncake's
   traces (https://github.com/kvcache-ai/Mooncake), whose tools can read the file.
3. A file that is there already is continued. The salt is a new one, as the prompt cache is.
"""

import argparse
import json
import logging
import secrets
import time
from array import array
from hashlib import blake2b
from string import ascii_letters, digits
from threading import Lock
from typing import Any, Dict, List, Optional, Sequence

from .. import hookimpl
from ..errors import one_line
from ..interfaces import RequestInfo, RequestStats

logger = logging.getLogger(__name__)

# Tokens of a block.
BLOCK = 16
LETTERS = ascii_letters + digits + "-_"
# JSON's numbers are exact below 2**53.
MASK = (1 << 53) - 1


@hookimpl
def mlx_lm_add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--record-trace",
        type=trace_file,
        metavar="FILE",
        help="append a line of JSON for each request, with hashes instead of its tokens, for "
        "python -m mlx_lm_ext.bench.replay",
    )


@hookimpl
def mlx_lm_request_finished(
    request: RequestInfo, stats: RequestStats, args: argparse.Namespace
) -> None:
    recorder: Optional[Recorder] = getattr(args, "record_trace", None)
    if recorder is not None:
        recorder.record(request, stats)


def trace_file(path: str) -> "Recorder":
    """An argument type: a file to append to."""
    try:
        return Recorder(path)
    except OSError as e:
        raise argparse.ArgumentTypeError(f"the file cannot be written: {e}")


class Recorder:
    """Writes a trace. ``record`` may be called on any thread.

    Args:
        path (str): The file.

    Raises:
        OSError: If it cannot be written.
    """

    def __init__(self, path: str):
        self.path = path
        self.append("")
        self.lock = Lock()
        # Whether the last request could not be written.
        self.has_failed = False
        self.salt = secrets.token_bytes(16)
        # What the clock of the server is to be added to, to give the time of day.
        self.clock_start = time.time() - time.monotonic()

    def record(self, request: RequestInfo, stats: RequestStats) -> None:
        """Write the line of a request that has ended."""
        line = json.dumps(self.describe(request, stats), separators=(",", ":"))
        with self.lock:
            try:
                self.append(line + "\n")
            except OSError as e:
                if not self.has_failed:
                    logger.error(
                        f"--record-trace: requests are not recorded: {one_line(e)}"
                    )
                self.has_failed = True
            else:
                self.has_failed = False

    def append(self, text: str) -> None:
        # Opened each time, so that the file may be moved away meanwhile.
        with open(self.path, "a", encoding="utf-8") as file:
            file.write(text)

    def describe(self, request: RequestInfo, stats: RequestStats) -> Dict[str, Any]:
        """The fields of the line of a request. Times are in milliseconds."""
        prompt, answer = request.prompt, request.generated[: stats.completion_tokens]
        root = self.digest(repr(request.cache_key).encode())
        hashes = self.chain(root, prompt + answer)
        n_whole = len(prompt) // BLOCK
        # The last block of the prompt may go on with the answer.
        end = self.chain(hashes[n_whole], prompt[n_whole * BLOCK :])[1:]
        return {
            "timestamp": round(1000 * (self.clock_start + request.arrival)),
            "input_length": len(prompt),
            "output_length": len(answer),
            "hash_ids": numbers(hashes[1 : n_whole + 1] + end),
            # From the first block on that is not full of the prompt.
            "output_hash_ids": numbers(hashes[n_whole + 1 :]),
            "token_hashes": self.letters(hashes, prompt + answer),
            "cache_key": numbers([root])[0],
            "block_size": BLOCK,
            "segments": [
                [kind, len(tokens)]
                for kind, tokens in zip(request.segment_types, request.segments)
            ],
            "user": self.pseudonym(request.user),
            "priority": request.priority,
            "max_tokens": request.max_tokens,
            "finish_reason": stats.finish_reason,
            "cached_tokens": stats.cached_tokens,
            "queue_ms": milliseconds(stats.queue_seconds),
            "ttft_ms": milliseconds(stats.ttft),
            "total_ms": milliseconds(stats.seconds),
        }

    def digest(self, data: bytes) -> bytes:
        return blake2b(data, digest_size=8, key=self.salt).digest()

    def chain(self, before: bytes, tokens: Sequence[int]) -> List[bytes]:
        """Hash blocks of tokens, each with the hash of the one before.

        Args:
            before (bytes): The hash of what comes before the tokens.
            tokens (Sequence[int]): The tokens. The last block may be shorter than the others.

        Returns:
            List[bytes]: ``before``, and the hash of each block.
        """
        hashes = [before]
        for i in range(0, len(tokens), BLOCK):
            block = array("q", tokens[i : i + BLOCK]).tobytes()
            hashes.append(self.digest(hashes[-1] + block))
        return hashes

    def letters(self, hashes: Sequence[bytes], tokens: Sequence[int]) -> str:
        """A letter for each token, which tells where within a block two requests part. It is
        made of the token and all before it, and wrong one time in 64.

        Args:
            hashes (Sequence[bytes]): What ``chain`` gives for the tokens.
            tokens (Sequence[int]): The tokens.
        """
        found = []
        for i, before in zip(range(0, len(tokens), BLOCK), hashes):
            state = blake2b(before, digest_size=1, key=self.salt, person=b"token")
            for token in tokens[i : i + BLOCK]:
                state.update(array("q", [token]).tobytes())
                found.append(LETTERS[state.digest()[0] % 64])
        return "".join(found)

    def pseudonym(self, user: Optional[str]) -> Optional[str]:
        """What stands for a user, whose name may be personal."""
        if user is None:
            return None
        return self.digest(user.encode("utf-8", "surrogatepass")).hex()


def numbers(hashes: List[bytes]) -> List[int]:
    return [int.from_bytes(h, "big") & MASK for h in hashes]


def milliseconds(seconds: Optional[float]) -> Optional[float]:
    return None if seconds is None else round(1000 * seconds, 3)
