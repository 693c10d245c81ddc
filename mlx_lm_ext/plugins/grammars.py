"""Compiles grammars for a model's tokenizer with llguidance, and keeps answers to them.

Rules:
1. llguidance is imported when a request needs it, and never before.
2. Whatever a client sends, it is compiled or refused within about a second: the size is
   limited, and what takes longer is given up.
3. llguidance recurses, and an overflow would end the process: grammars are compiled on
   threads with a deep stack.
4. A matcher says that it has failed only if it is asked.
"""

import json
import re
import threading
import time
from collections import OrderedDict
from typing import (
    TYPE_CHECKING,
    Any,
    Callable,
    Dict,
    List,
    Optional,
    Sequence,
    Tuple,
    cast,
)
from weakref import WeakKeyDictionary

import numpy as np

from ..errors import RequestError, one_line
from ..interfaces import Constraint, RequestInfo
from ..request.fields import check_depth

if TYPE_CHECKING:
    from llguidance import LLMatcher

# Bytes of a grammar, and lines of one that a client has written: rules that need each other
# make llguidance recurse.
MAX_BYTES = 256 << 10
MAX_LINES = 1000
# Properties of a schema. The time for those that an object need not have grows with their
# square.
MAX_PROPERTIES = 2000
# Seconds to compile a grammar, with the wait for others.
MAX_SECONDS = 1.0
MAX_COMPILING = 4
# Seconds for the first three masks of a grammar, which are microseconds as a rule.
MAX_START = 0.05
# With half of it, no grammar within these limits was seen to overflow.
STACK_BYTES = 128 << 20
TOO_COMPLEX = "it is too complex"
# Compiled grammars that are kept for each tokenizer.
MAX_KEPT = 64
# The slowest masks of hostile grammars then take some 10 ms, and a matcher some 20 MB.
LIMITS = dict(
    max_items_in_row=10_000,
    step_lexer_fuel=50_000,
    max_lexer_states=20_000,
    max_grammar_size=50_000,
    # The state of a matcher, which holds what the client has sent, is not for its error.
    verbose_errors=False,
)

compiling = threading.Semaphore(MAX_COMPILING)
stack_lock = threading.Lock()


class GrammarConstraint(Constraint):
    """The tokens that a grammar allows.

    Args:
        grammars (Grammars): What has compiled it.
        matcher (LLMatcher): A matcher of its own.
    """

    def __init__(self, grammars: "Grammars", matcher: "LLMatcher"):
        self.grammars = grammars
        self.matcher = matcher

    def copy(self) -> "GrammarConstraint":
        return GrammarConstraint(self.grammars, self.matcher.deep_copy())

    def advance(self, token: int) -> None:
        # A grammar that has ended takes nothing more, and the tokens that end a text may
        # follow.
        if not self.matcher.is_stopped():
            self.matcher.consume_token(token)
        self.check()

    def takes(self, text: bytes) -> bool:
        """Whether the answer may go on with a text."""
        tokens = self.grammars.tokens(text)
        # A copy, because it may fail.
        return bool(self.matcher.deep_copy().validate_tokens(tokens) == len(tokens))

    def check(self) -> None:
        """Raise a ``ValueError`` if the matcher has failed."""
        if self.matcher.is_error():
            raise ValueError(reason(self.matcher))

    def fill(self, mask: np.ndarray) -> None:
        self.fill_all([self], mask[None])

    @classmethod
    def fill_all(cls, constraints: Sequence[Constraint], masks: np.ndarray) -> None:
        rows = cast("Sequence[GrammarConstraint]", constraints)
        rows[0].grammars.fill([row.matcher for row in rows], masks)
        for row in rows:
            row.check()


