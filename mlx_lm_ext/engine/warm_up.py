"""Runs what requests will run, before they come.

MLX compiles kernels when they are first needed, and on a GPU chooses some of them for each
size of the batch. Without a warm-up, the first requests would wait for that.

Rules:
1. The warm-up consists of pieces. What every request needs comes first, what few need last.
2. A piece ends at its next step when it is asked to, and runs again later. So a request
   waits for one step of it at most.
3. Nothing is left of a piece but what MLX keeps. Plugins do not hear of it.
"""

import argparse
import logging
import sys
import time
from collections import deque
from dataclasses import replace
from typing import Any, Callable, Deque, Dict, List, NamedTuple, Sequence

import numpy as np
from mlx_lm.generate import StopSequences
from mlx_lm.server import CompletionRequest
from tqdm import tqdm

from ..batch.batch import Batch
from ..batch.prefill import max_prefill_tokens
from ..device import device_kind, on_cpu
from ..errors import RequestError
from ..interfaces import Constraint
from ..log import PROGRESS_INTERVAL
from ..policies.guard import Policies
from ..policies.guarded_constraint import GuardedConstraint
from ..policies.loading import Plugins
from ..request.fields import make_generation_arguments
from ..request.mailbox import Turnstile
from ..request.request import Request
from ..sampling.penalties import MAX_CONTEXT

logger = logging.getLogger(__name__)

Body = Dict[str, Any]
GREEDY: Body = {}
SAMPLED: Body = {"temperature": 0.7, "top_p": 0.95}
LOGPROBS: Body = {"logprobs": 2}
PENALTIES: Body = dict(
    repetition_penalty=1.1,
    presence_penalty=0.1,
    frequency_penalty=0.1,
    logit_bias={"0": 1},
)
RESTRICTED: Body = {"structured_outputs": {"regex": "."}}
# What a row may ask for, the likely before the rare. With CUDA, each needs kernels of its
# own, which take seconds to compile.
GPU_BODIES: List[Body] = [
    {"temperature": 0.7},
    {"temperature": 0.7, "min_p": 0.01},
    {"temperature": 0.7, "top_k": 40},
    LOGPROBS,
    RESTRICTED,
    PENALTIES,
    {"temperature": 0.7, "xtc_probability": 0.5, "xtc_threshold": 0.1},
    PENALTIES | dict(repetition_context_size=MAX_CONTEXT + 1),
]
# Tokens of a short message in the usual chat templates.
MESSAGE = 60
# The policies of plugins take no part in it.
BUILT_IN = dict(eviction_policy="lru", scheduler="fcfs", sampler="default")


class AnyToken(Constraint):
    """Allows all tokens: the kernels are the same, whatever is allowed."""

    def advance(self, token: int) -> None:
        pass

    def fill(self, mask: np.ndarray) -> None:
        pass


class Piece(NamedTuple):
    """A batch to run.

    Args:
        bodies (Sequence[Body]): The fields of the request of each row.
        n_prompt (int): Tokens of each prompt.
    """

    bodies: Sequence[Body]
    n_prompt: int = 8


def kernel_pieces() -> List[Piece]:
    """The pieces that together need each kernel, the likely before the rare."""
    pieces = [Piece([GREEDY]), Piece([SAMPLED]), Piece([GREEDY, SAMPLED])]
    if on_cpu():
        return pieces
    # To pick some rows of a batch needs kernels, too.
    return pieces + [Piece([GREEDY, body]) for body in GPU_BODIES]


def size_pieces(batch_size: int, step_size: int) -> List[Piece]:
    """Long prompts, and batches of all sizes with a row of each kind in turn. On a CPU,
    where a size needs nothing of its own, there are none.

    Args:
        batch_size (int): ``--batch-size``.
        step_size (int): ``--prefill-step-size``: no chunk of a prompt is longer.
    """
    if on_cpu():
        return []
    kinds = [GREEDY, SAMPLED, LOGPROBS]
    powers = [2**i for i in range(2, batch_size.bit_length())]
    sizes = dict.fromkeys([*powers, *range(batch_size, 2, -1)])
    batches = [[kinds[i % len(kinds)] for i in range(n)] for n in sizes]
    longest = max_prefill_tokens(step_size)
    if device_kind() != "cuda":
        longest = min(longest, 256)
    pieces = [Piece([GREEDY], longest), *(Piece(bodies) for bodies in batches)]
    if device_kind() == "cuda":
        # The chunks of prompts of all lengths need plans, see ``batch/prefill.py``.
        pieces += [Piece([GREEDY], n) for n in (MESSAGE, *range(128, longest, 128))]
        pieces += [Piece(bodies, MESSAGE) for bodies in batches]
    return pieces


