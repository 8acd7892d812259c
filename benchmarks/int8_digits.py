"""int8 of a ScConv-ResNet that was really trained, on scikit-learn's digits: one table of all types and other tools.

NVIDIA's Model Optimizer pins other versions: MODELOPT_PYTHON names an interpreter that has nvidia-modelopt[onnx].
The files are made and judged with the project's own commands, which the results list. Half of the digits train the
network and calibrate, the other half is held out and judges. Other tools get the naive export, in float arithmetic too.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import os
import shlex
import time
from collections.abc import Iterator
from concurrent.futures import ProcessPoolExecutor
from multiprocessing import get_context
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import torch
from safetensors.torch import load_file, save_file
from typer.testing import CliRunner

from benchmarks import digits_network, int8_tools, subjects
from benchmarks.gates import eager_gates
from benchmarks.harness import Row, interleave, write
from scconv_deploy import cli
from scconv_deploy.graph.types import half_in
from scconv_deploy.runtimes.half import HalfRunner, runner_of, runs_here
from scconv_deploy.runtimes.onnxruntime import OnnxRuntimeRunner, RuntimeOptions
from scconv_deploy.verification.accuracy import PairedCounts
from scconv_deploy.verification.metrics import relative_l2

BATCH = 29
"""899 held-out rows are 31 batches; the naive export has a fixed batch."""
_HERE = RuntimeOptions(threads=1)
_MODEL = "benchmarks/digits_network.py:network --weights {0}/digits.safetensors --input 29x1x16x16"
_COMMANDS = {
    "fp32": "export {model} --opset 22 --batch 1:32:256 -o {0}/fp32.onnx",
    "fp16": "convert {0}/fp32.onnx --precision fp16 --data {0}/images.npz -o {0}/fp16.onnx",
    "bf16": "convert {0}/fp32.onnx --precision bf16 --data {0}/images.npz -o {0}/bf16.onnx",
    "int8": "quantize {0}/fp32.onnx --data {0}/train.npz -o {0}/int8.onnx",
    "int8+fp16": "quantize {0}/fp16.onnx --data {0}/train.npz -o {0}/int8_fp16.onnx",
    "int8, --target cpu": "quantize {0}/fp32.onnx --data {0}/train.npz --target cpu -o {0}/cpu.onnx",
    "int8, --target cpu --reduce-range":
        "quantize {0}/fp32.onnx --data {0}/train.npz --target cpu --reduce-range -o {0}/reduced.onnx",
}  # fmt: skip
_CALIBRATIONS = ("entropy", "percentile:99.99", "percentile:99.9")
_VERIFY = "verify {file} --reference {model} --data {0}/held.npz --deep 8"
_PROVED = ("fp32", "int8", "int8+fp16")
"""Files that are verified against the model on the held-out rows; of others, the command that makes them judges."""
_COLUMNS = {
    "file": "file",
    "accuracy": "accuracy",
    "against float: difference": "difference",
    "95 % interval": "interval",
    "SNR": "snr",
    "as ONNX Runtime runs it here": "accuracy_here",
    "gates changed, running free": "gates_free",
    "gates changed, on the same x": "gates_same",
    "unexplained gates, codes": "unexplained",
    "multiply-adds in int8": "multiply_adds",
    "size": "size_ratio",
    "faster than fp32": "speedup",
}


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--workers", type=int, default=1, help="processes that make files; times are taken afterwards")
    parser.add_argument("--rounds", type=int, default=15)
    parser.add_argument("--warmup", type=int, default=3)


def run(options: argparse.Namespace) -> None:
    torch.set_num_threads(1)  # of a network this small, two only wait for each other
    python = os.environ.get("MODELOPT_PYTHON", "")  # not an option, for the command is written into the results
    folder = subjects.CACHE / "int8_digits"
    folder.mkdir(parents=True, exist_ok=True)
    data = digits_network.digits(options.seed)
    np.savez(folder / "train.npz", image=data.images, labels=data.labels)
    np.savez(folder / "images.npz", image=data.images[:64])
    np.savez(folder / "held.npz", image=data.held_images, labels=data.held_labels)
    net, seconds = _trained(folder, data, options.seed)
    judge = _Judge(net, data)
    made = [_ours(name, folder, judge) for name in ("fp32", "fp16")]  # others are made of these
    with ProcessPoolExecutor(options.workers, get_context("spawn")) as pool:
        waiting = [pool.submit(_ours, name, folder, judge) for name in list(_COMMANDS)[2:]]
        waiting += [pool.submit(_calibrated, method, folder, judge) for method in _CALIBRATIONS]
        waiting += [pool.submit(_theirs, name, python, net, data, judge) for name in _TOOLS]
        made += [one.result() for one in waiting]
    rows = [row for row, _ in made]
    files = {row["file"]: model for row, model in made if model is not None}
    _add_times(rows, files, data.held_images[:BATCH], options)
    commands = {
        name: f"scconv-deploy {text.format('DIR', model=_MODEL.format('DIR'))}" for name, text in _COMMANDS.items()
    }
    write(
        options.results, rows, _COLUMNS,
        seed=options.seed, trained_on=len(data.images), held_out=len(data.held_images), training_s=seconds,
        parameters=sum(p.numel() for p in net.parameters()), gates=judge.gates, batch=BATCH, threads_of_latency=1,
        commands=commands, verify=f"scconv-deploy {_VERIFY.format('DIR', file='FILE', model=_MODEL.format('DIR'))}",
    )  # fmt: skip


def _trained(folder: Path, data: digits_network.Digits, seed: int) -> tuple[torch.nn.Module, float | None]:
    """The trained network, and the processor time of its training; kept for this code, seed and torch."""
    key = hashlib.sha256(Path(digits_network.__file__).read_bytes() + f"{seed} {torch.__version__}".encode())
    facts, weights = folder / "training.json", folder / "digits.safetensors"
    known = json.loads(facts.read_text()) if facts.exists() else {}
    if known.get("key") != key.hexdigest():
        start = time.process_time()
        net = digits_network.train(data, seed)
        known = {"key": key.hexdigest(), "seconds": time.process_time() - start}
        save_file({name: value.contiguous() for name, value in net.state_dict().items()}, weights)
        facts.write_text(json.dumps(known), encoding="utf-8")
    net = digits_network.network()
    net.load_state_dict(load_file(weights))
    return net.eval(), known["seconds"]


class _Judge:
    """Answers and gates of files on the held-out rows, beside PyTorch's in float."""

    def __init__(self, net: torch.nn.Module, data: digits_network.Digits) -> None:
        self._labels = data.held_labels
        self.images = data.held_images
        with torch.inference_mode():
            self.logits = torch.cat([net(torch.from_numpy(rows)) for rows in self.batches()]).numpy()
        self._gates = [[g.numpy() for g in eager_gates(net, torch.from_numpy(rows))] for rows in self.batches()]
        self.gates = sum(mask.size for masks in self._gates for mask in masks)

    def batches(self) -> Iterator[np.ndarray]:
        for start in range(0, len(self.images), BATCH):
            yield self.images[start : start + BATCH]

    def accuracy(self, runner: Any) -> Row:
        """Accuracy, and its difference from float with the paired interval."""
        counts, output = PairedCounts(), runner.outputs[0]
        logits = np.concatenate([runner.run({runner.inputs[0]: rows})[output] for rows in self.batches()])
        counts.add(self.logits, logits, self._labels)
        found = counts.accuracy()
        if found is None:
            raise RuntimeError("no row has a label")
        interval = f"{found.low:+.2%} to {found.high:+.2%}"
        return {"accuracy": f"{found.artifact:.2%}", "difference": f"{found.difference:+.2%}", "interval": interval}

    def snr(self, runner: Any) -> str:
        """Signal-to-noise ratio of the logits against float, all rows together."""
        logits = np.concatenate([runner.run({runner.inputs[0]: rows})[runner.outputs[0]] for rows in self.batches()])
        error = relative_l2(logits, self.logits)
        return f"{-20 * np.log10(error):.1f} dB" if error else "the same"

    def gates_free(self, model: onnx.ModelProto) -> str:
        """Gates of a file in its own arithmetic that differ from PyTorch's in float, of all."""
        inlined = onnx.inliner.inline_local_functions(model)
        names = [node.output[0] for node in inlined.graph.node if node.op_type == "GreaterOrEqual"]
        inlined.graph.output.extend(onnx.ValueInfoProto(name=name) for name in names)
        runner, changed = runner_of(inlined), 0
        for rows, expected in zip(self.batches(), self._gates, strict=True):
            found = runner.run({runner.inputs[0]: rows})
            changed += sum(int((found[name] != mask).sum()) for name, mask in zip(names, expected, strict=True))
        return f"{changed / self.gates:.3%}"


