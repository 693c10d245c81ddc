"""Checks samplers: rows of random logits join, leave and are parted, as in the batch of a server."""

import argparse
import random
import tempfile
from copy import copy, deepcopy
from pathlib import Path
from typing import Any, Dict, Iterable, List, Sequence, Type

import mlx.core as mx
import numpy as np
from mlx_lm.utils import load_tokenizer
from tokenizers.pre_tokenizers import ByteLevel

from ..demo_model import write_tokenizer
from ..interfaces import BatchSampler, RequestInfo
from ..policies.guarded_sampler import normalize
from ..policies.loading import SAMPLER, one_line
from .requests import VOCABULARY, make_request, random_sampling
from .watching import Watched, command_line

N_ROWS = 12
# Tokens of a row.
N_TOKENS = 6


def check_sampler(
    cls: Type[BatchSampler],
    argv: Sequence[str] = (),
    bodies: Sequence[Dict[str, Any]] = ({},),
    may_evaluate: bool = False,
    seeds: Iterable[int] = range(2),
) -> None:
    """Check a class for ``--sampler`` against its contract.

    Args:
        cls (Type[BatchSampler]): The class.
        argv (Sequence[str]): The command line of the server. ``-p`` names the plugin if its
          flags are needed and it is not installed.
        bodies (Sequence[Dict[str, Any]]): Bodies of requests with fields of the sampler. They
          get sampling parameters and a seed unless they have some.
        may_evaluate (bool): Whether it may wait for the device, which the contract forbids.
          Only for a sampler that is used on a CPU.
        seeds (Iterable[int]): The seeds of the traces.

    Raises:
        AssertionError: If it breaks the contract.
        SystemExit: If the command line is wrong.
    """
    args, tokenizer = command_line(argv), make_tokenizer()
    for seed in seeds:
        for dtype in (mx.float32, mx.bfloat16):
            trace = Trace(cls, args, tokenizer, bodies, dtype, seed)
            tokens = trace.run(global_seed=0)
            assert trace.run(global_seed=0) == tokens, (
                f"{cls.__name__} gave other tokens when the same rows were run again, each with "
                "its seed; right is to draw from request.args.seed, or from mx.random"
            )
            # A sampler that uses the seeds of the requests, or none, can be checked row by row.
            if trace.is_copied and trace.run(global_seed=1) == tokens:
                trace.check_rows_alone(tokens)
            trace.check_resumed()
            if not may_evaluate:
                trace.check_evaluates_nothing()


def make_tokenizer() -> Any:
    """A tokenizer with a token for each byte."""
    special = ["<|endoftext|>", "<|im_start|>", "<|im_end|>"]
    tokens = [*special, *sorted(ByteLevel.alphabet())]
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        write_tokenizer(folder, tokens, [], special, None, eos_token="<|im_end|>")
        return load_tokenizer(folder)


class Rows:
    """Rows of a batch, and the object that samples them.

    Args:
        watched (Watched): The object.
        requests (List[RequestInfo]): The requests of the rows.
    """

    def __init__(self, watched: Watched, requests: List[RequestInfo]):
        self.watched = watched
        self.requests = requests

    def extend(self, other: "Rows") -> None:
        self.watched.call("extend", other.watched.object)
        self.requests += other.requests

    def filter(self, keep: List[int]) -> None:
        if keep != [*range(len(self.requests))]:
            self.watched.call("filter", list(keep))
            self.requests = [self.requests[i] for i in keep]


