"""Built-in scheduler policies: which request starts next."""

from .interfaces import SchedulerPolicy


class FCFS(SchedulerPolicy):
    """First come, first served; prompts are processed as fast as they can be."""

    name = "fcfs"
