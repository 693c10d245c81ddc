"""Text that is made as tokens come is what the tokenizer makes of all of them."""

import random
import time
from functools import cache
from itertools import takewhile

import pytest
from helpers import ALONE, complete, saying, streamed_text
from hypothesis import assume, example, given, settings
from hypothesis import strategies as st
from tiny_tokenizers import BYTE_TOKENS, KINDS, write_model

from mlx_lm_ext.request.detokenizing import MAX_BYTES, Decoder, Detokenizer

SHARED = settings(max_examples=150, deadline=None)
TEXTS = st.lists(
    st.one_of(
        st.text(max_size=4),
        st.sampled_from([*" \n\0.,'ntsa<>", "  ", "\u4e16\U0001f600", "<n>", "hello"]),
    ),
    max_size=30,
).map("".join)


@cache
def tokenizer_of(kind):
    tokenizer = KINDS[kind]()
    return tokenizer, Decoder(tokenizer)


def expected(kind, ids):
    tokenizer, _ = tokenizer_of(kind)
    # Tokenizers with code of their own refuse ids that they do not have.
    return tokenizer.decode([i for i in ids if i < len(tokenizer)])


def n_bytes_at_end(kind, ids):
    """How many byte tokens follow the last other one."""
    _, decoder = tokenizer_of(kind)
    return len([*takewhile(lambda i: i in decoder.bytes, reversed(ids))])


def streamed(kind, ids, rng=None):
    """The text of ids that come one by one, or in random groups."""
    detokenizer, text = Detokenizer(tokenizer_of(kind)[1]), ""
    while ids:
        n = rng.choice([1, 2, 5, 100]) if rng else 1
        text += detokenizer.add(ids[:n])
        ids = ids[n:]
    return text + detokenizer.end()


@pytest.mark.parametrize("kind", KINDS)
@SHARED
@given(st.data(), st.randoms(use_true_random=False))
def test_pieces_add_up_to_the_text_of_all_ids(kind, data, rng):
    n = len(tokenizer_of(kind)[0])
    few = data.draw(st.lists(st.integers(0, n + 3), min_size=1, max_size=5))
    ids = data.draw(
        st.lists(st.one_of(st.sampled_from(few), st.integers(0, n + 3)), max_size=60)
    )
    assert streamed(kind, ids) == expected(kind, ids)
    assert streamed(kind, ids, rng) == expected(kind, ids)


@pytest.mark.parametrize("kind", KINDS)
@SHARED
@example("0\x85\xa0", 0, random.Random(0))
@given(TEXTS, st.integers(0, 8), st.randoms(use_true_random=False))
def test_pieces_add_up_to_a_text_and_to_one_that_is_cut_off(kind, text, n_cut, rng):
    tokenizer, _ = tokenizer_of(kind)
    ids = tokenizer.encode(text, add_special_tokens=False)
    ids = ids[: max(0, len(ids) - n_cut)]
    # Of a longer row, the first characters are given out before the cut makes it wrong.
    assume(n_bytes_at_end(kind, ids) < MAX_BYTES)
    assert streamed(kind, ids) == expected(kind, ids)
    assert streamed(kind, ids, rng) == expected(kind, ids)


@pytest.mark.parametrize("kind", KINDS)
def test_each_id_has_a_text_and_ids_beyond_the_vocabulary_have_none(kind):
    n = len(tokenizer_of(kind)[0])
    for i in range(n):
        assert streamed(kind, [i]) == expected(kind, [i])
    assert streamed(kind, [n, n + 1, 1 << 20]) == ""


@pytest.mark.parametrize("kind", ["byte level", "tekken", "sentencepiece", "own"])
@pytest.mark.parametrize("text", ["a", "a  ", "a\n\n    b", "a .", "a \u4e16."])
def test_complete_text_is_not_held_back(kind, text):
    tokenizer, decoder = tokenizer_of(kind)
    ids = tokenizer.encode(text, add_special_tokens=False)
    assert Detokenizer(decoder).add(ids) == text


def test_byte_token_that_its_decoder_takes_for_text_is_not_held_back():
    tokenizer, decoder = tokenizer_of("metaspace")
    (token,) = tokenizer.convert_tokens_to_ids(["<0x41>"])
    assert Detokenizer(decoder).add([token]) == "<0x41>"


