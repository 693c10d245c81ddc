"""The tiny models of mlx-lm's own tests: a batch with the prompt cache gives each prompt the
tokens that it gets alone, or the self-check says that it would not."""

import ast
import importlib
import random
from types import SimpleNamespace

import mlx.core as mx
import pytest
from integrity import check
from mlx_lm.generate import StopSequences, generate_step
from mlx_lm.models.cache import make_prompt_cache
from upstream_sources import upstream_sources

from mlx_lm_ext.arguments import make_parser
from mlx_lm_ext.batch.batch import Batch
from mlx_lm_ext.cache.prompt_cache import RadixPromptCache
from mlx_lm_ext.engine.self_check import SelfCheck
from mlx_lm_ext.engine.warm_up import make_request
from mlx_lm_ext.policies.guard import Policies
from mlx_lm_ext.policies.loading import Plugins
from mlx_lm_ext.request.mailbox import Turnstile
from mlx_lm_ext.request.served_model import ServedModel

pytestmark = pytest.mark.slow

RIGHT = """
    Klear afmoe apertus baichuan_m1 bailing_hybrid bailing_moe deepseek_v32 dots1 ernie4_5
    ernie4_5_moe exaone4 exaone_moe gemma3n gemma4 glm glm4 glm4_moe glm4_moe_lite granite
    granitemoe granitemoehybrid helium kimi_k3 kimi_linear kimi_vl laguna lfm2-vl lille-130m
    llama4_text longcat_flash mamba2 mimo mimo_v2_flash minimax minimax_m3_vl muse_glimmer
    nanochat nemotron-nas olmo3 olmoe pixtral prism_hadamard_qwen35 qwen3_5 qwen3_5_moe
    qwen3_next qwen3_vl qwen3_vl_moe rwkv7 seed_oss talkie telechat3 youtu_llm
""".split()
# What mlx-lm's batch does wrong with rows that are padded. The patches mend it.
WRONG = {
    "afm7": "the last layers rotate queries by the length of the longest row",
    "bailing_moe_linear": "the linear attention goes on through the padding",
    "jamba": "the recurrent layers go on through the padding",
    "longcat_flash_ngram": "the padding counts as the last tokens",
    "nemotron_h": "the recurrent layers go on through the padding",
}
# The engine serves them one request at a time, because their caches cannot be merged.
NOT_BATCHED = ["llama4"]
# Sizes with which a test takes seconds.
SMALLER = {
    "jamba": {"mamba_expand": 2},
    "nanochat": {"num_hidden_layers": 2},
}
N_TOKENS = 8


@pytest.fixture(scope="module")
def configs(tmp_path_factory):
    """The configurations of ``test_all_models``, by the type of the model."""
    file = upstream_sources(tmp_path_factory) / "tests" / "test_models.py"
    for node in ast.walk(ast.parse(file.read_text())):
        names = [ast.unparse(t) for t in getattr(node, "targets", ())]
        if names == ["test_configs"]:
            found = eval(compile(ast.Expression(node.value), file, "eval"))
            return {config["model_type"]: config for config in found}


@pytest.fixture
def make_provider(configs):
    """Makes a model with random weights, as the engine sees one that it has loaded."""

    def make(architecture):
        config = configs[architecture] | SMALLER.get(architecture, {})
        module = importlib.import_module(f"mlx_lm.models.{architecture}")
        mx.random.seed(0)
        model = module.Model(module.ModelArgs.from_dict(config))
        mx.eval(model.parameters())
        served = ServedModel(
            key=(architecture, None, None),
            tokenizer=SimpleNamespace(eos_token_ids=set(), all_special_ids=[]),
            vocabulary_size=config["vocab_size"],
            context_length=None,
            most_characters=None,
            takes_images=False,
            end_of_text=StopSequences(),
            sampling={},
        )
        return SimpleNamespace(
            model=model,
            tokenizer=None,
            cli_args=make_parser().parse_args([]),
            describe=lambda name: served,
        )

    return make


def alone(model, prompt):
    """The tokens of a prompt, as ``mlx_lm.generate`` finds them."""
    steps = generate_step(mx.array(prompt), model, max_tokens=N_TOKENS)
    return [token for token, _ in steps]


def test_all_configurations_are_listed(configs):
    assert sorted(configs) == sorted([*RIGHT, *WRONG, *NOT_BATCHED])


@pytest.mark.parametrize("architecture", RIGHT)
def test_prompts_get_together_what_they_get_alone(architecture, make_provider):
    provider = make_provider(architecture)
    model, args = provider.model, provider.cli_args
    assert SelfCheck(provider).find_fault() == ""
    rng = random.Random(0)
    logits = model(mx.zeros((1, 1), mx.int32), cache=make_prompt_cache(model))
    tokens = range(min(256, logits.shape[-1]))
    common = rng.choices(tokens, k=24)
    prompts = [rng.choices(tokens, k=n) for n in (2, 7, 61)]
    prompts += [common + rng.choices(tokens, k=n) for n in (3, 9, 30)]
    expected = [alone(model, prompt) for prompt in prompts]
    policies = Policies(Plugins(autoload=False), args)
    batch = Batch(model, None, args, policies, RadixPromptCache(), Turnstile())
    for _ in range(2):
        requests = [
            make_request(provider, args, prompt, max_tokens=N_TOKENS)
            for prompt in prompts
        ]
        for request in requests:
            batch.add(request)
        while batch:
            batch.step()
        assert [request.generated for request in requests] == expected
    assert batch.prompt_cache.stats().hits >= len(prompts)
    check(batch.prompt_cache)
    batch.close()


@pytest.mark.parametrize("architecture", WRONG)
def test_the_check_finds_batches_that_are_wrong(architecture, make_provider):
    assert (
        "in a batch of two prompts"
        in SelfCheck(make_provider(architecture)).find_fault()
    )


@pytest.mark.parametrize("architecture", NOT_BATCHED)
def test_caches_that_cannot_be_merged_are_known(architecture, make_provider):
    caches = make_prompt_cache(make_provider(architecture).model)
    assert not all(hasattr(c, "merge") for c in caches)
