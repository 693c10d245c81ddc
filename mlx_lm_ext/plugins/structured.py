"""Structured output: ``response_format``, ``structured_outputs`` and ``guided_json`` and the
like.

Rule: a request without them costs a look into its body, and nothing is imported for it.
"""

import json
import re
from typing import TYPE_CHECKING, Any, Dict, Optional

from .. import hookimpl
from ..errors import RequestError, one_line
from ..interfaces import Constraint, RequestInfo

if TYPE_CHECKING:
    from ..request.fields import AnswerFormat

# What is imported in functions needs MLX or llguidance.

# What stands between the parts of JSON: nothing, a space, or a line break and an indent.
# With any number of them, a model could write nothing else for ever.
JSON_OPTIONS = {
    "item_separator": ",",
    "key_separator": ":",
    "whitespace_flexible": True,
    "whitespace_pattern": r" |\n[ \t]{0,32}",
    # What cannot be checked is refused, and not left out.
    "coerce_one_of": False,
    "lenient": False,
}
# What may stand before JSON: texts begin with a space for some tokenizers, and answers with
# a line break or two after a reasoning.
SPACE, BLANKS = '" "?', r"/[ \n]{0,4}/"
# The marks of the channels of gpt-oss, and an answer in the last one of them.
MARKS = ("<|channel|>", "<|message|>", "<|end|>", "<|start|>")
CHANNELS = r"""
start: reasoning* channel "final" message %s @answer
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

    form = parse_answer_format(request.body)
    if form is None:
        return None
    from .grammars import grammars_of

    # Grammars are made with llguidance, too: first see whether it is there.
    grammars_of(request, tokenizer, form.field)
    grammar = answer_grammar(request, form)
    return constrain(request, tokenizer, grammar, form.field, form.kind == "json")


def answer_grammar(request: RequestInfo, form: "AnswerFormat") -> Dict[str, Any]:
    """The grammar of an answer, as a part of llguidance's JSON. If the request has tools, it
    does not allow to call them.

    Raises:
        RequestError: If it is wrong or too large.
    """
    from .grammars import MAX_LINES, check_bytes, check_schema

    field, kind, value = form
    if kind == "json":
        check_schema(field, value)
        return {"json_schema": {**value, "x-guidance": JSON_OPTIONS}}
    if kind == "choice":
        return {"lark_grammar": "start: " + " | ".join(map(json.dumps, value))}
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


def constrain(
    request: RequestInfo,
    tokenizer: Any,
    grammar: Dict[str, Any],
    field: str,
    blanks: bool = False,
) -> Constraint:
    """The constraint of an answer that is as a grammar says, after the model's reasoning.

    Args:
        request (RequestInfo): The request.
        tokenizer (TokenizerWrapper): The model's tokenizer.
        grammar (Dict[str, Any]): A part of llguidance's JSON: ``lark_grammar`` or
          ``json_schema``.
        field (str): The field of the request that the grammar is made of.
        blanks (bool): Whether blanks before the answer do no harm.

    Raises:
        RequestError: If the grammar, or the model's tokenizer, cannot be used.
    """
    from ..server.harmony import Harmony, with_channels
    from .grammars import compose, grammars_of
    from .reasoning import AfterReasoning

    grammars = grammars_of(request, tokenizer, field)
    reasons = "messages" in request.body and tokenizer.has_thinking
    leading = SPACE if blanks or grammars.hides_space else ""
    if blanks and reasons:
        leading = BLANKS
    start = f"start: {leading} @answer"
    if isinstance(with_channels(tokenizer), Harmony) and begins_message(request.body):
        marks = [tokenizer.get_vocab().get(mark) for mark in MARKS]
        if None in marks:
            message = (
                f"{field} cannot be used with this model: it lacks a mark of {MARKS}"
            )
            raise RequestError(400, message, field)
        start = CHANNELS % (leading, *marks)
    constraint = grammars.constrain(compose(start, grammar), field)
    return AfterReasoning(request, tokenizer, constraint) if reasons else constraint


def begins_message(body: Dict[str, Any]) -> bool:
    """Whether a chat's answer is a message of its own."""
    variables = body | body.get("chat_template_kwargs", {})
    return "messages" in body and not variables.get("continue_final_message")
