"""Generated traces with the statistics of public ones. Where a source gives a mean and no
distribution, lengths are log-normal with ``SIGMA``.

Sources:
    LMSYS: Zheng et al., "LMSYS-Chat-1M: A Large-Scale Real-World LLM Conversation Dataset",
      ICLR 2024, table 1.
    Mooncake: Qin et al., "Mooncake: Trading More Storage for Less Computation", FAST 2025, the
      table of its traces.
    Alibaba: Wang et al., "KVCache Cache in the Wild", USENIX ATC 2025.
    BurstGPT: Wang et al., "BurstGPT: A Real-World Workload Dataset to Optimize LLM Serving
      Systems", KDD 2025.
    Zipf: Breslau et al., "Web Caching and Zipf-like Distributions", INFOCOM 1999.
"""

import math
import random
from itertools import accumulate, count, islice
from typing import Callable, Dict, Iterator, List

from mlx_lm_ext.bench.arrivals import Arrival, Runs, length

SIGMA = 1.0


class Generator:
    """Draws lengths, times and names.

    Args:
        rate (float): Conversations, or single requests, that begin in a second.
        scale (float): What all lengths are multiplied by.
        seed (int): The seed.
    """

    def __init__(self, rate: float, scale: float, seed: int):
        self.rate = rate
        self.scale = scale
        self.rng = random.Random(seed)
        self.ids = count(1)

    def text(self, mean: float) -> Runs:
        """A text of its own, with a random length.

        Args:
            mean (float): Its mean length in tokens.
        """
        mu = math.log(mean * self.scale) - SIGMA**2 / 2
        return [(next(self.ids), max(1, round(self.rng.lognormvariate(mu, SIGMA))))]

    def times(self, shape: float = 1.0) -> Iterator[float]:
        """When conversations begin. The times between two of them have a Gamma distribution:
        that of a Poisson process with a shape of 1, and bursts with less."""
        now = 0.0
        while True:
            yield now
            now += self.rng.gammavariate(shape, 1 / (shape * self.rate))

    def popular(self, n: int, alpha: float) -> Callable[[], int]:
        """What draws one of ``n`` things, where the i-th is asked for in proportion to
        ``1 / i ** alpha``."""
        weights = [*accumulate(1 / i**alpha for i in range(1, n + 1))]
        return lambda: self.rng.choices(range(n), cum_weights=weights)[0]


def chats(g: Generator) -> Iterator[Arrival]:
    """Chats of several turns, each by a user of its own.

    LMSYS: a chat has 2.0 turns, a prompt 69.5 and an answer 214.5 tokens, in the mean. The
    numbers of turns are geometric. Alibaba: of the reuses in a service for people, 80% come
    within 10 minutes; the times between turns are exponential with this quantile.
    """
    pause = 600 / math.log(5)
    for i, now in enumerate(g.times()):
        prompt: Runs = []
        while True:
            prompt = prompt + g.text(69.5)
            answer = g.text(214.5)
            yield Arrival(now, prompt, answer, user=f"user {i}")
            prompt = prompt + answer
            now += g.rng.expovariate(1 / pause)
            if g.rng.random() < 1 / 2.0:
                break


def agents(g: Generator) -> Iterator[Arrival]:
    """Single requests of programs that share system prompts.

    Mooncake, tool and agent: a prompt has 8,596 and an answer 182 tokens in the mean, and 59%
    of the prompts can come from a cache. Alibaba: in a service for programs, 97% of the hits
    are those of requests of one turn that share system prompts, and a tenth of the blocks has
    77% of the reuses. Here there are 50 system prompts whose popularity is Zipf's with an
    exponent of 1.2, with which the first five have 62% of the requests.
    """
    systems = [g.text(0.59 * 8596) for _ in range(50)]
    draw = g.popular(len(systems), 1.2)
    for now in g.times():
        i = draw()
        prompt = systems[i] + g.text(0.41 * 8596)
        segments = (("system", length(systems[i])), ("user", length(prompt[1:])))
        answer = g.text(182)
        yield Arrival(now, prompt, answer, user=f"user {i}", segments=segments)


def documents(g: Generator) -> Iterator[Arrival]:
    """Questions about long documents, of which some are popular.

    Mooncake, synthetic (made of data sets of questions about long documents, among others): a
    prompt has 15,325 and an answer 149 tokens in the mean. Zipf: pages of the web are asked for
    with exponents of 0.64 to 0.83; here it is 0.8 with 200 documents. Questions have the length
    of the prompts of LMSYS.
    """
    known = [g.text(15325 - 69.5) for _ in range(200)]
    draw, draw_user = g.popular(len(known), 0.8), g.popular(20, 1.0)
    for now in g.times():
        prompt, answer = known[draw()] + g.text(69.5), g.text(149)
        yield Arrival(now, prompt, answer, user=f"user {draw_user()}")


def bursts(g: Generator) -> Iterator[Arrival]:
    """Single requests in bursts, of a few users with very different shares.

    BurstGPT: the times between requests have a Gamma distribution; the shape of 0.25, which
    doubles the standard deviation of a Poisson process, is chosen here. Lengths are those of
    LMSYS. The shares of the 10 users are Zipf's with an exponent of 1.
    """
    draw = g.popular(10, 1.0)
    for now in g.times(shape=0.25):
        prompt, answer = g.text(69.5), g.text(214.5)
        yield Arrival(now, prompt, answer, user=f"user {draw()}")


GENERATORS: Dict[str, Callable[[Generator], Iterator[Arrival]]] = {
    f.__name__: f for f in (chats, agents, documents, bursts)
}


def generate(name: str, n: int, rate: float, scale: float, seed: int) -> List[Arrival]:
    """The first requests of a generated trace, in the order in which they come.

    Args:
        name (str): One of ``GENERATORS``.
        n (int): How many.
        rate (float): Conversations, or single requests, that begin in a second.
        scale (float): What all lengths are multiplied by.
        seed (int): The same seed gives the same requests.
    """
    requests = islice(GENERATORS[name](Generator(rate, scale, seed)), n)
    return sorted(requests, key=lambda a: a.seconds)
