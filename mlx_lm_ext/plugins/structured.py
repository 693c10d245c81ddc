"""Structured output: ``response_format``, ``structured_outputs``, ``guided_json`` and the like,
and tool calls that are forced or strict.

Rules:
1. A request without them costs a look into its body, and llguidance is not imported for it.
2. Forced calls are the whole answer. Where the model may choose between calls and an answer,
   the format holds for the answer.
"""

import json
import re
import time
from typing import TYPE_CHECKING, Any, Dict, Optional

from .. import hookimpl
from ..errors import RequestError, one_line
from ..interfaces import Constraint, RequestInfo

if TYPE_CHECKING:
    from ..request.fields import AnswerFormat

# Seconds for all grammars that are tried for the tools of a request.
MAX_TOOL_SECONDS = 2.0

# What is imported in functions needs MLX or llguidance.

# What may stand before JSON: texts begin with a space for some tokenizers, and answers with
# a line break or two after a reasoning.
LEADING_SPACE, LEADING_BLANKS = '" "?', r"/[ \n]{0,4}/"
# The marks of the channels of gpt-oss, and an answer in the last one of them.
CHANNEL_MARKS = ("<|channel|>", "<|message|>", "<|end|>", "<|start|>")
CHANNELS = r"""reasoning* channel "final" message %s @answer
reasoning: channel "analysis" message TEXT end begin "assistant"
channel: <[%d]>
message: <[%d]>
end: <[%d]>
begin: <[%d]>
TEXT: /(.|\n)*/
"""
# A rule of GBNF, llama.cpp's format of grammars.
GBNF = re.compile(r"^\s*[\w-]+\s*::=", re.MULTILINE)


@hookimpl
def mlx_lm_make_constraint(
    request: RequestInfo, tokenizer: Any
) -> Optional[Constraint]:
    from ..request.fields import parse_answer_format

    body = request.body
    form, answer, rules, alone = parse_answer_format(body), None, None, None
    if form is not None:
        from .grammars import grammars_of

        # Grammars are made with llguidance, too: first see whether it is there.
        grammars_of(request, tokenizer, form.field)
        answer = answer_grammar(form)
        rules = answer_rules(request, tokenizer, form)
        # First without the tools, which are not to blame for what is wrong with it.
        alone = constrain(request, tokenizer, f"start: {rules}", answer, form.field)
    if "messages" in body and body.get("tools"):
        constraint = constrain_calls(request, tokenizer, rules, answer)
        if constraint is not None:
            return constraint
    return alone


def constrain_calls(
    request: RequestInfo,
    tokenizer: Any,
    rules: Optional[str],
    answer: Optional[Dict[str, Any]],
) -> Optional[Constraint]:
    """The constraint of a chat that may or must call tools.

    Args:
        request (RequestInfo): The request.
        tokenizer (TokenizerWrapper): The model's tokenizer.
        rules (Optional[str]): What ``answer_rules`` gives, if an answer without calls has a
          format.
        answer (Optional[Dict]): What ``answer_grammar`` gives.

    Returns:
        The constraint; None if nothing about the calls is restricted.

    Raises:
        RequestError: If a strict function has a schema that cannot be done.
    """
    from ..request.fields import parse_tool_choice
    from .grammar_rules import Marks
    from .tool_grammars import tool_grammar

    is_forced = parse_tool_choice(request.body).mode == "required"
    field = "tool_choice" if is_forced else "tools"
    deadline = time.monotonic() + MAX_TOOL_SECONDS

    def check(grammar: str) -> str:
        from .grammars import compose, grammars_of

        if time.monotonic() > deadline:
            message = f"tools take longer than {MAX_TOOL_SECONDS:g} s to compile"
            raise RequestError(400, f"{message}; make them simpler", "tools")
        whole = compose(grammar, answer)
        return grammars_of(request, tokenizer, field).check(whole)

    text = None if rules is None else f"text: {rules}"
    grammar = tool_grammar(request.body, tokenizer, check, text)
    if grammar is None:
        return None
    call = Marks.of(tokenizer).ids.get(tokenizer.tool_call_start)
    return constrain(request, tokenizer, grammar, answer, field, call)


