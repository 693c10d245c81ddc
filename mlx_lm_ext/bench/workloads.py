"""The workloads of a comparison, and the figures computed from their outcomes.

Rules:
1. All servers get the same requests, which depend on the random generator only.
2. Answers are streamed. Prompts ask for long texts, so that ``max_tokens`` ends an answer.
"""

import asyncio
from dataclasses import dataclass, field
from functools import partial
from random import Random
from typing import Any, Awaitable, Callable, Dict, Iterable, List, Optional

from mlx_lm_ext.bench import timings, words
from mlx_lm_ext.bench.chat_client import GREEDY, Client, Messages
from mlx_lm_ext.bench.prefixes import Prefixes
from mlx_lm_ext.bench.timings import Timing

SAMPLED = {"temperature": 0.7, "top_p": 0.95}
SAMPLING = {"greedy": GREEDY, "sampled": SAMPLED}


@dataclass
class Outcome:
    """The outcome of a workload on one server.

    Args:
        timings (List[Timing]): Its measured requests.
        ideal_cached_tokens (int): Prompt tokens that an ideal cache would have had.
        distinct_tokens (int): Tokens that an ideal cache would hold at the end.
        cache_bytes (Optional[int]): Bytes in the server's prompt cache at the end.
    """

    timings: List[Timing] = field(default_factory=list)
    ideal_cached_tokens: int = 0
    distinct_tokens: int = 0
    cache_bytes: Optional[int] = None

    def part(self, label: str) -> List[Timing]:
        return [t for t in self.timings if t.label == label]

    def throughput(self, label: str) -> float:
        return timings.throughput(self.part(label))

    @property
    def cache_megabytes(self) -> Optional[float]:
        return None if self.cache_bytes is None else self.cache_bytes / 1e6

    @property
    def cached_share(self) -> float:
        """Prompt tokens from the cache / those that an ideal cache would have had."""
        cached = sum(t.cached_tokens for t in timings.succeeded(self.timings))
        return cached / self.ideal_cached_tokens

    @property
    def median_ttft(self) -> float:
        return timings.median(self.timings, lambda t: t.ttft)

    @property
    def ttft_gain(self) -> float:
        """The first turn's TTFT / the second's."""
        (first,), (second,) = self.part("first"), self.part("second")
        return first.ttft / second.ttft

    @property
    def stall(self) -> float:
        """The longest gap in a running stream after the late request was sent."""
        (late,) = self.part("late")
        return max(t.longest_gap(late.start) for t in self.part("stream"))

    @property
    def late_ttft(self) -> float:
        return self.part("late")[0].ttft


@dataclass(frozen=True)
class Plan:
    """The sizes of the workloads, and the model.

    Args:
        clients (List[int]): How many clients send short chats, for each run.
        max_tokens (int): The length of the answers to short chats.
        tokenizer (Any): The model's Hugging Face tokenizer.
        bytes_per_token (float): KV bytes of one token.
    """

    clients: List[int]
    max_tokens: int
    tokenizer: Any
    bytes_per_token: float

    def tokens(self, messages: Messages) -> List[int]:
        """The tokens of a prompt."""
        return list(
            self.tokenizer.apply_chat_template(
                messages, add_generation_prompt=True, tokenize=True, return_dict=False
            )
        )


@dataclass(frozen=True)
class Figure:
    """One number of a workload's outcome.

    Args:
        of (Callable): Computes it, in ``unit``; ``None`` if it is not known.
        bare (Optional[str]): The run of the bare engine to compare it with.
    """

    name: str
    unit: str
    of: Callable[[Outcome], Optional[float]]
    higher_is_better: bool = True
    bare: Optional[str] = None


Run = Callable[[Plan, Client, Random], Awaitable[Outcome]]


@dataclass(frozen=True)
class Workload:
    """Requests to send to a server, and the figures to compute from the answers."""

    title: str
    run: Run
    figures: Callable[[Plan], List[Figure]]


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


async def wave(
    plan: Plan,
    client: Client,
    rng: Random,
    n: int,
    label: str = "",
    sampling: Dict[str, float] = GREEDY,
) -> Outcome:
    """``n`` clients ask at the same time, once to warm up and once to measure."""

    async def ask(i, chat, max_tokens):
        # mlx_lm.server resets some of many connections that open at the same moment.
        await asyncio.sleep(i * 0.002)
        return await client.chat(chat, max_tokens, Timing(label), **sampling)

    async def send(max_tokens):
        chats = short_chats(rng, n)
        return await asyncio.gather(
            *(ask(i, chat, max_tokens) for i, chat in enumerate(chats))
        )

    await send(2)
    return Outcome(await send(plan.max_tokens))


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
) -> Outcome:
    """``n`` chats with the same system prompt, 8 requests at a time.

    All chats have their first turn, then all have their second, and so on. Each turn sends
    the whole chat again.
    """
    known, outcome = Prefixes(), Outcome()
    system = {"role": "system", "content": words.text(rng, system_words)}
    chats = [[system] for _ in range(n)]

    async def turn(chat, question):
        chat.append({"role": "user", "content": question})
        prompt = plan.tokens(chat)
        outcome.ideal_cached_tokens += known.match(prompt)
        timing = await client.chat(chat, 16)
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
    question = f"{words.text(rng, n_words)} {words.story(rng)}"
    chat, outcome = [{"role": "user", "content": question}], Outcome()
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
    chats = [
        [{"role": "user", "content": f"{words.text(rng, size)} {words.story(rng)}"}]
        for size in sizes
    ]
    return Outcome(
        await at_most(n, (client.chat(chat, plan.max_tokens) for chat in chats))
    )


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
    question = f"{words.text(rng, n_words)} {words.story(rng)}"
    late = Timing("late")
    await client.chat([{"role": "user", "content": question}], 8, late)
    await asyncio.gather(*running)
    return Outcome([*streams, late])


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
        lambda plan: [Figure("median TTFT", "s", lambda o: o.median_ttft, False)],
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
        lambda plan: [
            Figure("throughput", "tok/s", lambda o: timings.throughput(o.timings)),
            Figure("median TTFT", "s", lambda o: o.median_ttft, False),
        ],
    ),
    "bytes": Workload(
        "64 conversations on a system prompt of 1,000 tokens",
        partial(conversations, n=64, system_words=830),
        bytes_figures,
    ),
}

SWEEPS = {
    "concurrency": Sweep("clients", [1, 2, 4, 8, 16, 32, 64], wave),
    "prefix": Sweep("words of shared prefix", [50, 200, 800], shared_prefix),
    "conversations": Sweep("conversations", [4, 16, 64], conversations),
}

SWEEP_FIGURES = [
    Figure("throughput", "tok/s", lambda o: timings.throughput(o.timings)),
    Figure("median TTFT", "s", lambda o: o.median_ttft, False),
    Figure("cache", "MB", lambda o: o.cache_megabytes, False),
]