class Grammars:
    """The grammars of a tokenizer.

    Args:
        tokenizer (TokenizerWrapper): The tokenizer, which is not kept.
        vocabulary_size (int): How many token ids the model has. The tokenizer may have more
          or fewer.

    Raises:
        ValueError: If llguidance cannot use the tokenizer.
    """

    def __init__(self, tokenizer: Any, vocabulary_size: int):
        from llguidance import LLExecutor, LLParserLimits, LLTokenizer

        backend = getattr(tokenizer, "backend_tokenizer", None)
        if backend is None:
            raise ValueError("it is not one of the tokenizers library")
        n_tokens = max(vocabulary_size, len(tokenizer))
        ends = sorted(i for i in tokenizer.eos_token_ids if i < n_tokens)
        if not ends:
            raise ValueError("it has no token that ends a text")
        self.vocabulary_size = vocabulary_size
        self.tokenizer = LLTokenizer(backend.to_str(), n_vocab=n_tokens, eos_token=ends)
        self.limits = LLParserLimits(**LIMITS)
        # Filling is a matter of microseconds.
        self.executor = LLExecutor(num_threads=1)
        # Whether texts begin with a space that is left out when they are decoded.
        ids = tokenizer.encode("a", add_special_tokens=False)
        self.hides_space = (
            self.text(ids)[:1] == b" " != tokenizer.decode(ids)[:1].encode()
        )
        # What ``running_on`` has found.
        self.tokens_after: Dict[bytes, Dict[int, List[Tuple[int, bytes]]]] = {}
        # Guards ``kept``.
        self.lock = threading.Lock()
        # The least recently used one is the first.
        self.kept: "OrderedDict[str, LLMatcher]" = OrderedDict()

    def text(self, tokens: Sequence[int]) -> bytes:
        """What tokens stand for."""
        return cast(bytes, self.tokenizer.decode_bytes(list(tokens)))

    def tokens(self, text: bytes) -> List[int]:
        """Tokens that stand for a text."""
        return cast(List[int], self.tokenizer.tokenize_bytes(text))

    def running_on(self, mark: bytes) -> Dict[int, List[Tuple[int, bytes]]]:
        """The tokens that end a mark and go on after it, and what of them stands after it: by
        how many bytes of the mark stand before them."""
        if mark not in self.tokens_after:
            found: Dict[int, List[Tuple[int, bytes]]] = {}
            for token in range(self.vocabulary_size):
                text = self.text([token])
                # Nearly no token comes further.
                for n in range(len(mark)) if mark[-1:] in text[:-1] else ():
                    _, end, rest = (mark[:n] + text).partition(mark)
                    if end and rest:
                        found.setdefault(n, []).append((token, rest))
            self.tokens_after[mark] = found
        return self.tokens_after[mark]

    def fill(self, matchers: Sequence["LLMatcher"], masks: np.ndarray) -> None:
        """Fill masks of shape (rows, ceil(vocabulary_size / 32)), one for each matcher."""
        from llguidance.numpy import fill_next_token_bitmask_par

        n_words = -(-self.tokenizer.vocab_size // 32)
        target = masks.view(np.int32)
        fits = masks.shape[1] == n_words and masks.flags.c_contiguous
        if not fits:
            target = np.empty((len(masks), n_words), np.int32)
        rows = [(matcher, i) for i, matcher in enumerate(matchers)]
        fill_next_token_bitmask_par(self.executor, rows, target)
        if not fits:
            masks[:] = target.view(np.uint32)[:, : masks.shape[1]]
        if n_rest := self.vocabulary_size % 32:
            masks[:, -1] &= np.uint32((1 << n_rest) - 1)

    def constrain(self, grammar: str, field: str) -> GrammarConstraint:
        """Compile a grammar, unless it is kept from an earlier request.

        Args:
            grammar (str): In llguidance's version of Lark, or its JSON with several grammars.
            field (str): The field of the request that it is made of.

        Raises:
            RequestError: A 400 if it is wrong or too large, a 503 if too many others are
              being compiled.
        """
        with self.lock:
            matcher = self.kept.pop(grammar, None)
            if matcher is not None:
                self.kept[grammar] = matcher
        if matcher is None:
            matcher = self.compile(grammar, field)
            with self.lock:
                self.kept[grammar] = matcher
                while len(self.kept) > MAX_KEPT:
                    self.kept.popitem(last=False)
        return GrammarConstraint(self, matcher.deep_copy())

    def check(self, grammar: str) -> str:
        """What is wrong with a grammar; empty if ``constrain`` can use it.

        Raises:
            RequestError: A 503 if too many others are being compiled.
        """
        try:
            self.constrain(grammar, "it")
        except RequestError as e:
            if e.status != 400:
                raise
            return str(e)
        return ""

    def check_start(self, matcher: "LLMatcher") -> str:
        """Why a new matcher cannot be used; empty if it can. Some grammars fail, or are slow,
        as late as at the first mask, after a leading space, or within an object."""
        tried, begin = matcher.deep_copy(), time.thread_time()
        for text in (b"", b" ", b"{"):
            tokens = self.tokens(text)
            if tried.validate_tokens(tokens) == len(tokens):
                tried.try_consume_tokens(tokens)
            if not tried.is_stopped():
                tried.compute_bitmask()
            if tried.is_error():
                return reason(tried)
        return "it is too slow" if time.thread_time() - begin > MAX_START else ""

    def compile(self, grammar: str, field: str) -> "LLMatcher":
        """Compile a grammar on a thread of its own, which is left alone if it takes too
        long."""
        check_bytes(field, grammar)
        slots = compiling
        if not slots.acquire(timeout=MAX_SECONDS):
            raise RequestError(503, "too many grammars are being compiled")
        # The matcher, and why it cannot be used.
        made: List[Tuple["LLMatcher", str]] = []

        def run() -> None:
            from llguidance import LLMatcher

            try:
                matcher = LLMatcher(
                    self.tokenizer, grammar, log_level=0, limits=self.limits
                )
                made.append((matcher, self.check_start(matcher)))
            finally:
                slots.release()

        try:
            thread = start_with_stack(run)
        except RuntimeError:
            slots.release()
            raise RequestError(503, "there is no memory to compile a grammar")
        thread.join(MAX_SECONDS)
        if not made and not thread.is_alive():
            # It has raised something.
            raise RequestError(400, f"{field} cannot be used: {TOO_COMPLEX}", field)
        if not made:
            message = f"{field} takes longer than {MAX_SECONDS:g} s to compile"
            raise RequestError(400, f"{message}; make it simpler", field)
        matcher, wrong = made[0]
        if wrong:
            raise RequestError(400, f"{field} cannot be used: {wrong}", field)
        return matcher


def start_with_stack(run: Callable[[], None]) -> threading.Thread:
    """Start a thread with a deep stack.

    Raises:
        RuntimeError: If there is no memory for it.
    """
    thread = threading.Thread(target=run, name="grammar", daemon=True)
    with stack_lock:
        # It is that of all threads that start meanwhile, which does no harm: the memory is
        # not used before it is needed.
        usual = threading.stack_size(STACK_BYTES)
        try:
            thread.start()
        finally:
            threading.stack_size(usual)
    return thread


def reason(matcher: "LLMatcher") -> str:
    """Why a matcher has failed, in one line."""
    text: str = matcher.get_error()
    if "panic" in text:
        return TOO_COMPLEX
    if text.startswith("NoExtension"):
        return "nothing fits it"
    # What follows is the state of the matcher, or an option that no client can set.
    return one_line(ValueError(re.split(r"\n<|\. Enable ", text)[0]))


def check_bytes(field: str, grammar: str) -> None:
    """Refuse a grammar that is too long."""
    n = len(grammar.encode())
    if n > MAX_BYTES:
        message = f"{field} may make a grammar of {MAX_BYTES} bytes at most, not {n}"
        raise RequestError(400, message, field)


def check_schema(field: str, schema: Dict[str, Any]) -> None:
    """Refuse a schema that is nested too deeply, or has too many properties."""
    check_depth(field, schema)
    n_properties, parts = 0, [cast(Any, schema)]
    for part in parts:
        if isinstance(part, dict):
            properties = part.get("properties")
            n_properties += len(properties) if isinstance(properties, dict) else 0
            part = part.values()
        # They are looked at in their turn.
        parts += [value for value in part if isinstance(value, (dict, list))]
    if n_properties > MAX_PROPERTIES:
        message = f"{field} may have {MAX_PROPERTIES} properties, not {n_properties}"
        raise RequestError(400, message, field)


tokenizers: "WeakKeyDictionary[Any, Dict[int, Grammars]]" = WeakKeyDictionary()
tokenizers_lock = threading.Lock()


def grammars_of(request: RequestInfo, tokenizer: Any, field: str) -> Grammars:
    """The grammars of a tokenizer, made once.

    Raises:
        RequestError: If llguidance is not installed, or cannot use the tokenizer.
    """
    try:
        import llguidance  # noqa: F401
    except ImportError:
        message = f'{field} needs pip install "mlx-lm-ext[structured]" on the server'
        raise RequestError(400, message, field, "unsupported_value")
    size = request.vocabulary_size
    with tokenizers_lock:
        sizes = tokenizers.setdefault(tokenizer, {})
        if size not in sizes:
            try:
                sizes[size] = Grammars(tokenizer, size)
            except Exception as e:
                message = f"{field} cannot be used with this model's tokenizer: "
                raise RequestError(400, message + one_line(e), field)
        return sizes[size]


def compose(grammar: str, answer: Optional[Dict[str, Any]]) -> str:
    """One grammar within another.

    Args:
        grammar (str): A grammar in Lark that may say ``@answer`` where the other one stands.
        answer (Optional[Dict]): The other one: its ``lark_grammar`` or ``json_schema``.
    """
    if answer is None:
        return grammar
    parts = [{"lark_grammar": grammar}, {"name": "answer", **answer}]
    return json.dumps({"grammars": parts})
