"""Checks, when a model is loaded, that prompts in a batch get the logits that they get alone.

For some architectures, a batch of mlx-lm is wrong: the padding of the shorter prompts changes
their answers. Two short prompts show it.

Rules:
1. During the check the model computes in float32, whatever its weights are. In 16 bits,
   rounding moves the logits as far as the faults do that the check looks for.
2. A fault has to show with several pairs of prompts. Where two experts of a mixture score
   alike, rounding may choose the other one, and one pair may differ because of that.
3. The check leaves nothing behind but what MLX caches, and draws no random number.
"""

import logging
import random
import traceback
from contextlib import contextmanager
from functools import partial
from typing import Iterator, List, NamedTuple

import mlx.core as mx
from mlx import nn
from mlx.utils import tree_unflatten
from mlx_lm.models.cache import make_prompt_cache

from ..batch.generator import LeanGenerationBatch
from ..batch.prompts import LeanPromptBatch, PromptInProgress
from ..cache.kinds import make_segmented_cache
from ..distributed.group import ONE_PROCESS, OneProcess
from ..errors import one_line

logger = logging.getLogger(__name__)

# Tokens of the segments of the two prompts, but for the last token of each. After the first
# segment, the shorter prompt has padding before its tokens and after them.
SEGMENTS = ((2, 1), (5, 3))
# Tokens that are run one by one: the last of the prompt, and one of an answer.
N_STEPS = 2
N_TRIES = 3
# How far the logits of a step may be apart: the root of the mean square of the differences, in
# standard deviations of the logits. Measured on a CPU with the random models of mlx-lm 0.32.2's
# tests: up to 4e-5 if the architecture is right, and 1.7e-2 and more if it is wrong, with weights
# in float32, bfloat16, float16 and 4 bits alike. To compute in 16 bits alone moves the logits of
# these models by up to 0.7, and of those with weights in 4 bits by up to 1.6.
# On an H100, where MLX multiplies float32 in TF32, right ones were up to 8e-4 apart (five models,
# of up to 8B and 32 layers), and the wrong ones 1.2e-2 and more.
TOLERANCE = 3e-3


class Prompt(NamedTuple):
    """A prompt of the check.

    Args:
        segments (List[List[int]]): Its tokens but for the last.
        steps (List[int]): Its last token, and those of its answer.
    """

    segments: List[List[int]]
    steps: List[int]


class UncheckedError(Exception):
    """A model cannot be checked. The message says why."""


class Float32Embedding(nn.Module):
    """An embedding that gives float32, so that all layers after it compute in float32.

    Args:
        embedding (nn.Module): What it takes the place of.
    """

    def __init__(self, embedding: nn.Module):
        super().__init__()
        self.embedding = embedding

    def __call__(self, tokens: mx.array) -> mx.array:
        return self.embedding(tokens).astype(mx.float32)

    # Some models compute their logits from these.

    def as_linear(self, x: mx.array) -> mx.array:
        return self.embedding.as_linear(x)

    @property
    def weight(self) -> mx.array:
        return self.embedding.weight


@contextmanager
def in_float32(model: nn.Module) -> Iterator[None]:
    """Meanwhile, the model computes in float32. Its weights stay as they are: MLX converts those
    of a layer when they are needed."""
    kinds = (nn.Embedding, nn.QuantizedEmbedding)
    found = [(n, m) for n, m in model.named_modules() if isinstance(m, kinds)]
    replaced = [(n, Float32Embedding(m)) for n, m in found]
    try:
        model.update_modules(tree_unflatten(replaced))
        yield
    finally:
        model.update_modules(tree_unflatten(found))


def find_fault(model: nn.Module, group: OneProcess = ONE_PROCESS) -> str:
    """What is wrong with the batches of a model. Empty if they are right, or if they could not be
    checked, of which a line of the log says why.

    Args:
        model (nn.Module): A model whose caches can be merged.
        group (OneProcess): The ranks that run the model. Rank 0 decides after each try.
    """
    fault = ""
    with in_float32(model):
        for seed in range(N_TRIES):
            found = judge(model, seed)
            fault, unchecked = group.agree("fault of batches", partial(list, found))
            if unchecked:
                logger.warning(f"There is no self-check of batches: {unchecked}")
            if not fault:
                break
    return fault


