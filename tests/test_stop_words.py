"""The first stop word of a text is found however the text is cut into pieces."""

import gc
import random
import string

from hypothesis import example, given, settings
from hypothesis import strategies as st

from mlx_lm_ext.server.stop_words import StopWords

WORDS = st.lists(st.text("ab", min_size=1, max_size=5), max_size=5)
PIECES = st.lists(st.text("abc", max_size=6), max_size=6)


def expected(words, text, n_passed):
    """The text before the word that ends first, and ``None`` for what is held back; or
    all of the text that cannot be the start of a word, and the rest. No word ends in the first
    ``n_passed`` characters."""
    for end in range(n_passed + 1, len(text) + 1):
        found = [word for word in words if text[:end].endswith(word)]
        if found:
            return text[: end - max(map(len, found))], None
    for start in range(len(text)):
        rest = text[start:]
        if any(word != rest and word.startswith(rest) for word in words):
            return text[:start], text[start:]
    return text, ""


@settings(max_examples=1000, deadline=None)
@given(WORDS, PIECES, st.integers(0, 6))
@example(["abcd", "bc"], ["ab", "cd"], 0)
@example(["bc", "abc"], ["a", "bc"], 0)
@example(["ab", "abc", "b"], ["cab"], 0)
@example(["ab", "abc"], ["ab", "c"], 1)
@example(["a", "aba", "abab"], ["aba", "b"], 1)
def test_answer_ends_before_the_word_that_ends_first(words, pieces, n_without):
    """In the first pieces, no word may end."""
    stop_words, text, answer = StopWords(words), "", ""
    n_passed = len("".join(pieces[:n_without]))
    for i, piece in enumerate(pieces):
        text += piece
        answer += stop_words.split(piece, counts=i >= n_without)
        before, held = expected(words, text, n_passed)
        assert answer == before
        assert stop_words.found is (held is None)
        if stop_words.found:
            break
        assert stop_words.held == held
    rest = stop_words.flush()
    assert answer + rest == (before if stop_words.found else text)


def test_many_words_leave_no_garbage_in_cycles():
    rng = random.Random(0)
    words = ["".join(rng.choices(string.ascii_letters, k=25)) for _ in range(1000)]
    gc.collect()
    gc.disable()
    try:
        stop_words = StopWords(words)
        assert stop_words.split(f"so {words[7]}") == "so "
        del stop_words
        assert gc.collect() == 0
    finally:
        gc.enable()
