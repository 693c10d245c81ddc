"""The engine of the server with a model, a sampler and arrivals that are simulated: its tree, its
batch, its scheduler and eviction policies and their guard are those that serve.

Rules:
1. The clock moves by what the model is said to cost, and from one request to the next while
   nothing is to be done. Nothing waits, there is one thread, and the same requests give the
   same times.
2. The KV of a token takes ``KV_BYTES``. Limits in bytes are scaled to that: see ``scaled``.
3. Answers are those of the trace. All rows decode in one group, as the cost of a step does not
   depend on their lengths.
"""

import argparse
from dataclasses import dataclass, field
from types import SimpleNamespace
from typing import Any, Dict, List, NamedTuple, Optional, Sequence

import mlx.core as mx
from mlx import nn
from mlx_lm.generate import StopSequences
from mlx_lm.models.cache import BatchKVCache, KVCache
from mlx_lm.server import CompletionRequest

from mlx_lm_ext.batch.batch import Batch
from mlx_lm_ext.batch.grouping import Grouping
from mlx_lm_ext.batch.step_costs import StepCosts
from mlx_lm_ext.bench.arrivals import END, Arrival, Outcome, expand
from mlx_lm_ext.cache.prompt_cache import RadixPromptCache
from mlx_lm_ext.engine.loop import STATISTICS_INTERVAL, Engine
from mlx_lm_ext.interfaces import RequestInfo
from mlx_lm_ext.policies.guard import Policies
from mlx_lm_ext.policies.loading import Plugins
from mlx_lm_ext.request.fields import make_generation_arguments
from mlx_lm_ext.request.request import Request
from mlx_lm_ext.request.served_model import ServedModel

# A key and a value of one byte each.
KV_BYTES = 2
# Longer than any row.
NO_LENGTH = 1 << 60


class Costs(NamedTuple):
    """What a call of the model takes, in seconds.

    Args:
        step (float): The least: the time of its weights.
        row (float): What each row adds to a decode step.
        token (float): A token of a prompt, padding included.
    """

    step: float
    row: float
    token: float

    def of_call(self, n_rows: int, width: int) -> float:
        """The time of a call with ``width`` tokens of each row."""
        if width == 1:
            return self.step + n_rows * self.row
        return max(self.step, n_rows * width * self.token)


class SimulatedClock:
    """Seconds that only ``now`` moves."""

    def __init__(self) -> None:
        self.now = 0.0

    def __call__(self) -> float:
        return self.now


class SimulatedModel(nn.Module):
    """Keeps KV that says nothing, and moves the clock.

    Args:
        clock (SimulatedClock): The clock.
        costs (Costs): What its calls take.
    """

    def __init__(self, clock: SimulatedClock, costs: Costs):
        super().__init__()
        self.clock = clock
        self.costs = costs

    def make_cache(self) -> List[Any]:
        return [KVCache()]

    def __call__(self, inputs: mx.array, cache: List[Any]) -> mx.array:
        n_rows, width = inputs.shape
        (layer,) = cache
        if isinstance(layer, BatchKVCache):
            # Other calls only look at the shapes of the KV.
            self.clock.now += self.costs.of_call(n_rows, width)
        kv = mx.zeros((n_rows, 1, width, 1), mx.uint8)
        layer.update_and_fetch(kv, kv)
        # The tokens of a real model depend on its KV, and have it evaluated.
        mx.eval(layer.keys, layer.values)
        return mx.zeros((n_rows, width, 1))


@dataclass(eq=False, kw_only=True)
class ReplayedRequest(Request):
    """A request of a trace.

    Args:
        answer (List[int]): The tokens that it gets.
    """

    answer: List[int] = field(default_factory=list)


class Script:
    """A ``RowSampler`` that gives each row the tokens of its answer.

    Args:
        requests (Sequence[ReplayedRequest]): The requests of the rows.
    """

    group = "script"

    def __init__(self, requests: Sequence[ReplayedRequest]):
        self.answers = [r.answer for r in requests]
        self.places = [r.n_generated for r in requests]

    def extend(self, other: "Script") -> None:
        self.answers += other.answers
        self.places += other.places

    def filter(self, keep: List[int]) -> None:
        self.answers = [self.answers[i] for i in keep]
        self.places = [self.places[i] for i in keep]

    def copy(self) -> "Script":
        other = Script(())
        other.extend(self)
        return other

    def __call__(self, logits: mx.array) -> mx.array:
        tokens = [answer[i] for answer, i in zip(self.answers, self.places)]
        self.places = [i + 1 for i in self.places]
        return mx.array(tokens, mx.uint32)


class ReplayPolicies(Policies):
    """The policies of the server, but for the sampler."""

    def make_sampler(self, name: str, request: RequestInfo, tokenizer: Any) -> Any:
        return Script([request])  # type: ignore[list-item]


class SimulatedProvider:
    """Takes the place of ``BatchModelProvider``.

    Args:
        args (argparse.Namespace): The command line.
        model (SimulatedModel): The model.
    """

    default_key = model_key = ("simulated", None, None)
    is_batchable = True

    def __init__(self, args: argparse.Namespace, model: SimulatedModel):
        self.cli_args = args
        self.model = model
        self.tokenizer = SimpleNamespace(eos_token_ids={END})
        self.served = ServedModel(
            key=self.default_key,
            tokenizer=self.tokenizer,
            vocabulary_size=1 << 32,
            context_length=None,
            most_characters=0,
            takes_images=False,
            end_of_text=StopSequences([(END,)]),
        )

    def switch_to(self, key: Any) -> None:
        pass

    def reset(self) -> None:
        pass


