"""The kinds of draws of ``fuzz``: a command, what its end must be, and what to hold its artifact against."""

from __future__ import annotations

import json
import random
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal

import numpy as np
import onnx
import onnxruntime
import torch
from onnx import TensorProto, helper, numpy_helper
from torch import Tensor, nn

from benchmarks import fuzz_models

MODELS = str(Path(fuzz_models.__file__))
_NEAR = 1e-4
"""Relative to the largest value: float32 in another order is at 1e-6, every fault that is drawn beyond 1e-2."""
_JUMPS = 2e-3
"""Share of an output's elements that rounding at a gate may move: a thousand times what is seen."""


@dataclass(frozen=True)
class Outcome:
    """How a command ended: its exit code, all that it printed, and the folder that it worked in."""

    code: int
    text: str
    folder: Path


@dataclass(frozen=True)
class Draw:
    """One command.

    Attributes:
        arguments: of ``scconv-deploy``.
        expected: ``success``: refusing is a false alarm; ``refusal``: exit 0 is wrong; ``either``: refusing is allowed.
        compare: what is wrong with the artifact, in words; empty if nothing is.
        refusals: exit codes that a refusal may have.
        damaged: commands that must end with exit 6, after a success: (what was damaged, arguments).
    """

    arguments: tuple[str, ...]
    expected: Literal["success", "refusal", "either"]
    compare: Callable[[Outcome], str]
    refusals: tuple[int, ...] = (4,)
    damaged: Callable[[Outcome], Iterator[tuple[str, tuple[str, ...]]]] = field(default=lambda _: iter(()))


# --- sizes -------------------------------------------------------------------------------------------------------

_Truth = Literal["success", "refusal", "either"]


def _all_or_none(holds: bool) -> _Truth:
    return "success" if holds else "refusal"


SIZE_RULES: dict[str, tuple[tuple[int, ...], Callable[[range, int, int], _Truth]]] = {
    # axes, and (sizes, k, traced size) -> truth
    "plain": ((0, 3), lambda sizes, k, traced: "success"),
    "odd": ((3,), lambda sizes, k, traced: "refusal"),
    "above": ((0, 3), lambda sizes, k, traced: _all_or_none(k < sizes[0] or k >= sizes[-1])),
    "equal": ((0, 3), lambda sizes, k, traced: _all_or_none(k not in sizes)),
    "unrolled": ((0,), lambda sizes, k, traced: "refusal"),
    "capped": ((3,), lambda sizes, k, traced: "success" if k <= sizes[0] or k >= sizes[-1] else "either"),
    "upsampled": ((0, 3), lambda sizes, k, traced: "success"),
    "resized": ((0, 3), lambda sizes, k, traced: "success"),
    "unet": ((0, 3), lambda sizes, k, traced: "refusal"),
    "positional": ((3,), lambda sizes, k, traced: _all_or_none(sizes[-1] <= 64)),
    "averaged": ((0, 3), lambda sizes, k, traced: "success"),
    "scaled": ((3,), lambda sizes, k, traced: "either"),
    "numbered": ((3,), lambda sizes, k, traced: "success"),
    "cached": ((3,), lambda sizes, k, traced: "either"),
    "padded": ((3,), lambda sizes, k, traced: "either"),
    "flattened": ((0, 3), lambda sizes, k, traced: "success"),
    "baked": ((0, 3), lambda sizes, k, traced: "either"),
    "windows": ((3,), lambda sizes, k, traced: "refusal"),
}
"""What code does with a size, on which axes, and whether it can hold in all of a range. A U-Net's and a window's sizes
must be multiples, and every range that is drawn holds others too."""