def _command(text: str, folder: Path) -> dict[str, Any]:
    """Run one of the project's commands in this process; its JSON."""
    arguments = shlex.split(text.format(folder, model=_MODEL.format(folder)))
    if arguments[0] != "verify":
        arguments.append("--force")
    found = CliRunner().invoke(cli.app, [*arguments, "--json"])
    if found.exit_code and (found.exit_code, arguments[0]) != (6, "verify"):
        raise RuntimeError(f"{text}: exit {found.exit_code}: {found.stderr}")
    return json.loads(found.stdout) | {"exit": found.exit_code}


def _ours(name: str, folder: Path, judge: _Judge) -> tuple[Row, onnx.ModelProto | None]:
    """Make, judge and measure a file by the project's commands."""
    torch.set_num_threads(1)
    made = _command(_COMMANDS[name], folder)
    file = Path(_COMMANDS[name].split()[-1].format(folder))
    report = _command(_VERIFY.replace("{file}", str(file)), folder) if name in _PROVED else made["report"]
    model = onnx.load(file)
    flips = [sru["teacher_forced"] for sru in report["srus"]]
    checks = {c["name"]: c for link in report["links"] for c in link["checks"]}
    codes = checks.get("codes", {"quantities": []})["quantities"]
    unexplained = [sum(f["unexplained"] for f in flips)]
    unexplained += [int(next(q["value"] for q in codes if q["tolerance"] == "unexplained_flips"))] if codes else []
    share = made.get("multiply_adds")
    row = {
        "file": name, "verdict": report["verdict"], **judge.accuracy(runner_of(model)), **_here(model, judge),
        "snr": judge.snr(runner_of(model)), "gates_free": judge.gates_free(model),
        "gates_same": f"{sum(f['flips'] for f in flips)}",
        "unexplained": ", ".join(map(str, unexplained)),
        "multiply_adds": f"{share[0] / share[1]:.1%}" if share else None,
        "size_ratio": file.stat().st_size / (folder / "fp32.onnx").stat().st_size, "bytes": file.stat().st_size,
        "integer_kernels": checks.get("integer kernels", {}).get("reason"),
        "budget": checks.get("budget", {}).get("reason"),
    }  # fmt: skip
    print(row, flush=True)
    return row, model


