"""The fields of a request body: types, ranges, and what is not supported.

Rules:
1. A field that is invalid, or that OpenAI's API has and this server does not support, gives
   a 400 that names it. Unknown fields are ignored.
2. A field that is absent or null has the default of the command line.
3. What clients of other servers send for "none" is replaced here. Nothing else has to know
   these values, plugins included.
"""

import argparse
import re
from dataclasses import dataclass
from inspect import signature
from typing import (
    Any,
    Collection,
    Dict,
    FrozenSet,
    Iterator,
    List,
    NamedTuple,
    Optional,
    Tuple,
)

from mlx_lm.server import (
    GenerationArguments,
    LogitsProcessorArguments,
    ModelDescription,
    SamplingArguments,
)
from transformers import PreTrainedTokenizerBase

from ..errors import RequestError
from .images import MAX_IMAGES
from .json_text import load_json
from .other_fields import check_other_fields

TYPE_NAMES = {
    bool: "a boolean",
    int: "an integer",
    float: "a number",
    str: "a string",
    list: "an array",
    dict: "an object",
}


@dataclass(frozen=True)
class Field:
    """The type of a field, and the range of its value or, for a text, of its length."""

    kind: type
    minimum: float = -1e9
    maximum: float = 1e9


# Answers that one request may ask for.
MAX_ANSWERS = 128

# A name, with as many characters as a path may have.
NAME = Field(str, 0, 4096)

FIELDS = {
    "model": NAME,
    "adapters": NAME,
    "draft_model": NAME,
    "num_draft_tokens": Field(int, 1),
    "stream": Field(bool),
    "stream_options": Field(dict),
    # Clients send the largest integer of some type for "no limit".
    "max_tokens": Field(int, 0, 2**64 - 1),
    "max_completion_tokens": Field(int, 1, 2**64 - 1),
    "temperature": Field(float, 0),
    "top_p": Field(float, 0, 1),
    "top_k": Field(int, 0, 2**63 - 1),
    "min_p": Field(float, 0, 1),
    "xtc_probability": Field(float, 0, 1),
    "xtc_threshold": Field(float, 0, 0.5),
    "repetition_penalty": Field(float, 0),
    "repetition_context_size": Field(int, 0),
    "presence_penalty": Field(float),
    "presence_context_size": Field(int, 0),
    "frequency_penalty": Field(float),
    "frequency_context_size": Field(int, 0),
    "logit_bias": Field(dict),
    "top_logprobs": Field(int, 0, 20),
    "seed": Field(int, -(2**63), 2**64 - 1),
    "n": Field(int, 1, MAX_ANSWERS),
    "best_of": Field(int, 1, MAX_ANSWERS),
    "response_format": Field(dict),
    "structured_outputs": Field(dict),
    "tools": Field(list),
    "parallel_tool_calls": Field(bool),
    "chat_template_kwargs": Field(dict),
    "add_generation_prompt": Field(bool),
    "continue_final_message": Field(bool),
    "enable_thinking": Field(bool),
    "reasoning_effort": Field(str, 0, 64),
    "role_mapping": Field(dict),
    "echo": Field(bool),
    "suffix": Field(str),
    "user": NAME,
    "priority": Field(int, -(2**31), 2**31 - 1),
    "sampler": NAME,
    "cache_salt": NAME,
    # As in vLLM.
    "min_tokens": Field(int, 0, 2**63 - 1),
    "ignore_eos": Field(bool),
    "stop_token_ids": Field(list),
    "include_stop_str_in_output": Field(bool),
    "skip_special_tokens": Field(bool),
    "add_special_tokens": Field(bool),
}

# The values that mean none in vLLM, SGLang, llama.cpp, Ollama and LM Studio, or that
# clients send for an empty object or array, and the one to use instead. None stands for a
# field that is absent.
UNSET: Dict[str, Tuple[List[Any], Any]] = {
    "max_tokens": ([-1], None),
    "max_completion_tokens": ([-1], None),
    "top_k": ([-1], 0),
    "seed": ([-1], None),
    "repetition_penalty": ([1], 0),
    "repetition_context_size": ([-1], 0),
    "presence_context_size": ([-1], 0),
    "frequency_context_size": ([-1], 0),
    "stop": (["", [], {}], None),
    "logit_bias": ([{}, []], None),
}
# Below these only the most likely token can be chosen. Clients send such values because
# some servers refuse 0, and mlx-lm takes a top_p of 0 for 1.
LEAST_TEMPERATURE = 1e-5
LEAST_TOP_P = 1e-6

