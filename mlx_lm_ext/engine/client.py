"""The engine as handlers see it: they tokenize a request, submit it, and cancel it."""

import argparse
import time
from collections import Counter
from copy import copy
from dataclasses import asdict, replace
from threading import Lock
from typing import Any, Dict, List, Optional, Sequence

from jinja2 import TemplateSyntaxError
from mlx_lm.server import CompletionRequest, GenerationArguments, ModelDescription

from ..errors import RequestError
from ..interfaces import RequestStats, ServerStatistics
from ..policies.guard import Policies
from ..request.fields import (
    check_choice,
    n_candidates,
    parse_tool_choice,
    restricting_field,
    use_model_sampling,
)
from ..request.fill_in import fill_in
from ..request.images import image_parts
from ..request.mailbox import Mailbox
from ..request.preparation import Preparation, Preparations
from ..request.request import Answers, PromptLogprobs, Request
from ..request.served_model import ServedModel
from ..request.tokenizing import explain
from ..routes import ModelInfo
from .admission import Admission
from .counters import Counters
from .inbox import Inbox
from .models import BatchModelProvider
from .upstream import SingleGenerator


class EngineClient:
    """What handlers call. All methods may be called on any thread.

    Args:
        model_provider (BatchModelProvider): Finds models, and carries the command line.
        policies (Policies): The samplers that requests may name, and the observers.
        inbox (Inbox): Takes requests to the generation thread.
        counters (Counters): What the generation thread tells about itself.
    """

    def __init__(
        self,
        model_provider: BatchModelProvider,
        policies: Policies,
        inbox: Inbox,
        counters: Counters,
    ):
        self.model_provider = model_provider
        self.policies = policies
        self.inbox = inbox
        self.counters = counters
        args = model_provider.cli_args
        self.admission = Admission(
            args.max_queue, args.max_requests_per_key, policies.clock
        )
        self.tokenizing = SingleGenerator(model_provider)
        self.started = policies.clock()
        # Tokens of the prompts of answers that have ended, and a lock for them.
        self.prompt_tokens: "Counter[str]" = Counter()
        self.lock = Lock()

    @property
    def cli_args(self) -> argparse.Namespace:
        return self.model_provider.cli_args

    @property
    def served_names(self) -> List[str]:
        """What clients may call the served model; its own name is the first one."""
        return self.model_provider.served_names

    def is_served(self, name: str) -> bool:
        """Whether a name stands for the served model."""
        if name in self.served_names:
            return True
        is_any = self.cli_args.any_model_name and name != "default_model"
        return is_any and not self.model_provider.has(name)

    @property
    def status(self) -> str:
        """ "ok" while requests are served, "loading" before, and "stopping" or "unavailable"
        after that."""
        if self.admission.is_closed:
            return "stopping"
        if not self.inbox.loaded.is_set():
            return "loading"
        return "unavailable" if self.inbox.is_closed else "ok"

    def check_available(self, seconds: float = 0.0) -> None:
        """Raise a 503 ``RequestError`` if no request has been served for so many seconds."""
        inbox = self.inbox
        if inbox.reason is not None and time.monotonic() - inbox.closed >= seconds:
            raise RequestError(503, inbox.reason)

    def wait_until_loaded(self, seconds: float, arrival: float) -> bool:
        """Wait until the served model is loaded.

        Args:
            seconds (float): How long to wait at most.
            arrival (float): When the request came, on the clock of the policies.

        Returns:
            bool: Whether it is loaded.

        Raises:
            RequestError: If it cannot be loaded, the server stops, or the request has taken
              longer than ``--request-timeout``.
        """
        is_loaded = self.inbox.loaded.wait(seconds)
        self.check_available()
        timeout = self.cli_args.request_timeout
        if timeout is not None and self.policies.clock() - arrival >= timeout:
            message = f"the model was not loaded within {timeout:g} seconds"
            raise RequestError(503, f"{message} (--request-timeout)")
        return is_loaded

    def describe(self, args: GenerationArguments) -> ServedModel:
        """The model that a request names. It may have to be downloaded.

        Raises:
            RequestError: If there is none, or the request may not have it.
        """
        return self.model_provider.describe(args.model)

    def model_info(self, name: Optional[str] = None) -> ModelInfo:
        """What the route of a plugin may know of a model.

        Raises:
            RequestError: If there is none with this name, or it is not loaded yet.
        """
        self.check_available()
        name = name or self.served_names[0]
        wanted = "default_model" if self.is_served(name) else name
        model = self.model_provider.describe(
            ModelDescription(wanted, "default_model", None)
        )
        return ModelInfo(
            name,
            model.tokenizer,
            model.vocabulary_size,
            model.context_length,
            model.decoder.decode,
        )

    def generate(
        self,
        completions: Sequence[CompletionRequest],
        args: GenerationArguments,
        body: Dict[str, Any],
        model: ServedModel,
        arrival: Optional[float] = None,
        id: str = "",
        preparation: Optional[Preparation] = None,
        key_name: Optional[str] = None,
    ) -> List[Request]:
        """Tokenize the prompts of a request on the caller's thread, and submit ``n`` requests
        for each, or with ``best_of`` so many.

        Args:
            completions (Sequence[CompletionRequest]): The prompts, or the messages.
            args (GenerationArguments): Sampling parameters and limits.
            body (Dict[str, Any]): What the client sent.
            model (ServedModel): What ``describe`` gave.
            arrival (Optional[float]): When it came, on the clock of the policies. Without
              it, now.
            id (str): The id of its answer.
            preparation (Optional[Preparation]): Says when to give up. Without one, never.
            key_name (Optional[str]): The name of its API key.

        Raises:
            ConnectionError: If its client has left.
            RequestError: If it cannot be served.
        """
        self.check_available()
        if model.sampling:
            use_model_sampling(args, body, self.cli_args, model.sampling)
        template = Request(
            id=id,
            args=args,
            body=body,
            arrival=self.policies.clock() if arrival is None else arrival,
            model=model,
            completion=completions[0],
            sampler=body.get("sampler", self.cli_args.sampler),
            clock=self.policies.clock,
            timeout=self.cli_args.request_timeout,
            key_name=key_name,
            shares_cache=self.cli_args.share_cache,
            answers=Answers(Mailbox(self.inbox.turnstile)),
            # What may end an answer at any token, and streams, want each token at once.
            reads_each=bool(
                body.get("stream")
                or args.stop_words
                or body.get("parallel_tool_calls") is False
            ),
        )
        check_choice("sampler", template.sampler, self.policies.samplers)
        preparation = preparation or Preparations().begin()
        # A call that is forced is made in any case.
        if completions[0].tools and parse_tool_choice(body).mode == "auto":
            name = template.prompt_field
            model.bounded_tokenizer(name, preparation).check_tools()
        field = restricting_field(body)
        requests: List[Request] = []
        for completion in completions:
            # The limit of its tokens depends on the prompt.
            first = replace(
                template, completion=completion, args=copy(args), generated=[]
            )
            # Prompts with images are tokenized on the generation thread.
            if not image_parts(completion.messages):
                self.tokenize(first, preparation)
            elif self.model_provider.group.size > 1:
                message = "images cannot be used with a model on several ranks"
                raise RequestError(400, message, "messages", "unsupported_value")
            first.check_tokens()
            if first.segments:
                first.fit_to_context()
            first.constraint = self.policies.make_constraint(first, model.tokenizer)
            if field is not None and first.constraint is None:
                message = f"{field} needs the plugin structured, which is blocked"
                raise RequestError(400, message, field, "unsupported_value")
            check_constraint(first)
            if body.get("echo") and args.logprobs:
                first.prompt_logprobs = PromptLogprobs()
            # The best are found by their log probabilities.
            first.args.logprobs |= n_candidates(body) > body.get("n", 1)
            # What is known late of the prompt, its constraint learns from the first one.
            first.index = len(requests)
            requests.append(first)
            for i in range(1, n_candidates(body)):
                requests.append(first.sibling(i, len(requests)))
        for request in requests:
            self.inbox.put(request)
        return requests

    def tokens_of(
        self,
        completion: CompletionRequest,
        args: GenerationArguments,
        body: Dict[str, Any],
        model: ServedModel,
        preparation: Preparation,
    ) -> List[int]:
        """The tokens of a prompt, which is not submitted. For the arguments see ``generate``.

        Raises:
            ConnectionError: If its client has left.
            RequestError: If it cannot be tokenized.
        """
        if image_parts(completion.messages):
            message = "the tokens of images cannot be counted"
            raise RequestError(400, message, "messages")
        request = Request(
            id="", args=args, body=body, model=model, completion=completion
        )
        self.tokenize(request, preparation)
        return request.prompt

    def tokenize(self, request: Request, preparation: Preparation) -> None:
        """Make the prompt of a request.

        Raises:
            ConnectionError: If its client has left.
            RequestError: If it cannot be tokenized, or is too long.
        """
        name = request.prompt_field
        tokenizer = request.model.bounded_tokenizer(name, preparation)
        suffix = request.body.get("suffix")
        try:
            if suffix:
                form, prompt = request.model.fill_in_form, request.completion.prompt
                prompt = fill_in(prompt, suffix, form, tokenizer)
                request.completion = replace(request.completion, prompt=prompt)
            (
                request.prompt,
                request.segments,
                request.segment_types,
                request.initial_state,
            ) = self.tokenizing.tokenize(tokenizer, request.completion, request.args)
        except (ConnectionError, RequestError):
            raise
        except TemplateSyntaxError as e:
            raise RequestError(400, f"{name} cannot be tokenized: {explain(e)}", name)
        except Exception as e:
            # Chat templates are code, and can raise anything.
            raise RequestError(400, f"{name} cannot be tokenized: {e}", name)
        request.n_prompt = len(request.prompt)

    def cancel(self, request: Request) -> None:
        """Let a request leave the waiting list or the batch before the next step. Its handler
        wants nothing more of it."""
        request.answers.end(request)
        self.inbox.cancel(request)

    def request_finished(self, request: Request, stats: RequestStats) -> None:
        """Tell the plugins that observe requests that an answer has ended."""
        is_started = stats.queue_seconds is not None
        with self.lock:
            self.prompt_tokens["all"] += stats.prompt_tokens if is_started else 0
            self.prompt_tokens["cached"] += stats.cached_tokens
        self.policies.request_finished(request, stats)

    def statistics(self, n_connections: int) -> ServerStatistics:
        """What the server has done, and what it holds.

        Args:
            n_connections (int): Connections that are open.
        """
        return ServerStatistics(
            model=self.served_names[0],
            status=self.status,
            seconds=self.policies.clock() - self.started,
            batch_size=self.cli_args.batch_size,
            n_waiting=self.admission.n_waiting,
            n_connections=n_connections,
            prompt_tokens=self.prompt_tokens["all"],
            cached_tokens=self.prompt_tokens["cached"],
            policy_seconds=self.policies.seconds,
            **asdict(self.counters),
        )


def check_constraint(request: Request) -> None:
    """Refuse what would let an answer go on after its constraint has ended it, and draft models,
    with which several tokens are chosen at once.

    Raises:
        RequestError: A 400 that names the field, if the request has one that restricts.
    """
    if request.constraint is None:
        return
    for name in ("ignore_eos", "min_tokens"):
        if request.body.get(name):
            message = f"{name} cannot be used with what restricts the answer"
            raise RequestError(400, message, name)
    if request.model.key[2] is not None:
        # Without a format and a forced call, it is that of strict tools, or of a plugin.
        strict = "tools" if request.body.get("tools") else None
        name = restricting_field(request.body) or strict
        message = "answers of a draft model cannot be restricted"
        if name is not None:
            message = f"{name} cannot be used: {message}"
        raise RequestError(400, message, name)