def test_incomplete_character_is_held_back_until_it_is_complete():
    tokenizer, decoder = tokenizer_of("byte level")
    detokenizer = Detokenizer(decoder)
    pieces = [detokenizer.add([i]) for i in tokenizer.encode("a\u4e16")]
    assert pieces == ["a", "", "\u4e16"]


@pytest.mark.parametrize("kind", KINDS)
def test_what_follows_a_pile_of_tokens_may_change_its_end(kind):
    tokenizer, decoder = tokenizer_of(kind)
    ids = tokenizer.encode("hello \u4e16 , 'n '" * 100, add_special_tokens=False)
    for n in range(len(ids) - 40, len(ids)):
        detokenizer = Detokenizer(decoder)
        text = detokenizer.add(ids[:n]) + detokenizer.add(ids[n:]) + detokenizer.end()
        assert text == tokenizer.decode(ids)


@pytest.mark.parametrize("n_together", [1, 7])
def test_long_row_of_byte_tokens_is_given_out_before_it_ends(n_together):
    tokenizer, decoder = tokenizer_of("sentencepiece")
    text = "\U0001f600\u1005\u1019\u00fc" * 100
    ids = tokenizer.convert_tokens_to_ids([BYTE_TOKENS[b] for b in text.encode()])
    detokenizer, given_out = Detokenizer(decoder), ""
    for i in range(0, len(ids), n_together):
        given_out += detokenizer.add(ids[i : i + n_together])
        n_read = len(tokenizer.decode(ids[: i + n_together]).rstrip("\ufffd"))
        assert n_read - len(given_out) < 80
    assert given_out + detokenizer.end() == text


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("words", ["hello", " ", "\n", "hello , 'n '", "\u4e16"])
def test_cost_of_a_token_does_not_grow_with_the_answer(kind, words, monkeypatch):
    tokenizer, decoder = tokenizer_of(kind)
    ids = tokenizer.encode(words * 1000, add_special_tokens=False)[:1000]
    ids = (ids or [0]) * 4
    decode, n_decoded = decoder.decode_ids, 0

    def counting(some):
        nonlocal n_decoded
        n_decoded += len(some)
        return decode(some)

    monkeypatch.setattr(decoder, "decode_ids", counting)
    detokenizer, costs = Detokenizer(decoder), []
    for half in (ids[: len(ids) // 2], ids[len(ids) // 2 :]):
        n_decoded = 0
        for i in half:
            detokenizer.add([i])
        costs.append(n_decoded)
    assert costs[1] < 1.5 * costs[0] + 100


def test_time_to_find_what_may_change_does_not_grow_with_the_square_of_a_text():
    _, decoder = tokenizer_of("cleaned wordpiece")
    start = time.process_time()
    assert decoder.count_settled(" " * 20_000 + "a") == 20_001
    assert time.process_time() - start < 3


def test_tokens_that_have_piled_up_are_decoded_at_once(monkeypatch):
    tokenizer, decoder = tokenizer_of("byte level")
    n_calls, decode = 0, decoder.decode_ids

    def counting(ids):
        nonlocal n_calls
        n_calls += 1
        return decode(ids)

    monkeypatch.setattr(decoder, "decode_ids", counting)
    assert Detokenizer(decoder).add(tokenizer.encode("hello " * 500)) == "hello " * 500
    assert n_calls < 10


@pytest.mark.parametrize("kind", ["byte level", "sentencepiece", "metaspace"])
def test_answer_is_what_the_tokenizer_decodes_streamed_or_not(
    kind, start_server, tmp_path
):
    tokenizer, _ = tokenizer_of(kind)
    model = write_model(tmp_path / "model", tokenizer)
    ids = tokenizer.encode("  hello\n    x \U0001f600", add_special_tokens=False)
    ids += random.Random(0).choices(range(3, len(tokenizer) + 3), k=30)
    _, port = start_server("llama", "--model", str(model), plugin=saying(ids))
    body = dict(max_tokens=len(ids))
    text = complete(port, "a", **body)
    assert text == streamed_text(port, "a", **body) == tokenizer.decode(ids)


@pytest.mark.parametrize("argv", [[], ALONE])
def test_token_that_only_the_model_has_is_no_error(argv, start_server, tmp_path):
    tokenizer, _ = tokenizer_of("sentencepiece")
    model = write_model(tmp_path / "model", tokenizer)
    _, port = start_server("llama", "--model", str(model), *argv)
    body = dict(max_tokens=3, logit_bias={len(tokenizer): 1e4}, logprobs=2)
    assert complete(port, "a", **body) == ""
