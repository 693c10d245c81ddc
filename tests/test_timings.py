"""Every figure of the measuring tools, on recorded timings."""

import pytest

from mlx_lm_ext.bench import timings
from mlx_lm_ext.bench.timings import Timing


def stream(start, *arrivals, tokens=None, **kwargs):
    """A streamed request; one token a piece unless ``tokens`` says otherwise."""
    return Timing(
        streamed=True,
        start=start,
        arrivals=list(arrivals),
        end=arrivals[-1] + 0.5,
        completion_tokens=tokens or len(arrivals),
        **kwargs,
    )


FIRST = stream(10.0, 12.0, 12.5, 13.0, prompt_tokens=7, cached_tokens=3)
SECOND = stream(11.0, 12.0, 16.0, tokens=5, prompt_tokens=9)
FAILED = Timing(start=10.5, end=20.0, error="HTTP 429: busy")
# Neither in the order of their starts nor of their ends.
RUN = [SECOND, FAILED, FIRST]


def test_one_streamed_request():
    assert FIRST.latency == 3.5
    assert FIRST.ttft == 2.0
    assert FIRST.itl == 0.5
    # Pieces of several tokens: four tokens came in the four seconds after the first.
    assert SECOND.itl == 1.0


def test_one_request_without_streaming():
    whole = Timing(start=1.0, arrivals=[3.0], end=3.0, completion_tokens=4)
    assert whole.latency == 2.0
    assert whole.ttft is None
    assert whole.itl == 0.5


@pytest.mark.parametrize("tokens", [1, 8])
def test_a_stream_in_one_piece_has_no_time_between_tokens(tokens):
    assert stream(0.0, 1.0, tokens=tokens).itl is None


def test_longest_gap_counts_what_ends_after_a_moment():
    gaps = stream(0.0, 1.0, 4.0, 6.0, 6.5)
    assert gaps.longest_gap() == 3.0
    assert gaps.longest_gap(since=3.9) == 3.0
    assert gaps.longest_gap(since=4.0) == 2.0
    assert gaps.longest_gap(since=6.5) == 0.0


def test_gaps_within_a_time():
    gaps = stream(0.0, 1.0, 4.0, 6.0, 6.5)
    assert gaps.gaps() == [3.0, 2.0, 0.5]
    # A gap that is not all within the time is in no figure of it.
    assert gaps.gaps(since=1.5) == [2.0, 0.5]
    assert gaps.gaps(until=6.2) == [3.0, 2.0]
    assert gaps.gaps(since=7.0) == []


def test_mean_gap_is_that_of_tokens():
    # Two gaps, each with two tokens, and one with one.
    run = [stream(0.0, 1.0, 3.0, 5.0, tokens=6), stream(0.0, 1.0, 2.0), FAILED]
    assert timings.mean_gap(run) == 1.0
    assert timings.mean_gap(run, since=3.0) == 1.0
    assert timings.mean_gap(run, since=4.0) is None


def test_mean_gap_while_all_streams_run():
    steady = stream(0.0, 1.0, 2.0, 3.0, 5.0, 7.0, 8.0)
    assert timings.mean_gap_together([steady]) == 1.4
    assert timings.mean_gap_together([steady], beside=[stream(0.0, 3.0, 7.0)]) == 2.0
    assert timings.mean_gap_together([steady], beside=[stream(0.0, 9.0, 9.5)]) is None


def test_percentiles_of_the_gaps_of_all_streams():
    run = [stream(0.0, 1.0, 2.0, 4.0), FAILED, stream(0.0, 7.0, 10.0)]
    assert timings.gap_percentile(run, 50) == 2.0
    assert timings.gap_percentile(run, 100) == 3.0
    assert timings.gap_percentile([stream(0.0, 1.0)], 50) is None


def test_summary_of_a_run():
    summary = timings.summarize(RUN)
    assert summary["requests"] == 3
    assert summary["successful_requests"] == 2
    assert summary["failures"] == {"HTTP 429: busy": 1}
    assert summary["prompt_tokens"] == 16
    assert summary["cached_tokens"] == 3
    assert summary["generated_tokens"] == 8
    assert summary["duration"] == 10.0
    assert summary["throughput"] == 0.8
    assert summary["latency"]["mean"] == 4.5
    assert summary["ttft"]["mean"] == 1.5
    assert summary["itl"]["mean"] == 0.75


