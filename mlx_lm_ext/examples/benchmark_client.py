"""Measure an OpenAI-compatible server as its users see it.

    mlx_lm.batch_server &
    mlx_lm.batch_benchmark --concurrency 8 --requests 40 --stream --plot run.png

Rules:
1. The seed alone determines the requests, so that two servers get the same ones.
2. No request is retried: one that fails is reported.
"""

import argparse
import asyncio
import json
import random
import sys
from contextlib import asynccontextmanager
from typing import Any, AsyncIterator, Dict, List, NamedTuple, Optional

from mlx_lm_ext.arguments import ArgumentParser, number
from mlx_lm_ext.bench import timings, words
from mlx_lm_ext.bench.arguments import add_server_arguments, output_file, plot_file
from mlx_lm_ext.bench.timings import Timing

try:
    import openai
    from tqdm import tqdm
except ImportError as e:
    raise SystemExit(f"error: {e}; pip install 'mlx-lm-ext[bench]'")


class Question(NamedTuple):
    """One request, and how long its user waits before the next one."""

    prompt: str
    max_tokens: int
    delay: float


def make_parser() -> argparse.ArgumentParser:
    parser = ArgumentParser(
        prog="mlx_lm.batch_benchmark",
        description="Send chats to an OpenAI-compatible server and time the answers.",
        formatter_class=argparse.ArgumentDefaultsHelpFormatter,
    )
    add = parser.add_argument
    add_server_arguments(parser)
    add("--requests", type=number(int, 1), default=20, help="requests in all")
    add("--stream", action="store_true", help="stream the answers")
    add(
        "--min-delay",
        type=number(float, 0, 3600),
        default=0.1,
        help="least time that a user waits between two requests, in seconds",
    )
    add(
        "--max-delay",
        type=number(float, 0, 3600),
        default=2.0,
        help="longest time, in seconds",
    )
    add(
        "--min-tokens",
        type=number(int, 1),
        default=10,
        help="least max_tokens of a request, which is drawn anew for each",
    )
    add("--max-tokens", type=number(int, 1), default=512, help="most max_tokens")
    add("--seed", type=int, default=0, help="determines prompts, max_tokens and delays")
    add(
        "--json",
        type=output_file,
        metavar="FILE",
        help="write all figures and timings, in seconds",
    )
    add("--plot", type=plot_file, metavar="FILE", help="plot the run as .png or .svg")
    return parser


def draw(args: argparse.Namespace) -> List[Question]:
    """The requests to send, which depend on the seed only."""
    rng = random.Random(args.seed)
    return [
        Question(
            words.story(rng),
            rng.randint(args.min_tokens, args.max_tokens),
            rng.uniform(args.min_delay, args.max_delay),
        )
        for _ in range(args.requests)
    ]


@asynccontextmanager
async def connect(args: argparse.Namespace) -> AsyncIterator[openai.AsyncOpenAI]:
    """Connect to the server.

    Raises:
        SystemExit: If it does not answer.
    """
    async with openai.AsyncOpenAI(
        base_url=args.base_url, api_key=args.api_key, max_retries=0
    ) as client:
        try:
            await client.models.list()
        except openai.NotFoundError:
            pass  # a server without this route
        except openai.APIConnectionError as e:
            raise SystemExit(
                f"error: no server answers at {args.base_url} ({e.__cause__ or e}); "
                "start one with mlx_lm.batch_server, or name another with --base-url"
            )
        except openai.OpenAIError as e:
            raise SystemExit(f"error: {args.base_url} refuses: {cause(e)}")
        yield client


def cause(error: openai.OpenAIError) -> str:
    """Why a request failed, the same text for the same cause."""
    if isinstance(error, openai.APIStatusError):
        body = error.body if isinstance(error.body, dict) else {}
        return f"HTTP {error.status_code}: {body.get('message') or error.message}"
    return f"{type(error).__name__}: {error}"


