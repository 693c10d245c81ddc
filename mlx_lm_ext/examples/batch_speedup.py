"""Measure how much faster several clients are served together than one alone.

Sends the same short prompts with 1 client and with N clients in turn, to a server
that is already running, and prints tokens per second and the ratio of each pair.

    mlx_lm.batch_server &
    python -m mlx_lm_ext.examples.batch_speedup --clients 8
"""

import argparse
import http.client
import json
import statistics
import time
from concurrent.futures import ThreadPoolExecutor
from urllib.parse import urlsplit

SUBJECTS = "dog sailor river king baker forest clock island".split()


def complete(base_url: str, prompt: str, max_tokens: int) -> int:
    """Send one completion; gives the number of tokens that came back."""
    url = urlsplit(base_url)
    connection = http.client.HTTPConnection(url.hostname, url.port)
    body = {"prompt": prompt, "max_tokens": max_tokens, "temperature": 0}
    connection.request("POST", f"{url.path}/completions", json.dumps(body))
    response = connection.getresponse()
    answer = json.loads(response.read())
    connection.close()
    if response.status != 200:
        raise SystemExit(f"the server answered {response.status}: {answer}")
    return answer["usage"]["completion_tokens"]


def throughput(base_url: str, clients: int, max_tokens: int) -> float:
    """Tokens per second with one request for each of ``clients`` at once."""
    prompts = [
        f"This is the long story of the {SUBJECTS[i % len(SUBJECTS)]} number {i}:"
        for i in range(clients)
    ]
    start = time.perf_counter()
    with ThreadPoolExecutor(clients) as pool:
        n_tokens = sum(pool.map(lambda p: complete(base_url, p, max_tokens), prompts))
    return n_tokens / (time.perf_counter() - start)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--base-url", default="http://localhost:8080/v1")
    parser.add_argument("--clients", type=int, default=8)
    parser.add_argument("--max-tokens", type=int, default=128)
    parser.add_argument("--rounds", type=int, default=5)
    args = parser.parse_args()

    try:
        throughput(args.base_url, args.clients, 8)
    except OSError as e:
        raise SystemExit(f"no server at {args.base_url}: {e}")
    ratios = []
    for _ in range(args.rounds):
        one = throughput(args.base_url, 1, args.max_tokens)
        many = throughput(args.base_url, args.clients, args.max_tokens)
        ratios.append(many / one)
        print(
            f"1 client: {one:.1f} tok/s, {args.clients} clients: {many:.1f} tok/s, "
            f"ratio {ratios[-1]:.2f}",
            flush=True,
        )
    print(f"median ratio {statistics.median(ratios):.2f}")


if __name__ == "__main__":
    main()
