"""The lines of the log that each answer has: how it went, and with ``--log-level DEBUG`` its
text."""

import logging

from ..interfaces import RequestStats
from ..request.request import Request

logger = logging.getLogger(__name__)


def log_answer(id: str, request: Request, stats: RequestStats) -> None:
    """Log how an answer went.

    Args:
        id (str): The id that the client finds in the headers.
        request (Request): The request.
        stats (RequestStats): How it went.
    """
    speed = None
    if stats.ttft is not None and stats.completion_tokens > 1:
        seconds = stats.seconds - stats.ttft
        speed = (stats.completion_tokens - 1) / max(seconds, 1e-6)
    line = "" if request.key_name is None else f"{request.key_name} "
    line += f"{id}: {stats.prompt_tokens} prompt tokens"
    if stats.cached_tokens:
        line += f" ({stats.cached_tokens} cached)"
    line += f", {stats.completion_tokens} generated"
    if stats.queue_seconds is not None:
        line += f", waited {stats.queue_seconds:.3f} s"
    if stats.ttft is not None:
        line += f", first token after {stats.ttft:.3f} s"
    if speed is not None:
        line += f", {speed:.1f} tok/s"
    fields = {
        "request_id": id,
        "answer_id": request.id,
        "key_name": request.key_name,
        "prompt_tokens": stats.prompt_tokens,
        "cached_tokens": stats.cached_tokens,
        "completion_tokens": stats.completion_tokens,
        "queue_seconds": stats.queue_seconds,
        "ttft": stats.ttft,
        "seconds": stats.seconds,
        "tokens_per_second": speed,
        "finish_reason": stats.finish_reason,
    }
    logger.info(f"{line}, {stats.finish_reason}", extra={"fields": fields})
    if logger.isEnabledFor(logging.DEBUG):
        decode = request.model.decoder.decode
        answer = decode(request.generated[: stats.completion_tokens])
        logger.debug(f"{id} prompt: {decode(request.prompt)!r}")
        logger.debug(f"{id} answer: {answer!r}")
