"""Checks that a plugin's policies and samplers keep the contract of ``interfaces.py``: for the
tests of the plugin. They need no server, no GPU and no model, and take a few seconds.

Each runs random traces, the same ones each time. What breaks the contract raises an
``AssertionError`` that names the method and the call, and says what would be right. Methods that
take long, and what is allowed but seldom meant, are warned about (``ContractWarning``)::

    from mlx_lm_ext.testing import check_eviction_policy

    def test_largest_first_keeps_the_contract():
        check_eviction_policy(LargestFirst)
"""

from .eviction import check_eviction_policy
from .samplers import check_sampler
from .scheduling import check_scheduler_policy
from .watching import ContractWarning

__all__ = [
    "ContractWarning",
    "check_eviction_policy",
    "check_sampler",
    "check_scheduler_policy",
]
