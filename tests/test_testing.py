"""The conformance kit for plugins: it passes what is right, and finds each rule that is broken."""

import random
import sys
import time
from itertools import cycle

import mlx.core as mx
import numpy as np
import pytest

from mlx_lm_ext.errors import RequestError
from mlx_lm_ext.interfaces import BatchSampler, EvictionPolicy, SchedulerPolicy
from mlx_lm_ext.policies import eviction, scheduling
from mlx_lm_ext.sampling import default
from mlx_lm_ext.sampling.default import DefaultSampler
from mlx_lm_ext.testing import (
    ContractWarning,
    check_eviction_policy,
    check_sampler,
    check_scheduler_policy,
    watching,
)


def named(cls):
    return cls.__name__


# What is built in


@pytest.mark.parametrize("cls", eviction.POLICIES, ids=named)
def test_built_in_eviction_policies_pass(cls):
    check_eviction_policy(cls)


@pytest.mark.parametrize("cls", scheduling.POLICIES, ids=named)
def test_built_in_scheduler_policies_pass(cls):
    check_scheduler_policy(cls)


def test_built_in_scheduler_policies_pass_with_arguments():
    argv = ["--prefill-budget", "16", "--max-wait", "0"]
    check_scheduler_policy(scheduling.SJF, argv, seeds=[7])


def test_built_in_sampler_passes_with_the_code_for_gpus(monkeypatch):
    monkeypatch.setattr(default, "on_cpu", lambda: False)
    check_sampler(DefaultSampler)


def test_built_in_sampler_passes_with_the_code_for_cpus_which_evaluates():
    check_sampler(DefaultSampler, may_evaluate=True)
    with pytest.raises(AssertionError, match="evaluated an array"):
        check_sampler(DefaultSampler)


# Classes that cannot be registered


class Oldest(EvictionPolicy):
    """A policy that is right. The broken ones are like it but for one thing."""

    name = "oldest"

    def priority(self, entry):
        return entry.last_hit


class NotDerived:
    name = "not-derived"


class WithoutName(EvictionPolicy):
    def priority(self, entry):
        return 0


class WithoutPriority(EvictionPolicy):
    name = "without-priority"


class WithoutTwoArguments(Oldest):
    def __init__(self, args):
        pass


class NeedsFlag(Oldest):
    def __init__(self, args, clock):
        super().__init__(args, clock)
        self.weight = args.no_such_flag


@pytest.mark.parametrize(
    "cls, message",
    [
        (NotDerived, "does not derive from mlx_lm_ext.interfaces.EvictionPolicy"),
        (WithoutName, "the eviction policy WithoutName has no name"),
        (WithoutPriority, "'without-priority' lacks the method priority"),
        (WithoutTwoArguments, r"WithoutTwoArguments.__init__\(.* raised TypeError"),
        (NeedsFlag, r"NeedsFlag.__init__\(.* raised AttributeError: .*no_such_flag"),
    ],
    ids=lambda x: x.__name__ if isinstance(x, type) else "",
)
def test_class_that_no_plugin_may_register_is_found(cls, message):
    with pytest.raises(AssertionError, match=message):
        check_eviction_policy(cls)


# Eviction policies


class RaisesInPriority(Oldest):
    def priority(self, entry):
        return 1 / (entry.hits - 1)


class ExitsInHit(Oldest):
    def on_hit(self, entry, n_tokens):
        sys.exit()


class DividesByNoBytes(Oldest):
    """Entries that only lead to others have no bytes."""

    def on_split(self, parent, child):
        parent.data = parent.recompute_cost / parent.nbytes


class ForgetsNewParents(Oldest):
    """``on_split`` gives an entry that ``on_insert`` did not."""

    def on_insert(self, entry):
        entry.data = [entry.created]

    def priority(self, entry):
        return entry.data[0]


class ChangesAnEntry(Oldest):
    def on_hit(self, entry, n_tokens):
        entry.hits += 1


