"""The contract with mlx-lm: every name, signature, list of fields and state of a cache that this
package uses, and how mlx-lm behaves where the package relies on it.

A failure says what is different in the installed mlx-lm, and which files use it. How to try
another release is in CONTRIBUTING.md. Modules of this package that may not fit that release are
imported in the tests that need them.
"""

import ast
import inspect
import re
from importlib import import_module
from importlib.metadata import version
from pathlib import Path
from pkgutil import resolve_name
from queue import Queue
from types import SimpleNamespace
from typing import Iterator, List, NamedTuple, Set

import mlx.core as mx
import mlx_lm
import pytest
import transformers
from mlx_lm import server
from mlx_lm.models import cache
from mlx_lm.utils import load_tokenizer

import mlx_lm_ext

# ``mlx_lm.generate`` is a function, too.
generate = import_module("mlx_lm.generate")

PACKAGE = Path(mlx_lm_ext.__file__).parent
FILES = sorted(PACKAGE.rglob("*.py"))
# The files that may use private names.
DOORS = [
    path
    for path in FILES
    if path.name == "upstream.py" or path == PACKAGE / "batch" / "generator.py"
]
VERSIONS = f"mlx-lm {mlx_lm.__version__}, transformers {transformers.__version__}"

# A module, and below it what is called, made, overridden or read of it:
# - a function, a method or a class and its parameters, "=" after those that may be left out;
#   dataclasses and named tuples by the order of their fields;
# - "has": attributes of an object;
# - "state is": the attributes that the state of a cache gives, in this order;
# - "=": a constant;
# - a name alone: it is there.
CONTRACT = """
mlx_lm
  load(path_or_hf_repo, tokenizer_config=, model_config=, adapter_path=, lazy=,
      return_config=, revision=, trust_remote_code=)

mlx_lm.generate
  BatchGenerator(model, *, max_tokens=, stop_tokens=, sampler=, logits_processors=,
      completion_batch_size=, prefill_batch_size=, prefill_step_size=, max_kv_size=,
      stream=)
  BatchGenerator has model sampler prefill_batch_size prefill_step_size
      prompt_cache_nbytes next_generated _counters _generation_batch _prompt_batch _stream
      _unprocessed_sequences
  BatchGenerator.insert_segments(self, segments, max_tokens=, caches=, all_tokens=,
      samplers=, logits_processors=, stop_sequences=)
  BatchGenerator.extract_cache(self, uids)
  BatchGenerator.remove(self, uids, return_prompt_caches=)
  BatchGenerator.close(self)
  PromptProcessingBatch(model, uids, caches, tokens=, prefill_step_size=, samplers=,
      fallback_sampler=, logits_processors=, stop_sequences=, max_tokens=)
  PromptProcessingBatch has model uids prompt_cache tokens samplers fallback_sampler
      logits_processors stop_sequences max_tokens extract_cache
  PromptProcessingBatch.empty(model, fallback_sampler, prefill_step_size=)
  PromptProcessingBatch.extend(self, batch)
  PromptProcessingBatch.filter(self, keep)
  PromptProcessingBatch.split(self, indices)
  PromptProcessingBatch.prompt(self, tokens)
  PromptProcessingBatch.generate(self, tokens)
  PromptProcessingBatch.Response(uid, progress, end_of_segment, end_of_prompt)
  GenerationBatch(model, uids, inputs, prompt_cache, tokens, samplers, fallback_sampler,
      logits_processors, stop_sequences, max_tokens)
  GenerationBatch has model uids prompt_cache tokens samplers fallback_sampler
      logits_processors stop_sequences max_tokens _matchers _next_logprobs _next_tokens
      _num_tokens _token_context
  GenerationBatch.extract_cache(self, idx)
  GenerationBatch.extend(self, batch)
  GenerationBatch.filter(self, keep)
  GenerationBatch.next(self)
  GenerationBatch._step(self)
  GenerationBatch.Response(uid, token, logprobs, finish_reason, prompt_cache, all_tokens)
  StopSequences(stop_sequences=)
  StopSequences.matcher(self)
  StopSequences.Matcher.advance(self, token)
  TextStateMachine(transitions=)
  TextStateMachine.make_state(self, initial=)
  TextStateMachine.split(state, text)
  TextStateMachine.flush(state)
  make_stop_sequences(tokenizer, stop_words=)
  make_text_state_machine(tokenizer, stop_words=)

mlx_lm.models.activations
  swiglu(gate, x)

mlx_lm.models.base
  create_causal_mask(N, offset=, window_size=, right_padding=, left_padding=)

mlx_lm.models.cache
  create_attention_mask(N, offset, return_array, window_size)
  dynamic_roll(x, shifts, axis)
  make_prompt_cache(model, max_kv_size=)
  KVCache()
  KVCache.state is keys values offset
  KVCache.step = 256
  KVCache has nbytes offset
  KVCache.from_state(state)
  KVCache.update_and_fetch(self, keys, values)
  KVCache.trim(self, n)
  KVCache.size(self)
  KVCache.empty(self)
  KVCache.merge(caches)
  RotatingKVCache(max_size, keep=)
  RotatingKVCache.state is keys values offset keep max_size _idx
  RotatingKVCache.step = 256
  RotatingKVCache has keep max_size
  RotatingKVCache.merge(caches)
  QuantizedKVCache(group_size=, bits=)
  QuantizedKVCache.state is keys values offset group_size bits
  QuantizedKVCache.step = 256
  QuantizedKVCache has group_size bits
  ChunkedKVCache(chunk_size)
  ChunkedKVCache.state is keys values offset chunk_size start_position
  ChunkedKVCache.step = 256
  ChunkedKVCache has chunk_size
  ArraysCache(size, left_padding=)
  ArraysCache.state is cache left_padding lengths
  ArraysCache has cache
  CacheList(*caches)
  CacheList has caches
  BatchKVCache(left_padding)
  BatchKVCache.step = 256
  BatchKVCache.update_and_fetch(self, keys, values)
  BatchKVCache.keys_and_values(self)
  BatchKVCache.prepare(self, *, left_padding=, lengths=, right_padding=)
  BatchKVCache.finalize(self)
  BatchKVCache.make_mask(self, N, return_array=, **kwargs)
  BatchKVCache.trim(self, n)
  BatchKVCache.size(self)
  BatchKVCache.empty(self)
  BatchKVCache.filter(self, batch_indices)
  BatchKVCache.extend(self, other)
  BatchKVCache.extract(self, idx)
  BatchKVCache.merge(caches)
  LRUPromptCache(max_size=, max_bytes=)
  LRUPromptCache has max_size max_bytes nbytes
  LRUPromptCache.__len__(self)
  LRUPromptCache.fetch_nearest_cache(self, model, tokens)
  LRUPromptCache.insert_cache(self, model, tokens, prompt_cache, *, cache_type=)
  LRUPromptCache.trim_to(self, *, n_sequences=, n_bytes=)
  LRUPromptCache.stats_by_type(self)

mlx_lm.models.mla
  MultiLinear(input_dims, output_dims, num_heads)
  QuantizedMultiLinear(input_dims, output_dims, num_heads, group_size, bits, mode)

mlx_lm.models.switch_layers
  SwitchLinear(input_dims, output_dims, num_experts, bias=)
  QuantizedSwitchLinear(input_dims, output_dims, num_experts, bias=, group_size=, bits=,
      mode=, global_scale=)

mlx_lm.processors
  PROCESSORS

mlx_lm.sample_utils
  make_logits_processors(logit_bias=, repetition_penalty=, repetition_context_size=,
      presence_penalty=, presence_context_size=, frequency_penalty=,
      frequency_context_size=)
  make_sampler(temp=, top_p=, min_p=, min_tokens_to_keep=, top_k=, xtc_probability=,
      xtc_threshold=, xtc_special_tokens=)

mlx_lm.server
  _image_url(part)
  _make_logits_processors(args)
  get_system_fingerprint()
  APIHandler(response_generator, *args, system_fingerprint=, **kwargs)
  APIHandler has body created object_type request_id requested_model
      response_generator do_GET do_OPTIONS do_POST
  APIHandler.handle_chat_completions(self)
  APIHandler.handle_text_completions(self)
  APIHandler.handle_health_check(self)
  APIHandler.handle_models_request(self)
  APIHandler.generate_response(self, text, finish_reason, prompt_token_count=,
      completion_token_count=, prompt_cache_count=, token_logprobs=, top_tokens=, tokens=,
      tool_calls=, reasoning_text=)
  APIHandler.completion_usage_response(self, prompt_token_count=,
      completion_token_count=, prompt_cache_count=)
  CompletionRequest(request_type, prompt, messages, tools, role_mapping)
  GenerationArguments(model, sampling, logits, stop_words, max_tokens, num_draft_tokens,
      logprobs, top_logprobs, seed, chat_template_kwargs)
  GenerationContext(has_tool_calling, has_thinking, tool_parser, text_sm, initial_state,
      prompt, prompt_cache_count=, _should_stop=)
  LogitsProcessorArguments(logit_bias, repetition_penalty, repetition_context_size,
      presence_penalty, presence_context_size, frequency_penalty,
      frequency_context_size)
  ModelDescription(model, draft, adapter)
  ModelProvider(cli_args)
  ModelProvider has cli_args model tokenizer draft_model model_key is_batchable
      _adapter_map _draft_model_map _model_map _tokenizer_config
  ModelProvider.load(self, model_path, adapter_path=, draft_model_path=)
  ModelProvider.reset(self)
  Response(text, token, logprob, finish_reason, top_tokens)
  ResponseGenerator has model_provider prompt_cache stop_and_join
      _is_distributed _rank _state_machine_cache
  ResponseGenerator._tokenize(self, tokenizer, request, args)
  ResponseGenerator._serve_single(self, request, stream)
  SamplingArguments(temperature, top_p, top_k, min_p, xtc_probability, xtc_threshold)
  ToolCallFormatter(tool_parser, tools, streaming=)
  ToolCallFormatter.__call__(self, tool_calls)

mlx_lm.tokenizer_utils
  StreamingDetokenizer has add_token finalize reset offset
  TokenizerWrapper(tokenizer, detokenizer_class=, eos_token_ids=, chat_template=,
      tool_call_start=, tool_call_end=, tool_parser=, response_format=)
  TokenizerWrapper has detokenizer eos_token_ids has_chat_template
      has_thinking has_tool_calling response_initial_state response_transitions
      think_start think_end think_start_tokens tool_call_start tool_call_end
      tool_parser _chat_template _tokenizer
  TokenizerWrapper.apply_chat_template(self, *args, tokenize=, **kwargs)
  TokenizerWrapper.rfind_think_start(self, tokens, start=, end=)
  TokenizerWrapper.rfind_think_end(self, tokens, start=, end=)

mlx_lm.utils
  _download(path_or_hf_repo, revision=, allow_patterns=)
  load_config(model_path)
  load_tokenizer(model_path, tokenizer_config_extra=, eos_token_ids=)

transformers
  PreTrainedTokenizerBase has apply_chat_template

transformers.utils.chat_template_utils
  _compile_jinja_template(chat_template)
"""


