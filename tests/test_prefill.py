"""How wide the chunks of prompts are, and that their padding changes no answer."""

import pytest
from helpers import Reference, read, submit, texts
from tiny_models import CONFIGS

from mlx_lm_ext import prefill


@pytest.mark.parametrize(
    "lengths, n_tokens, width",
    [
        ([500], 256, 256),
        ([5, 500], 256, 69),
        ([500] * 8, 256, 32),
        ([500] * 8, 4, 1),
        # A few tokens of padding are cheaper than a step.
        ([4, 500, 500], 96, 32),
        ([4] * 7 + [2000], 256, 13),
        # A quarter may be padding: 180 of 1,200, 332 of 1,464.
        ([400, 220, 400], 1200, 400),
        ([1000, 400], 2000, 732),
    ],
)
def test_padding_of_a_step_is_bounded(lengths, n_tokens, width):
    found = prefill.chunk_width(lengths, n_tokens)
    assert found == width


@pytest.mark.parametrize(
    "lengths, n_tokens, width",
    [
        ([93], 2048, 128),
        ([1100], 2048, 1024),
        ([500] * 8, 256, 32),
        ([500] * 6, 256, 32),
        ([93] * 8, 2048, 128),
        ([4, 500, 500], 2048, 256),
        ([1] * 40, 256, 1),
    ],
)
def test_chunks_take_few_shapes_where_a_new_one_is_dear(
    lengths, n_tokens, width, monkeypatch
):
    monkeypatch.setattr(prefill, "ROUNDED", True)
    monkeypatch.setattr(prefill, "FREE_PADDING", 512)
    assert prefill.chunk_width(lengths, n_tokens) == width
    assert width & (width - 1) == 0


@pytest.mark.parametrize("architecture", CONFIGS)
def test_padded_chunks_give_the_same_tokens(
    architecture, monkeypatch, start_engine, model_folder
):
    monkeypatch.setattr(prefill, "ROUNDED", True)
    reference = Reference(model_folder(architecture))
    engine = start_engine(architecture, "--use-prompt-cache", "--prefill-budget", "100")
    prompts = texts(12, longest=300, seed=3)
    prompts += [p + "!" for p in prompts[:4]]
    jobs = [submit(engine, p, max_tokens=12) for p in prompts]
    for prompt, job in zip(prompts, jobs):
        assert read(job) == reference.tokens(prompt, 12)
    engine.prompt_cache.check_integrity()