class SortsWhatItRanks(Oldest):
    def rank(self, entries):
        entries.sort(key=lambda e: -e.depth)
        return [(False, e.last_hit) for e in entries]


class SaysNothingOfEvictable(Oldest):
    def evictable(self, entry):
        _ = entry.hits > 2


class NaN(Oldest):
    def priority(self, entry):
        return float("nan") if entry.hits else 0.0


class MixedKinds(Oldest):
    def priority(self, entry):
        return (entry.hits, 0) if entry.hits else 0


class MixedNumbers(Oldest):
    """Can be compared, but the server takes only plain numbers as such."""

    def priority(self, entry):
        return np.float64(1.0) if entry.hits else 0.0


class NotComparable(Oldest):
    def priority(self, entry):
        return {"hits": entry.hits}


class WithoutOrder(Oldest):
    class AlwaysLess:
        def __lt__(self, other):
            return True

        def __eq__(self, other):
            return True

    def priority(self, entry):
        return self.AlwaysLess()


class DrawsPriorities(Oldest):
    def priority(self, entry):
        return random.random()


class CountsInPriority(Oldest):
    def priority(self, entry):
        entry.data = (entry.data or 0) + 1
        return entry.last_hit


class RanksTooFew(Oldest):
    def rank(self, entries):
        return super().rank(entries)[:-1]


class RanksWithoutPinned(Oldest):
    def rank(self, entries):
        return [entry.last_hit for entry in entries]


class RanksByPlace(Oldest):
    def rank(self, entries):
        order = sorted(entries, key=lambda e: e.last_hit)
        return [(False, float(order.index(e))) for e in entries]


class ExpiresNumbers(Oldest):
    def expired(self, now):
        return [now]


class ExpiresNone(Oldest):
    def expired(self, now):
        if now < 0:
            return []


class ExpiresOnce(Oldest):
    """Changes something when it is asked."""

    def __init__(self, args, clock):
        super().__init__(args, clock)
        self.old = {}

    def on_insert(self, entry):
        self.old[entry] = None

    def on_split(self, parent, child):
        self.old[parent] = None

    def on_remove(self, entry, reason):
        self.old.pop(entry, None)

    def expired(self, now):
        return [self.old.popitem()[0] for _ in [*self.old]]


class ExpiresWhatHasLeft(Oldest):
    def __init__(self, args, clock):
        super().__init__(args, clock)
        self.entries = []

    def on_insert(self, entry):
        self.entries.append(entry)

    def expired(self, now):
        return [e for e in self.entries if now - e.last_hit > 100]


class CountsOnlyInsertions(Oldest):
    """Its ``on_remove`` fails for the parents of ``on_split``."""

    def __init__(self, args, clock):
        super().__init__(args, clock)
        self.entries = {}

    def on_insert(self, entry):
        self.entries[entry] = 1

    def on_remove(self, entry, reason):
        del self.entries[entry]


class KeepsAllEntries(Oldest):
    def __init__(self, args, clock):
        super().__init__(args, clock)
        self.entries = []

    def on_insert(self, entry):
        self.entries.append(entry)


class NeedsAFlag(Oldest):
    name = "needs a flag"

    def __init__(self, args, clock):
        super().__init__(args, clock)
        self.grace = args.grace


