"""How many tokens of prompts fit between two tokens of the streams that run."""

import pytest

from mlx_lm_ext.batch import pace as pace_module
from mlx_lm_ext.batch.pace import MAX_MIXED, Pace

LIMIT = 2048


def pace(max_gap=1.0, decode=0.1, chunk=0.0, token=0.01, n_steps=30):
    """What is known after steps of 4 rows, whose chunks take a fixed time, and one for each
    token."""
    known = Pace(max_gap, LIMIT, least=16)
    for n in (8, 16, 32, 64, 128, 256, 512, 1024, 2048):
        for _ in range(n_steps):
            known.note(0, [n], chunk + n * token)
    for _ in range(n_steps):
        known.note(4, [], decode)
    return known


@pytest.mark.parametrize("token, n", [(0.01, 70), (0.001, 700), (0.0001, LIMIT)])
def test_prompts_fit_into_what_the_decoding_leaves_of_the_gap(token, n):
    assert pace(token=token).gap_tokens(4) == pytest.approx(n, rel=0.01)


def test_a_chunk_has_a_fixed_cost():
    known = pace(chunk=0.3, token=0.01)
    # Chunks of 32 to 63 tokens were seen with 32 of them.
    assert 31 <= known.gap_tokens(4) < 45
    assert known.cost(40, 8) > 8


def test_gap_is_four_decode_steps_if_no_other_is_given():
    assert pace(None, decode=1.0).gap_tokens(4) == pytest.approx(220, rel=0.01)
    # Nobody reads faster than that.
    known = pace(None, decode=0.01, token=0.001)
    assert known.gap_tokens(4) == pytest.approx(70, rel=0.02)


@pytest.mark.parametrize("is_on_cpu, n", [(True, 460), (False, 300)])
def test_gap_is_longer_while_a_long_prompt_is_left(is_on_cpu, n, monkeypatch):
    monkeypatch.setattr(pace_module, "on_cpu", lambda: is_on_cpu)
    assert pace(None, decode=1.0).gap_tokens(4, 1024) == pytest.approx(n, rel=0.01)
    # Not if a gap is given.
    assert pace(1.0).gap_tokens(4, 1024) == pace(1.0).gap_tokens(4)


def test_prompts_get_a_share_however_slow_the_decoding_is():
    assert pace(0.0, decode=1.0).gap_tokens(4) == pytest.approx(100, rel=0.01)
    assert pace(0.0, decode=0.01).gap_tokens(4) == 16


def test_estimates_follow_the_steps():
    known = pace()
    for _ in range(30):
        n = known.gap_tokens(4)
        known.note(4, [n], 0.1 + n * 0.02)
    assert known.gap_tokens(4) == pytest.approx(35, rel=0.02)


def test_one_slow_step_changes_little():
    known = pace()
    known.note(4, [80], 60.0)
    known.note(4, [], 60.0)
    assert known.gap_tokens(4) > 50


def test_a_slow_first_step_is_forgotten_soon():
    known = Pace(1.0, LIMIT)
    known.note(0, [64], 30.0)
    for _ in range(3):
        known.note(0, [64], 0.64)
    assert known.gap_tokens(0) > 50


def test_decoding_is_measured_where_it_is_not_known():
    known = pace()
    assert not known.must_measure(0)
    assert not known.must_measure(7)
    assert known.must_measure(8)
    for _ in range(MAX_MIXED):
        assert not known.must_measure(4)
        known.note(4, [8], 0.2)
    assert known.must_measure(4)


def test_a_decode_step_that_was_thought_to_be_long_is_forgotten():
    known = Pace(1.0, LIMIT)
    known.note(1, [], 1.0)
    known.note(1, [64], 0.05)
    for _ in range(30):
        known.note(1, [], 0.01)
        known.note(1, [64], 0.65)
    assert known.gap_tokens(1) == pytest.approx(78, rel=0.05)


def test_first_chunk_is_short():
    assert Pace(None, LIMIT).gap_tokens(1) == 64