class Row(NamedTuple):
    """A row of the table: the module, the name in it, and what comes after the name."""

    module: str
    name: str
    rest: str

    @property
    def names(self) -> List[str]:
        """The names that a change of it could take away; the class for what Python calls."""
        own = self.name.removesuffix(".state").split(".")[-1]
        if self.rest.startswith(" has "):
            return self.rest.split()[1:]
        if re.fullmatch("__.*__", own):
            own = self.name.split(".")[-2]
        return [own]

    def __str__(self):
        return f"{self.module}:{self.name}{self.rest}"


def rows() -> Iterator[Row]:
    """The rows of the table."""
    module = ""
    for line in re.sub(r"\n {6}", " ", CONTRACT).splitlines():
        if line.startswith("  "):
            name, rest = re.fullmatch(r"([\w.]+)(.*)", line.strip()).groups()
            yield Row(module, name, rest)
        elif line:
            module = line


ROWS = list(rows())


def uses_of_file(path: Path) -> Set[str]:
    """The names that a file imports, reads, writes, calls or overrides."""
    found = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.ImportFrom):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.Attribute):
            found.add(node.attr)
        elif isinstance(node, ast.Name):
            found.add(node.id)
        elif isinstance(node, (ast.FunctionDef, ast.ClassDef)):
            found.add(node.name)
    return found