def make_request(
    provider: Any, args: argparse.Namespace, prompt: List[int], **body: Any
) -> Request:
    """A request that no client has sent, and that only ``max_tokens`` ends."""
    generation_args = make_generation_arguments(body, args)
    model = provider.describe(generation_args.model)
    constraint = None
    if body.keys() & RESTRICTED.keys():
        size = model.vocabulary_size
        constraint = GuardedConstraint("the warm-up", AnyToken(), size)
    return Request(
        "",
        generation_args,
        completion=CompletionRequest("text", "", [], None, None),
        model=replace(model, end_of_text=StopSequences()),
        prompt=prompt,
        n_prompt=len(prompt),
        segments=[prompt],
        segment_types=["assistant"],
        constraint=constraint,
    )


class WarmUp:
    """The warm-up of the model that a provider has loaded.

    Args:
        provider (Any): Has ``model``, ``tokenizer``, ``cli_args`` and ``describe``, as
          ``BatchModelProvider`` has.
        pieces (List[Piece]): What to run, in this order.
    """

    def __init__(self, provider: Any, pieces: List[Piece]):
        self.provider = provider
        self.args = argparse.Namespace(**vars(provider.cli_args) | BUILT_IN)
        self.policies = Policies(Plugins(autoload=False), self.args)
        self.pieces: Deque[Piece] = deque(pieces)
        self.n_pieces = len(pieces)
        self.seconds = 0.0

    def __len__(self) -> int:
        return len(self.pieces)

    @classmethod
    def of_server(cls, provider: Any) -> "WarmUp":
        """All that the requests to a server may need."""
        args = provider.cli_args
        sizes = size_pieces(args.batch_size, args.prefill_step_size)
        return cls(provider, kernel_pieces() + sizes)

    def run_all(self, must_end: Callable[[], bool]) -> None:
        """Run all pieces, and show how far it is.

        Args:
            must_end (Callable[[], bool]): Whether to stop at the next step.
        """
        last = time.perf_counter()
        hidden = not sys.stderr.isatty()
        with tqdm(
            total=self.n_pieces, desc="Warming up", unit="batch", disable=hidden
        ) as bar:
            while self.pieces and not must_end():
                self.run_next(must_end)
                n_done = self.n_pieces - len(self.pieces)
                bar.update(n_done - bar.n)
                if hidden and time.perf_counter() - last > PROGRESS_INTERVAL:
                    last = time.perf_counter()
                    logger.info(f"Warming up: {n_done} of {self.n_pieces} batches")

    def run_next(self, must_end: Callable[[], bool]) -> None:
        """Run the next piece. If it has to end before, it stays the next one.

        Args:
            must_end (Callable[[], bool]): Whether to stop at the next step.
        """
        start = time.perf_counter()
        try:
            is_over = self.run(self.pieces[0], must_end)
        except RequestError as e:
            if len(self.pieces) == self.n_pieces:
                self.pieces.clear()
                logger.warning(f"There is no warm-up: {e}")
                return
            is_over = True  # a longer prompt than the others does not fit
        except Exception:
            self.pieces.clear()
            logger.warning("The warm-up failed", exc_info=True)
            return
        self.seconds += time.perf_counter() - start
        if is_over:
            self.pieces.popleft()
            if not self.pieces:
                logger.info(f"Warmed up in {self.seconds:.1f} seconds")

    def run(self, piece: Piece, must_end: Callable[[], bool]) -> bool:
        """Let the rows of a piece join a batch one after the other, run some steps, and let
        half of them leave. Rows that do not fit into the memory for KV are left out.

        Returns:
            bool: Whether it was run to its end.

        Raises:
            RequestError: If not even one row fits.
        """
        provider = self.provider
        batch = Batch(
            provider.model,
            provider.tokenizer,
            self.args,
            self.policies,
            None,
            Turnstile(),
        )

        def step() -> bool:
            if must_end():
                return False
            batch.step()
            return True

        try:
            for i, body in enumerate(piece.bodies):
                # Prompts of two lengths, because padding needs kernels of its own.
                prompt = [i % 64] * (piece.n_prompt + i % 2)
                request = make_request(
                    provider, self.args, prompt, max_tokens=64, **body
                )
                if not batch.fits(request):
                    break
                batch.add(request)
            while batch.prefilling:
                if not step():
                    return False
            if not (step() and step()):
                return False
            batch.remove(batch.requests[(len(batch) + 1) // 2 :])
            return step()
        finally:
            batch.close()
