"""What stands for the policies on the ranks that follow rank 0: it runs the plugins, and tells the
others what they have decided."""

import argparse
import time
from typing import Any, Dict, List

from ..cache.lru import LRU
from ..interfaces import SchedulerPolicy


class NoOrder(SchedulerPolicy):
    """Decides nothing."""

    name = "none"

    def overrides(self, method: str) -> bool:
        return False


class FollowerPolicies:
    """``Policies`` without plugins, none of which is asked for anything.

    Args:
        args (argparse.Namespace): The command line.
    """

    def __init__(self, args: argparse.Namespace):
        self.clock = time.monotonic
        self.scheduler = NoOrder(args, self.clock)
        self.eviction = LRU(args, self.clock)
        self.samplers: Dict[str, Any] = {}
        self.seconds: Dict[str, float] = {}

    def make_sampler(self, name: str, request: Any, tokenizer: Any) -> Any:
        raise NotImplementedError("rank 0 chooses the tokens")

    def make_logits_processors(self, request: Any, tokenizer: Any) -> List[Any]:
        raise NotImplementedError("rank 0 chooses the tokens")
