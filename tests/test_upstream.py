"""What this package relies on in mlx-lm, and the rules of the package.

Where a changed mlx-lm fails here, look at the files that use the name: the doors
(``batch/generator.py`` and those named ``upstream.py``), ``server/`` and ``request/``.
"""

import ast
import inspect
import re
import sys
from pathlib import Path
from pkgutil import resolve_name
from queue import Queue
from types import SimpleNamespace

import mlx.core as mx
import mlx_lm
import mlx_lm.server
import mlx_lm.utils
import pytest
import transformers
import transformers.utils.chat_template_utils
from mlx_lm.generate import BatchGenerator, GenerationBatch, StopSequences
from mlx_lm.server import CompletionRequest, ModelProvider, ResponseGenerator
from processes import run_program

import mlx_lm_ext
from mlx_lm_ext import batch_server
from mlx_lm_ext.batch.generator import UnprocessedPrompt
from mlx_lm_ext.engine import upstream as _upstream

PACKAGE = Path(mlx_lm_ext.__file__).parent
FILES = sorted(PACKAGE.rglob("*.py"))
DOORS = [
    path
    for path in FILES
    if path.name == "upstream.py" or path == PACKAGE / "batch" / "generator.py"
]

# What is called, overridden or made of mlx-lm, and its parameters.
SIGNATURES = [
    "generate:BatchGenerator(model, max_tokens, stop_tokens, sampler, "
    "logits_processors, completion_batch_size, prefill_batch_size, "
    "prefill_step_size, max_kv_size, stream)",
    "generate:BatchGenerator.insert_segments(self, segments, max_tokens, caches, "
    "all_tokens, samplers, logits_processors, stop_sequences)",
    "generate:BatchGenerator.extract_cache(self, uids)",
    "generate:BatchGenerator.remove(self, uids, return_prompt_caches)",
    "generate:BatchGenerator.close(self)",
    "generate:BatchGenerator._make_batch(self, n)",
    "generate:PromptProcessingBatch(model, uids, caches, tokens, prefill_step_size, "
    "samplers, fallback_sampler, logits_processors, stop_sequences, max_tokens)",
    "generate:PromptProcessingBatch.empty(model, fallback_sampler, "
    "prefill_step_size)",
    "generate:PromptProcessingBatch.extend(self, batch)",
    "generate:PromptProcessingBatch.filter(self, keep)",
    "generate:PromptProcessingBatch.split(self, indices)",
    "generate:PromptProcessingBatch.prompt(self, tokens)",
    "generate:PromptProcessingBatch.generate(self, tokens)",
    "generate:GenerationBatch(model, uids, inputs, prompt_cache, tokens, samplers, "
    "fallback_sampler, logits_processors, stop_sequences, max_tokens)",
    "generate:GenerationBatch.empty(model, fallback_sampler)",
    "generate:GenerationBatch.extend(self, batch)",
    "generate:GenerationBatch.filter(self, keep)",
    "generate:GenerationBatch.next(self)",
    "generate:GenerationBatch._step(self)",
    "generate:StopSequences(stop_sequences)",
    "generate:StopSequences.matcher(self)",
    "generate:StopSequences.Matcher.advance(self, token)",
    "generate:TextStateMachine(transitions)",
    "generate:TextStateMachine.make_state(self, initial)",
    "generate:TextStateMachine.split(state, text)",
    "generate:TextStateMachine.flush(state)",
    "generate:make_stop_sequences(tokenizer, stop_words)",
    "generate:make_text_state_machine(tokenizer, stop_words)",
    "server:_make_logits_processors(args)",
    "server:get_system_fingerprint()",
    "utils:_download(path_or_hf_repo, revision, allow_patterns)",
    "server:ToolCallFormatter(tool_parser, tools, streaming)",
    "server:ToolCallFormatter.__call__(self, tool_calls)",
    "server:ModelProvider(cli_args)",
    "server:ModelProvider.load(self, model_path, adapter_path, draft_model_path)",
    "server:ModelProvider.reset(self)",
    "server:ResponseGenerator._tokenize(self, tokenizer, request, args)",
    "server:ResponseGenerator._serve_single(self, request, stream)",
    "server:APIHandler(response_generator, args, system_fingerprint, kwargs)",
    "server:APIHandler.handle_chat_completions(self)",
    "server:APIHandler.handle_text_completions(self)",
    "server:APIHandler.generate_response(self, text, finish_reason, "
    "prompt_token_count, completion_token_count, prompt_cache_count, "
    "token_logprobs, top_tokens, tokens, tool_calls, reasoning_text)",
    "server:APIHandler.completion_usage_response(self, prompt_token_count, "
    "completion_token_count, prompt_cache_count)",
    # Dataclasses, by the order of their fields.
    "generate:PromptProcessingBatch.Response(uid, progress, end_of_segment, "
    "end_of_prompt)",
    "generate:GenerationBatch.Response(uid, token, logprobs, finish_reason, "
    "prompt_cache, all_tokens)",
    "server:CompletionRequest(request_type, prompt, messages, tools, role_mapping)",
    "server:ModelDescription(model, draft, adapter)",
    "server:SamplingArguments(temperature, top_p, top_k, min_p, xtc_probability, "
    "xtc_threshold)",
    "server:LogitsProcessorArguments(logit_bias, repetition_penalty, "
    "repetition_context_size, presence_penalty, presence_context_size, "
    "frequency_penalty, frequency_context_size)",
    "server:GenerationArguments(model, sampling, logits, stop_words, max_tokens, "
    "num_draft_tokens, logprobs, top_logprobs, seed, chat_template_kwargs)",
    "server:GenerationContext(has_tool_calling, has_thinking, tool_parser, text_sm, "
    "initial_state, prompt, prompt_cache_count, _should_stop)",
    "server:Response(text, token, logprob, finish_reason, top_tokens)",
]


