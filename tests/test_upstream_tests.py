"""mlx-lm's own tests of its server and its caches, run against this package's."""

from pathlib import Path
from typing import NamedTuple

import pytest
from upstream_cases import make_hub, run_cases
from upstream_sources import upstream_sources

pytestmark = pytest.mark.slow
TESTS = Path(__file__).parent


class Listed(NamedTuple):
    """A case that fails because it asks for what this package does otherwise.

    Args:
        case (str): Its name.
        error (str): What its error contains. Another one is a fault.
        reason (str): Why it is right that it fails.
    """

    case: str
    error: str
    reason: str


# With RadixPromptCache in the place of LRUPromptCache.
NO_ARRAYS = "MockCache has no arrays, and the cache keeps no cache of an unknown type"
RADIX_PROMPT_CACHE = [
    Listed(
        "TestLRUPromptCache.test_caching",
        "2 != 1",
        "what two prompts share is an entry of its own",
    ),
    Listed(
        "TestLRUPromptCache.test_insert_empty_tokens_does_not_self_destruct",
        "0 != 1",
        NO_ARRAYS,
    ),
    Listed(
        "TestLRUPromptCache.test_insert_trimmable_cache_removes_immediate_prefix",
        "0 != 1",
        NO_ARRAYS,
    ),
    Listed("TestLRUPromptCache.test_lru", "None != [<test_server.MockCache", NO_ARRAYS),
    Listed("TestLRUPromptCache.test_lru_bytes", "0 != 3", NO_ARRAYS),
]

# With mlx_lm.batch_server in the place of mlx_lm.server: the cases that talk HTTP.
BATCH_SERVER = [
    Listed(
        "TestServer.test_health_endpoint",
        "'reason': 'the server is stopping'",
        "/health says why as well",
    ),
    Listed(
        "TestServerKVCacheQuantization.test_completion_quantizes_the_cache",
        "no attribute 'model_provider'",
        "it looks up the key of upstream's prompt cache in the objects of the server",
    ),
]

# With SegmentedKVCache, its tokens in segments, SlidingKVCache and their batches in the places of
# KVCache, RotatingKVCache and theirs.
BATCH_CACHES = [
    Listed(
        "TestPromptCache.test_batch_kv_cache",
        "(2, 1, 4, 8) != (2, 1, 2, 8)",
        "padding that all rows have stays until it is worth a copy of them",
    ),
    Listed(
        "TestPromptCache.test_batch_kv_cache_offset_not_mutated_in_place",
        "no attribute 'left_padding'",
        "the padding is in Python, in row_starts; the offsets before that are right",
    ),
    Listed(
        "TestPromptCache.test_batch_rotating_kv_cache",
        "[False, False, True, True, True, False, False, False]"
        " != [False, True, True, True, False, False, False]",
        "a token that has left the window stays for a while, and the mask hides it",
    ),
    Listed(
        "TestPromptCache.test_merge_with_empty_caches",
        "(2, 4, 256, 4) != (2, 4, 4, 4)",
        "merged arrays have room for the tokens that follow",
    ),
    Listed(
        "TestPromptCache.test_save_load_batch_caches",
        "Shapes (4,4,7,4) and (2,4,7,4) cannot be broadcast",
        "it writes four rows into a batch of two; and what joins a batch is never saved",
    ),
]


@pytest.fixture(scope="module")
def hub(tmp_path_factory):
    return make_hub(tmp_path_factory.mktemp("hub"))


@pytest.fixture
def check(tmp_path_factory, hub, tmp_path):
    """Checks that of a file of mlx-lm's tests, run with a plugin, the listed cases fail and no
    others."""

    def check(tests, plugin, listed):
        path = upstream_sources(tmp_path_factory) / "tests" / tests
        # Not in the folder of the sources, where the first mlx_lm is not the installed one.
        errors = run_cases(
            ["-p", f"upstream_plugins.{plugin}", path],
            path.parent,
            tmp_path / "results.xml",
            [TESTS, TESTS.parent],
            HF_HUB_CACHE=str(hub),
        )
        failed = {case: error for case, error in errors.items() if error}
        for case, error, reason in listed:
            assert error in failed.pop(case, "it has passed"), f"{case}: {reason}"
        assert failed == {}

    return check


def test_mlx_lm_server_with_the_radix_cache(check):
    check("test_server.py", "radix_prompt_cache", RADIX_PROMPT_CACHE)


def test_batch_server_in_the_place_of_mlx_lm_server(check):
    check("test_server.py", "batch_server", BATCH_SERVER)


def test_batch_caches_in_the_places_of_those_of_mlx_lm(check):
    check("test_prompt_cache.py", "batch_caches", BATCH_CACHES)