def sizes(rng: random.Random, folder: Path) -> Draw:
    """A model whose code depends on a size, with that axis open."""
    rule = rng.choice(list(SIZE_RULES))
    axes, truth = SIZE_RULES[rule]
    axis, k = rng.choice(axes), rng.choice((2, 3, 4, 5, 7, 12, 20))
    low, traced, high = (rng.choice((1, 2)), rng.choice((2, 3)), rng.choice((4, 6, 9)))
    if axis == 3:
        low, traced, high = rng.choice((4, 8, 11)), rng.choice((12, 16)), rng.choice((17, 23, 40, 70))
    if rule == "unet" and axis == 0:
        expected: _Truth = "success"
    else:
        expected = truth(range(low, high + 1), k, traced)
    arguments = {"rule": rule, "k": k, "axis": axis, "seed": rng.randrange(1000)}
    opened = ["--batch", f"{low}:{traced}:{high}"] if axis == 0 else ["--dynamic", f"x:3={low}:{traced}:{high}"]
    command = rng.choice(("deploy", "export"))
    output = folder / ("out" if command == "deploy" else "out.onnx")
    shape = "2x3x8x16" if axis == 0 else f"1x3x8x{traced}"

    def compare(outcome: Outcome) -> str:
        run = _session(output / "model.onnx" if command == "deploy" else output)
        for size in range(low, high + 1):
            torch.manual_seed(size)
            x = torch.randn(*((size, 3, 8, 16) if axis == 0 else (2, 3, 8, size)))
            if axis == 3:
                x = x[:1]
            try:
                expected = fuzz_models.sizes(**arguments).eval()(x).detach().numpy()
            except (RuntimeError, ValueError) as error:
                return f"size {size}: PyTorch refuses it ({str(error).splitlines()[0][:60]})"
            if words := _differs(run, {"x": x.numpy()}, [expected]):
                return f"size {size}: {words}"
        return ""

    return Draw(
        (command, f"{MODELS}:sizes", "--kwargs", json.dumps(arguments), "--input", shape, *opened, "-o", str(output)),
        expected, compare, refusals=(4,),
    )  # fmt: skip


# --- gates -------------------------------------------------------------------------------------------------------


def gates(rng: random.Random, folder: Path) -> Draw:
    """A gate of a known form, or of none, in 1 to 3 axes; damaged copies of the artifact are judged too."""
    dims, groups = rng.choice((1, 2, 2, 2, 3)), rng.choice((1, 4, 16))
    arguments = {
        "channels": rng.choice((16, 24, 32)), "groups": groups, "dims": dims,
        "weight": rng.choice(("sum", "sum", "torch", "softmax", "abs", "one")),
        "comparison": rng.choice((">=", ">")), "threshold": rng.choice((0.5, 0.5, 0.45, 0.6)),
        "deviation": rng.choice(("unbiased", "unbiased", "biased", "groupnorm")),
        "apply": rng.choice(("multiply", "float", "where", "soft", "fill", "other")),
        "cross": rng.choice(("crossed", "crossed", "straight", "added")),
        "spread": rng.choice((0.0, 0.3, 1.0)), "cancel": rng.random() < 0.3, "seed": rng.randrange(1000),
    }  # fmt: skip
    if arguments["deviation"] == "groupnorm" and arguments["channels"] % groups:
        arguments["channels"] = 32  # torch's own refuses groups that straddle channels
    side = {1: "64", 2: "8x8", 3: "4x4x8"}[dims]
    return _gate_draw(rng, folder, "gated", arguments, f"2x3x{side}", damage=True)


def pooled(rng: random.Random, folder: Path) -> Draw:
    """An SRU behind a global pool: groups of one to a few elements."""
    channels, size = rng.choice((16, 32)), rng.choice((1, 1, 2))
    groups = rng.choice([g for g in (1, 4, 8, 16) if channels * size * size > g])
    arguments = {
        "size": size, "channels": channels, "groups": groups, "dims": 2, "weight": rng.choice(("sum", "softmax")),
        "comparison": rng.choice((">=", ">")), "threshold": 0.5,
        "deviation": rng.choice(("unbiased", "biased", "groupnorm")), "apply": rng.choice(("multiply", "soft")),
        "cross": "crossed", "spread": rng.choice((0.0, 0.3)), "cancel": False, "seed": rng.randrange(1000),
    }  # fmt: skip
    return _gate_draw(rng, folder, "pooled", arguments, f"2x{channels}x8x8", damage=False)


