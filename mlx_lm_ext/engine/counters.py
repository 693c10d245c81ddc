"""What the generation thread tells about itself."""

from dataclasses import dataclass, field
from typing import Dict


@dataclass
class Counters:
    """What has been done, and what there is. The generation thread writes it, and any thread
    may read it. For the fields see ``interfaces.ServerStatistics``."""

    n_running: int = 0
    generated_tokens: int = 0
    n_steps: int = 0
    step_seconds: float = 0.0
    batch_bytes: int = 0
    batch_limit: int = 0
    cache_bytes: int = 0
    cache_limit: int = 0
    evictions: Dict[str, int] = field(default_factory=dict)
    warm_up_left: int = 0