async def ask(
    client: openai.AsyncOpenAI,
    model: str,
    prompt: str,
    max_tokens: int,
    stream: bool,
    label: str = "",
) -> Timing:
    """Send one chat and time its answer; a failure is in ``Timing.error``."""
    request: Dict[str, Any] = dict(
        model=model,
        messages=[{"role": "user", "content": prompt}],
        max_tokens=max_tokens,
    )
    timing = Timing(label=label, streamed=stream)
    error = None
    try:
        if stream:
            events = await client.chat.completions.create(
                **request, stream=True, stream_options={"include_usage": True}
            )
            async for event in events:
                timing.read(event.to_dict())
        else:
            answer = await client.chat.completions.create(**request)
            timing.read(answer.to_dict())
    except openai.OpenAIError as e:
        error = cause(e)
    timing.close(error)
    return timing


async def run(args: argparse.Namespace) -> List[Timing]:
    """Let ``--concurrency`` users send one request after the other."""
    questions = iter(draw(args))
    done: List[Timing] = []

    async def use(client: openai.AsyncOpenAI, bar: tqdm) -> None:
        question: Optional[Question] = next(questions, None)
        while question is not None:
            done.append(
                await ask(
                    client,
                    args.model,
                    question.prompt,
                    question.max_tokens,
                    args.stream,
                )
            )
            bar.update()
            delay, question = question.delay, next(questions, None)
            if question is not None:
                await asyncio.sleep(delay)

    async with connect(args) as client:
        with tqdm(total=args.requests, unit="request", file=sys.stderr) as bar:
            await asyncio.gather(*(use(client, bar) for _ in range(args.concurrency)))
    return done


def report(summary: Dict[str, Any], streamed: bool) -> str:
    """The figures of a run as text."""
    lines = [
        f"Successful requests:    {summary['successful_requests']} of "
        f"{summary['requests']}",
        f"Total tokens generated: {summary['generated_tokens']}",
        f"Total duration:         {summary['duration']:.2f} s",
        f"Throughput (TPS):       {summary['throughput']:.2f} tokens/s",
    ]
    figures = [("latency", 1, "s"), ("ttft", 1, "s"), ("itl", 1000, "ms")]
    for name, scale, unit in figures:
        if values := summary[name]:
            title = name if name == "latency" else name.upper()
            percentiles = ", ".join(
                f"{p} {values[p] * scale:.2f}" for p in ("p50", "p95", "p99")
            )
            note = ""
            if name == "itl" and not streamed:
                note = " latency / tokens, because nothing was streamed"
            lines.append(
                f"{f'Average {title}:':<23} {values['mean'] * scale:.2f} {unit} "
                f"({percentiles}){note}"
            )
    for error, n in summary["failures"].items():
        lines.append(f"Failed:                 {n} with {error}")
    return "\n".join(lines)


def main(argv: Optional[List[str]] = None) -> None:
    """Measure, and exit with 1 if a request failed."""
    parser = make_parser()
    args = parser.parse_args(argv)
    for kind in ("delay", "tokens"):
        low = getattr(args, f"min_{kind}")
        if low > getattr(args, f"max_{kind}"):
            parser.error(
                f"argument --min-{kind}: must be at most --max-{kind}, not {low:g}"
            )
    try:
        done = asyncio.run(run(args))
    except KeyboardInterrupt:
        raise SystemExit("interrupted")
    summary = timings.summarize(done)
    print(report(summary, args.stream))
    if args.json:
        content = {
            "settings": {k: v for k, v in vars(args).items() if k != "api_key"},
            "summary": summary,
            "requests": [vars(t) for t in done],
        }
        args.json.write_text(json.dumps(content, indent=2, default=str))
    if args.plot:
        from mlx_lm_ext.bench import plots

        plots.save_run(done, args.plot)
    if summary["failures"]:
        raise SystemExit(1)


if __name__ == "__main__":
    main()
