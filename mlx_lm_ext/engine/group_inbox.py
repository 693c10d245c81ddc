"""The inbox where several ranks run the model: requests come to rank 0, which tells the others.

Rules:
1. The others get of a request what decides about its KV: its tokens, its limits and who may share
   its KV. How its tokens are chosen is known on rank 0 only.
2. What has come, what has left and whether all is over is told in each step, so that it is the
   same step on all ranks.
"""

from itertools import accumulate, count, pairwise
from typing import Any, Dict, List, Optional, Tuple
from weakref import WeakValueDictionary

from mlx_lm.server import CompletionRequest

from ..distributed.group import OneProcess
from ..errors import RequestError
from ..request.fields import make_generation_arguments
from ..request.request import NO_TOKEN, PromptLogprobs, Request
from .inbox import Inbox
from .models import BatchModelProvider

# Fields of a body that decide how long an answer is and who may share its KV.
FIELDS = ("stop_token_ids", "ignore_eos", "cache_salt")


class GroupInbox(Inbox):
    """The inbox of one of several ranks.

    Args:
        group (OneProcess): The ranks.
        model_provider (BatchModelProvider): Knows the model that all of them serve.
    """

    def __init__(self, group: OneProcess, model_provider: BatchModelProvider):
        super().__init__()
        self.group = group
        self.model_provider = model_provider
        self.numbers = count(1)
        self.numbered: "WeakValueDictionary[int, Request]" = WeakValueDictionary()
        # Those of prompts that requests here have in common.
        self.logprobs: "WeakValueDictionary[int, PromptLogprobs]" = (
            WeakValueDictionary()
        )
        self.was_told_to_end = False

    @property
    def is_done(self) -> bool:
        return self.was_told_to_end or self.group.lost is not None

    def abandon(self, reason: str) -> None:
        super().abandon(reason)
        # ``values`` may raise while another thread adds some.
        for reference in self.numbered.valuerefs():
            if request := reference():
                request.put(RequestError(503, reason))

    def take(self, block: bool, timeout: Optional[float] = None) -> List[Request]:
        if self.is_done:
            return super().take(block, timeout)
        requests: List[Request] = []

        def come() -> List[Any]:
            requests.extend(super(GroupInbox, self).take(block, timeout))
            for request in requests:
                request.number = next(self.numbers)
            return [self.is_closed, [to_message(request) for request in requests]]

        try:
            self.was_told_to_end, messages = self.group.agree("requests", come)
        except BaseException:
            # The group is lost: they are still here to be ended.
            for request in requests:
                self.put(request)
            raise
        if self.group.rank:
            requests = [self.make_request(message) for message in messages]
        self.numbered.update((request.number, request) for request in requests)
        return requests

    def make_request(self, message: Dict[str, Any]) -> Request:
        """The request that rank 0 has told this rank of."""
        request = from_message(self.model_provider, message)
        if message["logprobs"] is not None:
            number, is_known = message["logprobs"]
            logprobs = self.logprobs.setdefault(number, PromptLogprobs())
            if is_known and not logprobs:
                # All requests that had them have left. What they were is not needed here.
                logprobs.append(NO_TOKEN)
            request.prompt_logprobs = logprobs
        return request

    def take_cancelled(self) -> List[Request]:
        def gone() -> List[int]:
            cancelled = super(GroupInbox, self).take_cancelled()
            # Those that were cancelled before they were taken have no number.
            return [r.number for r in cancelled if r.number is not None]

        numbers = self.group.agree("cancelled requests", gone)
        return [self.numbered[n] for n in numbers if n in self.numbered]


def to_message(request: Request) -> Dict[str, Any]:
    """What the other ranks have to know of a request."""
    return {
        "number": request.number,
        "prompt": request.prompt,
        "segments": [len(segment) for segment in request.segments],
        "segment_types": request.segment_types,
        "max_tokens": request.max_tokens,
        "body": {name: request.body[name] for name in FIELDS if name in request.body},
        "key_name": request.key_name,
        "shares_cache": request.shares_cache,
        "logprobs": to_logprobs(request),
    }


def to_logprobs(request: Request) -> Optional[Tuple[int, bool]]:
    """What the log probabilities of its prompt are called, and whether they are known; None if
    it does not ask for them."""
    logprobs = request.prompt_logprobs
    if logprobs is None:
        return None
    if logprobs.number is None:
        logprobs.number = request.number
    return logprobs.number, bool(logprobs)


def from_message(
    model_provider: BatchModelProvider, message: Dict[str, Any]
) -> Request:
    """A request of which rank 0 has told, without the log probabilities of its prompt."""
    args = make_generation_arguments({}, model_provider.cli_args)
    args.max_tokens = message["max_tokens"]
    prompt = message["prompt"]
    ends = [*accumulate(message["segments"])]
    segments = [prompt[start:end] for start, end in pairwise([0, *ends])]
    return Request(
        id=str(message["number"]),
        number=message["number"],
        args=args,
        body=message["body"],
        key_name=message["key_name"],
        shares_cache=message["shares_cache"],
        model=model_provider.describe(args.model),
        completion=CompletionRequest("text", prompt, [], None, None),
        prompt=prompt,
        n_prompt=len(prompt),
        segments=segments,
        segment_types=message["segment_types"],
    )
