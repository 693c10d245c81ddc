"""Turns the weights of loaded models into the type with which their device is fast.

Rules:
1. What they will take is computed from shapes: nothing is converted that does not fit.
2. One layer is converted at a time and its old arrays are freed: the peak is what the new
   weights take, and one layer.
3. A model has one type, because a product of two types converts its weights at each step.
   No parameter that is not quantized loses bits, and those are left alone that the model's
   ``cast_predicate`` names, as in ``mlx_lm.convert``.
"""

import argparse
import logging
from functools import partial
from typing import Dict, Optional, Sequence, Set, Tuple

import mlx.core as mx
import mlx.nn as nn
from mlx.utils import tree_flatten, tree_unflatten
from mlx_lm.models.cache import make_prompt_cache
from mlx_lm.models.mla import MultiLinear, QuantizedMultiLinear
from mlx_lm.models.switch_layers import QuantizedSwitchLinear, SwitchLinear

from ..device import device_kind, give_back_freed, usable_memory
from ..distributed.group import ONE_PROCESS, OneProcess
from ..log import stage

logger = logging.getLogger(__name__)

# Devices on which quantized weights are slow.
SLOW_DEVICES = ("cuda", "cpu-linux")
# The layer that a quantized one becomes. Upstream's ``dequantize_model`` lacks two of these,
# takes subclasses for them, and makes all new weights before it frees the old ones.
PLAIN = {
    nn.QuantizedLinear: nn.Linear,
    nn.QQLinear: nn.Linear,
    nn.QuantizedEmbedding: nn.Embedding,
    QuantizedSwitchLinear: SwitchLinear,
    QuantizedMultiLinear: MultiLinear,
}
# Their parameters that become the weights of the plain layer.
PACKED = ("weight", "scales", "biases", "global_scale")
# The share of the memory that is left for KV, if no argument asks for more.
KV_SHARE = 1 / 10


def convert(
    models: Sequence[nn.Module],
    args: argparse.Namespace,
    group: OneProcess = ONE_PROCESS,
) -> None:
    """Convert models that are served together, as ``--dequantize`` says. Several ranks do it if
    all of them have room for it.

    Raises:
        MemoryError: If that was asked for, and does not fit.
    """
    kind = device_kind()
    is_slow = kind in SLOW_DEVICES
    if args.dequantize == "off" or (args.dequantize == "auto" and not is_slow):
        return
    conversions = [Conversion(model, kind.startswith("cpu")) for model in models]
    if kept := sorted({name for c in conversions for name in c.kept}):
        logger.info(f"Layers that stay quantized: {', '.join(kept)}")
    types = sorted({type_name(c.dtype) for c in conversions if c.dtype is not None})
    before = sum(c.n_before for c in conversions)
    after = sum(c.n_after for c in conversions)
    memory = usable_memory()
    room = max(
        int(memory * KV_SHARE),
        args.max_kv_bytes or 0,
        args.radix_cache_size if args.use_prompt_cache else 0,
        max(c.n_working for c in conversions),
    )
    name = " and ".join(types)
    has_room = bool(group.least(int(not types or after + room <= memory)))
    if not types:
        return
    if not has_room:
        figures = (
            f"in {name} the weights take {gigabytes(after)}, beside which KV needs "
            f"{gigabytes(room)}, and there are {gigabytes(memory)}"
        )
        if args.dequantize == "on":
            raise MemoryError(f"no room for --dequantize on: {figures}")
        logger.info(f"No room to convert the weights, so steps are slow: {figures}")
        return
    with stage(
        f"Converting the weights to {name} ({gigabytes(before)} -> {gigabytes(after)}; "
        "--dequantize off leaves them as they are)"
    ):
        for conversion in conversions:
            conversion.run()
    give_back_freed()


def type_name(dtype: mx.Dtype) -> str:
    return str(dtype).removeprefix("mlx.core.")


def gigabytes(n_bytes: int) -> str:
    return f"{n_bytes / 1e9:.2f} GB"