def _gate_draw(rng: random.Random, folder: Path, factory: str, arguments: dict, shape: str, *, damage: bool) -> Draw:
    output, inputs = folder / "out", tuple(map(int, shape.split("x")))
    named = (f"{MODELS}:{factory}", "--kwargs", json.dumps(arguments), "--input", shape)

    def compare(outcome: Outcome) -> str:
        run, model = _session(output / "model.onnx"), getattr(fuzz_models, factory)(**dict(arguments)).eval()
        for scale in (1e-2, 1.0, 30.0):
            torch.manual_seed(1)
            x = scale * torch.randn(*inputs)
            with torch.no_grad():
                expected = model(x).numpy()
            if words := _differs(run, {run.get_inputs()[0].name: x.numpy()}, [expected], jumps=_JUMPS):
                return f"inputs of {scale:g}: {words}"
        return ""

    def damaged(outcome: Outcome) -> Iterator[tuple[str, tuple[str, ...]]]:
        for index, name in enumerate(DAMAGE):
            model = onnx.load(output / "model.onnx")
            if not DAMAGE[name](model):
                continue
            path = folder / f"damaged{index}.onnx"
            onnx.save(model, path)
            yield name, ("verify", str(path), "--reference", *named)

    return Draw(
        ("deploy", *named, "-o", str(output)), "success", compare,
        damaged=damaged if damage else lambda _: iter(()),
    )  # fmt: skip


def _invert(model: onnx.ModelProto) -> bool:
    """The first comparison of the graph or of a function, turned round."""
    turned = {"GreaterOrEqual": "Less", "Greater": "LessOrEqual", "Less": "GreaterOrEqual", "LessOrEqual": "Greater"}
    for nodes in (model.graph.node, *(f.node for f in model.functions)):
        for node in nodes:
            if node.op_type in turned:
                node.op_type = turned[node.op_type]
                return True
    return False


def _weaken(model: onnx.ModelProto) -> bool:
    """The last convolution's weights a hundredth larger."""
    names = [node.input[1] for node in model.graph.node if node.op_type == "Conv"]
    tensor = next((t for t in model.graph.initializer if names and t.name == names[-1]), None)
    if tensor is None:
        return False
    tensor.CopyFrom(numpy_helper.from_array(numpy_helper.to_array(tensor) * np.float32(1.01), tensor.name))
    return True


DAMAGE: dict[str, Callable[[onnx.ModelProto], bool]] = {"comparison inverted": _invert, "weights moved": _weaken}


# --- checkpoints -------------------------------------------------------------------------------------------------


def checkpoints(rng: random.Random, folder: Path) -> Draw:
    """A state dict as trainers wrap it: nested, prefixed, doubled, partial."""
    channels, seed = rng.choice((4, 5, 6, 7)), rng.randrange(1000)
    torch.manual_seed(seed + 1)
    good = {key: _trained(value) for key, value in fuzz_models.branched(channels, seed).state_dict().items()}
    wrap, expected, options = _WRAPS[rng.choice(list(_WRAPS))](good, rng)
    suffix = rng.choice((".pt", ".pth", ".ckpt", ".pth.tar"))
    path, output = folder / f"weights{suffix}", folder / "out.onnx"
    torch.save(wrap, path)
    arguments = {"channels": channels, "seed": seed}

    def compare(outcome: Outcome) -> str:
        model = fuzz_models.branched(channels, seed).eval()
        model.load_state_dict(good)
        x = torch.randn(1, 3, 8, 8, generator=torch.Generator().manual_seed(0))
        run = _session(output)
        words = _differs(run, {run.get_inputs()[0].name: x.numpy()}, [model(x).detach().numpy()])
        if "--non-strict" in options and words:
            told = any(word in outcome.text.lower() for word in ("missing", "random", "initial", "not in the file"))
            return "" if told else f"nothing is said of what is missing: {words}"
        return words

    return Draw(
        ("export", f"{MODELS}:branched", "--kwargs", json.dumps(arguments), "--weights", str(path),
         "--input", "1x3x8x8", *options, "-o", str(output)),
        expected, compare, refusals=(2, 4),
    )  # fmt: skip