class Trace:
    """A batch without a model.

    Args:
        cls (Type[BatchSampler]): The class that is checked.
        args (argparse.Namespace): The command line.
        tokenizer (Any): The tokenizer.
        bodies (Sequence[Dict[str, Any]]): Bodies of requests.
        dtype (mx.Dtype): The type of the logits.
        seed (int): Decides what happens.
    """

    def __init__(
        self,
        cls: Type[BatchSampler],
        args: argparse.Namespace,
        tokenizer: Any,
        bodies: Sequence[Dict[str, Any]],
        dtype: Any,
        seed: int,
    ):
        self.cls = cls
        self.args = args
        self.tokenizer = tokenizer
        rng = random.Random(seed)
        self.bodies = [
            random_sampling(rng) | bodies[i % len(bodies)] for i in range(N_ROWS)
        ]
        self.dtype = dtype
        self.seed = seed
        # Whether its objects can be copied, as the server does to part rows.
        self.is_copied = True

    def requests(self) -> List[RequestInfo]:
        return [
            make_request(self.args, body, i, arrival=float(i))
            for i, body in enumerate(self.bodies)
        ]

    def make(self, request: RequestInfo) -> Rows:
        """A row with an object of its own."""
        watched = Watched(SAMPLER, self.cls, self.args, request, self.tokenizer)
        needs = watched.object.needs_logprobs
        assert isinstance(needs, bool), (
            f"{self.cls.__name__}.needs_logprobs is {needs!r}; right is True for log "
            "probabilities, or False for logits"
        )
        return Rows(watched, [request])

    def run(self, global_seed: int) -> Dict[str, List[int]]:
        """Run all rows in batches that change.

        Args:
            global_seed (int): For the generators that belong to no request.

        Returns:
            Dict[str, List[int]]: The tokens of each request, by its id.
        """
        states = random.getstate(), np.random.get_state()
        random.seed(global_seed)
        np.random.seed(global_seed)
        mx.random.seed(global_seed)
        try:
            return self.run_batches()
        finally:
            random.setstate(states[0])
            np.random.set_state(states[1])

    def run_batches(self) -> Dict[str, List[int]]:
        rng = random.Random(self.seed)
        waiting = self.requests()
        groups: List[Rows] = []
        tokens: Dict[str, List[int]] = {request.id: [] for request in waiting}
        watched = None
        while waiting or groups:
            n_new = rng.randint(1, 4)
            new, waiting = waiting[:n_new], waiting[n_new:]
            if new:
                # New rows are joined before the first call.
                rows, *others = map(self.make, new)
                for other in others:
                    rows.extend(other)
                groups.append(rows)
            rng.shuffle(groups)
            if len(groups) > 1 and rng.random() < 0.7:
                last = groups.pop()
                groups[0].extend(last)
            if len(groups[0].requests) > 1 and rng.random() < 0.4:
                groups.append(self.part(groups[0], rng))
            for rows in groups:
                watched = rows.watched
                for request, token in zip(rows.requests, self.sample(rows)):
                    tokens[request.id].append(token)
                    request.n_generated += 1
            for rows in groups:
                keep = [
                    i
                    for i, request in enumerate(rows.requests)
                    if request.n_generated < N_TOKENS and rng.random() < 0.95
                ]
                # Rows that leave are replaced by the last ones, which changes the order.
                rng.shuffle(keep)
                if keep:
                    rows.filter(keep)
                else:
                    rows.requests = []
            groups = [rows for rows in groups if rows.requests]
        if watched is not None:
            watched.warn_if_slow()
        return tokens

    def part(self, rows: Rows, rng: random.Random) -> Rows:
        """Take some of the rows out, with a copy of their object."""
        n = len(rows.requests)
        go = sorted(rng.sample(range(n), rng.randint(1, n - 1)))
        shared = [self.args, self.tokenizer, *rows.requests]
        other = Rows(copy(rows.watched), rows.requests[:])
        try:
            other.watched.object = deepcopy(
                rows.watched.object, {id(x): x for x in shared}
            )
        except Exception as e:
            if self.is_copied:
                rows.watched.warn(
                    f"{self.cls.__name__} cannot be copied ({one_line(e)}): new objects are made "
                    "for rows that are parted, which know nothing of their tokens so far"
                )
            self.is_copied = False
            other, *others = map(self.make, rows.requests)
            for one in others:
                other.extend(one)
        other.filter(go)
        rows.filter([i for i in range(n) if i not in go])
        return other

    def logits(self, request: RequestInfo) -> np.ndarray:
        """The logits of the next token of a row: the same whichever rows are beside it."""
        index = int(request.id.removeprefix("r"))
        rng = np.random.default_rng([self.seed, index, request.n_generated])
        logits = 3 * rng.standard_normal(VOCABULARY)
        kind = rng.integers(3)
        if kind == 1:
            # What a constraint leaves.
            logits[rng.random(VOCABULARY) < 0.7] = -np.inf
            logits[rng.integers(VOCABULARY)] = 0
        if kind == 2:
            allowed = rng.integers(VOCABULARY)
            logits[np.arange(VOCABULARY) != allowed] = -np.inf
        return logits.astype(np.float32)

    def sample(self, rows: Rows) -> List[int]:
        """The next tokens of rows, which are checked."""
        logits = mx.array(np.stack([self.logits(r) for r in rows.requests]))
        logits = logits.astype(self.dtype)
        needs_logprobs = rows.watched.object.needs_logprobs
        given = normalize(logits) if needs_logprobs else logits[:]
        before = np.array(given.astype(mx.float32))
        tokens = rows.watched.call("__call__", given)
        n, call = len(rows.requests), ("__call__", [given])
        right = f"an mx.array of {n} integers, one token id for each row"
        if not isinstance(tokens, mx.array):
            rows.watched.fail(*call, f"returned {type(tokens).__name__}", right)
        if tokens.shape != (n,) or not mx.issubdtype(tokens.dtype, mx.integer):
            found = f"returned {tokens.dtype} of shape {tokens.shape}"
            rows.watched.fail(*call, found, right)
        ids: List[int] = tokens.tolist()
        for row, token in enumerate(ids):
            if not 0 <= token < VOCABULARY:
                found = f"returned {token} for row {row}"
                right = f"a token id from 0 to {VOCABULARY - 1}"
                rows.watched.fail(*call, found, right)
            if before[row, token] == -np.inf:
                found = (
                    f"chose token {token} in row {row}, which is minus infinity there"
                )
                right = "a token that is more than minus infinity: others are forbidden"
                rows.watched.fail(*call, found, right)
        if not np.array_equal(before, np.array(given.astype(mx.float32))):
            right = "to write into a copy, as values[:] gives it"
            rows.watched.fail(*call, "changed what it was given", right)
        return ids

    def check_rows_alone(self, tokens: Dict[str, List[int]]) -> None:
        """Check that each row has got the tokens that it gets alone."""
        for request in self.requests():
            rows, expected = self.make(request), tokens[request.id]
            for i, token in enumerate(expected):
                (alone,) = self.sample(rows)
                request.n_generated += 1
                assert alone == token, (
                    f"{self.cls.__name__} gave token {token} as number {i} of request "
                    f"{request.id!r}, which gets {alone} when it runs alone; right is that "
                    "extend appends the rows of the other object, filter keeps rows in the "
                    "given order, and copies share nothing that changes"
                )

    def check_resumed(self) -> None:
        """Check that an object can be made for a request that has tokens already."""
        request, *_ = self.requests()
        request.n_generated = 5
        self.sample(self.make(request))

    def check_evaluates_nothing(self) -> None:
        """Check that it does not wait for the device: MLX refuses that while it traces."""
        rows, *others = map(self.make, self.requests()[:3])
        for other in others:
            rows.extend(other)
        logits = mx.array(np.stack([self.logits(r) for r in rows.requests]))
        logits = normalize(logits.astype(self.dtype))
        sampler = rows.watched.object
        try:
            # What the second call finds in the object depends on what the first was given.
            mx.compile(lambda x: (sampler(x), sampler(x)))(logits)
        except Exception as e:
            if "eval" not in str(e):
                rows.watched.warn(
                    f"it cannot be told whether {self.cls.__name__} evaluates arrays: within "
                    f"mx.compile it raised {one_line(e)}"
                )
                return
            raise AssertionError(
                f"{rows.watched.described('__call__', [logits])} evaluated an array, as item(), "
                "tolist(), mx.eval(), bool() and NumPy do; right is to return an array that is "
                "not evaluated: the server evaluates it once for the whole step"
            ) from e