class SimulatedBatch(Batch):
    def make_grouping(self) -> Grouping:
        costs = StepCosts(lambda: 0.0)
        return Grouping(costs, self.kv_memory.most_tokens, min_length=NO_LENGTH)


def scaled(args: argparse.Namespace, bytes_per_token: int) -> argparse.Namespace:
    """The command line with limits in bytes for as many tokens as they are with a real model.

    Args:
        args (argparse.Namespace): The command line.
        bytes_per_token (int): What the KV of a token takes with that.
    """
    limits = {
        name: n_bytes // bytes_per_token * KV_BYTES
        for name in ("radix_cache_size", "max_kv_bytes")
        if (n_bytes := getattr(args, name)) is not None
    }
    return argparse.Namespace(
        **vars(args) | limits | dict(warmup="off", self_check=False)
    )


class SimulatedEngine(Engine):
    """An engine that serves the requests of a trace. ``run`` returns when all have ended.

    Args:
        arrivals (Sequence[Arrival]): The requests, in the order in which they come.
        args (argparse.Namespace): The command line, with the names of the policies. Its limits
          are scaled.
        plugins (Plugins): The plugins.
        costs (Costs): What the model costs.
    """

    batch_class = SimulatedBatch

    def __init__(
        self,
        arrivals: Sequence[Arrival],
        args: argparse.Namespace,
        plugins: Plugins,
        costs: Costs,
    ):
        self.clock = SimulatedClock()
        self.arrivals = arrivals
        self.n_arrived = 0
        self.outcomes: List[Outcome] = []
        policies = ReplayPolicies(plugins, args, self.clock)
        cache = RadixPromptCache(
            max_bytes=args.radix_cache_size,
            eviction=policies.eviction,
            clock=self.clock,
        )
        provider = SimulatedProvider(args, SimulatedModel(self.clock, costs))
        super().__init__(provider, policies, cache)  # type: ignore[arg-type]

    @property
    def next_arrival(self) -> Optional[Arrival]:
        if self.n_arrived == len(self.arrivals):
            return None
        return self.arrivals[self.n_arrived]

    def take_new(self, block: bool) -> None:
        if block:
            self.skip_time()
        while (a := self.next_arrival) and a.seconds <= self.clock.now:
            self.n_arrived += 1
            self.inbox.put(self.request(a))
        super().take_new(block=False)

    def skip_time(self) -> None:
        """Go on to the next request, or to the next look for expired KV. There is nothing else
        to do."""
        arrival = self.next_arrival
        if arrival is None:
            self.inbox.close("all requests have ended")
            return
        then = arrival.seconds
        if self.policies.eviction.overrides("expired"):
            then = min(then, self.clock.now + STATISTICS_INTERVAL)
        self.clock.now = max(self.clock.now, then)

    def request(self, arrival: Arrival) -> ReplayedRequest:
        prompt, answer = expand(arrival.prompt), expand(arrival.answer)
        max_tokens = max(arrival.max_tokens or 0, len(answer))
        if max_tokens > len(answer):
            answer[-1] = END
        body: Dict[str, Any] = dict(
            max_tokens=max_tokens, priority=arrival.priority, stream=True
        )
        if arrival.user is not None:
            body["user"] = arrival.user
        segments, types, start = [], [], 0
        for kind, n in arrival.segments or (("user", len(prompt)),):
            segments.append(prompt[start : start + n])
            types.append(kind)
            start += n
        return ReplayedRequest(
            id=str(self.n_arrived),
            args=make_generation_arguments(body, self.cli_args),
            body=body,
            arrival=arrival.seconds,
            n_prompt=len(prompt),
            prompt=prompt,
            segments=segments,
            segment_types=types,
            completion=CompletionRequest("text", "", [], None, None),
            model=self.model_provider.served,
            clock=self.clock,
            timeout=self.cli_args.request_timeout,
            answer=answer,
        )

    def forget(self, request: Request) -> None:
        if not request.forgotten:
            assert isinstance(request, ReplayedRequest)
            n_tokens = request.n_generated
            is_whole = n_tokens == len(request.answer)
            stats = request.stats("stop" if is_whole else "error", n_tokens)
            self.outcomes.append(Outcome(request.arrival, request.user, stats))
        super().forget(request)


def replay(
    arrivals: Sequence[Arrival],
    args: argparse.Namespace,
    plugins: Plugins,
    costs: Costs,
    bytes_per_token: int,
) -> List[Outcome]:
    """Run the requests of a trace, and say how they went.

    Args:
        arrivals (Sequence[Arrival]): The requests, in the order in which they come.
        args (argparse.Namespace): The command line, with the names of the policies.
        plugins (Plugins): The plugins.
        costs (Costs): What the model costs.
        bytes_per_token (int): What the KV of a token takes.

    Raises:
        PluginError: If a policy cannot be used.
        RuntimeError: If a policy or the engine has failed.
    """
    args = scaled(args, bytes_per_token)
    # On any machine, the batch is that of a CPU.
    with mx.stream(mx.cpu):
        return run_engine(SimulatedEngine(arrivals, args, plugins, costs))


def run_engine(engine: SimulatedEngine) -> List[Outcome]:
    """Let an engine serve its requests, and say how they went.

    Raises:
        RuntimeError: If a policy or the engine has failed.
    """
    policies = (engine.policies.eviction, engine.policies.scheduler)
    classes = [type(guarded.policy) for guarded in policies]
    engine.run()
    for guarded, cls in zip(policies, classes):
        if type(guarded.policy) is not cls:
            kind = guarded.policy_class.kind.title
            raise RuntimeError(f"the {kind} {cls.name!r} has failed; the log says why")
    if len(engine.outcomes) < len(engine.arrivals):
        raise RuntimeError("the engine has failed; the log says why")
    return engine.outcomes