USES = {path.relative_to(PACKAGE).as_posix(): uses_of_file(path) for path in FILES}


def users(name: str) -> List[str]:
    """The files that use a name."""
    return [file for file, names in USES.items() if name in names]


def signature(function) -> str:
    """The parameters of a function, as in the table."""
    found, star = [], False
    for p in inspect.signature(function).parameters.values():
        name = p.name + ("" if p.default is p.empty else "=")
        if p.kind is p.KEYWORD_ONLY and not star:
            found.append("*")
            star = True
        star = star or p.kind is p.VAR_POSITIONAL
        stars = {p.VAR_POSITIONAL: "*", p.VAR_KEYWORD: "**"}.get(p.kind, "")
        found.append(stars + name)
    return f"({', '.join(found)})"


def has(cls, name: str) -> bool:
    """Whether objects of a class have an attribute: the class does, or its code sets it."""
    sources = (inspect.getsource(c) for c in cls.__mro__ if c.__module__ != "builtins")
    return hasattr(cls, name) or any(
        re.search(rf"self\.{name}\b[^=\n]*=[^=]|self\.{name},$", source, re.M)
        for source in sources
    )


def filled(cls):
    """A cache of a class, with the KV of three tokens."""
    options = {
        "RotatingKVCache": dict(max_size=8, keep=2),
        "QuantizedKVCache": dict(group_size=32, bits=4),
        "ChunkedKVCache": dict(chunk_size=8),
        "ArraysCache": dict(size=2),
    }
    made = cls(**options.get(cls.__name__, {}))
    x = mx.random.normal((1, 2, 3, 32))
    if hasattr(made, "update_and_fetch"):
        made.update_and_fetch(x, x)
    else:
        made[0] = made[1] = x
    return made


