"""The workloads of a comparison.

Rules:
1. All servers get the same requests, which depend on the random generator only.
2. Answers are streamed. Prompts ask for long texts, so that ``max_tokens`` ends an answer.
"""

import asyncio
from dataclasses import dataclass
from functools import partial
from itertools import chain
from random import Random
from typing import Any, Awaitable, Callable, Dict, Iterable, List, Optional

from mlx_lm_ext.bench import timings, words
from mlx_lm_ext.bench.chat_client import GREEDY, Client, Messages
from mlx_lm_ext.bench.outcomes import (
    PEAK_MEMORY,
    Figure,
    Outcome,
    in_milliseconds,
    pace_figures,
)
from mlx_lm_ext.bench.prefixes import Prefixes
from mlx_lm_ext.bench.timings import Timing

SAMPLED = {"temperature": 0.7, "top_p": 0.95}
SAMPLING = {"greedy": GREEDY, "sampled": SAMPLED}
# Numbers of clients that are more than a batch has rows.
MANY = (64, 128, 256)
# Tokens of the long prompt beside short ones, if the model takes so many.
LONG = 16_000


@dataclass(frozen=True)
class Plan:
    """The sizes of the workloads, and the model.

    Args:
        clients (List[int]): How many clients send short chats, for each run.
        max_tokens (int): The length of the answers, but for workloads that need another.
        tokenizer (Any): The model's Hugging Face tokenizer.
        bytes_per_token (float): KV bytes of one token.
        context_length (Optional[int]): The most tokens that the model takes, if that is known.
    """

    clients: List[int]
    max_tokens: int
    tokenizer: Any
    bytes_per_token: float
    context_length: Optional[int] = None

    def tokens(self, messages: Messages) -> List[int]:
        """The tokens of a prompt."""
        return list(
            self.tokenizer.apply_chat_template(
                messages, add_generation_prompt=True, tokenize=True, return_dict=False
            )
        )

    def question(self, rng: Random, n_tokens: int) -> Messages:
        """A prompt of about ``n_tokens`` tokens."""
        least, more = (len(self.tokens(question(rng, n))) for n in (0, 100))
        return question(rng, max(0, 100 * (n_tokens - least) // (more - least)))


Run = Callable[[Plan, Client, Random], Awaitable[Outcome]]


@dataclass(frozen=True)
class Workload:
    """Requests to send to a server, and the figures to compute from the answers.

    Args:
        heavy (bool): Whether it takes too long on a CPU to run without being asked for.
    """

    title: str
    run: Run
    figures: Callable[[Plan], List[Figure]]
    heavy: bool = False


@dataclass(frozen=True)
class Sweep:
    """A workload whose parameter ``n`` takes several sizes."""

    title: str
    sizes: List[int]
    run: Callable[..., Awaitable[Outcome]]


async def at_most(n: int, requests: Iterable[Awaitable[Timing]]) -> List[Timing]:
    """Send all requests, ``n`` at a time, in their order."""
    gate = asyncio.Semaphore(n)

    async def one(request):
        async with gate:
            return await request

    return await asyncio.gather(*(one(r) for r in requests))


def short_chats(rng: Random, n: int) -> List[Messages]:
    """Short chats without a common prefix, so that no cache helps."""
    return [
        [
            {"role": "system", "content": f"You are {words.phrase(rng)}."},
            {"role": "user", "content": words.story(rng)},
        ]
        for _ in range(n)
    ]


def question(rng: Random, n_words: int) -> Messages:
    """A question after ``n_words`` words."""
    content = f"{words.text(rng, n_words)} {words.story(rng)}"
    return [{"role": "user", "content": content}]


def long_questions(rng: Random, n: int, n_words: int = 3000) -> List[Messages]:
    return [question(rng, n_words) for _ in range(n)]


async def at_once(
    client: Client,
    chats: List[Messages],
    max_tokens: int,
    label: str = "",
    sampling: Dict[str, float] = GREEDY,
) -> List[Timing]:
    """Send all chats at the same time."""

    async def ask(i, chat):
        # mlx_lm.server resets some of many connections that open at the same moment.
        await asyncio.sleep(i * 0.002)
        return await client.chat(chat, max_tokens, Timing(label), **sampling)

    return await asyncio.gather(*(ask(i, chat) for i, chat in enumerate(chats)))


async def wave(
    plan: Plan,
    client: Client,
    rng: Random,
    n: int,
    label: str = "",
    sampling: Dict[str, float] = GREEDY,
    make_chats: Callable[[Random, int], List[Messages]] = short_chats,
) -> Outcome:
    """``n`` clients ask at the same time, once to warm up and once to measure."""
    await at_once(client, make_chats(rng, n), 2, label, sampling)
    chats = make_chats(rng, n)
    return Outcome(await at_once(client, chats, plan.max_tokens, label, sampling))


async def short(plan: Plan, client: Client, rng: Random) -> Outcome:
    """Each number of clients in turn, greedy and sampled."""
    outcome = Outcome()
    for n in plan.clients:
        for kind, sampling in SAMPLING.items():
            part = await wave(plan, client, rng, n, f"{n} {kind}", sampling)
            outcome.timings += part.timings
    return outcome


def short_figures(plan: Plan) -> List[Figure]:
    def speed(label):
        return lambda outcome: outcome.throughput(label)

    def quotient(label, by):
        return lambda outcome: outcome.throughput(label) / outcome.throughput(by)

    first, *others = plan.clients
    figures = [
        Figure(f"{n} at a time, {kind}", "tok/s", speed(label), bare=label)
        for n in plan.clients
        for kind in SAMPLING
        for label in [f"{n} {kind}"]
    ]
    figures += [
        Figure(
            f"{n} at a time / {first}", "", quotient(f"{n} greedy", f"{first} greedy")
        )
        for n in others
    ]
    figures += [
        Figure(
            f"sampled / greedy, {n} at a time",
            "",
            quotient(f"{n} sampled", f"{n} greedy"),
        )
        for n in others
    ]
    return figures


async def many_clients(plan: Plan, client: Client, rng: Random) -> Outcome:
    """Each number of clients in turn."""
    outcome = Outcome()
    for n in MANY:
        outcome.timings += (await wave(plan, client, rng, n, str(n))).timings
    return outcome


async def shared_prefix(
    plan: Plan, client: Client, rng: Random, n: int = 400
) -> Outcome:
    """16 requests with one system prompt of ``n`` words, 8 at a time."""
    system = {"role": "system", "content": words.text(rng, n)}
    questions = [{"role": "user", "content": words.story(rng)} for _ in range(16)]
    return Outcome(await at_most(8, (client.chat([system, q], 16) for q in questions)))


async def conversations(
    plan: Plan,
    client: Client,
    rng: Random,
    n: int,
    turns: int = 2,
    system_words: int = 100,
    max_tokens: Optional[int] = 16,
) -> Outcome:
    """``n`` chats with the same system prompt, 8 requests at a time.

    All chats have their first turn, then all have their second, and so on. Each turn sends
    the whole chat again.

    Args:
        max_tokens (Optional[int]): The length of the answers; that of the plan if ``None``.
    """
    known, outcome = Prefixes(), Outcome()
    system = {"role": "system", "content": words.text(rng, system_words)}
    chats = [[system] for _ in range(n)]

    async def turn(chat, question):
        chat.append({"role": "user", "content": question})
        prompt = plan.tokens(chat)
        outcome.ideal_cached_tokens += known.match(prompt)
        timing = await client.chat(chat, max_tokens or plan.max_tokens)
        outcome.timings.append(timing)
        answer = plan.tokenizer.encode(timing.text, add_special_tokens=False)
        # The model never processes the last token of an answer.
        known.add(prompt + answer[: max(0, timing.completion_tokens - 1)])
        chat.append({"role": "assistant", "content": timing.text})

    # The first runs alone, so that the others find the system prompt in the cache.
    await turn(chats[0], words.story(rng))
    for i in range(turns):
        waiting = chats[1:] if i == 0 else chats
        await at_most(8, [turn(chat, words.story(rng)) for chat in waiting])
    outcome.distinct_tokens = known.n_tokens
    return outcome


async def turns(
    plan: Plan, client: Client, rng: Random, n_words: int = 1250
) -> Outcome:
    """A chat that begins with a long question, and its second turn."""
    chat, outcome = question(rng, n_words), Outcome()
    for label in ("first", "second"):
        outcome.timings.append(await client.chat(chat, 16, Timing(label)))
        chat.append({"role": "assistant", "content": outcome.timings[-1].text})
        chat.append({"role": "user", "content": words.story(rng)})
    return outcome


async def mixed(plan: Plan, client: Client, rng: Random, n: int = 32) -> Outcome:
    """``n`` clients ask at the same time, with prompts of 20 to 2,000 words whose lengths
    are spread evenly on a logarithmic scale."""
    sizes = [round(20 * 100 ** (i / (n - 1))) for i in range(n)]
    rng.shuffle(sizes)
    chats = [question(rng, size) for size in sizes]
    return Outcome(
        await at_most(n, (client.chat(chat, plan.max_tokens) for chat in chats))
    )


def long_row(plan: Plan) -> int:
    """Tokens of the long prompt beside short ones."""
    if plan.context_length is None:
        return LONG
    return min(LONG, plan.context_length * 3 // 4)


async def mixed_lengths(
    plan: Plan, client: Client, rng: Random, n: int = 31, n_tokens: int = 100
) -> Outcome:
    """``n`` short rows decode, without a long one and then beside it.

    They come when the long prompt has its first token, and its answer is longer than theirs,
    so that all decode together. Before that, they do so for a few tokens to warm up.

    Raises:
        RuntimeError: If the model takes no prompt that is much longer than the short ones.
    """
    if long_row(plan) < 8 * n_tokens:
        raise RuntimeError(
            f"the model takes {plan.context_length:,} tokens, too few for a long prompt"
        )

    def short_rows(label, max_tokens):
        chats = [plan.question(rng, n_tokens) for _ in range(n)]
        return at_once(client, chats, max_tokens, label)

    async def all_rows(max_tokens):
        long = Timing("long")
        chat = plan.question(rng, long_row(plan))
        request = asyncio.ensure_future(client.chat(chat, max_tokens + 64, long))
        while not (long.arrivals or long.end):
            await asyncio.sleep(0.01)
        return [*(await short_rows("beside", max_tokens)), await request]

    await all_rows(4)
    alone = await short_rows("alone", plan.max_tokens)
    return Outcome([*alone, *(await all_rows(plan.max_tokens))])


def mixed_lengths_figures(plan: Plan) -> List[Figure]:
    def alone(outcome):
        return timings.mean_gap_together(outcome.part("alone"))

    def beside(outcome):
        return timings.mean_gap_together(outcome.part("beside"), outcome.part("long"))

    long = f"mean gap beside one of {long_row(plan):,} tokens"
    return [
        Figure("mean gap alone", "ms", lambda o: in_milliseconds(alone(o)), False),
        Figure(long, "ms", lambda o: in_milliseconds(beside(o)), False),
        Figure(
            f"{long} / alone",
            "",
            lambda o: timings.quotient(beside(o), alone(o)),
            False,
        ),
        *pace_figures("beside", "long", title="all 32 rows: "),
        PEAK_MEMORY,
    ]


async def late_prompt(
    plan: Plan, client: Client, rng: Random, n_words: int = 3000
) -> Outcome:
    """A long prompt arrives while 4 streams run."""
    streams = [Timing("stream") for _ in range(4)]
    running = [
        asyncio.ensure_future(client.chat(chat, 128, timing))
        for chat, timing in zip(short_chats(rng, 4), streams)
    ]
    while any(len(t.arrivals) < 8 and not t.end for t in streams):
        await asyncio.sleep(0.01)
    late = Timing("late")
    await client.chat(question(rng, n_words), 8, late)
    await asyncio.gather(*running)
    return Outcome([*streams, late])


def many_figures(plan: Plan) -> List[Figure]:
    each = [pace_figures(str(n), title=f"{n} at a time, ") for n in MANY]
    return [*chain.from_iterable(each), PEAK_MEMORY]


THROUGHPUT, MEDIAN_TTFT, *_ = pace_figures()
CACHED = Figure("cached / ideal tokens", "", lambda o: o.cached_share)


def bytes_figures(plan: Plan) -> List[Figure]:
    def share(outcome):
        if outcome.cache_bytes is None:
            return None
        return outcome.cache_bytes / (outcome.distinct_tokens * plan.bytes_per_token)

    return [CACHED, Figure("cache bytes / distinct", "", share, False)]


WORKLOADS = {
    "short": Workload("short chats", short, short_figures),
    "prefix": Workload(
        "16 requests share a 400-word prefix",
        shared_prefix,
        lambda plan: [*pace_figures(), PEAK_MEMORY],
    ),
    "chats": Workload(
        "8 chats of 3 turns",
        partial(conversations, n=8, turns=3, max_tokens=None),
        lambda plan: [*pace_figures(), PEAK_MEMORY],
    ),
    "conversations": Workload(
        "32 conversations of 4 turns",
        partial(conversations, n=32, turns=4),
        lambda plan: [CACHED],
    ),
    "turns": Workload(
        "2 turns of a chat of 1,500 tokens",
        turns,
        lambda plan: [Figure("TTFT of the first / second", "", lambda o: o.ttft_gain)],
    ),
    "late": Workload(
        "a 3,000-word prompt joins 4 streams",
        late_prompt,
        lambda plan: [
            Figure("longest gap in a stream", "s", lambda o: o.stall, False),
            Figure("TTFT of the long prompt", "s", lambda o: o.late_ttft, False),
        ],
    ),
    "mixed": Workload(
        "32 clients with prompts of 20 to 2,000 words",
        mixed,
        lambda plan: [*pace_figures(), PEAK_MEMORY],
    ),
    "bytes": Workload(
        "64 conversations on a system prompt of 1,000 tokens",
        partial(conversations, n=64, system_words=830),
        bytes_figures,
    ),
    "mixed-lengths": Workload(
        "31 rows of 100 tokens", mixed_lengths, mixed_lengths_figures, heavy=True
    ),
    "long-prompts": Workload(
        "16 clients with prompts of 3,000 words",
        partial(wave, n=16, make_chats=long_questions),
        lambda plan: [*pace_figures(), PEAK_MEMORY],
        heavy=True,
    ),
    "many-clients": Workload(
        "short chats of many clients", many_clients, many_figures, heavy=True
    ),
}

SWEEPS = {
    "concurrency": Sweep("clients", [1, 2, 4, 8, 16, 32, 64], wave),
    "prefix": Sweep("words of shared prefix", [50, 200, 800], shared_prefix),
    "conversations": Sweep("conversations", [4, 16, 64], conversations),
}

SWEEP_FIGURES = [
    THROUGHPUT,
    MEDIAN_TTFT,
    Figure("cache", "MB", lambda o: o.cache_megabytes, False),
]
