"""The bytes that each token of a vocabulary adds to a text."""

from typing import Dict, Optional, Tuple

from transformers.convert_slow_tokenizer import bytes_to_unicode

from .detokenizing import Decoder

# The characters with which byte-level vocabularies write bytes.
BYTES = {character: byte for byte, character in bytes_to_unicode().items()}


class TokenBytes:
    """Finds the bytes of tokens, each once. Shared by all threads.

    Args:
        decoder (Decoder): That of the model's tokenizer.
    """

    def __init__(self, decoder: Decoder):
        self.decoder = decoder
        self.before = decoder.encode("a")[-1:]
        self.text_before = decoder.decode(self.before)
        self.found: Dict[Tuple[int, bool], Optional[bytes]] = {}

    def get(self, token: int, is_first: bool = False) -> Optional[bytes]:
        """The bytes of a token.

        Args:
            token (int): Its id.
            is_first (bool): Whether it is the first of a text: some lose a space there.

        Returns:
            Its bytes, which may be a part of a character. None if they are not known.
        """
        key = token, is_first
        if key not in self.found:
            self.found[key] = self.find(token, is_first)
        return self.found[key]

    def find(self, token: int, is_first: bool) -> Optional[bytes]:
        if is_first:
            text = self.decoder.decode([token])
            return self.get(token) if "\ufffd" in text else text.encode()
        if token in self.decoder.bytes:
            return self.decoder.bytes[token]
        text = self.text(token)
        if "\ufffd" not in text:
            return text.encode()
        # A part of a character, or U+FFFD itself.
        (name,) = self.decoder.tokenizer.convert_ids_to_tokens([token])
        if isinstance(name, bytes):
            return name
        if "\ufffd" in name:
            return text.encode()
        if not BYTES.keys() >= set(name):
            return None
        raw = bytes(BYTES[character] for character in name)
        return raw if raw.decode(errors="replace") == text else None

    def text(self, token: int) -> str:
        """What a token adds to a text that has begun."""
        text = self.decoder.decode([*self.before, token])
        if text.startswith(self.text_before):
            return text[len(self.text_before) :]
        return self.decoder.decode([token])

    def name(self, token: int, is_first: bool = False) -> str:
        """The text of a token; as OpenAI writes it, if it has a part of a character."""
        raw = self.get(token, is_first)
        if raw is None:
            return self.text(token)
        try:
            return raw.decode()
        except UnicodeDecodeError:
            return "bytes:" + raw.decode(errors="backslashreplace")