# Characters of a stop word: the time to find it can grow with their square.
MAX_STOP_WORD = 1000
MAX_STOP_WORDS = 128
MAX_MESSAGES = 10_000
MAX_TOOLS = 1024
TOOL_MODES = ("none", "auto", "required")
MAX_BIASES = 10_000
# Characters of each text of a role mapping, which is repeated for every message.
MAX_ROLE_TEXT = 1000
MAX_CHOICES = 10_000
# Most tokens of an answer with a format, or of a forced call, if neither the request nor the
# operator says: one that is cut off is of no use.
MAX_FORMATTED = 32_768
# Objects and arrays in each other, of which llguidance takes 128, and chat templates a few
# hundred.
MAX_DEPTH = 100
# Objects and arrays of a body: no other thread runs while they are made.
MAX_NESTED = 500_000

# Arguments of the tokenizer itself, which are passed together with the variables of the
# chat template. Clients must not set them: some are code, some change what is done.
TOKENIZER_ARGUMENTS = {
    name
    for function in (
        PreTrainedTokenizerBase.apply_chat_template,
        PreTrainedTokenizerBase.__call__,
        PreTrainedTokenizerBase.encode,
    )
    for name in signature(function).parameters
}
TOKENIZER_ARGUMENTS -= {"add_generation_prompt", "continue_final_message"}
TOKENIZER_ARGUMENTS |= {"messages", *PreTrainedTokenizerBase.SPECIAL_TOKENS_ATTRIBUTES}

TOKEN_ID = re.compile(r"-?[0-9]{1,10}")

# The kinds of vLLM's ``structured_outputs``, and the fields in which its older versions have
# them.
KINDS = ("json", "regex", "choice", "grammar")
GUIDED = {f"guided_{kind}": kind for kind in KINDS}
# The fields that can say what an answer must be like.
FORMAT_FIELDS = {"response_format", "structured_outputs", *GUIDED}
ANY_OBJECT = {"type": "object"}


class AnswerFormat(NamedTuple):
    """What an answer must be like.

    Args:
        field (str): The field that says so.
        kind (str): One of ``KINDS``.
        value (Any): The JSON schema, the regular expression, the texts to choose from, or the
          grammar.
    """

    field: str
    kind: str
    value: Any


def check_size(raw: bytes, limit: int) -> None:
    """Check the size of a body whose images may be large.

    Args:
        raw (bytes): The body.
        limit (int): Bytes that it may have, without its data URLs.

    Raises:
        RequestError: A 413 if it has more.
    """
    n, end = len(raw), 0
    for _ in range(MAX_IMAGES if n > limit else 0):
        start = raw.find(b'"data:', end)
        end = raw.find(b'"', start + 1)
        if start < 0 or end < 0:
            break
        n -= end - start
    if n > limit:
        message = f"the body may have {limit} bytes at most, without its images"
        raise RequestError(413, message)


def parse_object(raw: bytes) -> Dict[str, Any]:
    """Parse a body that has to be a JSON object.

    Raises:
        RequestError: If it is none.
    """
    if raw.count(b"[") + raw.count(b"{") > MAX_NESTED:
        message = f"the body may have {MAX_NESTED} objects and arrays at most"
        raise RequestError(400, message)
    try:
        body = load_json(raw)
    except (ValueError, RecursionError) as e:
        raise RequestError(400, f"the body is not JSON: {e}")
    if not isinstance(body, dict):
        raise RequestError(400, "the body must be a JSON object")
    return body


def parse_body(raw: bytes) -> Dict[str, Any]:
    """Parse a request's body and check each field that it holds.

    Returns:
        The body without its null fields.

    Raises:
        RequestError: If it is not a JSON object, or a field is wrong.
    """
    body = parse_object(raw)
    body = {name: value for name, value in body.items() if value is not None}
    for name in ("model", "adapters", "draft_model"):
        # Some clients send an empty name instead of none.
        if body.get(name) == "":
            del body[name]
    check_fields(body)
    check_other_fields(body)
    check_supported(body)
    return body