EVICTION = [
    (NeedsAFlag, r"__init__\(.*\) raised AttributeError.*argv=\['-p', its name\]"),
    (RaisesInPriority, r"priority\(entry to depth \d+\) raised ZeroDivisionError"),
    (ExitsInHit, r"on_hit\(entry to depth \d+, \d+\) raised SystemExit"),
    (DividesByNoBytes, r"on_split\(.*\) raised ZeroDivisionError"),
    (ForgetsNewParents, "priority.* raised TypeError.*; right is to raise nothing"),
    (ChangesAnEntry, r"on_hit.* changed hits of entry to depth \d+; .*but entry.data"),
    (SortsWhatItRanks, r"rank\(\d+ entries\) changed the list; right is to change not"),
    (SaysNothingOfEvictable, "evictable.* returned None; right is True or False"),
    (NaN, "gave nan; right is a number that can be compared"),
    (MixedKinds, "right is priorities that can all be compared"),
    (MixedNumbers, "right is priorities that can all be compared: only plain numbers"),
    (NotComparable, "comparing them raised .*'<' not supported.*compared with <"),
    (WithoutOrder, "each is less than the other; right are priorities that have an"),
    (DrawsPriorities, "and nothing happened in between; .* kept in entry.data"),
    (CountsInPriority, r"priority.* changed entry.data; right is to change nothing"),
    (RanksTooFew, r"rank\((\d+) entries\) returned \d+ of them; right is one tuple"),
    (RanksWithoutPinned, "rank.* right is one tuple for each entry: whether it is pin"),
    (RanksByPlace, "right is the same key from both, whichever other entries"),
    (ExpiresNumbers, r"expired\(\d+.* gave \d+.*; right is entries and nothing else"),
    (ExpiresNone, r"expired\(.*\) raised TypeError: 'NoneType'"),
    (ExpiresOnce, r"expired\(.*\) returned .* and then \[\], and nothing happened"),
    (ExpiresWhatHasLeft, "an entry that has left the cache; right is to forget"),
    (CountsOnlyInsertions, r"on_remove\(entry to depth \d+, 'evicted'\) raised Key"),
    (KeepsAllEntries, r"keeps \d+ of \d+ entries that have left the cache; right"),
]


@pytest.mark.parametrize(
    "cls, message", EVICTION, ids=[c.__name__ for c, _ in EVICTION]
)
def test_eviction_policy_that_breaks_a_rule_is_found(cls, message):
    with pytest.raises(AssertionError, match=f"(?s)^{cls.__name__}.*{message}"):
        check_eviction_policy(cls)


class Pinning(Oldest):
    """Unusual, and right."""

    def evictable(self, entry):
        return entry.cache_type != "system"

    def rank(self, entries):
        # All at once.
        hits = np.array([e.last_hit for e in entries])
        return [(not self.evictable(e), float(x)) for e, x in zip(entries, hits)]

    def expired(self, now):
        yield from ()


class RandomOnes(Oldest):
    def on_insert(self, entry):
        entry.data = random.random()

    def on_split(self, parent, child):
        parent.data = random.random()

    def priority(self, entry):
        return entry.data


@pytest.mark.parametrize("cls", [Oldest, Pinning, RandomOnes], ids=named)
def test_eviction_policy_that_is_right_passes(cls):
    check_eviction_policy(cls)


# Scheduler policies


class InOrder(SchedulerPolicy):
    name = "in-order"


class RaisesInOrder(InOrder):
    def order(self, waiting, view):
        return [waiting[1], waiting[0]]


class ExitsInTokens(InOrder):
    def on_tokens(self, counts):
        sys.exit()


class WantsEachToStart(InOrder):
    """Requests may leave before they start."""

    def __init__(self, args, clock):
        super().__init__(args, clock)
        self.running = set()

    def on_start(self, request):
        self.running.add(request)

    def on_finish(self, request):
        self.running.remove(request)


class WantsUsers(InOrder):
    """A request need not have a user."""

    def order(self, waiting, view):
        return sorted(waiting, key=lambda r: r.body["user"])


class Twice(InOrder):
    def order(self, waiting, view):
        return [*waiting, waiting[0]]


class OrdersRunning(InOrder):
    def order(self, waiting, view):
        return [*waiting, *view.running]


class OrdersIds(InOrder):
    def order(self, waiting, view):
        return [r.id for r in waiting]


class OrdersNumber(InOrder):
    def order(self, waiting, view):
        return len(waiting)


class SortsInPlace(InOrder):
    def order(self, waiting, view):
        waiting.sort(key=lambda r: -r.arrival)
        return waiting