def test_summary_of_failures_only():
    summary = timings.summarize([FAILED, FAILED])
    assert summary["failures"] == {"HTTP 429: busy": 2}
    assert summary["throughput"] == 0
    assert summary["latency"] is summary["ttft"] is summary["itl"] is None


def test_percentiles():
    values = timings.distribution([None, *range(101)])
    assert values == {"mean": 50, "p50": 50, "p95": 95, "p99": 99}
    assert timings.distribution([None]) is None


def test_running_requests_over_time():
    times, counts = timings.running_over_time(RUN)
    assert times == [0.0, 0.5, 1.0, 3.5, 6.5, 10.0]
    assert counts == [1, 2, 3, 2, 1, 0]


def test_throughput_over_time_shares_an_answer_among_its_pieces():
    edges, rates = timings.throughput_over_time(RUN, n_bins=5)
    assert edges == [0, 2, 4, 6, 8, 10]
    # Three tokens and half of five between 2 and 4 s, the other half at 6 s.
    assert rates == [0, 2.75, 0, 1.25, 0]


def test_gain_is_above_one_where_ours_is_better():
    assert timings.gain(30, 20, higher_is_better=True) == 1.5
    assert timings.gain(2, 5, higher_is_better=False) == 2.5


@pytest.mark.parametrize("ours, theirs", [(0.9, 0), (None, 1), (1, None)])
def test_no_gain_over_nothing(ours, theirs):
    assert timings.gain(ours, theirs, higher_is_better=True) is None


def test_spread():
    assert timings.spread([1.5, 1.0, 4.0]) == (1.5, 1.0, 4.0)


def chunk(delta, finish_reason=None, **event):
    return {"choices": [{"delta": delta, "finish_reason": finish_reason}], **event}


def test_tokens_are_those_of_the_usage():
    timing = Timing(streamed=True)
    timing.read(chunk({"role": "assistant", "content": ""}))
    assert timing.arrivals == []
    timing.read(chunk({"content": "two tokens"}))
    timing.read(chunk({"reasoning_content": "or more"}))
    timing.read(chunk({}, "stop"))
    usage = {"prompt_tokens": 5, "completion_tokens": 9}
    usage["prompt_tokens_details"] = {"cached_tokens": 4}
    timing.read({"choices": [], "usage": usage})
    timing.close()
    assert timing.error is None
    assert len(timing.arrivals) == 2
    assert timing.start <= timing.arrivals[0] <= timing.arrivals[1] <= timing.end
    assert (timing.prompt_tokens, timing.cached_tokens) == (5, 4)
    assert timing.completion_tokens == 9
    assert timing.text == "two tokens"


@pytest.mark.parametrize(
    "choice", [{"message": {"content": "Yes"}}, {"text": "Yes", "index": 0}]
)
def test_a_whole_answer_arrives_at_once(choice):
    timing = Timing()
    usage = {"prompt_tokens": 5, "completion_tokens": 1}
    timing.read({"choices": [choice | {"finish_reason": "stop"}], "usage": usage})
    timing.close()
    assert (timing.error, len(timing.arrivals), timing.text) == (None, 1, "Yes")


def test_the_end_of_an_answer_without_text_is_its_arrival():
    timing = Timing(streamed=True)
    timing.read(chunk({}, "stop"))
    assert len(timing.arrivals) == 1


def test_an_answer_that_cannot_be_counted_is_a_failure():
    timing = Timing(streamed=True)
    timing.read(chunk({"content": "Yes"}, "stop"))
    timing.close()
    assert "no usage" in timing.error


def test_an_error_in_a_stream_is_a_failure():
    timing = Timing(streamed=True)
    timing.read(chunk({"content": "Y"}))
    timing.read({"error": {"message": "the server failed"}})
    timing.close()
    assert "the server failed" in timing.error
