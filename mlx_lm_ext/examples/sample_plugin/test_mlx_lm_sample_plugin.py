"""The tests of the plugin: ``pip install pytest``, and ``pytest`` in this folder."""

from mlx_lm_sample_plugin import CostAware, Mirostat, StreamsFirst

from mlx_lm_ext.testing import (
    check_eviction_policy,
    check_sampler,
    check_scheduler_policy,
)

# The plugin need not be installed.
PLUGIN = ["-p", "mlx_lm_sample_plugin"]


def test_cost_aware_keeps_the_contract_of_eviction_policies():
    for weight in ("0", "1"):
        check_eviction_policy(CostAware, [*PLUGIN, "--cost-weight", weight])


def test_streams_first_keeps_the_contract_of_scheduler_policies():
    check_scheduler_policy(StreamsFirst)


def test_mirostat_keeps_the_contract_of_samplers():
    check_sampler(Mirostat, bodies=[{}, {"mirostat_tau": 0}, {"mirostat_tau": 3}])