def check_fields(body: Dict[str, Any]) -> None:
    """Check the fields of ``FIELDS``, and replace values that stand for others in place.

    Raises:
        RequestError: If one is wrong.
    """
    for name, (values, value) in UNSET.items():
        # In Python, true is equal to 1.
        if body.get(name) in values and body[name] is not True:
            body[name] = value
            if value is None:
                del body[name]
    for name, field in FIELDS.items():
        if name in body:
            if field.kind is int:
                body[name] = as_integer(body[name])
            check_field(name, body[name], field)


def as_integer(value: Any) -> Any:
    """An integer instead of an integral float: in some languages all numbers are floats.
    Other values as they are."""
    if isinstance(value, float) and value.is_integer() and abs(value) <= 2**53:
        return int(value)
    return value


def check_type(name: str, value: Any, kind: type) -> None:
    """Refuse a value of another JSON type. An integer is also a number. A boolean is
    neither, although Python's ``bool`` is an ``int``."""
    kinds = (int, float) if kind is float else kind
    if not isinstance(value, kinds) or (kind is not bool and isinstance(value, bool)):
        raise RequestError(400, f"{name} must be {TYPE_NAMES[kind]}", name)


def check_choice(name: str, value: Any, choices: Collection[str]) -> None:
    """Refuse a value that is not one of the choices."""
    if value not in choices:
        raise RequestError(400, f"{name} must be one of {', '.join(choices)}", name)


def check_field(name: str, value: Any, field: Field) -> None:
    """Refuse a value of another type, or out of the range of the field."""
    check_type(name, value, field.kind)
    low, high = field.minimum, field.maximum
    if field.kind is str and len(value) > high:
        message = f"{name} may have {high:.0f} characters at most"
        raise RequestError(400, message, name)
    if field.kind not in (int, float):
        return
    # Not ``value < low or ...``: NaN must fail too.
    if not low <= value <= high:
        limits = f"between {low:g} and {high:g}"
        if value < low and high >= Field.maximum:
            limits = f"at least {low:g}"
        raise RequestError(400, f"{name} must be {limits}", name)


def check_supported(body: Dict[str, Any]) -> None:
    """Refuse features of OpenAI's API that this server does not have."""
    parse_answer_format(body)
    supported = {
        "best_of": (
            n_candidates(body) >= body.get("n", 1),
            "must be at least n",
        ),
        "stream": (
            not (body.get("stream") and n_candidates(body) > body.get("n", 1)),
            "must be false if best_of is more than n",
        ),
        "suffix": (
            not (body.get("suffix") and body.get("echo")),
            "must be empty with echo",
        ),
        "functions": (not body.get("functions"), "must be empty; use tools"),
        "audio": (not body.get("audio"), "must be empty"),
        "modalities": (
            body.get("modalities", ["text"]) == ["text"],
            'must be ["text"]',
        ),
    }
    for name, (is_supported, right) in supported.items():
        if not is_supported:
            message = f"{name} {right}: no other value is supported"
            raise RequestError(400, message, name, "unsupported_value")
    if body.get("max_tokens") == 0 and not body.get("echo"):
        message = "max_tokens must be at least 1, or 0 with echo"
        raise RequestError(400, message, "max_tokens")
    usage = body.get("stream_options", {}).get("include_usage")
    if usage is not None:
        check_type("stream_options.include_usage", usage, bool)
    for name in body.get("chat_template_kwargs", {}):
        if name in TOKENIZER_ARGUMENTS or name.startswith("_"):
            name = f"chat_template_kwargs.{name[:100]}"
            message = f"{name} is not a variable of a chat template"
            raise RequestError(400, message, name, "unsupported_value")
    for role, text in body.get("role_mapping", {}).items():
        check_field(f"role_mapping.{role[:100]}", text, Field(str, 0, MAX_ROLE_TEXT))


def n_candidates(body: Dict[str, Any]) -> int:
    """How many answers are made to each prompt, of which the best ``n`` are given."""
    n: int = body.get("best_of", body.get("n", 1))
    return n


