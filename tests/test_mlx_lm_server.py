"""``mlx_lm.server`` and mlx-lm's batches with this package's prompt cache."""

import random
import re
import socket
import sys
import threading
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import mlx.core as mx
import pytest
from helpers import LETTERS, Reference, call
from mlx_lm.generate import BatchGenerator
from mlx_lm.models.cache import make_prompt_cache
from patching import make_patched
from processes import join, read_until, started
from tiny_models import CONFIGS

from mlx_lm_ext.cache.prompt_cache import RadixPromptCache

ROOT = Path(__file__).parent.parent
(SCRIPT,) = re.findall(
    r"```python\n([^`]*server\.main\(\)\n)```", (ROOT / "README.md").read_text()
)
# What takes its place once mlx-lm has the patches.
SCRIPT_WITH_PATCHES = """
from mlx_lm.server import ModelProvider, run, setup_arg_parser

from mlx_lm_ext.cache.prompt_cache import RadixPromptCache

args = setup_arg_parser().parse_args()
cache = RadixPromptCache(args.prompt_cache_size)
run(args.host, args.port, ModelProvider(args), prompt_cache=cache)
"""
N_TOKENS = 12


def letters(n, rng):
    return "".join(rng.choices(LETTERS, k=n))


def prompts_of_unlike_lengths(seed=0):
    """What some prompts begin with, and prompts, half of which begin with it."""
    rng = random.Random(seed)
    common = letters(60, rng)
    tails = [letters(n, rng) for n in (40, 3, 7, 90, 25, 61)]
    return common, [common * (i % 2 == 0) + tail for i, tail in enumerate(tails)]


@pytest.mark.parametrize("architecture", CONFIGS)
def test_hits_and_misses_share_a_batch_of_mlx_lm(model_folder, architecture):
    reference = Reference(model_folder(architecture))
    model, encode = reference.model, reference.tokenizer.encode
    common, prompts = prompts_of_unlike_lengths()
    common, prompts = encode(common), [encode(p) for p in prompts]
    caches = make_prompt_cache(model)
    model(mx.array([common]), cache=caches)
    prompt_cache = RadixPromptCache()
    prompt_cache.insert_cache("model", common, caches)
    found = [prompt_cache.fetch_nearest_cache("model", p) for p in prompts]
    assert [caches is not None for caches, _ in found] == [True, False] * 3

    ends = [[t] for t in reference.tokenizer.eos_token_ids]
    generator = BatchGenerator(model, max_tokens=N_TOKENS, stop_tokens=ends)
    caches, rests = zip(*found)
    uids = generator.insert(list(rests), caches=list(caches))
    answers = {uid: [] for uid in uids}
    while responses := generator.next_generated():
        for r in responses:
            answers[r.uid].append(r.token)
    assert [*answers.values()] == [reference.tokens(p, N_TOKENS) for p in prompts]


@pytest.fixture(params=["released", "patched"])
def port(request, model_folder, tmp_path):
    """The port of ``mlx_lm.server``, as the script of the README starts it, or the one that takes
    its place."""
    is_patched = request.param == "patched"
    script = tmp_path / "radix_server.py"
    script.write_text(SCRIPT_WITH_PATCHES if is_patched else SCRIPT)
    # The folder of the script is the first one in which modules are looked for.
    if is_patched:
        make_patched(tmp_path)
    with socket.create_server(("127.0.0.1", 0)) as free:
        port = free.getsockname()[1]
    command = [sys.executable, script, "--model", model_folder(), "--port", str(port)]
    command += ["--prompt-cache-size", "1000", "--prompt-cache-bytes", "1GB"]
    with started(command) as process:
        read_until(process, "not recommended for production")
        # An unread pipe would block the server once it is full.
        reader = threading.Thread(target=process.stderr.read)
        reader.start()
        try:
            yield port
        finally:
            process.kill()
            join(reader)


@pytest.mark.slow
def test_script_of_the_readme_serves_from_the_prompt_cache(port, model_folder):
    reference = Reference(model_folder())

    def ask(prompt):
        body = dict(prompt=prompt, max_tokens=N_TOKENS)
        status, answer = call(port, "POST", "/v1/completions", body)
        assert status == 200, answer
        details = answer["usage"]["prompt_tokens_details"]
        return answer["choices"][0]["text"], details["cached_tokens"]

    common, prompts = prompts_of_unlike_lengths()
    assert ask(common) == (reference.text(common, N_TOKENS), 0)
    with ThreadPoolExecutor(len(prompts)) as pool:
        answers = [*pool.map(ask, prompts)]
    assert [text for text, _ in answers] == [
        reference.text(prompt, N_TOKENS) for prompt in prompts
    ]
    n_common = len(reference.tokenizer.encode(common))
    assert all(n >= n_common for _, n in answers[::2])
