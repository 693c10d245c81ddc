"""How wide the chunks of prompts are."""

import pytest

from mlx_lm_ext.batch import prefill


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