def _calibrated(method: str, folder: Path, judge: _Judge) -> tuple[Row, None]:
    """Measure int8 with another calibration."""
    file = f"{method.replace(':', '_')}.onnx"
    _command(f"{_COMMANDS['int8']} --calibration {method}".replace("int8.onnx", file), folder)
    model = onnx.load(folder / file)
    row = {"file": f"int8, --calibration {method}", **judge.accuracy(runner_of(model))}
    row |= {"gates_free": judge.gates_free(model), "snr": judge.snr(runner_of(model))}
    print(row, flush=True)
    return row, None


def _here(model: onnx.ModelProto, judge: _Judge) -> Row:
    """Accuracy as ONNX Runtime runs the file on this CPU, with all optimisations; empty if it cannot."""
    if not runs_here(model, _HERE):
        return {}
    return {"accuracy_here": judge.accuracy(_native(model))["accuracy"]}


def _native(model: onnx.ModelProto) -> OnnxRuntimeRunner | HalfRunner:
    if half_in(model) is None:
        return OnnxRuntimeRunner(model, _HERE)
    return HalfRunner(model, _HERE, native=True)


_TOOLS = {
    "": "naive export, fp32",
    "quantize_static": "naive export, ONNX Runtime's quantize_static",
    "modelopt": "naive export, NVIDIA Model Optimizer",
}


def _theirs(
    tool: str, python: str, net: torch.nn.Module, data: digits_network.Digits, judge: _Judge
) -> tuple[Row, onnx.ModelProto | None]:
    """Measure another tool's file, made with its defaults of the naive export."""
    torch.set_num_threads(1)
    naive = subjects.cached_naive_onnx(net, torch.from_numpy(data.images[:BATCH]))[0]
    given, rows = onnx.load_model_from_string(naive), data.images[: 8 * BATCH]
    try:
        model = given
        if tool == "modelopt":
            model = int8_tools.by_modelopt(python, given, rows, BATCH)
        elif tool:
            model = int8_tools.by_onnxruntime(given, rows, BATCH)
    except int8_tools.Unavailable as error:
        return {"file": _TOOLS[tool], "accuracy": str(error)}, None
    changed, total = int8_tools.gates_on_their_input(model, net, judge.batches())
    row = {
        "file": _TOOLS[tool], **judge.accuracy(runner_of(model)), **_here(model, judge),
        "snr": judge.snr(runner_of(model)), "gates_free": judge.gates_free(model),
        "gates_same": f"{changed:,} of {total:,}", "size_ratio": model.ByteSize() / len(naive),
        "bytes": model.ByteSize(),
    }  # fmt: skip
    print(row, flush=True)
    return row, model


def _add_times(
    rows: list[Row], files: dict[str, onnx.ModelProto], image: np.ndarray, options: argparse.Namespace
) -> None:
    """Processor time of one thread, all files in turns; one that the CPU provider cannot run has none."""
    runners = {name: _native(model) for name, model in files.items() if runs_here(model, _HERE)}
    calls = {name: (lambda one=one: one.run({one.inputs[0]: image})) for name, one in runners.items()}
    timing = interleave(calls, options.rounds, options.warmup, time.thread_time)
    for row in rows:
        if row["file"] in calls:
            row |= timing.row(row["file"], "fp32")