class ChangesRequests(InOrder):
    def on_start(self, request):
        request.body["priority"] = 3


class AddsToRequests(InOrder):
    def order(self, waiting, view):
        for r in waiting:
            r.credit = 1


class NoTokens(InOrder):
    def prefill_tokens(self, view):
        return 0


class HalfTokens(InOrder):
    def prefill_tokens(self, view):
        return (view.gap_tokens or 64) / 2


class GapTokens(InOrder):
    """There are none before the first step."""

    def prefill_tokens(self, view):
        return min(512, view.gap_tokens)


class YesTokens(InOrder):
    def prefill_tokens(self, view):
        return True


class KnowsAll(InOrder):
    most_known = None


class OrdersForever(InOrder):
    def order(self, waiting, view):
        return cycle(waiting) if waiting else None


SCHEDULING = [
    (OrdersForever, r"order\(.*\) returned request 'r\d+' twice"),
    (RaisesInOrder, r"order\(requests r\d+, view.* raised IndexError: .*; right is"),
    (ExitsInTokens, "on_tokens.* raised SystemExit.*built-in one"),
    (WantsEachToStart, r"on_finish\(request 'r\d+'\) raised KeyError"),
    (WantsUsers, "order.* raised KeyError: 'user'"),
    (Twice, r"returned request 'r\d+' twice; right is some or all of the waiting"),
    (OrdersRunning, r"returned 'r\d+', which does not wait; right is some or all"),
    (OrdersIds, r"returned 'r\d+', which does not wait; right is some or all"),
    (OrdersNumber, r"order.* returned \d+; right is some or all"),
    (SortsInPlace, "order.* changed the list; right is to change nothing"),
    (ChangesRequests, r"on_start.* changed body of request 'r\d+'; right is to change"),
    (AddsToRequests, r"order.* changed credit of request 'r\d+'; right is to change"),
    (NoTokens, r"prefill_tokens\(view with \d+ running\) returned 0; right is an int"),
    (HalfTokens, r"returned [\d.]+; right is an integer of at least 1, or None"),
    (GapTokens, "prefill_tokens.* raised TypeError"),
    (YesTokens, "returned True; right is an integer of at least 1"),
    (KnowsAll, "most_known is None; right is how many waiting requests"),
]


@pytest.mark.parametrize(
    "cls, message", SCHEDULING, ids=[c.__name__ for c, _ in SCHEDULING]
)
def test_scheduler_policy_that_breaks_a_rule_is_found(cls, message):
    with pytest.raises(AssertionError, match=f"(?s)^{cls.__name__}.*({message})"):
        check_scheduler_policy(cls)