def check_required(body: Dict[str, Any], name: str) -> None:
    """Refuse a body that lacks a field."""
    if name not in body:
        raise RequestError(400, f"{name} is required", name)


def check_count(name: str, n: int, limit: int) -> None:
    """Refuse more of something than ``limit``."""
    if n > limit:
        raise RequestError(400, f"{name} may have {limit} at most, not {n}", name)


def check_depth(name: str, value: Any) -> None:
    """Refuse a value with too many objects and arrays in each other."""
    level: List[Any] = [[value]]
    for _ in range(MAX_DEPTH + 1):
        level = [
            part
            for whole in level
            for part in (whole.values() if isinstance(whole, dict) else whole)
            if isinstance(part, (dict, list))
        ]
        if not level:
            return
    message = f"{name} may have {MAX_DEPTH} objects and arrays in each other"
    raise RequestError(400, message, name)


def parse_tools(body: Dict[str, Any]) -> Optional[List[Dict[str, Any]]]:
    """Check the tools, and return those that the model may call."""
    tools = body.get("tools") or []
    check_count("tools", len(tools), MAX_TOOLS)
    seen: Dict[str, Any] = {}
    for i, tool in enumerate(tools):
        check_type(f"tools[{i}]", tool, dict)
        name, function = f"tools[{i}].function", tool.get("function")
        check_type(name, function, dict)
        check_type(f"{name}.name", function.get("name"), str)
        if not function["name"]:
            raise RequestError(400, f"{name}.name must not be empty", f"{name}.name")
        if function.get("parameters") is not None:
            check_type(f"{name}.parameters", function["parameters"], dict)
        if function.get("strict") is not None:
            check_type(f"{name}.strict", function["strict"], bool)
        for key, value in function.items():
            check_depth(f"{name}.{key[:100]}", value)
        if seen.setdefault(function["name"], function) != function:
            message = f"{name}.name is that of another tool"
            raise RequestError(400, message, f"{name}.name")
    # All stay in the prompt, whichever may be called: so its start is the same.
    return None if parse_tool_choice(body).mode == "none" else tools or None


class ToolChoice(NamedTuple):
    """Which calls the answer to a chat may have.

    Args:
        mode (str): "none", "auto", or "required" if it has to have one.
        names (Optional[FrozenSet[str]]): The functions that may be called, if not all.
        is_named (bool): Whether it has to be one call of a single function.
    """

    mode: str
    names: Optional[FrozenSet[str]] = None
    is_named: bool = False

    def allows(self, name: str) -> bool:
        return self.names is None or name in self.names


def parse_tool_choice(body: Dict[str, Any]) -> ToolChoice:
    """Check which tools may or have to be called, and return it.

    Args:
        body (Dict[str, Any]): The body of a chat whose ``tools`` have been checked.
    """
    name, choice = "tool_choice", body.get("tool_choice", "auto")
    if isinstance(choice, str):
        check_choice(name, choice, TOOL_MODES)
        made = ToolChoice(choice)
    else:
        check_type(name, choice, dict)
        name = f"{name}.type"
        check_choice(name, choice.get("type"), ("function", "allowed_tools"))
        if choice["type"] == "function":
            wanted = frozenset([parse_function("tool_choice", choice)])
            made = ToolChoice("required", wanted, is_named=True)
        else:
            made = parse_allowed_tools(choice)
    names = {tool["function"]["name"] for tool in body.get("tools") or []}
    if made.mode == "required" and not names:
        raise RequestError(400, "tool_choice needs tools", "tool_choice")
    for wanted_name in made.names or ():
        if wanted_name not in names:
            message = f"tool_choice names {wanted_name[:100]!r}, which no tool has"
            raise RequestError(400, message, "tool_choice")
    return made


def parse_allowed_tools(choice: Dict[str, Any]) -> ToolChoice:
    name = "tool_choice.allowed_tools"
    allowed: Any = choice.get("allowed_tools")
    check_type(name, allowed, dict)
    check_choice(f"{name}.mode", allowed.get("mode"), ("auto", "required"))
    tools: Any = allowed.get("tools")
    check_type(f"{name}.tools", tools, list)
    check_count(f"{name}.tools", len(tools), MAX_TOOLS)
    if not tools:
        message = f"{name}.tools must not be empty"
        raise RequestError(400, message, f"{name}.tools")
    names = (parse_function(f"{name}.tools[{i}]", t) for i, t in enumerate(tools))
    return ToolChoice(allowed["mode"], frozenset(names))