def state_names(cls, expected: List[str]) -> List[str]:
    """The attributes of a cache that its state gives, in this order, and that ``from_state``
    sets; "?" for what is none."""
    made = filled(cls)
    again = cls.from_state(made.state)
    found = []
    for i, value in enumerate(made.state):
        # ``None`` may be the value of several.
        names = [*expected[i : i + 1], *vars(made)]
        same = (n for n in names if getattr(made, n, made) is value)
        found.append(next((n for n in same if getattr(again, n) is value), "?"))
    return found


def found_in_upstream(row: Row) -> str:
    """What the installed release has in the place of a row: the row itself, if all is right."""
    name, rest = row.name.removesuffix(".state"), row.rest
    owner = resolve_name(f"{row.module}:{name}")
    if rest.startswith("("):
        rest = signature(owner)
    elif rest.startswith(" has "):
        rest = " ".join(["", "has", *(n for n in row.names if has(owner, n))])
    elif rest.startswith(" is "):
        rest = " ".join(["", "is", *state_names(owner, rest.split()[1:])])
    elif rest.startswith(" = "):
        rest = f" = {owner}"
    return str(row._replace(rest=rest))


def where_used(row: Row, name: str) -> List[str]:
    """The files that use a name of a row: if many do, those that name its class, too."""
    files = users(name)
    of_class = [f for f in files if f in users(row.name.partition(".")[0])]
    return of_class if of_class and len(files) > 8 else files


