"""Checks of a model that is loaded whether its prompts get together what they get alone.

For some architectures, a batch of mlx-lm is wrong: the padding of the shorter prompts changes
their answers. Two short prompts show it.

Rules:
1. Nothing is left of it but what MLX keeps, and no random number is drawn.
2. Rounding is no fault. It differs with the type, the device and the depth of a model, and shows
   in the longer prompt, which has no padding.
3. A fault shows in every step and with every prompt. Rounding that lets a mixture choose another
   expert does not.
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

# Tokens of the two prompts, the shorter one first, and of each answer.
LENGTHS = (5, 13)
N_STEPS = 2
# How far logits may be apart in all steps, in standard deviations of the logits: ten times as far
# as in any step of the longer prompt, and so far in any case. More than ``MOST`` is a fault, be
# there padding or not.
LEAST = {mx.float32: 1e-3}
LEAST_16_BITS = 1e-2
MOST = 0.3


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
        requests = self.make_requests(seed)
        together, error = {}, ""
        try:
            together = self.run_together(requests)
        except RequestError:
            raise
        except Exception as e:
            error = one_line(e)
        try:
            alone = [self.run_alone(request) for request in requests]
        except Exception:
            return ""  # it is the model that fails
        if not all(mx.all(mx.isfinite(logits)).item() for logits in alone):
            return ""
        if error:
            return f"a batch of two prompts fails: {error}"
        dtype = alone[0].dtype
        apart = [
            distances(mx.stack(together[request]), logits)
            for request, logits in zip(requests, alone)
        ]
        shorter, longer = apart
        rounding = max(LEAST.get(dtype, LEAST_16_BITS), 10 * max(longer))
        for steps, limit in (shorter, min(rounding, MOST)), (longer, MOST):
            if min(steps) > limit:
                return (
                    "in a batch of two prompts, the logits of one are "
                    f"{min(steps):.2g} standard deviations from those of the prompt alone"
                )
        return ""

    def make_requests(self, seed: int) -> List[Request]:
        """The requests of two prompts, of tokens that all vocabularies have."""
        rng = random.Random(seed)
        model = self.provider.model
        # It is not run.
        logits = model(mx.zeros((1, 1), mx.int32), cache=make_prompt_cache(model))
        tokens = range(min(64, logits.shape[-1]))
        return [
            make_request(
                self.provider,
                self.provider.cli_args,
                rng.choices(tokens, k=n),
                max_tokens=N_STEPS,
            )
            for n in LENGTHS
        ]

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
        """The logits of the same tokens, of shape (steps, vocabulary)."""
        model, n = self.provider.model, len(request.prompt)
        tokens = [*request.prompt, *request.generated[:-1]]
        caches = make_prompt_cache(model)
        return model(mx.array([tokens], mx.uint32), cache=caches)[0, n - 1 :]


def distances(a: mx.array, b: mx.array) -> List[float]:
    """How far logits are apart in each step, in standard deviations of ``b``; infinitely far if
    ``a`` is no number.

    Args:
        a (mx.array): Logits of shape (steps, vocabulary).
        b (mx.array): Others of the same shape.
    """
    a, b = a.astype(mx.float32), b.astype(mx.float32)
    apart = mx.sqrt(mx.mean(mx.square(a - b), axis=-1))
    apart = apart / mx.maximum(mx.std(b, axis=-1), 1e-30)
    return mx.where(mx.isnan(apart), mx.inf, apart).tolist()