class Conversion:
    """What is to be done with one model.

    Args:
        model (nn.Module): A loaded model.
        to_float32 (bool): Whether all weights become float32. Otherwise only quantized ones
          are converted, to the type that the model computes in, if possible bfloat16.

    Attributes:
        dtype (Optional[mx.Dtype]): The new type; None if there is nothing to convert.
        kept (List[str]): The classes of quantized layers that cannot be converted.
        n_before, n_after (int): Bytes of the weights.
        n_working (int): Bytes that the largest layer takes in addition while it is converted.
    """

    def __init__(self, model: nn.Module, to_float32: bool):
        self.model = model
        modules = model.named_modules()
        quantized = {name: m for name, m in modules if type(m) in PLAIN}
        self.layers = set(quantized)
        self.kept = [type(m).__name__ for _, m in modules if is_packed(m)]
        packed = {f"{name}.{part}" for name in quantized for part in PACKED}
        parameters = dict(tree_flatten(model.parameters()))
        others = {name: a for name, a in parameters.items() if name not in packed}
        may_cast = getattr(model, "cast_predicate", lambda name: True)
        castable = {
            name: a
            for name, a in others.items()
            if mx.issubdtype(a.dtype, mx.floating) and may_cast(name)
        }
        self.dtype: Optional[mx.Dtype] = None
        self.cast: Set[str] = set()
        if to_float32:
            self.cast = {name for name, a in castable.items() if a.dtype.size == 2}
            self.dtype = mx.float32 if self.layers or self.cast else None
        elif self.layers:
            self.dtype, self.cast = choose_type(model, castable)
        self.n_before = self.n_after = sum(a.nbytes for a in parameters.values())
        self.n_working = 0
        if self.dtype is not None:
            sizes = [m.scales.size * m.group_size for m in quantized.values()]
            sizes += [a.size for name, a in others.items() if name in self.cast]
            rest = sum(a.nbytes for name, a in others.items() if name not in self.cast)
            self.n_after = sum(sizes) * self.dtype.size + rest
            self.n_working = max(sizes) * mx.float32.size

    def run(self) -> None:
        """Convert the model."""
        modules = [(n, m) for n, m in self.model.named_modules() if n in self.layers]
        # Taken out, so that nothing refers to those that are done.
        while modules:
            name, module = modules.pop()
            plain = dequantized(module, self.dtype)
            mx.eval(plain.parameters())
            self.model.update_modules(tree_unflatten([(name, plain)]))
        parameters = tree_flatten(self.model.parameters())
        parameters = [(name, a) for name, a in parameters if name in self.cast]
        while parameters:
            name, a = parameters.pop()
            a = a.astype(self.dtype)
            mx.eval(a)
            self.model.update(tree_unflatten([(name, a)]))


def is_packed(module: nn.Module) -> bool:
    """Whether it is a layer of packed weights that has no plain one."""
    weight = module.get("weight")
    return (
        isinstance(weight, mx.array)
        and not mx.issubdtype(weight.dtype, mx.floating)
        and type(module) not in PLAIN
    )


def logits_type(model: nn.Module) -> mx.Dtype:
    """The type in which a model computes. It is not run."""
    return model(mx.zeros((1, 1), mx.int32), cache=make_prompt_cache(model)).dtype


def choose_type(
    model: nn.Module, castable: Dict[str, mx.array]
) -> Tuple[mx.Dtype, Set[str]]:
    """The type for the quantized weights of a model: the one that it computes in, which can
    be float32 because of a few parameters.

    Args:
        model (nn.Module): The model; it is not run.
        castable (Dict[str, mx.array]): Its parameters that are not quantized, by name.

    Returns:
        The type, and the names of the parameters that have to be cast to it.
    """
    dtype = logits_type(model)
    if dtype != mx.float32:
        return dtype, set()
    wide = {name: a for name, a in castable.items() if a.dtype != mx.bfloat16}
    for a in wide.values():
        if not mx.array_equal(a.astype(mx.bfloat16).astype(a.dtype), a).item():
            return mx.float32, set()
    return mx.bfloat16, set(wide)


def dequantized(layer: nn.Module, dtype: mx.Dtype) -> nn.Module:
    """The plain layer for a quantized one. Its weights are rounded once, to ``dtype``."""
    scales, biases = layer["scales"], layer.get("biases")
    if biases is not None:
        # The scales of the other modes are no numbers, but packed too.
        scales, biases = scales.astype(mx.float32), biases.astype(mx.float32)
    dequantize = partial(
        mx.dequantize,
        group_size=layer.group_size,
        bits=layer.bits,
        mode=layer.mode,
        dtype=mx.float32,
    )
    weight, global_scale = layer["weight"], layer.get("global_scale")
    if global_scale is None:
        weight = dequantize(weight, scales, biases)
    else:
        experts = zip(weight, scales, global_scale)
        weight = mx.stack([dequantize(w, s, global_scale=g) for w, s, g in experts])
    plain = PLAIN[type(layer)](*weight.shape[::-1])
    plain.pop("bias", None)
    plain.weight = weight.astype(dtype)
    if "bias" in layer:
        plain.bias = layer.bias
    return plain
