"""With CUDA, chunks of prompts are padded to few shapes. Here the CPU does so, too."""

import random

import pytest
from helpers import LETTERS, Reference, read, submit, texts, wait_until_idle
from integrity import check
from tiny_models import CONFIGS

from mlx_lm_ext.batch import generator, prefill

CACHE = ["--use-prompt-cache"]


@pytest.fixture
def ends(monkeypatch):
    """Chunks are padded as with CUDA; gives the places where they have ended."""
    monkeypatch.setattr(prefill, "device_kind", lambda: "cuda")
    seen = []

    def padded_end(end):
        seen.append(prefill.padded_end(end))
        return seen[-1]

    monkeypatch.setattr(generator, "padded_end", padded_end)
    return seen


@pytest.mark.parametrize("architecture", CONFIGS)
@pytest.mark.parametrize("argv", [[], CACHE], ids=["without", "cache"])
def test_answers_are_those_without_padding(argv, architecture, start_engine, ends):
    engine = start_engine(architecture, *argv, "--prefill-step-size", "100")
    reference = Reference(engine.cli_args.model)
    prompts = texts(12, longest=400)
    # Some share a prefix with others.
    prompts += [p[: len(p) // 2] + "and more" for p in prompts[:4]]
    jobs = [submit(engine, p, max_tokens=9) for p in prompts]
    for prompt, job in zip(prompts, jobs):
        assert read(job) == reference.tokens(prompt, 9)
    # The same once more, from the cache.
    for prompt in prompts[:3]:
        assert read(submit(engine, prompt, max_tokens=9)) == reference.tokens(prompt, 9)
    wait_until_idle(engine)
    if argv:
        check(engine.prompt_cache)


def test_chunks_end_in_few_places(start_engine, ends):
    engine = start_engine()
    rng = random.Random(0)
    for n in (2, 20, 33, 200, 257, 300, 1000):
        read(submit(engine, "".join(rng.choices(LETTERS, k=n)), max_tokens=1))
    assert {end % 32 for end in ends if end <= 256} == {0}
    assert {end % 128 for end in ends if end > 256} == {0}


def test_nothing_is_padded_without_cuda():
    assert [prefill.padded_end(n) for n in (1, 33, 300)] == [1, 33, 300]