def judge(model: nn.Module, seed: int) -> List[str]:
    """What is wrong with the batch of two prompts, and why it could not be checked. Both are empty
    if it is right."""
    try:
        return [compare(model, seed), ""]
    except UncheckedError as e:
        return ["", str(e)]


def make_prompts(model: nn.Module, seed: int) -> List[Prompt]:
    """Two prompts of unlike lengths."""
    # It is not run.
    logits = model(mx.zeros((1, 1), mx.int32), cache=make_prompt_cache(model))
    n = logits.shape[-1]
    # The special tokens are at the ends of most vocabularies.
    rng, tokens = random.Random(seed), range(n // 4, max(n // 2, 1))
    return [
        Prompt([rng.choices(tokens, k=k) for k in lengths], rng.choices(tokens, k=2))
        for lengths in SEGMENTS
    ]


def compare(model: nn.Module, seed: int) -> str:
    """What is wrong with the batch of two prompts. Empty if it is right.

    Raises:
        UncheckedError: If the prompts alone have no logits that could be compared.
    """
    try:
        prompts = make_prompts(model, seed)
        alone = [run_alone(model, p) for p in prompts]
    except Exception as e:
        traceback.clear_frames(e.__traceback__)
        raise UncheckedError(f"a prompt fails: {one_line(e)}") from None
    if any(logits.dtype != mx.float32 for logits in alone):
        raise UncheckedError("the model does not compute in float32")
    if not all(mx.all(mx.isfinite(logits)).item() for logits in alone):
        raise UncheckedError("the logits of a prompt are not finite")
    try:
        apart = distance(run_together(model, prompts), mx.stack(alone))
    except Exception as e:
        traceback.clear_frames(e.__traceback__)
        return f"a batch of two prompts fails: {one_line(e)}"
    if apart <= TOLERANCE:
        return ""
    return (
        f"in a batch, the logits of a prompt are {apart:.2g} standard deviations from those of "
        f"the prompt alone ({TOLERANCE:g} could be rounding)"
    )


def run_alone(model: nn.Module, prompt: Prompt) -> mx.array:
    """The logits of the steps of a prompt, of shape (steps, vocabulary), all tokens at once."""
    tokens = [t for tokens in (*prompt.segments, prompt.steps) for t in tokens]
    inputs = mx.array([tokens], mx.uint32)
    logits = model(inputs, cache=make_prompt_cache(model))[0, -len(prompt.steps) :]
    # One after the other: with --pipeline, the ranks would mix what they send.
    mx.eval(logits)
    return logits


def run_together(model: nn.Module, prompts: List[Prompt]) -> mx.array:
    """What ``run_alone`` gives for each prompt, in the batches of the server."""
    progress = []
    for p in prompts:
        segments = [*p.segments, p.steps[:1]]
        progress.append(PromptInProgress(segments, 0, sum(map(len, segments))))
    batch = LeanPromptBatch(
        progress,
        model,
        [*range(len(prompts))],
        [make_segmented_cache(model) for _ in prompts],
        logits_processors=[[] for _ in prompts],
    )
    while not all(p.is_at_last_token for p in batch.progress):
        batch.run(max(batch.segment_lengths))
    rows = LeanGenerationBatch.of_prompts(batch, ONE_PROCESS)
    logits = []
    for tokens in zip(*(p.steps for p in prompts)):
        logits.append(rows.run(mx.array(tokens, mx.uint32)))
        mx.eval(logits)
    return mx.stack(logits, axis=1)


def distance(a: mx.array, b: mx.array) -> float:
    """How far logits are apart at most, in standard deviations of ``b``. NaN if some of ``a`` are
    not finite.

    Args:
        a (mx.array): Logits of shape (rows, steps, vocabulary).
        b (mx.array): Others of the same shape, which are finite.
    """
    apart = mx.sqrt(mx.mean(mx.square(a - b), axis=-1))
    # Logits that are all the same have no deviation but what rounding makes.
    size = mx.sqrt(mx.mean(mx.square(b), axis=-1))
    spread = mx.maximum(mx.std(b, axis=-1), 1e-3 * size + 1e-30)
    # MLX's ``max`` passes NaN on.
    return mx.max(apart / spread).item()