def _trained(value: Tensor) -> Tensor:
    return (torch.rand(value.shape) + 0.5).half().float() if value.is_floating_point() else value


def _other(good: dict[str, Tensor]) -> dict[str, Tensor]:
    return {key: value * 2 for key, value in good.items()}


def _prefixed(good: dict[str, Tensor], prefix: str) -> dict[str, Tensor]:
    return {prefix + key: value for key, value in good.items()}


def _half_of(good: dict[str, Tensor]) -> dict[str, Tensor]:
    return dict(list(good.items())[: len(good) // 2])


_Wrapped = tuple[object, _Truth, tuple[str, ...]]
_WRAPS: dict[str, Callable[[dict[str, Tensor], random.Random], _Wrapped]] = {
    "plain": lambda good, rng: (good, "success", ()),
    "nested": lambda good, rng: (
        {rng.choice(("state_dict", "model", "net", "params", "weights_of_run")): good, "epoch": 3}, "success", ()),
    "nested twice": lambda good, rng: ({"checkpoint": {"model": good}, "lr": 0.1}, "success", ()),
    "prefixed": lambda good, rng: (
        _prefixed(good, rng.choice(("module.", "model.", "_orig_mod.", "net.backbone.", "x."))), "success", ()),
    "prefixed and nested": lambda good, rng: (
        {"state_dict": _prefixed(good, "model.") | {"criterion.weight": torch.ones(3)}}, "success", ()),
    "beside tensors": lambda good, rng: (
        {"state_dict": good, "best": torch.tensor(71.3), "history": torch.ones(4)}, "success", ()),
    "beside an optimizer": lambda good, rng: (
        {"model": good, "optimizer": {"state": {0: {"exp_avg": torch.ones(3)}}, "param_groups": []}}, "success", ()),
    "averaged": lambda good, rng: (
        _prefixed(good, "module.") | {"n_averaged": torch.tensor(5)}, "success", ()),
    "two that differ": lambda good, rng: (
        {rng.choice(("model", "net")): _other(good), rng.choice(("ema", "model_ema")): good}, "refusal", ()),
    "two prefixes": lambda good, rng: (
        _prefixed(good, "student.") | _prefixed(_other(good), "teacher."), "refusal", ()),
    "two the same": lambda good, rng: ({"model": good, "ema": dict(good)}, "success", ()),
    "one of two fits": lambda good, rng: (
        {"generator": good, "discriminator": {"w": torch.ones(3, 3)}}, "success", ()),
    "partial": lambda good, rng: (_half_of(good), "refusal", ()),
    "partial, allowed": lambda good, rng: (_half_of(good), "success", ("--non-strict",)),
    "another network": lambda good, rng: ({"a.weight": torch.ones(3), "b": torch.ones(2, 2)}, "refusal", ()),
    "half": lambda good, rng: (
        {key: value.half() if value.is_floating_point() else value for key, value in good.items()}, "success", ()),
}  # fmt: skip


# --- half precision ------------------------------------------------------------------------------------------------


_BAR = 0.3  # below which the graph's values are cut off


def halves(rng: random.Random, folder: Path) -> Draw:
    """A float32 graph with subgraphs, casts and constants of several uses, converted to float16."""
    source, output = folder / "in.onnx", folder / "out.onnx"
    model, integers, lost = _graph(rng)
    onnx.save(model, source)

    def compare(outcome: Outcome) -> str:
        before, after = _session(source), _session(output)
        for seed in range(3):
            feeds = _feeds(before, seed)
            exact, half = before.run(None, feeds), after.run(None, feeds)
            for value, one, other in zip(model.graph.output, exact, half, strict=True):
                if value.name in integers and not np.array_equal(one, other):
                    return f"{value.name}: {int((one != other).sum())} of {one.size} entries differ"
                if value.name in integers:
                    continue
                other = other.astype(np.float32)
                if value.name == "where_y":  # what lies at the bar, rounding to half may decide otherwise
                    at_bar = np.abs(np.maximum(one, other) - _BAR) < 1e-2 * _BAR
                    one, other = one[~at_bar], other[~at_bar]
                if not _relative(one, other) <= 2e-2:
                    return f"{value.name}: {_relative(one, other):.1e} relative L2"
        return ""

    return Draw(
        ("convert", str(source), "-o", str(output), "--precision", "fp16"),
        "refusal" if lost else "success", compare, refusals=(6,) if lost else (4,),
    )  # fmt: skip


def _graph(rng: random.Random) -> tuple[onnx.ModelProto, set[str], bool]:
    """A graph on ``x [n, 3, 8, 8]``, its outputs that are looked up by number, and whether half must lose it."""
    draw = np.random.default_rng(rng.randrange(2**31))
    weights = [numpy_helper.from_array((draw.standard_normal((4, 3, 3, 3)) * 0.2).astype(np.float32), "w")]
    nodes = [helper.make_node("Conv", ["x", "w"], ["a"], pads=[1] * 4, name=rng.choice(("", "a", "/conv/Conv")))]
    inputs = [helper.make_tensor_value_info("x", TensorProto.FLOAT, [2, 3, 8, 8])]
    outputs: list[onnx.ValueInfoProto] = []
    integers: set[str] = set()
    lost = False

    def constant(name: str, value: object, dtype: type = np.float32) -> str:
        weights.append(numpy_helper.from_array(np.asarray(value, dtype), name))
        return name

    def give(name: str, kind: int = TensorProto.FLOAT) -> None:
        outputs.append(helper.make_tensor_value_info(name, kind, None))

    for part in rng.sample(("if", "shared", "rows", "where", "sequence", "names", "scaled", "masked", "shape"), 3):
        if part == "if":
            constant("zero", 0.0)
            constant("two", 2.0)
            then = helper.make_graph(
                [helper.make_node("Mul", ["a", "two"], ["p"]), helper.make_node("Relu", ["p"], ["p2"])], "then", [],
                [helper.make_tensor_value_info("p2", TensorProto.FLOAT, None)],
            )  # fmt: skip
            other = helper.make_graph(
                [helper.make_node("Identity", ["a"], ["q"])], "else", [],
                [helper.make_tensor_value_info("q", TensorProto.FLOAT, None)],
            )  # fmt: skip
            nodes += [
                helper.make_node("ReduceMax", ["a"], ["m"], keepdims=0),
                helper.make_node("Greater", ["m", "zero"], ["c"]),
                helper.make_node("If", ["c"], ["if_y"], then_branch=then, else_branch=other),
            ]
            give("if_y")
        elif part == "shared":
            constant("s", [1, 1, 2, 2])
            constant("i", 2, np.int64)
            nodes += [
                helper.make_node("Resize", ["a", "", "s"], ["big"]),
                helper.make_node("Gather", ["s", "i"], ["g"]),
                helper.make_node("Mul", ["big", "g"], ["shared_y"]),
            ]
            give("shared_y")
        elif part == "rows":
            constant("t", draw.standard_normal((5000, 4)))
            constant("step", rng.choice((1.0, 3.0)))
            inputs.append(helper.make_tensor_value_info("id", TensorProto.INT64, [64]))
            nodes += [
                helper.make_node("Cast", ["id"], ["f"], to=TensorProto.FLOAT),
                helper.make_node("Mul", ["f", "step"], ["f2"]),
                helper.make_node("Cast", ["f2"], ["at"], to=TensorProto.INT64),
                helper.make_node("Gather", ["t", "at"], ["rows_y"]),
            ]
            give("rows_y")
            give("at", TensorProto.INT64)
            integers.add("at")
        elif part == "where":
            constant("bar", _BAR)
            nodes += [
                helper.make_node("Greater", ["a", "bar"], ["open"]),
                helper.make_node("Cast", ["open"], ["openf"], to=TensorProto.FLOAT),
                helper.make_node("Mul", ["a", "openf"], ["where_y"]),
            ]
            give("where_y")
        elif part == "sequence":
            constant("n", 2, np.int64)
            constant("one", 1, np.int64)
            nodes += [
                helper.make_node("SplitToSequence", ["a", "n"], ["seq"], axis=1),
                helper.make_node("SequenceAt", ["seq", "one"], ["seq_y"]),
            ]
            give("seq_y")
        elif part == "names":
            nodes += [
                helper.make_node("Relu", ["a"], ["a__half"]),
                helper.make_node("Sigmoid", ["a__half"], ["a__float"]),
                helper.make_node("Add", ["a__float", "a__half"], ["names/y:0"]),
            ]
            give("names/y:0")
        elif part == "scaled":  # squares of values that half cannot hold, large again at the end
            small = rng.choice((2.0**-3, 2.0**-14))
            constant("small", small)
            constant("large", 1 / small)
            nodes += [
                helper.make_node("Mul", ["a", "small"], ["b"]),
                helper.make_node("Mul", ["b", "b"], ["bb"]),
                helper.make_node("Mul", ["bb", "large"], ["b3"]),
                helper.make_node("Mul", ["b3", "large"], ["scaled_y"]),
            ]
            give("scaled_y")
            lost = lost or small < 1e-3
        elif part == "masked":
            constant("low", np.triu(np.full((8, 8), -np.inf), 1))
            nodes += [
                helper.make_node("Add", ["a", "low"], ["scores"]),
                helper.make_node("Softmax", ["scores"], ["masked_y"], axis=-1),
            ]
            give("masked_y")
        else:
            constant("first", [2], np.int64)
            constant("rest", [-1], np.int64)
            constant("half_of", 0.5)
            nodes += [
                helper.make_node("Shape", ["a"], ["sh"]),
                helper.make_node("Gather", ["sh", "first"], ["h"]),
                helper.make_node("Cast", ["h"], ["hf"], to=TensorProto.FLOAT),
                helper.make_node("Mul", ["hf", "half_of"], ["hh"]),
                helper.make_node("Cast", ["hh"], ["hi"], to=TensorProto.INT64),
                helper.make_node("Concat", ["hi", "rest"], ["to"], axis=0),
                helper.make_node("Reshape", ["a", "to"], ["shape_y"]),
            ]
            give("shape_y")
    graph = helper.make_graph(nodes, "drawn", inputs, outputs, weights)
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 18)], ir_version=9)
    return onnx.shape_inference.infer_shapes(model), integers, lost


