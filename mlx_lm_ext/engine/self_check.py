"""Checks of a model that is loaded whether its prompts get together what they get alone.

For some architectures, a batch of mlx-lm is wrong: the padding of the shorter prompts changes
their answers. Two short prompts show it.

Rules:
1. Nothing is left of it but what MLX keeps, and no random number is drawn.
2. A difference counts only if other prompts show one too: in 16 bits, rounding may choose
   another expert of a mixture.
"""

import argparse
import logging
import random
from typing import Any, Callable, Dict, List

import mlx.core as mx
from mlx_lm.models.cache import make_prompt_cache

from ..batch.batch import Batch
from ..errors import RequestError, one_line
from ..interfaces import RequestInfo
from ..policies.guard import Policies
from ..policies.loading import Plugins
from ..request.mailbox import Turnstile
from ..request.request import Request
from .warm_up import BUILT_IN, make_request

logger = logging.getLogger(__name__)

# Tokens of the two prompts, and of each answer.
LENGTHS = (5, 13)
N_STEPS = 3
# How far the logits may be apart, in standard deviations of the logits: the root of the mean
# square. Of 60 architectures, those that are right differ by up to 3e-5 in float32, and by
# 0.02 in 16 bits; those that are wrong, by 0.03 to 1.5.
TOLERANCE = {mx.float32: 1e-3}
TOLERANCE_16_BITS = 0.1


class RecordingPolicies(Policies):
    """The built-in policies, which keep the logits of each request.

    Args:
        args (argparse.Namespace): The command line.
    """

    def __init__(self, args: argparse.Namespace):
        args = argparse.Namespace(**vars(args) | BUILT_IN)
        super().__init__(Plugins(autoload=False), args)
        self.logits: Dict[RequestInfo, List[mx.array]] = {}

    def make_logits_processors(
        self, request: RequestInfo, tokenizer: Any
    ) -> List[Callable[[Any, Any], Any]]:
        logits = self.logits[request] = []

        def keep(tokens: mx.array, row: mx.array) -> mx.array:
            logits.append(row[0])
            return row

        return [keep]


class SelfCheck:
    """Compares a batch of the model that a provider has loaded with its prompts alone.

    Args:
        provider (Any): Has ``model``, ``tokenizer``, ``cli_args`` and ``describe``, as
          ``BatchModelProvider`` has.
    """

    def __init__(self, provider: Any):
        self.provider = provider

    def find_fault(self) -> str:
        """What is wrong with the batch. Empty if it is right, or could not be checked."""
        reason = ""
        for seed in range(2):
            try:
                reason = self.compare(seed)
            except RequestError as e:
                logger.warning(f"There is no self-check: {e}")
                return ""
            if not reason:
                break
        return reason

    def compare(self, seed: int) -> str:
        """What is wrong with the batch of two prompts. Empty if it is right.

        Args:
            seed (int): Which prompts.

        Raises:
            RequestError: If there is no room for them.
        """
        rng = random.Random(seed)
        model = self.provider.model
        # It is not run.
        logits = model(mx.zeros((1, 1), mx.int32), cache=make_prompt_cache(model))
        tokens = range(min(64, logits.shape[-1]))
        prompts = [rng.choices(tokens, k=n) for n in LENGTHS]
        requests = [
            make_request(self.provider, self.provider.cli_args, p, max_tokens=N_STEPS)
            for p in prompts
        ]
        try:
            recorded = self.run_together(requests)
        except RequestError:
            raise
        except Exception as e:
            return f"a batch of two prompts fails: {one_line(e)}"
        for request in requests:
            together = mx.stack(recorded[request])
            alone = self.run_alone(request)
            limit = TOLERANCE.get(together.dtype, TOLERANCE_16_BITS)
            apart = distance(together, alone)
            if not mx.all(mx.isfinite(alone)).item():
                return ""  # the model itself is at fault
            if not apart <= limit:
                return (
                    f"in a batch, the logits of a prompt are {apart:.2g} standard deviations "
                    f"from those of the prompt alone (rounding: up to {limit:g})"
                )
        return ""

    def run_together(
        self, requests: List[Request]
    ) -> Dict[RequestInfo, List[mx.array]]:
        """The logits of each step of each request in one batch."""
        provider = self.provider
        policies = RecordingPolicies(provider.cli_args)
        batch = Batch(
            provider.model,
            provider.tokenizer,
            policies.args,
            policies,
            None,
            Turnstile(),
        )
        try:
            for request in requests:
                batch.add(request)
            while batch:
                batch.step()
        finally:
            batch.close()
        return policies.logits

    def run_alone(self, request: Request) -> mx.array:
        """The logits of the same tokens, in the steps of ``mlx_lm.generate``."""
        model = self.provider.model
        caches = make_prompt_cache(model)
        mx.eval(model(mx.array([request.prompt[:-1]], mx.uint32), cache=caches))
        tokens = [request.prompt[-1], *request.generated[:-1]]
        logits = [
            model(mx.array([[token]], mx.uint32), cache=caches)[0, -1]
            for token in tokens
        ]
        return mx.stack(logits)


def distance(a: mx.array, b: mx.array) -> float:
    """How far logits are apart, in standard deviations of ``b``; 0 if both have none.

    Args:
        a (mx.array): Logits of shape (steps, vocabulary).
        b (mx.array): Others of the same shape.
    """
    a, b = a.astype(mx.float32), b.astype(mx.float32)
    apart = mx.sqrt(mx.mean(mx.square(a - b))).item()
    if apart == 0:
        return 0.0
    return apart / max(mx.mean(mx.std(b, axis=-1)).item(), 1e-30)
