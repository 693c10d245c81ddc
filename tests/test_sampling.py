"""The built-in sampler and penalties, against those of mlx-lm, and what seeds promise."""

import math
import random
from types import SimpleNamespace

import mlx.core as mx
import numpy as np
import pytest
from helpers import Reference, call, read, stream, submit, texts
from mlx_lm import sample_utils
from tiny_models import CONFIGS

from mlx_lm_ext.arguments import make_parser
from mlx_lm_ext.batch.batch import Batch
from mlx_lm_ext.engine.loop import Engine
from mlx_lm_ext.request.fields import make_generation_arguments
from mlx_lm_ext.sampling import cpu as cpu_sampling
from mlx_lm_ext.sampling import default as sampling
from mlx_lm_ext.sampling import gpu as gpu_sampling
from mlx_lm_ext.sampling.default import DefaultSampler
from mlx_lm_ext.sampling.parameters import make_key
from mlx_lm_ext.sampling.penalties import MAX_CONTEXT, Penalties, PenaltyParameters

# A few that are about as likely as each other, and a long tail.
SPECIAL = [3, 17]
COMMAND_LINE = make_parser().parse_args([])
FILTERS = [
    dict(),
    dict(top_p=0.6),
    dict(top_p=0.999),
    dict(min_p=0.2),
    dict(top_p=0.9, min_p=0.2),
    dict(top_k=5),
    dict(xtc_probability=1.0, xtc_threshold=0.02),
    dict(xtc_probability=0.4, xtc_threshold=0.05),
    dict(top_p=0.9, min_p=0.05, top_k=7, xtc_probability=0.3, xtc_threshold=0.08),
]


def logits_of(n_tokens, seed=0, spread=2.0):
    return np.random.default_rng(seed).normal(0, spread, n_tokens).astype(np.float32)


def make_row(n_generated=0, **body):
    """A sampler of one row."""
    args = make_generation_arguments(body, COMMAND_LINE)
    tokenizer = SimpleNamespace(encode=lambda text: SPECIAL[:1], eos_token_ids=[17])
    request = SimpleNamespace(args=args, n_generated=n_generated)
    return DefaultSampler(None, request, tokenizer)


def make_rows(bodies):
    first, *others = (make_row(**body) for body in bodies)
    for other in others:
        first.extend(other)
    return first


def kept_by_upstream(logits, body):
    """The logits after upstream's filters, with xtc as likely as it is asked for."""
    x = mx.array(logits)[None]
    x = x - mx.logsumexp(x, axis=-1, keepdims=True)
    if 0 < body.get("top_p", 0) < 1:
        x = sample_utils.apply_top_p(x, body["top_p"])
    if "min_p" in body:
        x = sample_utils.apply_min_p(x, body["min_p"])
    if body.get("xtc_probability"):
        threshold = body["xtc_threshold"]
        x = sample_utils.apply_xtc(x, body["xtc_probability"], threshold, SPECIAL)
    if "top_k" in body:
        x = sample_utils.apply_top_k(x, body["top_k"])
    return np.array(x)[0]


def distribution(logits, body):
    """The probabilities of ``make_sampler`` with these parameters."""
    probability = body.get("xtc_probability", 0.0)
    total = 0.0
    for always, share in ((1.0, probability), (0.0, 1 - probability)):
        if not share:
            continue
        x = kept_by_upstream(logits, body | {"xtc_probability": always})
        x = x.astype(np.float64) / body["temperature"]
        p = np.exp(x - x.max())
        total = total + share * p / p.sum()
    return total


@pytest.fixture(params=["cpu", "gpu"])
def device(request, monkeypatch):
    """The code for either device. The device itself stays."""
    monkeypatch.setattr(sampling, "on_cpu", lambda: request.param == "cpu")