class Lottery(InOrder):
    """Unusual, and right: a generator of some of the requests."""

    most_known = 10

    def order(self, waiting, view):
        return (r for r in random.sample(waiting, len(waiting) // 2))

    def prefill_tokens(self, view):
        return np.int64(view.gap_tokens or 1)


@pytest.mark.parametrize("cls", [InOrder, Lottery], ids=named)
def test_scheduler_policy_that_is_right_passes(cls):
    check_scheduler_policy(cls)


# Samplers


class Greedy(BatchSampler):
    name = "greedy"

    def __call__(self, logprobs):
        return mx.argmax(logprobs, axis=-1)


class RaisesInCall(Greedy):
    def __call__(self, logprobs):
        return mx.argmax(logprobs @ mx.zeros((7, 7)), axis=-1)


class Refuses(Greedy):
    def __init__(self, args, request, tokenizer):
        if "mode" not in request.body:
            raise RequestError(400, "mode is needed", "mode")


class WantsNewRequests(Greedy):
    """A request may have tokens when its object is made."""

    def __init__(self, args, request, tokenizer):
        if request.n_generated:
            raise ValueError("started before")


class UnknownNeeds(Greedy):
    needs_logprobs = "logits"


class GivesList(Greedy):
    def __call__(self, logprobs):
        return [0] * len(logprobs)


class GivesFloats(Greedy):
    def __call__(self, logprobs):
        return super().__call__(logprobs).astype(mx.float32)


class GivesColumn(Greedy):
    def __call__(self, logprobs):
        return super().__call__(logprobs)[:, None]


class BeyondVocabulary(Greedy):
    def __call__(self, logprobs):
        return super().__call__(logprobs) + logprobs.shape[-1]


class Negative(Greedy):
    def __call__(self, logprobs):
        return super().__call__(logprobs).astype(mx.int32) - logprobs.shape[-1]


class Forbidden(Greedy):
    def __call__(self, logprobs):
        return mx.argmin(logprobs, axis=-1)


class WritesInPlace(Greedy):
    def __call__(self, logprobs):
        logprobs[:, 3] = logprobs[:, 3] - 1
        return super().__call__(logprobs)


class ChangesRequest(Greedy):
    def __init__(self, args, request, tokenizer):
        request.args.sampling.temperature = 0.0


class Evaluates(Greedy):
    def __call__(self, logprobs):
        return mx.array(np.array(logprobs.astype(mx.float32)).argmax(axis=-1))


class EvaluatesItsState(Greedy):
    """Looks at what it has kept, at the next call."""

    last = None

    def __call__(self, logprobs):
        if self.last is not None:
            self.last.tolist()
        self.last = super().__call__(logprobs)
        return self.last


class DrawsAnyhow(Greedy):
    """Its generator has no seed."""

    def __init__(self, args, request, tokenizer):
        self.rng = np.random.default_rng()

    def __call__(self, logprobs):
        noise = self.rng.gumbel(size=logprobs.shape).astype(np.float32)
        return mx.argmax(logprobs + mx.array(noise), axis=-1)


class Tallies(Greedy):
    """Rows that count their tokens, and choose the most or the second most likely in turns."""

    def __init__(self, args, request, tokenizer):
        self.counts = [int(request.id[1:])]

    def extend(self, other):
        self.counts = self.counts + other.counts

    def filter(self, keep):
        self.counts = [self.counts[i] for i in keep]

    def __call__(self, logprobs):
        second = mx.array([n % 2 for n in self.counts]) == 1
        self.counts = [n + 1 for n in self.counts]
        first, other = mx.argsort(-logprobs, axis=-1)[:, :2].T
        is_free = mx.take_along_axis(logprobs, other[:, None], axis=-1)[:, 0] > -mx.inf
        return mx.where(second & is_free, other, first)


class ExtendsBefore(Tallies):
    def extend(self, other):
        self.counts = other.counts + self.counts


class FiltersWithoutOrder(Tallies):
    def filter(self, keep):
        super().filter(sorted(keep))


class SharesCopies(Tallies):
    """Both copies count in one list."""

    def __init__(self, args, request, tokenizer):
        super().__init__(args, request, tokenizer)
        self.of_row = [self.counts]

    def __deepcopy__(self, memo):
        other = SharesCopies.__new__(SharesCopies)
        other.of_row = self.of_row[:]
        other.counts = []
        return other

    def extend(self, other):
        self.of_row += other.of_row

    def filter(self, keep):
        self.of_row = [self.of_row[i] for i in keep]

    def __call__(self, logprobs):
        # The rows that are parted keep their number of tokens, plus those of the others.
        self.counts = [sum(c) for c in self.of_row]
        for c in self.of_row[0], self.of_row[-1]:
            c[0] += 1
        return super().__call__(logprobs)


class ForgetsFilter(Tallies):
    filter = BatchSampler.filter


class ForgetsExtend(Tallies):
    extend = BatchSampler.extend


SAMPLING = [
    (RaisesInCall, r"__call__\(float32 of shape \(\d+, 320\)\) raised ValueError"),
    (
        Refuses,
        r"__init__\(.*request 'r0'.*raised RequestError: mode is needed; .* in bodies",
    ),
    (WantsNewRequests, "__init__.* raised ValueError: started before"),
    (UnknownNeeds, "needs_logprobs is 'logits'; right is True"),
    (GivesList, "returned list; right is an mx.array of"),
    (GivesFloats, r"returned mlx.core.float32 of shape \(\d+,\); right is an mx.arr"),
    (GivesColumn, r"of shape \(\d+, 1\); right is an mx.array of \d+ integers"),
    (BeyondVocabulary, r"returned \d+ for row 0; right is a token id from 0 to 319"),
    (Negative, r"returned -\d+ for row 0; right is a token id from 0 to 319"),
    (Forbidden, r"chose token \d+ in row \d+, which is minus infinity there; right"),
    (WritesInPlace, "changed what it was given; right is to write into a copy"),
    (ChangesRequest, "__init__.* changed args of request 'r0'; right is to change"),
    (Evaluates, r"__call__\(.*\) evaluated an array, as item"),
    (EvaluatesItsState, r"__call__\(.*\) evaluated an array, as item"),
    (DrawsAnyhow, "other tokens when the same rows were run again"),
    (ExtendsBefore, "when it runs alone; right is that extend appends"),
    (FiltersWithoutOrder, "when it runs alone; right is that .*filter keeps rows in"),
    (SharesCopies, "when it runs alone; right is that .*copies share nothing"),
    (ForgetsFilter, r"__call__.* raised ValueError: \[broadcast"),
    (ForgetsExtend, r"filter\(\[.*\]\) raised IndexError"),
]


@pytest.mark.parametrize(
    "cls, message", SAMPLING, ids=[c.__name__ for c, _ in SAMPLING]
)
def test_sampler_that_breaks_a_rule_is_found(cls, message):
    with pytest.raises(AssertionError, match=f"(?s)^{cls.__name__}.*({message})"):
        check_sampler(cls)


class Categorical(Greedy):
    """Draws with the generator of the process."""

    def __call__(self, logprobs):
        return mx.random.categorical(logprobs, axis=-1)


@pytest.mark.parametrize("cls", [Greedy, Categorical, Tallies], ids=named)
def test_sampler_that_is_right_passes(cls):
    check_sampler(cls)


def test_sampler_gets_requests_with_the_fields_that_it_needs():
    check_sampler(Refuses, bodies=[{"mode": 1}], seeds=[0])


# Warnings


class SlowHit(Oldest):
    def on_hit(self, entry, n_tokens):
        end = time.thread_time() + 0.002
        while time.thread_time() < end:
            pass


class KeepsAllRequests(InOrder):
    def __init__(self, args, clock):
        super().__init__(args, clock)
        self.requests = []

    def on_start(self, request):
        self.requests.append(request)


class NotCopied(Greedy):
    def __init__(self, args, request, tokenizer):
        self.rows = (row for row in [request])


def test_slow_method_is_warned_about(monkeypatch):
    monkeypatch.setattr(watching, "SLOW", 1e-3)
    with pytest.warns(ContractWarning, match=r"SlowHit.on_hit took \d.\d ms on ave"):
        check_eviction_policy(SlowHit, seeds=[0])


def test_scheduler_policy_that_keeps_all_requests_is_warned_about():
    with pytest.warns(ContractWarning, match="KeepsAllRequests keeps .* on_finish"):
        check_scheduler_policy(KeepsAllRequests, seeds=[0])


def test_sampler_that_cannot_be_copied_is_warned_about():
    with pytest.warns(ContractWarning, match="NotCopied cannot be copied .TypeError"):
        check_sampler(NotCopied, seeds=[0])


def test_wrong_command_line_ends_with_its_message(capsys):
    with pytest.raises(SystemExit):
        check_scheduler_policy(InOrder, ["--no-such-flag"])
    assert "unrecognized arguments: --no-such-flag" in capsys.readouterr().err
