"""Which rows decode together: decided on lengths and costs alone."""

import random
from itertools import combinations

import pytest

from mlx_lm_ext.batch.grouping import Grouping, Shape, cut
from mlx_lm_ext.batch.step_costs import StepCosts

PLACE = 1e-6


def grouping_of(seconds, **kwargs):
    """A step takes so long, and a microsecond more for each place."""
    costs = StepCosts(lambda: PLACE)
    for _ in range(3):
        costs.note(32, 100, seconds + 3200 * PLACE)
    return Grouping(costs, kwargs.pop("max_places", 10**9), **kwargs)


def sets(parts):
    return sorted(sorted(part) for part in parts)


def test_long_row_gets_a_group_of_its_own():
    grouping = grouping_of(0.01)
    assert grouping.place([[100] * 31], [16000]) == [1]
    assert sets(grouping.plan([[100] * 31 + [16000]])) == [[*range(31)], [31]]


def test_rows_of_like_length_stay_together():
    grouping = grouping_of(0.01)
    for lengths in ([100] * 32, [5000] * 32, [*range(5000, 6000, 50)]):
        assert grouping.plan([lengths]) is None
        assert grouping.place([lengths], [lengths[0]]) == [0]


@pytest.mark.parametrize("lengths", [[1023] * 8 + [1] * 20, [3, 4, 1000]])
def test_short_rows_are_neither_measured_nor_parted(lengths):
    def measure():
        raise AssertionError

    grouping = Grouping(StepCosts(measure), 10**9)
    grouping.costs.note(8, 1000, 1.0)
    assert grouping.place([lengths[1:]], lengths[:1]) == [0]


def test_nothing_is_measured_where_padding_is_little():
    def measure():
        raise AssertionError

    grouping = Grouping(StepCosts(measure), 10**9)
    grouping.costs.note(8, 4000, 1.0)
    assert grouping.plan([[3600, 4000] * 4]) is None
    assert grouping.place([[4000] * 8], [3600]) == [0]


def test_groups_are_not_worth_it_where_a_step_takes_long_whatever_its_rows():
    grouping = grouping_of(1.0)
    assert grouping.plan([[100] * 31 + [16000]]) is None
    assert grouping.place([[100] * 31], [16000]) == [0]


def test_groups_that_become_alike_are_joined():
    grouping = grouping_of(0.01)
    assert sets(grouping.plan([[1000] * 8, [1200] * 4])) == [[*range(12)]]
    assert sets(grouping.plan([[10], [20] * 4])) == [[*range(5)]]


def test_new_rows_join_the_group_of_their_length():
    grouping = grouping_of(0.01)
    groups = [[100] * 20, [16000] * 4]
    assert grouping.place(groups, [90, 15000, 200, 17000]) == [0, 1, 0, 1]
    assert grouping.place([], [100, 16000, 120, 16500]) == [0, 1, 0, 1]
    assert grouping.place([], [100, 120]) == [0, 0]


def test_there_are_not_more_groups_than_may_be():
    grouping = grouping_of(0.0001, max_groups=3)
    lengths = [100, 1000, 10000, 100000, 50, 30000] * 5
    assert len(grouping.plan([lengths])) == 3
    assert max(grouping.place([[100]] * 3, [16000, 4000, 300])) <= 2


def test_padding_that_takes_much_of_the_memory_is_worth_groups_that_take_longer():
    lengths = [100] * 31 + [16000]
    for max_places, is_parted in ((32 * 16000 * 2, True), (10**8, False)):
        grouping = grouping_of(9.0, max_places=max_places)
        assert bool(grouping.plan([lengths])) is is_parted
        assert grouping.place([[100] * 31], [16000]) == [int(is_parted)]
    # They stay apart as long as it would be so again.
    grouping = grouping_of(9.0, max_places=32 * 16000 * 2)
    assert grouping.plan([lengths[:31], lengths[31:]]) is None
    # It is known without a measurement.
    grouping = Grouping(StepCosts(lambda: 1 / 0), 32 * 16000 * 2)
    assert grouping.place([[100] * 31], [16000]) == [1]


def test_rows_are_not_joined_into_arrays_that_outgrow_the_memory():
    groups = [[1000] * 8, [1300] * 8]
    assert grouping_of(1.0).plan(groups)
    n_held = (8 + 2) * (1280 + 1792)
    assert grouping_of(1.0, max_places=n_held).plan(groups) is None


@pytest.mark.parametrize("seed", range(20))
def test_rows_do_not_move_back(seed):
    """Groups that were made are right until the rows have changed a lot."""
    rng = random.Random(seed)
    grouping = grouping_of(10 ** rng.uniform(-4, -1))
    lengths = [round(10 ** rng.uniform(1, 4.5)) for _ in range(32)]
    groups, n_moves = [lengths], 0
    for _ in range(50):
        parts = grouping.plan(groups)
        flat = [n for group in groups for n in group]
        if parts is not None:
            n_moves += 1
            assert sets(parts) == sorted(
                sorted(i for i in part) for part in parts if part
            )
            assert sorted(i for part in parts for i in part) == [*range(len(flat))]
            groups = [[flat[i] for i in part] for part in parts]
            assert grouping.plan(groups) is None
        groups = [[n + 64 for n in group] for group in groups]
    assert n_moves < 8


@pytest.mark.parametrize("seed", range(20))
def test_cut_is_the_cheapest(seed):
    rng = random.Random(seed)
    lengths = sorted(rng.randint(1, 1000) for _ in range(rng.randint(1, 9)))
    fixed = rng.choice([0, 100, 3000])

    def cost(shape):
        return fixed + shape.n_places

    def total(stops):
        edges = [0, *stops]
        parts = [lengths[a:b] for a, b in zip(edges, edges[1:])]
        return sum(cost(Shape.of(part)) for part in parts)

    n = len(lengths)
    found = cut([Shape.of([length]) for length in lengths], 4, cost)
    for k, stops in enumerate(found, 1):
        every = [[*inner, n] for inner in combinations(range(1, n), k - 1)]
        assert len(stops) == k and total(stops) == min(map(total, every))
    assert len(found) == min(4, n)


def test_step_of_fewer_rows_takes_no_longer_than_one_that_was_run():
    costs = StepCosts(lambda: PLACE)
    costs.note(32, 0, 0.02)
    assert costs.of_step(1, 1000) == pytest.approx(0.021)
    costs.note(1, 0, 0.005)
    assert costs.of_step(1, 1000) == pytest.approx(0.006)
    assert costs.of_step(2, 1000) == pytest.approx(0.022)
    assert costs.of_step(99, 0) == pytest.approx(0.02)


def test_a_step_that_waits_for_something_else_does_not_count():
    costs = StepCosts(lambda: PLACE)
    for seconds in (0.02, 0.02, 9.0, 0.02, 0.02):
        costs.note(4, 1000, seconds)
    assert costs.fixed(4) == pytest.approx(0.016)
