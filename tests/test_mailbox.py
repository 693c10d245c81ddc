"""Events reach their handlers, one wake-up after the other."""

import random
import threading
from dataclasses import replace

import pytest

from mlx_lm_ext.errors import RequestError
from mlx_lm_ext.request.mailbox import Mailbox, Turnstile
from mlx_lm_ext.request.request import Request, Token


class Waiting(Mailbox):
    """A mailbox as if its handler waited."""

    def __init__(self, turnstile):
        super().__init__(turnstile)
        self.is_waiting = True

    @property
    def is_woken(self):
        return not self.turn.locked()


def test_all_that_has_come_is_taken_at_once():
    turnstile = Turnstile()
    box = Mailbox(turnstile)
    assert box.take(timeout=0) == []
    for event in "abc":
        turnstile.put([(box, event, True)])
    assert box.take(timeout=0) == ["a", "b", "c"]
    assert box.take(timeout=0) == []


def test_tokens_that_came_before_an_error_are_taken_before_it_is_raised():
    request = Request("", None, model=None, completion=None)
    tokens = [Token(1), Token(2)]
    for event in (*tokens, RequestError(503, "over")):
        request.put(event)
    assert request.receive(timeout=60) == tokens
    for _ in range(2):
        with pytest.raises(RequestError, match="over"):
            request.receive(timeout=60)


def test_error_of_an_answer_that_has_ended_for_the_handler_does_not_end_the_others():
    first = Request("", None, model=None, completion=None)
    other, late = (replace(first, generated=[]) for _ in range(2))
    answers = first.answers
    for request, event in (
        (first, Token(1)),
        (first, RequestError(500, "over")),
        (other, Token(2)),
    ):
        request.put(event)
    assert answers.receive(timeout=60) == {first: [Token(1)], other: [Token(2)]}
    # The handler has found a stop word in the first token.
    answers.end(first)
    other.put(Token(3))
    assert answers.receive(timeout=60) == {other: [Token(3)]}
    answers.end(late)
    late.put(RequestError(500, "over"))
    other.put(Token(4, finish_reason="stop"))
    assert [*answers.receive(timeout=60)] == [other]


def test_handler_is_not_woken_for_what_is_not_worth_it():
    turnstile = Turnstile()
    box = Waiting(turnstile)
    turnstile.put([(box, "a", False)])
    assert not box.is_woken
    turnstile.put([(box, "b", True)])
    assert box.is_woken
    assert box.take(timeout=0) == ["a", "b"]


def test_each_handler_wakes_the_next():
    turnstile = Turnstile()
    boxes = [Waiting(turnstile) for _ in range(3)]
    turnstile.put([(box, "a", True) for box in boxes])
    # The next step has come before any of them ran.
    turnstile.put([(box, "b", True) for box in boxes])
    for i, box in enumerate(boxes):
        assert [b.is_woken for b in boxes[i:]] == [True] + [False] * (2 - i)
        assert box.turn.acquire(timeout=0)
        with turnstile.lock:
            turnstile.wake_next()
        assert box.events == ["a", "b"]
    assert not turnstile.is_busy


def test_busy_handler_keeps_nobody_waiting():
    turnstile = Turnstile()
    busy, idle = Mailbox(turnstile), Waiting(turnstile)
    turnstile.put([(busy, "a", True), (idle, "a", True)])
    assert idle.is_woken
    turnstile.put([(busy, "b", True)])
    assert idle.turn.acquire(timeout=0)
    with turnstile.lock:
        turnstile.wake_next()
    assert busy.take(timeout=0) == ["a", "b"]


def test_nothing_is_lost_when_time_runs_out_as_something_comes():
    turnstile = Turnstile()
    boxes = [Mailbox(turnstile) for _ in range(12)]
    taken = [[] for _ in boxes]

    def handle(box, events):
        rng = random.Random(id(box))
        while not events or events[-1] is not None:
            events += box.take(timeout=rng.choice([0, 1e-5, 1e-4, 1]))

    threads = [threading.Thread(target=handle, args=a) for a in zip(boxes, taken)]
    for thread in threads:
        thread.start()
    rng = random.Random(0)
    for step in range(3000):
        rows = rng.sample(boxes, rng.randint(1, 12))
        turnstile.put([(box, step, rng.random() < 0.7) for box in rows])
    turnstile.put([(box, None, True) for box in boxes])
    for thread in threads:
        thread.join(60)
        assert not thread.is_alive()
    for events in taken:
        assert events[:-1] == sorted(set(events[:-1]))
    assert sum(map(len, taken)) > 3000
