"""The built-in policies and the built-in sampler, registered as those of any plugin are."""

from .. import hookimpl

# They are imported when they are asked for, because the command line is parsed before MLX
# is imported.


@hookimpl
def mlx_lm_register_eviction_policies():
    from ..policies.eviction import POLICIES

    return POLICIES


@hookimpl
def mlx_lm_register_scheduler_policies():
    from ..policies.scheduling import POLICIES

    return POLICIES


@hookimpl
def mlx_lm_register_samplers():
    from ..sampling.default import DefaultSampler

    return [DefaultSampler]