def parse_function(name: str, tool: Any) -> str:
    """The name of the function that a choice has."""
    check_type(name, tool, dict)
    check_choice(f"{name}.type", tool.get("type", "function"), ("function",))
    check_type(f"{name}.function", tool.get("function"), dict)
    check_type(f"{name}.function.name", tool["function"].get("name"), str)
    found: str = tool["function"]["name"]
    return found


def parse_prompts(body: Dict[str, Any]) -> List[Any]:
    """Check the prompts of a text completion, and return them: texts or token ids."""
    check_required(body, "prompt")
    prompts: Any = body["prompt"]
    if is_prompt(prompts):
        prompts = [prompts]
    if not isinstance(prompts, list) or not all(map(is_prompt, prompts)):
        message = (
            "prompt must be a string, an array of token ids, or an array of either"
        )
        raise RequestError(400, message, "prompt")
    if not all(prompts):
        raise RequestError(400, "prompt must not be empty", "prompt")
    if len(prompts) * n_candidates(body) > MAX_ANSWERS:
        message = f"prompt and n or best_of may ask for {MAX_ANSWERS} answers at most"
        raise RequestError(400, message, "prompt")
    return list(prompts)


def is_prompt(value: Any) -> bool:
    """Whether it is a text or an array of integers."""
    if isinstance(value, list):
        return all(type(token) is int for token in value)
    return isinstance(value, str)


def parse_stop(body: Dict[str, Any]) -> List[str]:
    """Check the stop words, and return them as a list."""
    stop = body.get("stop", [])
    words = stop if isinstance(stop, list) else [stop]
    words = [word for word in words if word not in ("", None)]
    if not all(isinstance(word, str) for word in words):
        raise RequestError(400, "stop must be a string or an array of strings", "stop")
    check_count("stop", len(words), MAX_STOP_WORDS)
    if any(len(word) > MAX_STOP_WORD for word in words):
        message = f"stop words may have {MAX_STOP_WORD} characters at most"
        raise RequestError(400, message, "stop")
    return words


def parse_answer_format(body: Dict[str, Any]) -> Optional[AnswerFormat]:
    """Check the fields that say what an answer must be like, and return what they say."""
    if body.keys().isdisjoint(FORMAT_FIELDS):
        return None
    found = [
        *response_format(body.get("response_format", {})),
        *structured_outputs(body.get("structured_outputs", {})),
        *(
            guided_format(name, kind, body[name])
            for name, kind in GUIDED.items()
            if name in body
        ),
    ]
    if len(found) > 1:
        both = f"{found[0].field} and {found[1].field}"
        message = f"{both} exclude each other: an answer has one format"
        raise RequestError(400, message, found[1].field)
    return found[0] if found else None


def restricting_field(body: Dict[str, Any]) -> Optional[str]:
    """The field that says what the answer must be, if one does: its format, or that it is a
    tool call.

    Args:
        body (Dict[str, Any]): The body; that of a chat checked by ``parse_tools``.
    """
    form = parse_answer_format(body)
    if form is not None:
        return form.field
    if "messages" in body and parse_tool_choice(body).mode == "required":
        return "tool_choice"
    return None


def response_format(form: Dict[str, Any]) -> Iterator[AnswerFormat]:
    """What OpenAI's field says. Other servers take the schema of either type right in it."""
    name, kind = "response_format", form.get("type", "text")
    check_choice(f"{name}.type", kind, ("text", "json_object", "json_schema"))
    if kind == "text":
        return
    if kind == "json_schema" and form.get("schema") is None:
        name, form = f"{name}.json_schema", form.get("json_schema", {})
        check_type(name, form, dict)
        for key, of in (("name", str), ("description", str), ("strict", bool)):
            if form.get(key) is not None:
                check_type(f"{name}.{key}", form[key], of)
    if form.get("schema") is None:
        yield AnswerFormat(name, "json", ANY_OBJECT)
    else:
        check_type(f"{name}.schema", form["schema"], dict)
        yield AnswerFormat(f"{name}.schema", "json", form["schema"])