@pytest.mark.parametrize("row", ROWS, ids=lambda row: row.name + row.rest[:4].rstrip())
def test_upstream_is_as_in_the_table(row):
    try:
        found = found_in_upstream(row)
    except Exception as e:
        found = f"{row.module} in which this fails: {type(e).__name__}: {e}"
    if found != str(row):
        different = [n for n in row.names if n not in found.split()] or row.names
        used = (f"{n} is used in {', '.join(where_used(row, n))}" for n in different)
        lines = [VERSIONS, f"expected {row}", f"found    {found}", *used]
        pytest.fail("\n".join(lines), pytrace=False)


# The table itself


def test_table_has_nothing_that_no_file_uses():
    unused = {str(row): n for row in ROWS for n in row.names if not users(n)}
    assert not unused


def imported_names(path: Path) -> Iterator[str]:
    """What a file imports of mlx-lm."""
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.ImportFrom) and not node.level:
            if node.module.partition(".")[0] == "mlx_lm":
                yield from (f"{node.module}:{alias.name}" for alias in node.names)


def test_table_has_everything_that_is_imported():
    listed = {f"{row.module}:{row.name.partition('.')[0]}" for row in ROWS}
    assert {name for path in FILES for name in imported_names(path)} <= listed


def private_names(path: Path) -> Iterator[str]:
    """The private names of others that a file imports, reads, writes or overrides."""
    yield from (name for name in uses_of_file(path) if re.match("_[^_]", name))


def test_table_has_the_private_names_that_the_doors_use():
    listed = {n for row in ROWS for n in row.names if re.match("_[^_]", n)}
    assert {name for path in DOORS for name in private_names(path)} == listed


def names_of_mlx(path: Path) -> Iterator[str]:
    """The names of MLX that a file uses, as ``mlx.core:random.uniform``."""
    tree, modules = ast.parse(path.read_text()), {}
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            modules |= {a.asname: a.name for a in node.names if a.name[:4] == "mlx."}
        elif isinstance(node, ast.ImportFrom) and (node.module or "")[:4] == "mlx.":
            yield from (f"{node.module}:{alias.name}" for alias in node.names)
    for node in ast.walk(tree):
        if isinstance(node, ast.Attribute):
            root, *attributes = ast.unparse(node).split(".")
            if root in modules and all(map(str.isidentifier, attributes)):
                yield f"{modules[root]}:{'.'.join(attributes)}"


def test_mlx_has_every_name_that_is_used():
    missing = {}
    for path in FILES:
        for name in names_of_mlx(path):
            try:
                resolve_name(name)
            except (ImportError, AttributeError):
                missing.setdefault(name, set()).add(path.name)
    assert not missing, f"MLX {version('mlx')} lacks names, which these files use"


# How mlx-lm and MLX behave


def model_without_layers(inputs, cache):
    return mx.zeros((*inputs.shape, 4))


def start_generator(**kwargs):
    """Upstream's batch generator with one prompt, of which token 9 has been run."""
    generator = generate.BatchGenerator(model_without_layers)
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


def start_batch(cls=None, **kwargs):
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
        stop_sequences=[generate.StopSequences([(3,)])],
        max_tokens=[2],
    )
    return (cls or generate.GenerationBatch)(**options | kwargs)