@pytest.mark.slow
@pytest.mark.parametrize("temperature", [0.7, 1.6])
@pytest.mark.parametrize("body", FILTERS, ids=str)
def test_distribution_is_that_of_upstream(body, temperature, device):
    logits = logits_of(40)
    body = body | {"temperature": temperature}
    expected = distribution(logits, body)
    n_rows, n_steps = 2000, 10
    sampler = make_rows([body | {"seed": i} for i in range(n_rows)])
    x = mx.broadcast_to(mx.array(logits), (n_rows, len(logits)))
    drawn = np.concatenate([np.array(sampler(x)) for _ in range(n_steps)])
    counts = np.bincount(drawn, minlength=len(logits))
    assert not counts[expected == 0].any()
    # Pearson's chi-square, with what is rare in one cell.
    rare = expected * len(drawn) < 5
    cells = [(c, e) for c, e in zip(counts[~rare], expected[~rare])]
    if expected[rare].sum() * len(drawn) >= 5:
        cells.append((counts[rare].sum(), expected[rare].sum()))
    chi_square = sum((c - e * len(drawn)) ** 2 / (e * len(drawn)) for c, e in cells)
    free = len(cells) - 1
    # Wilson and Hilferty's normal approximation: beyond 4 sigma is 1 in 30,000.
    if free:
        cube = (chi_square / free) ** (1 / 3)
        sigmas = (cube - (1 - 2 / (9 * free))) / math.sqrt(2 / (9 * free))
        assert sigmas < 4


def supports(sampler, x):
    """Which tokens each row can draw, with XTC."""
    sampler.prepare()
    if sampler.backend is gpu_sampling:
        keys, parameters = sampler.keys, sampler.parameters
        x = gpu_sampling.apply_filters(mx.array(x), parameters, keys, SPECIAL)
        return np.isfinite(np.array(x))
    found = np.zeros(x.shape, bool)
    for places, logits, row in zip(
        found, x - x.max(axis=1)[:, None], sampler.parameters
    ):
        p = np.exp(logits)
        places[cpu_sampling.kept_ids(p, logits, row, 0.0, SPECIAL)] = True
    return found


@pytest.mark.parametrize("n_tokens", [20, 200, 1000])
@pytest.mark.parametrize("spread", [0.01, 1.0, 6.0])
@pytest.mark.parametrize(
    "body", [b for b in FILTERS if b and b.get("xtc_probability", 1) == 1], ids=str
)
def test_support_is_that_of_upstream(body, spread, n_tokens, device):
    rows = [logits_of(n_tokens, seed, spread) for seed in range(20)]
    if body.get("top_k", 0) >= n_tokens:
        body = body | {"top_k": 2}
    sampler = make_rows([body | {"temperature": 1.0}] * len(rows))
    for found, logits in zip(supports(sampler, np.stack(rows)), rows):
        kept = kept_by_upstream(logits, body)
        wrong = found != np.isfinite(kept)
        if "top_p" in body:
            # Rounding decides which are equal, and whether a sum is the limit.
            p = np.exp(logits.astype(np.float64))
            p /= p.sum()
            most, least = (
                np.array([p[logits > logit + gap].sum() for logit in logits])
                for gap in (-1e-6, 1e-6)
            )
            wrong &= (most < body["top_p"] - 1e-5) | (least > body["top_p"] + 1e-5)
        assert not wrong.any()


def test_rows_with_other_parameters_share_a_call(device):
    bodies = [b | {"temperature": 0.5 + i / 4} for i, b in enumerate(FILTERS)]
    bodies += [{"temperature": 0.0}, {}]
    bodies = [b | {"seed": i} for i, b in enumerate(bodies)]
    random.Random(1).shuffle(bodies)
    together, alone = make_rows(bodies), [make_row(**b) for b in bodies]
    for step in range(30):
        logits = [logits_of(300, 99 * step + i) for i in range(len(bodies))]
        x = mx.array(np.stack(logits))
        assert together(x).tolist() == [
            row(x[i : i + 1]).item() for i, row in enumerate(alone)
        ]


def test_equal_logits_at_the_edge_of_a_nucleus_all_stay(device):
    # As many equal ones as the first guess has room for, and more.
    logits = np.zeros((1, 300), np.float32)
    logits[0, :100] = 1.0
    sampler = make_row(temperature=1.0, top_p=0.2, seed=1)
    drawn = {sampler(mx.array(logits)).item() for _ in range(2000)}
    assert drawn == set(range(100))