def private_names(path):
    """The private names of others that a file imports, reads, writes or overrides."""
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.ImportFrom) and node.level == 0:
            names = [alias.name for alias in node.names]
        elif isinstance(node, ast.Attribute):
            names = [node.attr]
        elif isinstance(node, ast.FunctionDef):
            names = [node.name]
        else:
            continue
        yield from (name for name in names if re.match("_[^_]", name))


# What mlx-lm has to be like


def model_without_layers(inputs, cache):
    return mx.zeros((*inputs.shape, 4))


def start_generator(**kwargs):
    """Upstream's batch generator with one prompt, of which token 9 has been run."""
    generator = BatchGenerator(model_without_layers)
    options = dict(
        segments=[[[1, 2], [3, 4]]],
        max_tokens=[5],
        caches=[[]],
        all_tokens=[[9]],
        samplers=["sampler"],
        logits_processors=[["processor"]],
        stop_sequences=["stop"],
    )
    assert generator.insert_segments(**options | kwargs) == [0]
    return generator


def start_batch(cls=GenerationBatch, **kwargs):
    """A batch of one row that generates."""
    options = dict(
        model=model_without_layers,
        uids=[0],
        inputs=mx.array([1]),
        prompt_cache=[],
        tokens=[[9]],
        samplers=[None],
        fallback_sampler=lambda logprobs: mx.argmax(logprobs, axis=-1),
        logits_processors=[[]],
        stop_sequences=[StopSequences([(3,)])],
        max_tokens=[2],
    )
    return cls(**options | kwargs)


@pytest.mark.parametrize("expected", SIGNATURES, ids=lambda s: s.partition("(")[0])
def test_signatures_of_upstream(expected):
    name = expected.partition("(")[0]
    parameters = inspect.signature(resolve_name(f"mlx_lm.{name}")).parameters
    found = f"{name}({', '.join(parameters)})"
    assert found == expected, f"mlx-lm {mlx_lm.__version__} has {found}"


def private_members(tokenizer):
    """The private names that the doors use, and the objects that have to have them."""
    provider = ModelProvider(
        SimpleNamespace(
            model=None,
            adapter_path=None,
            draft_model=None,
            trust_remote_code=False,
            chat_template=None,
            pipeline=False,
        )
    )
    return {
        mlx_lm.server: "_image_url _make_logits_processors",
        mlx_lm.utils: "_download",
        transformers.utils.chat_template_utils: "_compile_jinja_template",
        start_generator(): "_counters _generation_batch _prompt_batch _stream "
        "_unprocessed_sequences",
        start_batch(): "_matchers _next_logprobs "
        "_next_tokens _num_tokens _step _token_context",
        provider: "_adapter_map _draft_model_map _model_map _tokenizer_config",
        _upstream.SingleGenerator(provider): "_is_distributed _serve_single "
        "_state_machine_cache _tokenize",
        tokenizer: "_chat_template _tokenizer",
    }


def test_private_names_that_the_doors_use_are_there(model_folder):
    members = private_members(mlx_lm.utils.load_tokenizer(model_folder()))
    for owner, names in members.items():
        for name in names.split():
            assert name in vars(owner) or hasattr(type(owner), name), (
                f"{owner} of mlx-lm {mlx_lm.__version__} or transformers "
                f"{transformers.__version__} has no {name}"
            )
    used = {name for path in DOORS for name in private_names(path)}
    listed = {name for names in members.values() for name in names.split()}
    assert used == listed, "this test lists other names than the doors use"


def test_prompt_that_has_not_begun_is_a_tuple_of_these_fields():
    (entry,) = start_generator()._unprocessed_sequences
    assert UnprocessedPrompt(*entry) == UnprocessedPrompt(
        uid=0,
        segments=[[1, 2], [3], [4]],
        max_tokens=5,
        cache=[],
        tokens=[9],
        sampler="sampler",
        logits_processors=("processor",),
        stop_sequences="stop",
    )


def test_progress_of_a_prompt_is_the_tokens_done_and_all():
    generator = start_generator(
        samplers=[None], logits_processors=[[]], stop_sequences=[StopSequences()]
    )
    responses = [generator.next()[0][0] for _ in range(3)]
    assert [
        (r.uid, r.progress, r.end_of_segment, r.end_of_prompt) for r in responses
    ] == [
        (0, (2, 4), True, False),
        (0, (3, 4), True, False),
        (0, (4, 4), True, True),
    ]


