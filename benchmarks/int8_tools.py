"""Other tools' int8 files of a naive export, and what their gates do on the input that they read."""

from __future__ import annotations

import subprocess
import tempfile
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import onnx
import torch
from onnxruntime.quantization import CalibrationDataReader, quantize_static
from torch import nn

from scconv_deploy.runtimes.onnxruntime import OnnxRuntimeRunner, RuntimeOptions
from tests.wild import OriginalSRU

_CARRIES = ("Cast", "QuantizeLinear", "DequantizeLinear", "Identity")


class Unavailable(Exception):
    """The tool is not at hand, or gives no file."""


class _Rows(CalibrationDataReader):
    def __init__(self, name: str, rows: np.ndarray, batch: int) -> None:
        self._left = iter({name: rows[i : i + batch]} for i in range(0, len(rows) - batch + 1, batch))

    def get_next(self) -> dict[str, np.ndarray] | None:
        return next(self._left, None)


def by_onnxruntime(naive: onnx.ModelProto, rows: np.ndarray, batch: int) -> onnx.ModelProto:
    """ONNX Runtime's ``quantize_static`` with its default options."""
    with tempfile.TemporaryDirectory() as folder:
        output = Path(folder) / "int8.onnx"
        quantize_static(naive, output, _Rows(naive.graph.input[0].name, rows, batch))
        return onnx.load(output)


def by_modelopt(python: str, naive: onnx.ModelProto, rows: np.ndarray, batch: int) -> onnx.ModelProto:
    """NVIDIA Model Optimizer's int8 with its default options, in an interpreter that has it; it pins other versions."""
    if not python:
        raise Unavailable("not run: MODELOPT_PYTHON names no interpreter with nvidia-modelopt[onnx]")
    with tempfile.TemporaryDirectory() as folder:
        source, output, data = (Path(folder) / name for name in ("naive.onnx", "int8.onnx", "rows.npy"))
        onnx.save(naive, source)
        np.save(data, rows[: len(rows) // batch * batch])
        command = [python, "-m", "modelopt.onnx.quantization", "--quantize_mode", "int8", "--calibration_eps", "cpu"]
        command += ["--onnx_path", str(source), "--calibration_data_path", str(data), "--output_path", str(output)]
        ran = subprocess.run(command, capture_output=True, text=True, check=False)
        if not output.exists():
            raise Unavailable(f"no file: {(ran.stdout + ran.stderr).strip().splitlines()[-1][:160]}")
        return onnx.load(output)


def gates_on_their_input(model: onnx.ModelProto, net: nn.Module, batches: Iterator[np.ndarray]) -> tuple[int, int]:
    """(changed, all) gates of a naive export's SRUs, each compared with PyTorch's on the x that the file's SRU reads.

    Where x is quantised for a part of the SRU, that of its readings counts which agrees better with PyTorch.
    """
    srus = [module for module in net.modules() if isinstance(module, OriginalSRU)]
    places = list(_places(model))
    if len(places) != len(srus):
        raise RuntimeError(f"{len(places)} of {len(srus)} gates were found in the file")
    exposed = onnx.ModelProto.FromString(model.SerializeToString())
    names = list(dict.fromkeys(name for mask, reads in places for name in (mask, *reads)))
    del exposed.graph.output[:]
    exposed.graph.output.extend(onnx.ValueInfoProto(name=name) for name in names)
    runner = OnnxRuntimeRunner(exposed, RuntimeOptions(optimization="none"))
    changed = total = 0
    for rows in batches:
        found = runner.run({runner.inputs[0]: rows})
        for sru, (mask, reads) in zip(srus, places, strict=True):
            expected = [_gate(sru, found[name]) for name in reads]
            changed += min(int((found[mask] != one).sum()) for one in expected)
            total += found[mask].size
    return changed, total


def _gate(sru: OriginalSRU, x: np.ndarray) -> np.ndarray:
    masks: list[torch.Tensor] = []
    handle = sru.sigomid.register_forward_hook(lambda _, __, r: masks.append(r >= sru.gate_treshold))
    with torch.inference_mode():
        sru(torch.from_numpy(x.astype(np.float32)))
    handle.remove()
    return masks[0].numpy()


def _places(model: onnx.ModelProto) -> Iterator[tuple[str, list[str]]]:
    """(mask, readings of x) of each SRU, in the order of calls: x is what the mask is multiplied with."""
    made = {output: node for node in model.graph.node for output in node.output}
    for node in model.graph.node:
        if node.op_type != "GreaterOrEqual":
            continue
        value, read = node.output[0], ""
        while not read:
            user = next(one for one in model.graph.node if value in one.input)
            if user.op_type == "Mul":
                read = next(name for name in user.input if name != value)
            elif user.op_type not in _CARRIES:
                raise RuntimeError(f"the mask {node.output[0]} goes into {user.op_type}")
            value = user.output[0]
        reads = [read]
        while (source := made.get(reads[-1])) is not None and source.op_type in _CARRIES:
            reads.append(source.input[0])
        of_float = [name for name in reads if made.get(name) is None or made[name].op_type != "QuantizeLinear"]
        yield node.output[0], of_float
