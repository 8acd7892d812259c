"""Weights of a model that was trained with fake quantisation, stored as the integers that training rounded them to."""

from __future__ import annotations

import numpy as np
import onnx_ir as ir
from torch import nn

from scconv_deploy.errors import ModelError
from scconv_deploy.model.fake_quantizers import SOURCE, quantized_layers


def store_trained_weights(model: ir.Model, swapped: nn.Module) -> int:
    """Replace float weights and the QuantizeLinear that reads them by PyTorch's codes, in place; return their number.

    ONNX Runtime divides by a scale where PyTorch multiplies by its reciprocal, so the codes are taken from PyTorch.

    Raises:
        ModelError: an exporter or simplifier left no QuantizeLinear, so that the layer would run in float.
    """
    graph, count = model.graph, 0
    for path, layer in quantized_layers(swapped):
        weight = graph.initializers.get(f"{path}.{SOURCE}")
        uses = [] if weight is None else list(weight.uses())
        if weight is None or any(use.node.op_type != "QuantizeLinear" for use in uses):
            raise ModelError(
                f"The graph does not round the weights of {path}, which was trained with fake quantisation.",
                "Report it with the model: its layer is of a kind that is not known here.",
            )
        name = f"{path}.weight_quantized"
        array = np.ascontiguousarray(layer.codes.numpy().astype(np.int8))
        tensor = ir.tensor(array, name=name)
        codes = ir.Value(name=name, type=ir.TensorType(tensor.dtype), shape=ir.Shape(array.shape), const_value=tensor)
        graph.initializers[name] = codes
        for use in uses:
            use.node.outputs[0].replace_all_uses_with(codes)
            graph.remove(use.node, safe=True)
        del graph.initializers[f"{path}.{SOURCE}"]
        count += 1
    return count