@pytest.mark.slow
def test_tokens_that_are_all_but_impossible_are_drawn_as_rarely(device):
    logits = np.full((1, 200_000), -18.0, np.float32)
    logits[0, 5] = 0.0
    n = 3000
    sampler = make_rows([dict(temperature=1.0, seed=i) for i in range(n)])
    drawn = np.array(sampler(mx.broadcast_to(mx.array(logits), (n, 200_000))))
    expected = n * 200_000 * math.exp(-18) / (1 + 200_000 * math.exp(-18))
    assert abs((drawn != 5).sum() - expected) < 5 * math.sqrt(expected)


@pytest.mark.parametrize(
    "uniform, token",
    # exp(-18) is 1.52e-8: the second token is first with numbers below 1.06e-8.
    [([0.5, 1.0e-8, 0.0], 1), ([0.5, 1.1e-8, 0.0], 0), ([0.0, 0.5, 0.0], 0)],
)
def test_draw_tells_small_random_numbers_apart(uniform, token, monkeypatch):
    monkeypatch.setattr(mx.random, "uniform", lambda shape, key: mx.array(uniform))
    x, keys = mx.array([[0.0, -18.0, -mx.inf]]), mx.zeros((1, 2), mx.uint32)
    mx.disable_compile()
    try:
        assert gpu_sampling.draw(x, mx.ones((1, 1)), keys).item() == token
    finally:
        mx.enable_compile()


ODD_LOGITS = {
    "infinite": ([0.0, np.inf, 1.0, np.inf, -np.inf], {1, 3}),
    "nothing left": ([-np.inf] * 5, {0, 1, 2, 3, 4}),
    "not a number": ([0.0, np.nan, 1.0, 2.0, 3.0], {0, 1, 2, 3, 4}),
    "lowest float": ([0.0, np.finfo(np.float32).min] * 2 + [1.0], {0, 2, 4}),
}


@pytest.mark.parametrize("odd", ODD_LOGITS)
@pytest.mark.parametrize("body", [{}, {"top_p": 0.999}, {"min_p": 1e-9}], ids=str)
def test_odd_logits_give_tokens_that_there_are(odd, body, device):
    logits, possible = ODD_LOGITS[odd]
    x = np.tile(np.array(logits, np.float32), (300, 1))
    sampler = make_rows([dict(temperature=1.0, seed=i, **body) for i in range(300)])
    assert set(sampler(mx.array(x)).tolist()) == possible


@pytest.mark.parametrize(
    "body",
    [{"temperature": t} for t in (1e-5, 1e-38, 1e-46, 1e-310)]
    + [{"temperature": 1.0, "top_p": 1e-50}],
    ids=str,
)
@pytest.mark.parametrize("shift", [0.0, 30.0])
def test_parameters_next_to_nothing_choose_the_most_likely(body, shift, device):
    x = np.stack([logits_of(300, seed) + shift for seed in range(20)])
    sampler = make_rows([body | {"seed": i} for i in range(20)])
    assert sampler(mx.array(x)).tolist() == x.argmax(axis=-1).tolist()


def test_greedy_rows_cost_an_argmax_only(monkeypatch):
    monkeypatch.setattr(DefaultSampler, "sample", None)
    sampler = make_rows([{}] * 3)
    assert sampler(mx.array([[1.0, 2.0], [3.0, 2.0], [0.0, 1.0]])).tolist() == [1, 0, 1]


def test_parameters_of_rows_that_join_are_put_into_arrays_once(monkeypatch):
    calls, prepare = [], DefaultSampler.prepare
    monkeypatch.setattr(
        DefaultSampler, "prepare", lambda self: (calls.append(self), prepare(self))
    )
    sampler = make_rows([{"temperature": 1.0, "seed": i} for i in range(5)])
    for _ in range(2):
        sampler(mx.zeros((5, 9)))
    assert calls == [sampler]
    sampler.filter([4, 1])
    sampler(mx.zeros((2, 9)))
    assert calls == [sampler] * 2


