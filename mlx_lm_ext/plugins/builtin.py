"""Registers the built-in policies of ``policies/`` and the built-in sampler of ``sampling/``,
as any plugin registers its own."""

from typing import List, Type

from .. import hookimpl
from ..interfaces import BatchSampler, EvictionPolicy, SchedulerPolicy

# They are imported when they are asked for, because the command line is parsed before MLX
# is imported.


@hookimpl
def mlx_lm_register_eviction_policies() -> List[Type[EvictionPolicy]]:
    from ..policies.eviction import POLICIES

    return POLICIES


@hookimpl
def mlx_lm_register_scheduler_policies() -> List[Type[SchedulerPolicy]]:
    from ..policies.scheduling import POLICIES

    return POLICIES


@hookimpl
def mlx_lm_register_samplers() -> List[Type[BatchSampler]]:
    from ..sampling.default import DefaultSampler

    return [DefaultSampler]