def answer_grammar(form: "AnswerFormat") -> Dict[str, Any]:
    """The grammar of an answer, as a part of llguidance's JSON.

    Raises:
        RequestError: If it is wrong or too large.
    """
    from .grammar_rules import JSON_OPTIONS, quoted
    from .grammars import MAX_LINES, check_bytes, check_schema

    field, kind, value = form
    if kind == "json":
        check_schema(field, value)
        return {"json_schema": {**value, "x-guidance": JSON_OPTIONS}}
    if kind == "choice":
        return {"lark_grammar": "start: " + " | ".join(map(quoted, value))}
    if kind == "regex":
        from llguidance import LLMatcher

        (grammar,) = json.loads(LLMatcher.grammar_from_regex(value))["grammars"]
        return {"lark_grammar": grammar["lark_grammar"]}
    check_bytes(field, value)
    if value.count("\n") >= MAX_LINES:
        raise RequestError(400, f"{field} may have {MAX_LINES} lines at most", field)
    if GBNF.search(value):
        from llguidance.gbnf_to_lark import gbnf_to_lark

        try:
            value = gbnf_to_lark(value)
        except (Exception, RecursionError) as e:
            raise RequestError(400, f"{field} is not GBNF: {one_line(e)}", field)
    return {"lark_grammar": value}


def answer_rules(request: RequestInfo, tokenizer: Any, form: "AnswerFormat") -> str:
    """What an answer with a format is made of, after a reasoning: a rule of llguidance's Lark
    without its name, with ``@answer`` where the format holds, and other rules.

    Raises:
        RequestError: If the model lacks the marks of its channels.
    """
    from ..server.harmony import Harmony, with_channels
    from .grammars import grammars_of

    is_json = form.kind == "json"
    hides_space = grammars_of(request, tokenizer, form.field).hides_space
    leading = LEADING_SPACE if is_json or hides_space else ""
    if is_json and reasons_first(request, tokenizer):
        leading = LEADING_BLANKS
    if not isinstance(with_channels(tokenizer), Harmony):
        return f"{leading} @answer"
    if not begins_message(request.body):
        return f"{leading} @answer"
    marks = [tokenizer.get_vocab().get(mark) for mark in CHANNEL_MARKS]
    if None in marks:
        message = f"{form.field} cannot be used with this model: it lacks a mark of {CHANNEL_MARKS}"
        raise RequestError(400, message, form.field)
    return CHANNELS % (leading, *marks)


def constrain(
    request: RequestInfo,
    tokenizer: Any,
    grammar: str,
    answer: Optional[Dict[str, Any]],
    field: str,
    call: Optional[int] = None,
) -> Constraint:
    """The constraint of a grammar, which holds after the model's reasoning.

    Args:
        request (RequestInfo): The request.
        tokenizer (TokenizerWrapper): The model's tokenizer.
        grammar (str): In llguidance's Lark, maybe with an ``@answer``.
        answer (Optional[Dict]): What that stands for.
        field (str): The field of the request that the grammar is made of.
        call (Optional[int]): The token that begins a call, if the answer may be one.

    Raises:
        RequestError: If the grammar, or the model's tokenizer, cannot be used.
    """
    from .grammars import compose, grammars_of
    from .reasoning import AfterReasoning

    grammars = grammars_of(request, tokenizer, field)
    constraint = grammars.constrain(compose(grammar, answer), field)
    if reasons_first(request, tokenizer):
        return AfterReasoning(request, tokenizer, constraint, call)
    return constraint


def reasons_first(request: RequestInfo, tokenizer: Any) -> bool:
    """Whether a reasoning may come before the answer."""
    return "messages" in request.body and bool(tokenizer.has_thinking)


def begins_message(body: Dict[str, Any]) -> bool:
    """Whether a chat's answer is a message of its own."""
    variables = body | body.get("chat_template_kwargs", {})
    return "messages" in body and not variables.get("continue_final_message")