def test_nucleus_that_fits_the_guess_needs_no_sort(monkeypatch):
    def sort(x):
        assert len(x) <= cpu_sampling.NUCLEUS_GUESS
        return original(x)

    original = np.sort
    monkeypatch.setattr(np, "sort", sort)
    logits = logits_of(50_000, spread=3.0)
    limit = cpu_sampling.nucleus_limit(np.exp(logits - logits.max()), 0.05)
    monkeypatch.undo()
    kept = kept_by_upstream(logits, {"top_p": 0.05})
    assert (np.exp(logits - logits.max()) >= limit).sum() == np.isfinite(kept).sum()


def test_token_of_a_nucleus_is_drawn_without_a_search_for_it(monkeypatch):
    x = np.log(np.array([0.5, 0.3, 0.15, 0.05], np.float32))
    (row,) = make_row(temperature=1.0, top_p=0.9).rows

    def draw(*u):
        return cpu_sampling.sample_row(x, row, np.array(u), [])

    with monkeypatch.context() as patch:
        patch.setattr(cpu_sampling, "kept_ids", None)
        assert [draw(u, 0, 0) for u in (0.1, 0.6, 0.9)] == [0, 1, 2]
    # What is not in it is drawn again, of what is.
    assert [draw(0.99, 0, u) for u in (0.1, 0.6, 0.9)] == [0, 1, 2]


# Seeds


def test_seed_is_hashed_as_documented():
    # hashlib.blake2b(b"11", digest_size=8) is d9614b235de46ab6.
    assert make_key(11) == (0x234B61D9, 0xB66AE45D)


@pytest.mark.slow
@pytest.mark.parametrize("extra", [{}, {"top_p": 0.9, "min_p": 0.01}])
@pytest.mark.parametrize("architecture", ["llama", "gemma3_text", "falcon_h1"])
def test_seed_gives_the_same_tokens_whatever_else_runs(
    architecture, extra, start_engine
):
    body = dict(max_tokens=30, temperature=1.0, seed=11, **extra)
    prompts = texts(3, longest=60, seed=5)
    alone = start_engine(architecture)
    expected = [read(submit(alone, p, **body)) for p in prompts]
    assert read(submit(alone, prompts[0], **dict(body, seed=12))) != expected[0]
    alone.stop_and_join()
    # After a restart, with a cache, and between others that come and go.
    engine = start_engine(architecture, "--use-prompt-cache", "--batch-size", "8")
    rng = random.Random(0)
    for _ in range(2):
        jobs = []
        for prompt in prompts:
            for other in texts(3, seed=rng.random()):
                extra = rng.choice([{}, {"temperature": 1.0}, {"seed": 3}])
                submit(engine, other, max_tokens=rng.randint(1, 50), **extra)
            jobs.append(submit(engine, prompt, **body))
        assert [read(job) for job in jobs] == expected


@pytest.mark.logs_errors
@pytest.mark.slow
def test_seeded_request_goes_on_as_it_began_after_a_failed_step(start_engine):
    class FailsOnce(Batch):
        failures = 0

        def step(self):
            n_generated = sum(request.n_generated for request in self.requests)
            if self.failures == 0 and len(self) == 2 and n_generated > 20:
                self.failures += 1
                raise MemoryError("once")
            return super().step()

    class FailingEngine(Engine):
        batch_class = FailsOnce

    engine = start_engine(make_engine=FailingEngine)
    body = dict(max_tokens=40, temperature=1.0, seed=5)
    expected = read(submit(engine, "hello", **body))
    jobs = [submit(engine, "hello", **body) for _ in range(2)]
    assert [read(job) for job in jobs] == [expected] * 2
    assert engine.batch.failures == 1


def test_without_a_seed_no_two_answers_are_the_same(start_engine):
    engine = start_engine()
    body = dict(max_tokens=30, temperature=1.0)
    jobs = [submit(engine, "hello", **body) for _ in range(8)]
    assert len({tuple(read(job)) for job in jobs}) == 8
    # Others of this process do not decide it.
    mx.random.seed(0)
    first = read(submit(engine, "hello", **body))
    mx.random.seed(0)
    assert read(submit(engine, "hello", **body)) != first


