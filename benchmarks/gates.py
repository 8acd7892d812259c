"""The gates that an SRU opened, read in PyTorch and in ONNX Runtime, so that they can be compared one by one."""

from __future__ import annotations

from collections.abc import Sequence

import onnx
import onnx.inliner
import torch
from torch import Tensor, nn

from benchmarks import subjects
from tests.wild import OriginalSRU


def eager_gates(model: nn.Module, x: Tensor) -> list[Tensor]:
    """Which gates PyTorch opens, SRU by SRU in the order of their calls; bool ``[N, C, H, W]`` each."""
    masks: list[Tensor] = []
    handles = [
        sru.sigomid.register_forward_hook(lambda _, __, r, t=sru.gate_treshold: masks.append(r >= t))
        for sru in model.modules()
        if isinstance(sru, OriginalSRU)
    ]
    with torch.inference_mode():
        model(x)
    for handle in handles:
        handle.remove()
    return masks


def ort_gates(data: bytes, x: Tensor) -> list[Tensor]:
    """The same of an ONNX model: its functions inlined, its comparisons made outputs."""
    model = onnx.inliner.inline_local_functions(onnx.load_model_from_string(data))
    names = [node.output[0] for node in model.graph.node if node.op_type == "GreaterOrEqual"]
    del model.graph.output[:]
    boolean = onnx.TensorProto.BOOL
    model.graph.output.extend(onnx.helper.make_tensor_value_info(name, boolean, None) for name in names)
    loaded = subjects.session(model.SerializeToString())
    return [torch.from_numpy(mask) for mask in loaded.run(None, {loaded.get_inputs()[0].name: x.numpy()})]


def count_changed(masks: Sequence[Tensor], expected: Sequence[Tensor]) -> int:
    """Gates that differ, over all SRUs."""
    return sum(int((mask != other).sum()) for mask, other in zip(masks, expected, strict=True))
