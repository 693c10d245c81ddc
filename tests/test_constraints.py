"""Rows of a batch that may not have all tokens: what they get is what mlx-lm gives under the same
rule, whichever rows are beside them."""

import math

import mlx.core as mx
import pytest
from helpers import Reference, plugin, read, submit, texts, wait_until_idle

from mlx_lm_ext.batch import generator
from mlx_lm_ext.batch.batch import Batch
from mlx_lm_ext.engine.constrained_model import ConstrainedModel
from mlx_lm_ext.engine.loop import Engine
from mlx_lm_ext.errors import RequestError
from mlx_lm_ext.interfaces import Constraint
from mlx_lm_ext.policies.guarded_constraint import GuardedConstraint

VOCABULARY = 259
PROMPTS = texts(8)


def is_allowed(token, i):
    """Whether it may be the i-th token of an answer."""
    return token % 7 == i % 7 and token > 2


class Stairs(Constraint):
    """Allows other tokens at each place of an answer."""

    def __init__(self):
        self.given = []

    def copy(self):
        other = type(self)()
        other.given = self.given[:]
        return other

    def advance(self, token):
        assert is_allowed(token, len(self.given))
        self.given.append(token)

    def fill(self, mask):
        mask[:] = 0
        for token in range(VOCABULARY):
            if is_allowed(token, len(self.given)):
                mask[token // 32] |= 1 << token % 32


def constraining(make):
    """A plugin that makes a constraint for the requests with ``restricted``."""

    def hook(request):
        if "restricted" in request.body:
            return make(request.body["restricted"])

    return plugin(mlx_lm_make_constraint=hook)


@pytest.fixture(
    params=[True, False], ids=["samples last", "samples first"], autouse=True
)
def order(request, monkeypatch):
    """The order of a step on a CPU, and on a GPU."""
    monkeypatch.setattr(generator, "on_cpu", lambda: request.param)


@pytest.fixture
def expected(model_folder):
    """What mlx-lm answers greedily, under the rule of ``Stairs`` or none."""
    free = Reference(model_folder())

    def get(prompt, n, restricted=False):
        if not restricted:
            return free.tokens(prompt, n)
        n_prompt = len(free.tokenizer.encode(prompt))

        def rule(tokens, logits):
            allowed = [is_allowed(t, len(tokens) - n_prompt) for t in range(VOCABULARY)]
            return mx.where(mx.array(allowed), logits, -mx.inf)

        return Reference(model_folder(), logits_processors=[rule]).tokens(prompt, n)

    return get


@pytest.mark.parametrize("argv", [[], ["--use-prompt-cache"]], ids=str)
@pytest.mark.parametrize("restricted", [[5], [1, 3, 5, 7], [*range(8)]], ids=str)
def test_rows_get_the_tokens_that_they_may_have_beside_others(
    restricted, argv, start_engine, expected
):
    engine = start_engine("llama", *argv, plugin=constraining(lambda _: Stairs()))
    fields = [{"restricted": 1} if i in restricted else {} for i in range(8)]
    for _ in range(2):
        jobs = [
            submit(engine, prompt, max_tokens=9 + i, **fields[i])
            for i, prompt in enumerate(PROMPTS)
        ]
        for i, job in enumerate(jobs):
            assert read(job) == expected(PROMPTS[i], 9 + i, i in restricted)


def test_each_answer_to_a_prompt_has_a_constraint_of_its_own(start_engine):
    engine = start_engine(plugin=constraining(lambda _: Stairs()))
    for seed in range(8):
        job = submit(
            engine, "a", max_tokens=20, temperature=1.5, seed=seed, restricted=1
        )
        assert all(is_allowed(token, i) for i, token in enumerate(read(job)))


def test_what_is_not_allowed_has_no_probability(start_engine):
    engine = start_engine(plugin=constraining(lambda _: Stairs()))
    job = submit(engine, "a", max_tokens=3, logprobs=20, restricted=1)
    found = []
    while not found or found[-1].finish_reason is None:
        found += job.receive(timeout=60)
    for i, token in enumerate(found):
        (first, logprob), *_ = token.top
        assert (first, logprob) == (token.id, token.logprob)
        allowed = [p for t, p in token.top if is_allowed(t, i)]
        # That of all 37 that are allowed is 1.
        assert 0.6 < sum(map(math.exp, allowed)) < 1
        assert all(p == -math.inf for t, p in token.top if not is_allowed(t, i))


def test_each_mask_is_filled_once(start_engine):
    filled = []

    class Watched(Stairs):
        def fill(self, mask):
            filled.append(len(self.given))
            super().fill(mask)

    engine = start_engine(plugin=constraining(lambda _: Watched()))
    assert len(read(submit(engine, "a", max_tokens=5, restricted=1))) == 5
    wait_until_idle(engine)
    assert filled == [*range(len(filled))] and len(filled) >= 5


class FailsAt(Stairs):
    """Fails at its fifth token, in one of the ways in which it can."""

    way = ""

    def advance(self, token):
        super().advance(token)
        if len(self.given) == 4 and self.way == "advance":
            raise ZeroDivisionError

    def fill(self, mask):
        super().fill(mask)
        if len(self.given) == 4 and self.way == "fill":
            raise ZeroDivisionError
        if len(self.given) == 4 and self.way == "nothing":
            mask[:] = 0

    @classmethod
    def fill_all(cls, constraints, masks):
        if cls.way == "fill_all" and len(constraints[0].given) == 4:
            raise ZeroDivisionError
        super().fill_all(constraints, masks)


@pytest.mark.logs_errors
@pytest.mark.parametrize("way", ["advance", "fill", "nothing", "fill_all"])
def test_constraint_that_fails_ends_its_request_only(
    way, start_engine, expected, caplog
):
    fails = type("Fails", (FailsAt,), {"way": way})
    make = {"fails": fails, "goes on": Stairs}
    engine = start_engine(plugin=constraining(lambda kind: make[kind]()))
    prompts = PROMPTS[:3]
    free, kept, failing = (
        submit(engine, prompt, max_tokens=12, **fields)
        for prompt, fields in zip(
            prompts, ({}, {"restricted": "goes on"}, {"restricted": "fails"})
        )
    )
    with pytest.raises(RequestError, match="its log says why"):
        read(failing)
    assert read(free) == expected(prompts[0], 12)
    assert read(kept) == expected(prompts[1], 12, True)
    wait_until_idle(engine)
    assert not len(engine.batch) and failing.forgotten
    assert "plugin 'test' (tests 0): a constraint failed" in caplog.text
    # It got no token that it may not have.
    assert failing.n_generated <= 4


def outgrowing(*when):
    """An engine whose memory is too small whenever a request has so many tokens."""

    class Outgrows(Batch):
        left = [*when]

        def outgrows_memory(self, beside):
            return any(
                row.request.n_generated in self.left for row in self.rows.values()
            )

        def preempt(self, request):
            self.left.remove(request.n_generated)
            super().preempt(request)

    class ShortEngine(Engine):
        batch_class = Outgrows

    return ShortEngine


def test_row_that_waits_for_memory_goes_on_where_its_constraint_was(
    start_engine, expected
):
    engine = start_engine(
        make_engine=outgrowing(5, 9), plugin=constraining(lambda _: Stairs())
    )
    job = submit(engine, "hello", max_tokens=14, restricted=1)
    assert read(job) == expected("hello", 14, True)
    assert not engine.batch.left


@pytest.mark.logs_errors
@pytest.mark.parametrize("n", [3, 4])
def test_constraint_may_fail_when_its_row_has_to_wait(n, start_engine, expected):
    fails = type("Fails", (FailsAt,), {"way": "advance"})
    engine = start_engine(
        make_engine=outgrowing(n), plugin=constraining(lambda _: fails())
    )
    job = submit(engine, "hello", max_tokens=14, restricted=1)
    with pytest.raises(RequestError, match="its log says why"):
        read(job)
    assert job.n_generated <= 4 and not engine.batch.left
    # The engine goes on.
    assert read(submit(engine, "hello", max_tokens=9)) == expected("hello", 9)


def test_constraint_that_refuses_a_request_says_so(start_engine):
    def make(_):
        raise RequestError(400, "no such rule", "restricted")

    engine = start_engine(plugin=constraining(make))
    with pytest.raises(RequestError, match="no such rule") as error:
        submit(engine, "hello", restricted=1)
    assert error.value.status == 400


def test_request_that_two_plugins_restrict_is_refused(start_engine):
    engine = start_engine(plugin=constraining(lambda _: Stairs()))
    other = constraining(lambda n: Stairs() if n > 1 else None)
    engine.policies.plugins.add("other", lambda: other, "tests", "0")
    with pytest.raises(RequestError, match="both restrict the answer") as error:
        submit(engine, "hello", restricted=2)
    assert error.value.status == 400
    assert "test" in str(error.value) and "other" in str(error.value)
    assert read(submit(engine, "hello", max_tokens=2, restricted=1))


def test_rule_of_an_answer_that_is_served_alone_begins_when_its_prompt_runs():
    class FirstOnly(Stairs):
        n_filled = 0

        def fill(self, mask):
            type(self).n_filled += 1
            super().fill(mask)

    row = GuardedConstraint("test", FirstOnly(), VOCABULARY)
    model = ConstrainedModel(
        lambda inputs, cache: mx.zeros((1, inputs.shape[1], VOCABULARY)), row, lambda: 3
    )
    assert FirstOnly.n_filled == 0
    assert model(mx.zeros((1, 2), mx.uint32), cache=None).shape == (1, 2, VOCABULARY)
    for i, token in enumerate((0, 7, 8)):
        logits = model(mx.array([[token]]), cache=None)[0, 0]
        allowed = [t for t, logit in enumerate(logits.tolist()) if logit == 0]
        assert allowed == [t for t in range(VOCABULARY) if is_allowed(t, i)]
    assert FirstOnly.n_filled == 3