def structured_outputs(options: Dict[str, Any]) -> Iterator[AnswerFormat]:
    """What vLLM's field says."""
    for key, value in options.items():
        name = f"structured_outputs.{key[:100]}"
        if value is None:
            continue
        if key in KINDS:
            yield guided_format(name, key, value)
        elif key == "json_object":
            check_type(name, value, bool)
            if value:
                yield AnswerFormat(name, "json", ANY_OBJECT)
        elif value is not False:
            message = f"{name} is not supported: use one of {', '.join(KINDS)}"
            raise RequestError(400, message, name, "unsupported_value")


def guided_format(name: str, kind: str, value: Any) -> AnswerFormat:
    """Check the value of a kind."""
    if kind == "json":
        if isinstance(value, str):
            try:
                value = load_json(value)
            except (ValueError, RecursionError) as e:
                raise RequestError(400, f"{name} is not JSON: {e}", name)
        if not isinstance(value, dict):
            message = f"{name} must be a JSON schema: an object, or the JSON of one"
            raise RequestError(400, message, name)
    else:
        check_type(name, value, list if kind == "choice" else str)
        if not value:
            raise RequestError(400, f"{name} must not be empty", name)
    if kind == "choice":
        check_count(name, len(value), MAX_CHOICES)
        for i, text in enumerate(value):
            check_type(f"{name}[{i}]", text, str)
    return AnswerFormat(name, kind, value)


def check_ends(body: Dict[str, Any], max_tokens: int) -> None:
    """Check what else says where an answer may end.

    Args:
        body (Dict[str, Any]): The body.
        max_tokens (int): The most tokens that an answer may have.
    """
    if body.get("min_tokens", 0) > max_tokens:
        message = f"min_tokens must be at most max_tokens, which is {max_tokens}"
        raise RequestError(400, message, "min_tokens")
    ids = body.get("stop_token_ids", [])
    check_count("stop_token_ids", len(ids), MAX_STOP_WORDS)
    ids[:] = map(as_integer, ids)
    for i, token in enumerate(ids):
        check_type(f"stop_token_ids[{i}]", token, int)


def parse_logprobs(body: Dict[str, Any]) -> Tuple[bool, int]:
    """Whether log probabilities are wanted, and for how many of the likeliest tokens.

    A chat request has ``logprobs`` (bool) and ``top_logprobs`` (int), a text
    completion has ``logprobs`` (int).
    """
    logprobs = body.get("logprobs", False)
    if isinstance(logprobs, bool):
        top = body.get("top_logprobs", 0)
        if top and not logprobs:
            raise RequestError(
                400, "top_logprobs needs logprobs to be true", "top_logprobs"
            )
        return logprobs, top
    logprobs = as_integer(logprobs)
    check_field("logprobs", logprobs, FIELDS["top_logprobs"])
    return True, logprobs


def parse_logit_bias(body: Dict[str, Any]) -> Optional[Dict[int, float]]:
    """Check the logit bias, and return it with token ids as integers."""
    if "logit_bias" not in body:
        return None
    biases = body["logit_bias"]
    check_count("logit_bias", len(biases), MAX_BIASES)
    try:
        # Many longer numbers could have the same hash, which makes a dictionary slow.
        if not all(map(TOKEN_ID.fullmatch, biases)):
            raise ValueError
        bias = {int(token): float(b) for token, b in biases.items()}
        if all(abs(b) <= 1e9 for b in bias.values()):
            return bias
    except (TypeError, ValueError, OverflowError):
        pass
    raise RequestError(
        400, "logit_bias must map token ids to finite numbers", "logit_bias"
    )


