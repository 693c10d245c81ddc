"""Prompts of common words, made with a random generator."""

import random
from typing import List

NOUNS = """apple baker bird boat book bridge captain castle city cloud coat corn desert
dog door dream farm field fire fish forest garden ghost girl gold harbor hat hill horse
house island judge king lamp letter library lion market mirror moon mountain night ocean
painter piano pilot queen rain ring river road sailor school ship shop snow song star
stone storm street table teacher tower train tree valley village wall wind winter
wolf""".split()
ADJECTIVES = """bright brave calm clever cold dark deep distant dry early empty gentle
golden great green happy heavy hidden late lonely long lost lucky old proud quiet red
rich round sharp silent silver slow small soft strange strong tall warm wild wise
young""".split()
VERBS = """builds calls carries chases draws finds follows forgets guards hears helps
hides holds keeps knows leads likes loses loves meets misses moves needs opens paints
passes reads remembers saves sees sells serves shows steals takes teaches trusts
visits wants watches""".split()


def phrase(rng: random.Random) -> str:
    return f"the {rng.choice(ADJECTIVES)} {rng.choice(NOUNS)}"


def story(rng: random.Random) -> str:
    """A request of about ten words whose answer is long."""
    return f"Tell me a long story about {phrase(rng)} and {phrase(rng)}."


def text(rng: random.Random, n_words: int) -> str:
    """``n_words`` words of simple sentences."""
    words: List[str] = []
    while len(words) < n_words:
        words += f"{phrase(rng)} {rng.choice(VERBS)} {phrase(rng)}.".split()
    return " ".join(words[:n_words])
