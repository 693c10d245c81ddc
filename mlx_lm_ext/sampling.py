"""The built-in sampler: mlx-lm's, one call for rows with equal parameters."""

from dataclasses import astuple
from typing import Dict, List, Tuple

from mlx_lm.sample_utils import Sampler

from ._upstream import make_sampler
from .interfaces import BatchSampler
from .row_samplers import apply_by_rows


class DefaultSampler(BatchSampler):
    """Temperature, top-p, top-k, min-p and XTC, as mlx-lm's ``make_sampler`` does them."""

    name = "default"

    def __init__(self, args, request, tokenizer):
        key = astuple(request.args.sampling)
        self.keys: List[Tuple] = [key]
        self.samplers: Dict[Tuple, Sampler] = {
            key: make_sampler(request.args, tokenizer)
        }
        self.group()

    def group(self):
        """Find the rows of each sampler."""
        rows = {key: [] for key in self.samplers}
        for i, key in enumerate(self.keys):
            rows[key].append(i)
        self.parts = [(self.samplers[key], rows[key]) for key in rows]
        self.needs_logprobs = any(temperature for temperature, *_ in rows)

    def extend(self, other):
        self.keys += other.keys
        self.samplers |= other.samplers
        self.group()

    def filter(self, keep):
        self.keys = [self.keys[i] for i in keep]
        self.samplers = {key: self.samplers[key] for key in self.keys}
        self.group()

    def __call__(self, logprobs):
        return apply_by_rows(self.parts, logprobs)
