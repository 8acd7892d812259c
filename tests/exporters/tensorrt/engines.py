"""Small ONNX models for engines, and recorded surfaces of TensorRT's versions."""

from __future__ import annotations

import json
import struct
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import onnx
from onnx import TensorProto, helper, numpy_helper

from scconv_deploy.graph.contract import FunctionKey, node_attributes
from scconv_deploy.graph.functions import function_proto

SURFACES = Path(__file__).parents[2] / "runtimes" / "tensorrt" / "surfaces"
VERSIONS = sorted(p.stem for p in SURFACES.glob("*.json"))


def surface(name):
    return json.loads((SURFACES / f"{name}.json").read_text())


class Recorded(SimpleNamespace):
    """A stand-in of a module; what is kept by module needs its hash."""

    __hash__ = object.__hash__
    __name__ = "tensorrt"


def recorded(name):
    """A module that has the recorded names and nothing else: an unknown one is an AttributeError, as it would be."""
    found = surface(name)
    classes = {c: SimpleNamespace(**dict.fromkeys(names)) for c, names in found["classes"].items()}
    return Recorded(__version__=found["version"], **classes)


def conv_model(operator="Conv", domain="", batch="N", channels=16):
    """One convolution, weights seeded."""
    weights = np.random.default_rng(0).standard_normal((channels, channels, 3, 3)).astype("float32")
    node = helper.make_node(operator, ["x", "w"], ["y"], name="conv0", domain=domain, pads=[1, 1, 1, 1])
    shape = [batch, channels, 8, 8]
    graph = helper.make_graph(
        [node], "g",
        [helper.make_tensor_value_info("x", TensorProto.FLOAT, shape)],
        [helper.make_tensor_value_info("y", TensorProto.FLOAT, shape)],
        [numpy_helper.from_array(weights, "w")],
    )  # fmt: skip
    opsets = [helper.make_opsetid("", 18)] + ([helper.make_opsetid(domain, 1)] if domain else [])
    return helper.make_model(graph, opset_imports=opsets, ir_version=10)


def sru_model(names=("block.sru",)):
    """SRUs in a row, each with its function; cut and sign seeded."""
    function = function_proto(FunctionKey("SRU", False, "where", 18))
    rng = np.random.default_rng(1)
    cut = numpy_helper.from_array(rng.standard_normal(8).astype("float32") * 0.1, "cut")
    sign = numpy_helper.from_array(np.ones(8, "float32"), "sign")
    nodes = [
        helper.make_node(
            "SRU", [f"x{i}" if i else "x", "cut", "sign"], [f"x{i + 1}"], domain="scconv", name=name,
            **node_attributes(4, 1, 0.0, 1e-10),
        )
        for i, name in enumerate(names)
    ]  # fmt: skip
    shape = ["N", 8, 8, 8]
    graph = helper.make_graph(
        nodes, "g",
        [helper.make_tensor_value_info("x", TensorProto.FLOAT, shape)],
        [helper.make_tensor_value_info(f"x{len(names)}", TensorProto.FLOAT, shape)],
        [cut, sign],
    )  # fmt: skip
    opsets = [helper.make_opsetid("", 18), helper.make_opsetid("scconv", 1)]
    return helper.make_model(graph, functions=[function], opset_imports=opsets, ir_version=10)


def elf_library(content=b""):
    """The bytes of a shared library with nothing in it: a header, an empty section, and what makes it another one."""
    header = struct.pack("<16sHHIQQQIHHHHHH", b"\x7fELF\x02\x01\x01", 3, 62, 1, 0, 0, 64, 0, 64, 56, 0, 64, 1, 0)
    return header + bytes(64) + content


def save(model, path):
    onnx.save(model, path)
    return path