def _feeds(run: onnxruntime.InferenceSession, seed: int) -> dict[str, np.ndarray]:
    rng = np.random.default_rng(seed)
    feeds = {}
    for value in run.get_inputs():
        if value.type == "tensor(int64)":
            feeds[value.name] = rng.integers(0, 1600, value.shape)
        else:
            feeds[value.name] = rng.standard_normal(value.shape).astype(np.float32)
    return feeds


# --- rewriting ---------------------------------------------------------------------------------------------------


def rewrites(rng: random.Random, folder: Path) -> Draw:
    """A gate as TorchScript's exporter writes it, rewritten."""
    arguments = {
        "channels": rng.choice((16, 32)), "groups": rng.choice((4, 16)), "dims": rng.choice((2, 2, 2, 1, 3)),
        "weight": rng.choice(("sum", "torch", "softmax", "abs")), "comparison": rng.choice((">=", ">")),
        "threshold": rng.choice((0.5, 0.45)), "deviation": rng.choice(("unbiased", "groupnorm")),
        "apply": rng.choice(("multiply", "float", "where", "soft")), "cross": rng.choice(("crossed", "added")),
        "spread": rng.choice((0.0, 0.3)), "cancel": rng.random() < 0.3, "seed": rng.randrange(1000),
    }  # fmt: skip
    side = {1: "64", 2: "8x8", 3: "4x4x8"}[arguments["dims"]]
    model = fuzz_models.gated(**arguments).eval()
    source, output, shape = folder / "in.onnx", folder / "out.onnx", f"2x3x{side}"
    _torchscript(model, torch.zeros(*map(int, shape.split("x"))), source)
    with_reference = rng.random() < 0.5
    reference = ("--reference", f"{MODELS}:gated", "--kwargs", json.dumps(arguments), "--input", shape)

    def compare(outcome: Outcome) -> str:
        if output.read_bytes() == source.read_bytes():
            return ""  # its gate was refused, and the file left alone
        run = _session(output)
        x = torch.randn(*map(int, shape.split("x")), generator=torch.Generator().manual_seed(3))
        with torch.no_grad():
            return _differs(run, {run.get_inputs()[0].name: x.numpy()}, [model(x).numpy()], jumps=_JUMPS)

    # a gate that is left alone is no fault of the file: --expect 0 takes it
    command = ("rewrite", str(source), "-o", str(output), "--expect", "0", *(reference if with_reference else ()))
    return Draw(command, "success", compare)


