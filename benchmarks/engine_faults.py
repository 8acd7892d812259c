"""Faults that an engine could have, made in an ONNX file of any precision; for :mod:`benchmarks.engine_noise`."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import onnx
import onnx.parser
from onnx import numpy_helper
from torch import nn

from scconv_deploy.graph import instrument
from scconv_deploy.graph.contract import FunctionKey
from scconv_deploy.graph.functions import function_text
from scconv_deploy.graph.types import Precision
from tests.mutations import (
    BIAS,
    GWC,
    SITE,
    ZERO_BETA,
    drop_layer,
    edit,
    gamma_changed,
    one_ulp,
    set_attribute,
    spoil,
    swap_outputs,
    tau_moved,
)


@dataclass(frozen=True)
class Fault:
    """Damage to a model (and the PyTorch one that it came from).

    Attributes:
        everywhere: whether the library would do it to an SRU alone as well.
        precisions: in which it is a fault.
    """

    damage: Callable[[onnx.ModelProto, nn.Module], None]
    everywhere: bool = False
    precisions: tuple[Precision, ...] = ("fp32", "fp16", "bf16")


def _in_body(old: str, new: str) -> Callable[[onnx.ModelProto, nn.Module], None]:
    """The meaning of every SRU with a part of its text replaced."""

    def damage(model: onnx.ModelProto, torch_model: nn.Module) -> None:
        opset = next(o.version for o in model.opset_import if not o.domain)
        text = function_text(FunctionKey("SRU", False, "where", opset))
        if text.count(old) != 1:
            raise ValueError(f"{old!r} is not once in the body")
        del model.functions[:]
        model.functions.append(onnx.parser.parse_function(text.replace(old, new)))

    return damage


def _of_site(name: str, value: float) -> Callable[[onnx.ModelProto, nn.Module], None]:
    def damage(model: onnx.ModelProto, torch_model: nn.Module) -> None:
        if SITE in instrument.sites(model):
            set_attribute(model, name, value)

    return damage


def _cut(
    change: Callable[[onnx.ModelProto, nn.Module], None], site: str = SITE
) -> Callable[[onnx.ModelProto, nn.Module], None]:
    """A fault of one cut, which an SRU alone of another site does not hold."""
    return lambda model, torch_model: change(model, torch_model) if site in instrument.sites(model) else None


def _weight(name: str, change: Callable[[np.ndarray], np.ndarray]) -> Callable[[onnx.ModelProto, nn.Module], None]:
    """A weight in float32, changed, and rounded to its type again."""

    def changed(weight: np.ndarray) -> np.ndarray:
        return change(weight.astype(np.float32)).astype(weight.dtype)

    return lambda model, torch_model: edit(model, name, changed)


def _moved(relative: float) -> Callable[[np.ndarray], np.ndarray]:
    """One element, by a part of the whole weight's norm."""

    def move(weight: np.ndarray) -> np.ndarray:
        weight.flat[7] += relative * np.linalg.norm(weight)
        return weight

    return move


def _weights_in_ten_bits(model: onnx.ModelProto, torch_model: nn.Module) -> None:
    """Of every convolution, as TF32 reads them."""
    names = {node.input[1] for node in model.graph.node if node.op_type == "Conv"}
    for tensor in model.graph.initializer:
        if tensor.name in names:
            bits = numpy_helper.to_array(tensor).view(np.uint32).astype(np.uint64)
            rounded = ((bits + 0x1000) & 0xFFFFE000).astype(np.uint32).view(np.float32)
            tensor.CopyFrom(numpy_helper.from_array(rounded, tensor.name))


_CENTRED = "sru__centred = Sub (sru__xf, sru__mean0_c)"
_CENTRED_IN_HALF = """sru__wide_centred = Sub (sru__xf, sru__mean0_c)
    sru__half_centred = Cast <to = 10> (sru__wide_centred)
    sru__centred = Cast <to = 1> (sru__half_centred)"""
_DEVIATION = "sru__s = Add (sru__deviation, sru__eps_std)"
_DEVIATION_IN_HALF = """sru__wide_s = Add (sru__deviation, sru__eps_std)
    sru__half_s = Cast <to = 10> (sru__wide_s)
    sru__s = Cast <to = 1> (sru__half_s)"""

FAULTS = {
    "gate inverted": Fault(_in_body("GreaterOrEqual (", "Less ("), everywhere=True),
    "> for >=": Fault(_in_body("GreaterOrEqual (", "Greater ("), everywhere=True),
    "halves not crossed": Fault(_in_body("value_ints = [1, 0]", "value_ints = [0, 1]"), everywhere=True),
    "gates compare centred data rounded to float16": Fault(_in_body(_CENTRED, _CENTRED_IN_HALF), everywhere=True),
    "deviation rounded to float16": Fault(_in_body(_DEVIATION, _DEVIATION_IN_HALF), everywhere=True),
    "biased for unbiased deviation, one SRU": Fault(_of_site("ddof", 0), everywhere=True),
    "eps 1e-5 for 1e-10, one SRU": Fault(_of_site("eps_std", 1e-5), everywhere=True),
    "eps 1e-3 for 1e-10, one SRU": Fault(_of_site("eps_std", 1e-3), everywhere=True),
    "wrong group count, one SRU": Fault(_of_site("num_groups", 8), everywhere=True),
    "tau off by one ulp, one SRU": Fault(
        _cut(lambda m, t: tau_moved(m, t, one_ulp, ZERO_BETA), ZERO_BETA), everywhere=True
    ),
    "tau off by 1e-3, one SRU": Fault(
        _cut(lambda m, t: tau_moved(m, t, lambda tau: tau + np.float64(1e-3))), everywhere=True
    ),
    "one channel's gamma changed by 1e-3": Fault(gamma_changed),
    "one weight changed by 1e-4 of its norm": Fault(_weight(GWC, _moved(1e-4))),
    "one weight changed by 1e-3 of its norm": Fault(_weight(GWC, _moved(1e-3))),
    "one weight changed by 1e-2 of its norm": Fault(_weight(GWC, _moved(1e-2))),
    "one weight changed by 1e-1 of its norm": Fault(_weight(GWC, _moved(1e-1))),
    "a bias 1 % larger": Fault(_weight(BIAS, lambda bias: bias * np.float32(1.01))),
    "a head's weight 1 % larger": Fault(_weight("second.weight", lambda weight: weight * np.float32(1.01))),
    "weights of convolutions in TF32": Fault(_weights_in_ten_bits, precisions=("fp32",)),
    "a ReLU dropped": Fault(lambda m, t: drop_layer(m)),
    "outputs swapped": Fault(lambda m, t: swap_outputs(m)),
    "NaN in one output": Fault(_weight("second.bias", spoil)),
}
"""On the network of ``tests/mutations.py``."""
