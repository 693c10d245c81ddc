"""``POST /tokenize`` and ``POST /detokenize``, as vLLM has them: prompts as the model sees them.

Rule: a prompt has here the tokens with which the server would answer it.
"""

import argparse
from typing import Any, Dict, List

from .. import hookimpl
from ..errors import RequestError
from ..routes import Route, RouteRequest

# What is imported in functions needs MLX.

# Tokens that are made text at a time: no other thread runs while a tokenizer does so, here for
# a tenth of a second.
MAX_TOKENS = 1 << 18


@hookimpl
def mlx_lm_register_routes(args: argparse.Namespace) -> List[Route]:
    return [
        Route("POST", "/tokenize", tokenize),
        Route("POST", "/detokenize", detokenize),
    ]


def read(request: RouteRequest) -> Dict[str, Any]:
    """The body without its null fields, and its ``model`` checked."""
    from ..request.fields import FIELDS, check_field

    body = {k: value for k, value in request.json().items() if value is not None}
    check_field("model", body.get("model", ""), FIELDS["model"])
    return body


def tokenize(request: RouteRequest) -> Dict[str, Any]:
    """The tokens of a text, or of a chat.

    Raises:
        RequestError: If a field is wrong, or there is no such model.
    """
    from ..request.fields import check_type

    body = read(request)
    if body.keys().isdisjoint(("prompt", "messages")):
        raise RequestError(400, "prompt or messages is required", "prompt")
    for name in ("return_token_strs", "add_special_tokens"):
        check_type(name, body.get(name, False), bool)
    is_plain = "prompt" in body and body.get("add_special_tokens") is False
    if "prompt" in body:
        check_type("prompt", body["prompt"], str)
        # The server adds them to each text that it answers.
        body.pop("add_special_tokens", None)
    tokens = request.tokenize(body)
    model = request.model(body.get("model"))
    if is_plain:
        tokens = model.tokenizer.encode(body["prompt"], add_special_tokens=False)
    texts = None
    if body.get("return_token_strs"):
        texts = model.tokenizer.convert_ids_to_tokens(tokens)
    return {
        "count": len(tokens),
        "max_model_len": model.context_length,
        "tokens": tokens,
        "token_strs": texts,
    }


def detokenize(request: RouteRequest) -> Dict[str, Any]:
    """The text of tokens. Special tokens are a part of it.

    Raises:
        RequestError: If a field is wrong, or there is no such model.
    """
    from ..request.fields import (
        Field,
        as_integer,
        check_count,
        check_field,
        check_required,
        check_type,
    )

    body = read(request)
    check_required(body, "tokens")
    check_type("tokens", body["tokens"], list)
    check_count("tokens", len(body["tokens"]), MAX_TOKENS)
    model = request.model(body.get("model"))
    tokens = list(map(as_integer, body["tokens"]))
    known = Field(int, 0, model.vocabulary_size - 1)
    if not all(type(t) is int and 0 <= t < model.vocabulary_size for t in tokens):
        for i, token in enumerate(tokens):
            check_field(f"tokens[{i}]", token, known)
    return {"prompt": model.decode(tokens)}