def parse_template_variables(body: Dict[str, Any]) -> Optional[Dict[str, Any]]:
    """The variables of the chat template that a request sets. Those of
    ``chat_template_kwargs`` take precedence over the fields of their own."""
    variables: Dict[str, Any] = {}
    if "reasoning_effort" in body:
        variables["reasoning_effort"] = body["reasoning_effort"]
        if body["reasoning_effort"] == "none":
            variables["enable_thinking"] = False
    for name in ("enable_thinking", "add_generation_prompt", "continue_final_message"):
        if name in body:
            variables[name] = body[name]
    if "enable_thinking" in variables:
        # Its name in the templates of DeepSeek and Granite.
        variables["thinking"] = variables["enable_thinking"]
    variables |= body.get("chat_template_kwargs", {})
    both = ("add_generation_prompt", "continue_final_message")
    for name in both:
        if name in variables:
            check_type(name, variables[name], bool)
    if all(variables.get(name) for name in both):
        message = f"{both[1]} must not be true if {both[0]} is"
        raise RequestError(400, message, both[1])
    return variables or None


def make_generation_arguments(
    body: Dict[str, Any], defaults: argparse.Namespace
) -> GenerationArguments:
    """Make the generation arguments of a request.

    Args:
        body (Dict[str, Any]): The body, checked by ``parse_body`` and ``parse_tools``.
        defaults (argparse.Namespace): The command line.

    Raises:
        RequestError: If a field is wrong.
    """
    logprobs, top_logprobs = parse_logprobs(body)
    max_tokens = body.get("max_completion_tokens", body.get("max_tokens"))
    if max_tokens is None:
        max_tokens = defaults.max_tokens
        if restricting_field(body) and "max_tokens" not in defaults.given:
            max_tokens = MAX_FORMATTED
    check_ends(body, max_tokens)
    seed = body.get("seed")
    return GenerationArguments(
        model=ModelDescription(
            model=body.get("model", "default_model"),
            draft=body.get("draft_model", "default_model"),
            adapter=body.get("adapters"),
        ),
        sampling=make_sampling_arguments(body, defaults),
        logits=LogitsProcessorArguments(
            logit_bias=parse_logit_bias(body),
            repetition_penalty=body.get("repetition_penalty", 0.0),
            repetition_context_size=body.get("repetition_context_size", 20),
            presence_penalty=body.get("presence_penalty", 0.0),
            presence_context_size=body.get("presence_context_size", 20),
            frequency_penalty=body.get("frequency_penalty", 0.0),
            frequency_context_size=body.get("frequency_context_size", 20),
        ),
        stop_words=parse_stop(body),
        max_tokens=max_tokens,
        num_draft_tokens=body.get("num_draft_tokens", defaults.num_draft_tokens),
        logprobs=logprobs,
        top_logprobs=top_logprobs,
        # MLX takes unsigned seeds of 64 bits.
        seed=None if seed is None else seed % 2**64,
        chat_template_kwargs=parse_template_variables(body),
    )


def use_model_sampling(
    args: GenerationArguments,
    body: Dict[str, Any],
    defaults: argparse.Namespace,
    sampling: Dict[str, Any],
) -> None:
    """Use the sampling of a model for the fields that the body does not have, in place.

    Args:
        args (GenerationArguments): The arguments of the request.
        body (Dict[str, Any]): Its body, checked by ``parse_body``.
        defaults (argparse.Namespace): The command line.
        sampling (Dict[str, Any]): Values by fields, checked by ``check_fields``.
    """
    body = sampling | body
    args.sampling = make_sampling_arguments(body, defaults)
    args.logits.repetition_penalty = body.get("repetition_penalty", 0.0)


def make_sampling_arguments(
    body: Dict[str, Any], defaults: argparse.Namespace
) -> SamplingArguments:
    """Make the sampling arguments of a request.

    Args:
        body (Dict[str, Any]): The body, checked by ``parse_body``.
        defaults (argparse.Namespace): The command line.
    """
    temperature = body.get("temperature", defaults.temp)
    top_p = body.get("top_p", defaults.top_p)
    if temperature < LEAST_TEMPERATURE:
        temperature = 0.0
    if top_p < LEAST_TOP_P:
        temperature, top_p = 0.0, 1.0
    return SamplingArguments(
        temperature=temperature,
        top_p=top_p,
        top_k=body.get("top_k", defaults.top_k),
        min_p=body.get("min_p", defaults.min_p),
        xtc_probability=body.get("xtc_probability", 0.0),
        xtc_threshold=body.get("xtc_threshold", 0.1),
    )