def test_a_seed_is_the_same_streamed(start_server):
    _, port = start_server()
    body = dict(prompt="hello", max_tokens=30, temperature=1.0, seed=4)
    _, answer = call(port, "POST", "/v1/completions", body)
    events = stream(port, "/v1/completions", **body)
    assert answer["choices"][0]["text"] == "".join(
        e["choices"][0]["text"] for e in events
    )


# Penalties

PENALTIES = [
    dict(),
    dict(logit_bias={"3": 5.0, "250": -100.0}),
    dict(repetition_penalty=1.3),
    dict(presence_penalty=0.7, presence_context_size=1),
    dict(frequency_penalty=0.4, frequency_context_size=MAX_CONTEXT),
    dict(
        repetition_penalty=0.8,
        repetition_context_size=7,
        presence_penalty=-0.5,
        frequency_penalty=0.3,
        logit_bias={"5": 1.0},
    ),
]


def penalty_arguments(**body):
    return make_generation_arguments(body, COMMAND_LINE).logits


@pytest.mark.parametrize("dtype", [mx.float32, mx.bfloat16])
def test_penalties_are_those_of_upstream(dtype):
    rng = random.Random(4)
    n_tokens, rows, histories = 260, [], []
    penalties = Penalties([])
    for step in range(60):
        if rng.random() < 0.3:
            body = rng.choice(PENALTIES)
            args = penalty_arguments(**body)
            penalties.extend(Penalties([PenaltyParameters.from_arguments(args)]))
            rows.append(args)
            histories.append(rng.choices(range(12), k=rng.randint(0, 90)))
        elif rng.random() < 0.2:
            keep = [i for i in range(len(rows)) if rng.random() < 0.7]
            penalties.filter(keep)
            rows, histories = [rows[i] for i in keep], [histories[i] for i in keep]
        if not rows:
            continue
        x = mx.array(
            np.stack([logits_of(n_tokens, 7 * step + i) for i in range(len(rows))])
        )
        x = x.astype(dtype)
        exact = x.astype(mx.float32)
        for history in histories:
            history.append(rng.randrange(12))
        expected = []
        for i, args in enumerate(rows):
            row, context = exact[i : i + 1], mx.array(histories[i])
            for process in sample_utils.make_logits_processors(**vars(args)):
                row = process(context, row)
            expected.append(row)
        found = penalties(histories, x)
        assert found.dtype == dtype
        # Half a unit in the last place of what is added, and of the sum.
        tolerance = 1e-6 if dtype == mx.float32 else 2**-8
        expected = mx.concatenate(expected)
        assert mx.allclose(found, expected, rtol=tolerance, atol=5 * tolerance)


@pytest.mark.slow
@pytest.mark.parametrize("size", [0, MAX_CONTEXT + 1])
def test_penalty_over_a_long_context_is_upstreams_own(size, start_engine, model_folder):
    body = dict(repetition_penalty=1.5, repetition_context_size=size)
    args = penalty_arguments(**body)
    assert not PenaltyParameters.from_arguments(args).is_short
    processors = sample_utils.make_logits_processors(**vars(args))
    reference = Reference(model_folder(), logits_processors=processors)
    prompt = texts(1)[0] * 2
    engine = start_engine()
    others = [submit(engine, p, max_tokens=50) for p in texts(3)]
    found = read(submit(engine, prompt, max_tokens=30, **body))
    assert found == reference.tokens(prompt, 30)
    assert found != Reference(model_folder()).tokens(prompt, 30)
    for job in others:
        read(job)


@pytest.mark.parametrize("architecture", CONFIGS)
def test_penalized_rows_give_what_mlx_lm_generates(
    architecture, start_engine, model_folder
):
    engine = start_engine(architecture)
    prompts = texts(len(PENALTIES))
    jobs = [submit(engine, p, max_tokens=20, **b) for p, b in zip(prompts, PENALTIES)]
    for prompt, body, job in zip(prompts, PENALTIES, jobs):
        args = penalty_arguments(**body)
        processors = sample_utils.make_logits_processors(**vars(args))
        reference = Reference(model_folder(architecture), logits_processors=processors)
        assert read(job) == reference.tokens(prompt, 20)