def test_prompt_that_has_not_begun_is_a_tuple_of_these_fields():
    from mlx_lm_ext.batch.generator import UnprocessedPrompt

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
        samplers=[None],
        logits_processors=[[]],
        stop_sequences=[generate.StopSequences()],
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
            samplers=[None],
            logits_processors=[[]],
            stop_sequences=[generate.StopSequences()],
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

    class Watched(generate.GenerationBatch):
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
    class Stops(generate.GenerationBatch):
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
    from mlx_lm_ext.engine.upstream import SingleGenerator

    provider = SimpleNamespace(
        cli_args=SimpleNamespace(chat_template_args={}), processor=None
    )
    generator = SingleGenerator(provider)
    tokenizer = load_tokenizer(model_folder())
    request = server.CompletionRequest(request_type, "hello", messages, None, None)
    args = SimpleNamespace(chat_template_kwargs=None)
    prompt, segments, types, state, images = server.ResponseGenerator._tokenize(
        generator, tokenizer, request, args
    )
    assert prompt and sum(segments, []) == prompt
    assert len(types) == len(segments) and set(types) <= {"system", "user", "assistant"}
    assert (state, images) == ("normal", None)


def test_serving_alone_reads_no_attribute_that_is_not_set():
    """``SingleGenerator`` does not call the constructor of ``ResponseGenerator``."""
    from mlx_lm_ext.engine.upstream import SingleGenerator

    generator = SingleGenerator(SimpleNamespace(cli_args=None))
    todo, seen = ["_tokenize", "_serve_single"], set()
    while todo:
        source = inspect.getsource(getattr(server.ResponseGenerator, todo.pop()))
        for name in set(re.findall(r"self\.(\w+)", source)) - seen:
            seen.add(name)
            assert hasattr(
                generator, name
            ), f"ResponseGenerator of mlx-lm {mlx_lm.__version__} reads {name}"
            if inspect.isfunction(getattr(server.ResponseGenerator, name, None)):
                todo.append(name)
    assert {"model_provider", "prompt_cache"} < seen


def test_request_that_is_served_alone_is_a_queue_the_request_and_its_arguments():
    from mlx_lm_ext.engine.upstream import SingleGenerator

    def tokenize(self, *args):
        raise ValueError(args)

    cls = type("Generator", (SingleGenerator,), dict(_tokenize=tokenize))
    provider = SimpleNamespace(model=None, tokenizer=None, draft_model=None)
    queue = Queue()
    cls(provider)._serve_single((queue, "request", "arguments"), None)
    assert queue.get(timeout=60).args == ((None, "request", "arguments"),)


@pytest.mark.parametrize("name", ["KVCache", "RotatingKVCache", "ChunkedKVCache"])
def test_keys_and_values_have_the_tokens_on_the_last_axis_but_one(name):
    made = filled(getattr(cache, name))
    for x in (made.keys, made.values):
        n_rows, n_heads, n_tokens, head_dim = x.shape
        assert (n_rows, n_heads, head_dim) == (1, 2, 32) and n_tokens >= 3


def test_quantized_keys_and_values_are_weights_scales_and_biases():
    made = filled(cache.QuantizedKVCache)
    for quantized in (made.keys, made.values):
        weights, scales, biases = quantized
        # Eight values of 4 bits in each integer, and one group of 32.
        assert (weights.shape[-1], scales.shape[-1], biases.shape[-1]) == (4, 1, 1)


def test_cache_list_has_its_caches_in_one_attribute():
    first, second = cache.KVCache(), cache.ArraysCache(1)
    assert list(cache.CacheList(first, second).caches) == [first, second]


def test_upstream_asks_a_prompt_cache_for_its_bytes_by_a_property():
    assert isinstance(cache.LRUPromptCache.nbytes, property)


def test_what_is_written_into_a_slice_of_all_leaves_the_array_as_it_was():
    """The prompt cache hands out its arrays so."""
    x = mx.zeros(3)
    y = x[:]
    y[0] = 1
    assert (x.tolist(), y.tolist()) == ([0, 0, 0], [1, 0, 0])


def test_keys_of_random_numbers_give_the_same_for_one_row_as_for_all():
    keys = mx.array([[1, 2], [3, 4]], mx.uint32)

    def draw(key):
        return mx.random.uniform(shape=(5,), key=key)

    assert mx.vmap(draw)(keys).tolist() == [draw(key).tolist() for key in keys]
