"""Drawn graphs: valid after conversion, run, and equal but for half's rounding; integers equal to the last.

Graphs in nodes, constants that shapes and data share, arithmetic to indices, odd names, all in one draw.
"""

from __future__ import annotations

import random

import numpy as np
import pytest
from onnx import TensorProto, helper, numpy_helper

from scconv_deploy.runtimes.stand_in import stand_in
from scconv_deploy.verification.checks.half_range import RangeWatch
from tests.precision.made import assert_same, halved

NAMES = ["{}", "{}_half", "{}_float", "/layer.0/{}:0", "cast_{}_half", "{}_half_half"]
DRAWS = 25


class Drawn:
    """One model: float32 values of shape [4, 8] that operators are drawn for, in the main graph and in branches."""

    def __init__(self, seed: int) -> None:
        self.random, self.numbers = random.Random(seed), np.random.default_rng(seed)
        self.count, self.stored = 0, [numpy_helper.from_array(np.float32([2, 2]), "shared")]
        self.outputs = []
        x = self.value("x")
        nodes, values = self.graph([x], depth=0)
        ends = [*self.random.sample(values, min(3, len(values))), x]
        ints = [v for v in self.outputs if self.random.random() < 0.9]
        outputs = [helper.make_tensor_value_info(v, TensorProto.FLOAT, [4, 8]) for v in dict.fromkeys(ends)]
        outputs += [helper.make_tensor_value_info(v, TensorProto.INT64, None) for v in ints]
        inputs = [
            helper.make_tensor_value_info(x, TensorProto.FLOAT, [4, 8]),
            helper.make_tensor_value_info("rows", TensorProto.INT64, [4]),
        ]
        if self.random.random() < 0.2:
            inputs += [helper.make_tensor_value_info(t.name, t.data_type, list(t.dims)) for t in self.stored]
        graph = helper.make_graph(nodes, "g", inputs, outputs, self.stored)
        self.model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 18)], ir_version=10)
        self.feed = {x: self.numbers.normal(size=(4, 8)).astype(np.float32), "rows": np.int64([2041, 2047, 2051, 4099])}

    def value(self, base: str = "v") -> str:
        self.count += 1
        return self.random.choice(NAMES).format(f"{base}{self.count}")

    def constant(self, array) -> str:
        name = self.value("k")
        self.stored.append(numpy_helper.from_array(np.asarray(array), name))
        return name

    def graph(self, known: list[str], depth: int) -> tuple[list, list[str]]:
        nodes: list = []
        made: list[str] = []

        def put(op: str, *inputs: str, **attributes) -> str:
            output = self.value()
            name = self.random.choice(["", f"cast_{output}", f"/{output}"])
            nodes.append(helper.make_node(op, list(inputs), [output], name=name, **attributes))
            return output

        for _ in range(self.random.randint(2, 6)):
            a, b = (self.random.choice(known + made) for _ in range(2))
            made.append(self.step(put, a, b, known + made, depth))
        return nodes, made

    def step(self, put, a: str, b: str, known: list[str], depth: int) -> str:
        kind = self.random.choice(
            [
                "Mul",
                "Add",
                "Relu",
                "Softmax",
                "MatMul",
                "Identity",
                "shared",
                "index",
                "sequence",
                "If",
                "Where",
                "Loop",
            ]
        )
        if kind in ("Relu", "Softmax", "Identity"):
            return put(kind, a)
        if kind == "Mul":
            return put("Mul", a, self.constant(np.float32(self.random.uniform(0.5, 2))))
        if kind == "Add":
            return put("Mul", put("Add", a, b), self.constant(np.float32(0.5)))
        if kind == "MatMul":
            return put("MatMul", a, self.constant(self.numbers.normal(size=(8, 8)).astype(np.float32) / 3))
        if kind == "shared":  # a constant of 2s: factor of the data, and size of a tile
            tiled = put("Tile", a, put("Cast", "shared", to=TensorProto.INT64))
            half = put("Slice", tiled, self.constant(np.int64([0, 0])), self.constant(np.int64([4, 8])))
            return put("Mul", half, put("Gather", "shared", self.constant(np.int64(0))))
        if kind == "index":  # rows beyond what half can count to
            counted = put("Mul", put("Cast", "rows", to=TensorProto.FLOAT), self.constant(np.float32(1)))
            index = put("Cast", counted, to=TensorProto.INT64)
            if depth == 0:
                self.outputs.append(index)
            table = self.constant(np.linspace(-1, 1, 4100, dtype=np.float32))
            picked = put("Unsqueeze", put("Gather", table, index), self.constant(np.int64([1])))
            return put("Mul", put("Add", a, picked), self.constant(np.float32(0.5)))
        if kind == "sequence":
            parts = put("SplitToSequence", a, self.constant(np.int64(4)), axis=1)
            return put("Concat", *(put("SequenceAt", parts, self.constant(np.int64(i))) for i in (1, 0)), axis=1)
        if kind == "Where":  # a decision that rounding cannot change: on a sum of indices
            total = put("ReduceSum", put("Cast", "rows", to=TensorProto.FLOAT), keepdims=0)
            limit = self.constant(np.float32(10237 + self.random.choice([0.5, 1.5])))
            return put("Where", put("Greater", total, limit), a, b)
        if depth > 1:
            return put("Identity", a)
        if kind == "If":
            total = put("ReduceSum", put("Cast", "rows", to=TensorProto.FLOAT), keepdims=0)
            chosen = put("Greater", total, self.constant(np.float32(10237.5)))
            return put("If", chosen, **{f"{n}_branch": self.branch(known, depth) for n in ("then", "else")})
        return put("Loop", self.constant(np.int64(2)), "", a, body=self.body(known, depth))

    def branch(self, known: list[str], depth: int):
        nodes, made = self.graph(known, depth + 1)
        output = helper.make_tensor_value_info(made[-1], TensorProto.FLOAT, [4, 8])
        return helper.make_graph(nodes, self.value("branch"), [], [output])

    def body(self, known: list[str], depth: int):
        turn, on, carried, go = (self.value(base) for base in ("turn", "on", "carried", "go"))
        nodes, made = self.graph([*known, carried], depth + 1)
        nodes.append(helper.make_node("Identity", [on], [go]))
        return helper.make_graph(
            nodes, self.value("body"),
            [helper.make_tensor_value_info(turn, TensorProto.INT64, []),
             helper.make_tensor_value_info(on, TensorProto.BOOL, []),
             helper.make_tensor_value_info(carried, TensorProto.FLOAT, [4, 8])],
            [helper.make_tensor_value_info(go, TensorProto.BOOL, []),
             helper.make_tensor_value_info(made[-1], TensorProto.FLOAT, [4, 8])],
        )  # fmt: skip


@pytest.mark.parametrize("io", ["float32", "half"])
def test_drawn_graphs(io):
    converted = 0
    for seed in range(DRAWS):
        drawn = Drawn(seed)
        half, conversion = halved(drawn.model, io=io)
        converted += conversion.half
        assert [v.name for v in half.graph.output] == [v.name for v in drawn.model.graph.output], seed
        try:
            assert_same(drawn.model, half, rtol=2**-6, **drawn.feed)
            assert_same(drawn.model, stand_in(half), rtol=2**-6, **drawn.feed)
            watch = RangeWatch(drawn.model, half, "fp16")
            watch.add(drawn.feed)
            assert all(0 <= largest < 1e4 for largest in watch.largest.values())
        except Exception as error:
            raise AssertionError(f"draw {seed}") from error
    assert converted > 2 * DRAWS