def _torchscript(model: nn.Module, x: Tensor, path: Path) -> None:
    import contextlib
    import io
    import warnings

    with warnings.catch_warnings(), contextlib.redirect_stdout(io.StringIO()):
        warnings.simplefilter("ignore")
        torch.onnx.export(model, (x,), str(path), dynamo=False, opset_version=17)


# --- comparing ---------------------------------------------------------------------------------------------------


def _session(path: Path) -> onnxruntime.InferenceSession:
    options = onnxruntime.SessionOptions()
    options.log_severity_level = 4
    return onnxruntime.InferenceSession(str(path), options, providers=["CPUExecutionProvider"])


def _relative(expected: np.ndarray, found: np.ndarray) -> float:
    norm = float(np.linalg.norm(expected.astype(np.float64)))
    return float(np.linalg.norm((found - expected).astype(np.float64))) / (norm or 1.0)


def _differs(
    run: onnxruntime.InferenceSession, feeds: dict[str, np.ndarray], expected: list[np.ndarray], jumps: float = 0.0
) -> str:
    """How outputs differ from what is right, in words; a share ``jumps`` of the elements may be anything."""
    try:
        found = run.run(None, feeds)
    except Exception as error:  # onnxruntime's exceptions share no base class
        return f"ONNX Runtime cannot run it: {str(error).splitlines()[0][:100]}"
    for one, other in zip(expected, found, strict=True):
        if one.shape != other.shape:
            return f"shape {list(other.shape)}, expected {list(one.shape)}"
        largest = float(np.abs(one).max(initial=1e-30))
        beyond = float((~(np.abs(one - other) <= _NEAR * largest)).mean()) if one.size else 0.0
        if beyond > jumps:
            return f"{beyond:.2%} of the elements differ (largest by {np.abs(one - other).max() / largest:.1e})"
    return ""


KINDS: dict[str, Callable[[random.Random, Path], Draw]] = {
    "sizes": sizes,
    "gates": gates,
    "pooled": pooled,
    "checkpoints": checkpoints,
    "halves": halves,
    "rewrites": rewrites,
}
