"""All architectures of which mlx-lm's own tests have a tiny model: what its prompts get in our
batches, with the prompt cache, is what ``generate_step`` gives to each of them alone.
"""

import ast
import random
from importlib import import_module
from types import SimpleNamespace

import mlx.core as mx
import pytest
from mlx.utils import tree_map
from mlx_lm.generate import StopSequences, generate_step
from mlx_lm.models.cache import make_prompt_cache
from upstream_sources import upstream_sources

from mlx_lm_ext.arguments import make_parser
from mlx_lm_ext.batch.batch import Batch
from mlx_lm_ext.cache.prompt_cache import RadixPromptCache
from mlx_lm_ext.engine.self_check import find_fault
from mlx_lm_ext.engine.warm_up import make_request
from mlx_lm_ext.policies.guard import Policies
from mlx_lm_ext.policies.loading import Plugins
from mlx_lm_ext.request.mailbox import Turnstile
from mlx_lm_ext.request.served_model import ServedModel

pytestmark = pytest.mark.slow

RIGHT = """
Klear afmoe apertus bailing_hybrid bailing_moe deepseek_v32 dots1 ernie4_5 ernie4_5_moe
exaone4 exaone_moe gemma3n gemma4 glm glm4 glm4_moe glm4_moe_lite granite granitemoe
granitemoehybrid helium kimi_k3 kimi_linear kimi_vl laguna lfm2-vl lille-130m
llama4_text longcat_flash mamba2 mimo mimo_v2_flash minimax minimax_m3_vl muse_glimmer
nanochat nemotron-nas olmo3 olmoe pixtral prism_hadamard_qwen35 qwen3_5 qwen3_5_moe
qwen3_next qwen3_vl qwen3_vl_moe seed_oss talkie telechat3 youtu_llm
""".split()
# Their batches are wrong in mlx-lm, and why.
WRONG = {
    "afm7": "layers that reuse KV rotate queries by their place in the padded batch",
    "baichuan_m1": "the convolution of keys and values goes on from the padding",
    "bailing_moe_linear": "padding changes the state of linear attention",
    "jamba": "padding changes the states of Mamba layers",
    "longcat_flash_ngram": "the n-grams of an answer begin with the padding",
    "nemotron_h": "the mask makes the state of a padded row zero",
    "rwkv7": "padding changes all states",
}
# The caches of these have no ``merge``: mlx-lm does not batch them.
UNBATCHABLE = ["llama4"]
# Smaller than in mlx-lm's tests, where a prompt takes seconds on a CPU.
SHRUNK = {
    "bailing_moe_linear": dict(hidden_size=128, moe_intermediate_size=64),
    "jamba": dict(mamba_expand=2, mamba_d_state=16),
    "nanochat": dict(num_hidden_layers=4),
    "pixtral": dict(hidden_size=256, intermediate_size=512),
}

N_COMMON = 17
LENGTHS = (2, 9, 40, 23, 31, 61)
# These begin with the same tokens.
ALIKE = (2, 3, 5)
N_TOKENS = 5
ARGS = make_parser().parse_args(["--model", "tiny"])


@pytest.fixture(scope="session")
def configs(tmp_path_factory):
    """The configurations in ``test_all_models`` of mlx-lm, by ``model_type``."""
    path = upstream_sources(tmp_path_factory) / "tests" / "test_models.py"
    (found,) = (
        statement.value
        for function in ast.walk(ast.parse(path.read_text()))
        if isinstance(function, ast.FunctionDef) and function.name == "test_all_models"
        for statement in function.body
        if isinstance(statement, ast.Assign)
        and ast.unparse(statement.targets) == "test_configs"
    )
    # Not all of it is literal.
    configs = eval(ast.unparse(found))
    return {config["model_type"]: config for config in configs}


def make_model(configs, name):
    config = configs[name]
    for part in (config, config.get("text_config", {})):
        if "vocab_size" in part:
            part["vocab_size"] = min(part["vocab_size"], 1000)
        part.update({k: v for k, v in SHRUNK.get(name, {}).items() if k in part})
    module = import_module(f"mlx_lm.models.{name}")
    mx.random.seed(0)
    model = module.Model(module.ModelArgs.from_dict(config))

    def disturb(x):
        # What is zero at first would hide all before it.
        if not mx.issubdtype(x.dtype, mx.floating):
            return x
        return (x + 0.02 * mx.random.normal(x.shape)).astype(mx.float32)

    model.update(tree_map(disturb, model.parameters()))
    model.eval()
    mx.eval(model.parameters())
    return model


def vocabulary_size(model):
    # It is not run.
    return model(mx.array([[0]])).shape[-1]


def make_prompts(n_vocabulary):
    rng = random.Random(0)
    tokens = range(2, n_vocabulary)
    common = rng.choices(tokens, k=N_COMMON)
    prompts = [rng.choices(tokens, k=n) for n in LENGTHS]
    for i in ALIKE:
        prompts[i][:N_COMMON] = common
    return prompts


def run_together(model, prompts, cache, n_vocabulary):
    """The tokens that the prompts get in one batch."""
    tokenizer = SimpleNamespace(eos_token_ids=set(), all_special_ids=[])
    served = ServedModel(
        key=("tiny", None, None),
        tokenizer=tokenizer,
        vocabulary_size=n_vocabulary,
        context_length=None,
        most_characters=None,
        takes_images=False,
        end_of_text=StopSequences(),
        sampling={},
    )
    provider = SimpleNamespace(describe=lambda model: served)
    policies = Policies(Plugins(autoload=False), ARGS)
    batch = Batch(model, tokenizer, ARGS, policies, cache, Turnstile())
    requests = [make_request(provider, ARGS, p, max_tokens=N_TOKENS) for p in prompts]
    for request in requests:
        batch.add(request)
    while batch:
        batch.step()
    assert not batch.take_failed()
    batch.close()
    return [request.generated for request in requests]


def run_alone(model, prompt):
    steps = generate_step(mx.array(prompt), model, max_tokens=N_TOKENS)
    return [token for token, _logprobs in steps]


def test_each_architecture_of_mlx_lm_is_known_here(configs):
    assert sorted([*RIGHT, *WRONG, *UNBATCHABLE]) == sorted(configs)


@pytest.mark.parametrize("name", RIGHT)
def test_prompts_together_get_what_each_gets_alone(name, configs):
    model = make_model(configs, name)
    n = vocabulary_size(model)
    prompts = make_prompts(n)
    expected = [run_alone(model, p) for p in prompts]
    cache = RadixPromptCache()
    assert run_together(model, prompts, cache, n) == expected
    assert len(cache)
    assert run_together(model, prompts, cache, n) == expected
    assert find_fault(model) == ""


@pytest.mark.parametrize("name", WRONG)
def test_wrong_batches_are_found(name, configs):
    assert "in a batch, the logits" in find_fault(make_model(configs, name))


@pytest.mark.parametrize("name", UNBATCHABLE)
def test_what_mlx_lm_does_not_batch_has_caches_that_cannot_be_merged(name, configs):
    caches = make_prompt_cache(make_model(configs, name))
    assert not all(hasattr(c, "merge") for c in caches)
