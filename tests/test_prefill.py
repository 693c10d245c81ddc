"""How many tokens of the prompts a step runs."""

import pytest

from mlx_lm_ext.batch import prefill


@pytest.mark.parametrize(
    "lengths, budget, width",
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
def test_padding_of_a_step_is_bounded(lengths, budget, width):
    assert prefill.chunk_width(lengths, budget) == width


@pytest.mark.parametrize("is_cpu, expected", [(True, [100, 256]), (False, [100, 2048])])
def test_step_of_a_cpu_runs_256_tokens_of_prompts_at_most(
    is_cpu, expected, monkeypatch
):
    monkeypatch.setattr(prefill, "on_cpu", lambda: is_cpu)
    assert [prefill.max_prefill_tokens(n) for n in (100, 2048)] == expected
