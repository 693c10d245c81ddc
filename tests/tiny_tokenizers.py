"""Tiny tokenizers: one of each kind of decoder that matters here."""

import re
from pathlib import Path

from mlx.utils import tree_flatten
from mlx_lm.tokenizer_utils import NewlineTokenizer, TokenizerWrapper
from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers
from transformers import PreTrainedTokenizer, PreTrainedTokenizerFast
from transformers.convert_slow_tokenizer import bytes_to_unicode

from mlx_lm_ext.bench.random_model import LLAMA, make_model, save

SPECIAL = ["<unk>", "<s>", "</s>", "<|im_start|>"]
BYTE_TOKENS = [f"<0x{byte:02X}>" for byte in range(256)]
PIECES = "▁ ▁▁ ▁▁▁▁ ▁hello hello ▁x é 世 . , \n ▁. ' n n't s < > <n>".split(" ")
PIECES += "abehlotx"
WORDS = "hello ##ing world a ##b . , ' s n t n't 's m do not".split()
LETTERS = ["a", "b", "a</w>", "b</w>", ".</w>"]
CHARACTERS = bytes_to_unicode()
SPOKEN = ["<pad>", *"helo|.'"]


def fast(tokenizer, cls=PreTrainedTokenizerFast, **kwargs):
    return TokenizerWrapper(cls(tokenizer_object=tokenizer, **kwargs))


def ids_of(tokens):
    return {token: i for i, token in enumerate(dict.fromkeys(tokens))}


def byte_level(pre_tokenizer=None):
    """Tokens end within characters: "世" is two, "😀" is three."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    merges = [("ä", "¸"), ("ð", "Ł"), ("Ġ", "t"), ("Ġt", "h"), ("Ġ", "Ġ"), ("ĺ", "Ģ")]
    tokens = [*SPECIAL, *alphabet, *map("".join, merges)]
    tokenizer = Tokenizer(models.BPE(ids_of(tokens), merges))
    tokenizer.pre_tokenizer = pre_tokenizer or pre_tokenizers.ByteLevel(
        add_prefix_space=False
    )
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_special_tokens(SPECIAL)
    tokenizer.add_tokens(["<tool call>", "\u4e00"])
    return tokenizer


def tekken():
    """As Mistral's: the text is split before the bytes."""
    split = pre_tokenizers.Split(r"\s", "isolated")
    bytes_ = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    return byte_level(pre_tokenizers.Sequence([split, bytes_]))


def sentence_piece(decoder):
    tokens = [*SPECIAL, *BYTE_TOKENS, *PIECES]
    tokenizer = Tokenizer(
        models.BPE(ids_of(tokens), [], unk_token="<unk>", byte_fallback=True)
    )
    tokenizer.normalizer = normalizers.Sequence(
        [normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")]
    )
    tokenizer.decoder = decoder
    tokenizer.add_special_tokens(SPECIAL)
    return tokenizer


def words(decoder, **kwargs):
    tokenizer = Tokenizer(
        models.WordPiece(ids_of(["[UNK]", *WORDS]), unk_token="[UNK]")
    )
    tokenizer.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    if decoder is not None:
        tokenizer.decoder = decoder
    return fast(tokenizer, **kwargs)


def parts(model, decoder):
    tokenizer = Tokenizer(model)
    tokenizer.decoder = decoder
    return fast(tokenizer)


class OwnTokenizer(PreTrainedTokenizer):
    """As those on tiktoken: ``decode`` is its own, and raises for ids that it lacks."""

    tokens = [
        *(bytes([byte]) for byte in range(256)),
        b" the",
        b"\xe4\xb8",
        b"\x98\x80",
    ]

    @property
    def vocab_size(self):
        return len(self.tokens)

    def get_vocab(self):
        return {self._convert_id_to_token(i): i for i in range(self.vocab_size)}

    def _tokenize(self, text, **kwargs):
        return [CHARACTERS[byte] for byte in text.encode()]

    def _convert_token_to_id(self, token):
        return self.get_vocab()[token]

    def _convert_id_to_token(self, index):
        return "".join(map(CHARACTERS.get, self.tokens[index]))

    def decode(self, token_ids, **kwargs):
        raw = b"".join(self.tokens[i] for i in token_ids)
        return raw.decode("utf-8", errors="replace")


class StrippingTokenizer(OwnTokenizer):
    def decode(self, token_ids, **kwargs):
        return super().decode(token_ids).strip()


class ByteTokenizer(OwnTokenizer):
    """Makes U+FFFD of each byte that is no part of a character."""

    def decode(self, token_ids, **kwargs):
        raw = b"".join(self.tokens[i] for i in token_ids)
        text = raw.decode("utf-8", errors="surrogateescape")
        return re.sub("[\udc80-\udcff]", "\ufffd", text)


STEPS = [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse()]
STRIP = decoders.Strip(" ", 1, 0)
KINDS = {
    "byte level": lambda: fast(byte_level()),
    "tekken": lambda: fast(tekken()),
    "metaspace": lambda: fast(sentence_piece(decoders.Metaspace())),
    "sentencepiece": lambda: fast(sentence_piece(decoders.Sequence([*STEPS, STRIP]))),
    "sentencepiece without strip": lambda: fast(
        sentence_piece(decoders.Sequence(STEPS))
    ),
    "odd sequence": lambda: fast(
        sentence_piece(decoders.Sequence([decoders.Strip("_", 1, 1), *STEPS, STRIP]))
    ),
    "newline": lambda: fast(
        sentence_piece(decoders.Sequence([*STEPS, STRIP])), NewlineTokenizer
    ),
    "wordpiece": lambda: words(decoders.WordPiece()),
    "cleaned wordpiece": lambda: words(
        decoders.WordPiece(cleanup=False), clean_up_tokenization_spaces=True
    ),
    "no decoder": lambda: words(None),
    "suffix": lambda: parts(models.BPE(ids_of(LETTERS), []), decoders.BPEDecoder()),
    "ctc": lambda: parts(models.WordLevel(ids_of(SPOKEN), "<pad>"), decoders.CTC()),
    "own": lambda: TokenizerWrapper(OwnTokenizer()),
    "own that strips": lambda: TokenizerWrapper(StrippingTokenizer()),
    "own of bytes": lambda: TokenizerWrapper(ByteTokenizer()),
}


def write_model(folder: Path, tokenizer: TokenizerWrapper, padding: int = 8) -> Path:
    """Write a random model with a fast tokenizer, and with ids that this does not have."""
    config = LLAMA | dict(vocab_size=len(tokenizer) + padding, eos_token_id=2)
    model = make_model("llama", config, 0)
    save(folder, dict(tree_flatten(model.parameters())), config)
    tokenizer.save_pretrained(folder)
    return folder
