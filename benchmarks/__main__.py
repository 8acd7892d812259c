"""``python -m benchmarks NAME [options]``, from the root of the repository.

A benchmark is a module here with a docstring, ``add_arguments(parser)`` and ``run(options)``, which may return an exit
status, and one line below.
"""

from __future__ import annotations

import argparse
import importlib
import sys
from collections.abc import Sequence

BENCHMARKS = {
    "sru_ort": "one SRU in ONNX Runtime: naive export, ours, PyTorch; milliseconds and gates that flip",
    "sru_cpu": "the fused SRU on CPUs: beside naive export, function, torch.compile, one pass; networks; 10^8 gates",
    "resnet50_ort": "the whole ScConv-ResNet-50 in ONNX Runtime: naive export, ours, PyTorch",
    "cru_forms": "the CRU's forms: time in ONNX Runtime on one thread, and that outputs are equal",
    "retinanet": "RetinaNet-R50 in ONNX Runtime and PyTorch: boxes matched one to one on photographs, and time",
    "yolo": 'ultralytics checkpoints with ScConv: YOLO("model.onnx") beside YOLO("best.pt"), boxes one to one',
    "export_time": "processor time to export or deploy four networks, with ScConv beside plain; recognition apart",
    "verify_cost": "a full verification of ScConv-ResNet-50 against one PyTorch pass: time and memory",
    "healthy": "two hundred healthy exports and inputs, each of which must pass",
    "mutations": "ScConv-ResNet-20 damaged on purpose: which checks catch each fault",
    "int8_faults": "ScConv-ResNet in int8 damaged on purpose: which checks catch each fault, or why it is hidden",
    "int8_forms": "share of multiply-adds in int8 by the form of the CRUs",
    "receiver_curve": "healthy networks and planted faults in three types: error of the replay over its limit",
    "engine_noise": "the end-to-end limit of engines: healthy artifacts, and faults, as multiples of the noise",
    "rewrite_time": "seconds to rewrite naive TorchScript exports of several depths, or ScConv-ResNet-50",
    "rewrite_forms": "naive exports of ScConv-ResNet-20 in every form: SRUs fused, gates changed, parity with PyTorch",
    "read_by_behaviour": "SRUs of graphs read from their nodes and by behaviour: right, refused, wrong; seconds, lines",
    "build_time": "seconds to build a TensorRT-RTX engine of ScConv-ResNet-50 beside the plain ResNet-50",
    "plan_traffic": "bytes and launches of TensorRT-RTX's compiled plan: ScConv-ResNet-50 in every form beside plain",
    "half_error": "float16 and bfloat16 by converter: error of outputs, gates and SRUs, validity, size",
    "half_keep": "what keeping an operator in float32 is worth in a half file",
    "int8_digits": "a network trained on digits in every type: accuracy, gates, size, time; other tools beside",
    "int8_cpu": "int8 in ONNX Runtime on this CPU beside fp32: time, integer convolutions, what the kernels change",
    "gate_flips": "gates that differ from PyTorch over seeds, means and betas",
    "whose_sum": "near-cancelling gammas of 20,000: SRUs recognised, refused, taken for another, by order of the sum",
    "zoo_deploy": "deploy of each ScConv network of the zoo: verdict, flips, seconds",
    "sru_math": "the CUDA kernels' arithmetic on the CPU: gates that differ from PyTorch over 10^8",
    "sru_sass": "the CUDA kernels compiled for ten architectures: registers, spills, accesses, instructions an element",
    "fleet": "a run file on two cores against its cells' own work, the second run; rows on one Ray worker and two",
    "fuzz": "drawn models, checkpoints and graphs: exit codes and artifacts against the truth",
    "house": "the code itself: lines, long parameter lists, files that a model and an artifact visit",
    "sru_cuda": "the fused SRU on a GPU: measure (tests, times beside PyTorch and a copy), inspect (sanitizers, bytes)",
}


def main(arguments: Sequence[str]) -> int:
    """Run one benchmark, or list them; the exit status."""
    if not arguments or arguments[0] not in BENCHMARKS:
        for name, question in BENCHMARKS.items():
            print(f"{name:14} {question}")
        return 2 if arguments and arguments[0] not in ("-h", "--help") else 0
    name = arguments[0]
    try:
        module = importlib.import_module(f"{__package__}.{name}")
    except ModuleNotFoundError as error:  # a GPU's machine may have little of it
        print(f"not run: {name} needs {error.name}: pip install -e '.[test]', or {error.name} alone")
        return 3
    parser = argparse.ArgumentParser(
        prog=f"python -m benchmarks {name}",
        description=module.__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--seed", type=int, default=0, help="of weights and inputs (default 0)")
    parser.add_argument("--results", default=name, metavar="FILE", help="name below benchmarks/results (without .json)")
    module.add_arguments(parser)
    return module.run(parser.parse_args(arguments[1:])) or 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