def test_caches_are_extracted_with_their_tokens_and_removed_at_each_stage():
    for n_steps, tokens in [(0, [9]), (1, [9, 1, 2]), (3, [9, 1, 2, 3, 4])]:
        generator = start_generator(
            samplers=[None], logits_processors=[[]], stop_sequences=[StopSequences()]
        )
        for _ in range(n_steps):
            generator.next()
        assert {
            uid: tuple(row) for uid, row in generator.extract_cache([0]).items()
        } == {0: ([], tokens)}
        generator.remove([0])
        assert generator.extract_cache([0]) == {}


def test_batch_runs_a_step_when_it_is_made_and_counts_those_of_next():
    """What ``LeanGenerationBatch`` relies on when it replaces ``_step``."""
    steps = []

    class Watched(GenerationBatch):
        def _step(self):
            steps.append(len(self.uids))
            return [7], ["logprobs"]

    batch = start_batch(Watched)
    assert (steps, batch._num_tokens) == ([1], [0])
    batch._next_logprobs = [None]
    (response,) = batch.next()
    assert (response.token, response.logprobs) == (7, "logprobs")
    assert (response.finish_reason, response.prompt_cache) == (None, None)
    assert batch._num_tokens == [1]
    (response,) = batch.next()
    assert (response.finish_reason, response.prompt_cache) == ("length", [])
    assert response.all_tokens == [9]
    assert (steps, batch.uids) == ([1, 1, 1], [])
    assert batch._matchers == batch._num_tokens == batch._token_context == []


def test_batch_ends_a_row_when_its_matcher_has_found_a_stop_sequence():
    class Stops(GenerationBatch):
        def _step(self):
            self._next_logprobs = [None]
            return [3], [None]

    (response,) = start_batch(Stops).next()
    assert (response.token, response.finish_reason) == (3, "stop")


def test_context_of_logits_processors_is_the_tokens_so_far():
    batch = start_batch()
    context = batch._token_context[0].update_and_fetch(mx.array([1]))
    assert context.tolist() == [9, 1]


@pytest.mark.parametrize(
    "request_type, messages", [("text", []), ("chat", [dict(role="user", content="a")])]
)
def test_tokenize_gives_prompt_segments_their_types_state_and_images(
    request_type, messages, model_folder
):
    provider = SimpleNamespace(
        cli_args=SimpleNamespace(chat_template_args={}), processor=None
    )
    generator = _upstream.SingleGenerator(provider)
    tokenizer = mlx_lm.utils.load_tokenizer(model_folder())
    request = CompletionRequest(request_type, "hello", messages, None, None)
    args = SimpleNamespace(chat_template_kwargs=None)
    prompt, segments, types, state, images = ResponseGenerator._tokenize(
        generator, tokenizer, request, args
    )
    assert prompt and sum(segments, []) == prompt
    assert len(types) == len(segments) and set(types) <= {"system", "user", "assistant"}
    assert (state, images) == ("normal", None)


def test_serving_alone_reads_no_attribute_that_is_not_set():
    """``SingleGenerator`` does not call the constructor of ``ResponseGenerator``."""
    generator = _upstream.SingleGenerator(SimpleNamespace(cli_args=None))
    todo, seen = ["_tokenize", "_serve_single"], set()
    while todo:
        source = inspect.getsource(getattr(ResponseGenerator, todo.pop()))
        for name in set(re.findall(r"self\.(\w+)", source)) - seen:
            seen.add(name)
            assert hasattr(
                generator, name
            ), f"ResponseGenerator of mlx-lm {mlx_lm.__version__} reads {name}"
            if inspect.isfunction(getattr(ResponseGenerator, name, None)):
                todo.append(name)
    assert {"model_provider", "prompt_cache"} < seen


def test_request_that_is_served_alone_is_a_queue_the_request_and_its_arguments():
    def tokenize(self, *args):
        raise ValueError(args)

    cls = type("Generator", (_upstream.SingleGenerator,), dict(_tokenize=tokenize))
    provider = SimpleNamespace(model=None, tokenizer=None, draft_model=None)
    queue = Queue()
    cls(provider)._serve_single((queue, "request", "arguments"), None)
    assert queue.get(timeout=60).args == ((None, "request", "arguments"),)


# What this package promises


def test_package_imports_no_mlx():
    code = "import sys, mlx_lm_ext; print('mlx.core' in sys.modules)"
    result = run_program([sys.executable, "-c", code])
    assert result.stdout == "False\n"


def test_files_say_what_they_are():
    for path in FILES:
        text = path.read_text()
        if text:
            assert ast.get_docstring(ast.parse(text)), path.name


@pytest.mark.parametrize(
    "version, good",
    [("0.32.2", True), ("0.32.10", True), ("0.32.1", False), ("0.33.0rc1", False)],
)
def test_other_series_of_upstream_are_refused(version, good, monkeypatch):
    monkeypatch.setattr(batch_server, "version", lambda name: version)
    if good:
        batch_server.check_mlx_lm()
    else:
        with pytest.raises(RuntimeError, match=version):
            batch_server.check_mlx_lm()
