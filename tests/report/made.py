"""Reports made by hand: one that holds everything, one whose every name is hostile."""

from __future__ import annotations

from dataclasses import replace

from scconv_deploy.records.accuracy import Accuracy
from scconv_deploy.records.engine import PlanTraffic
from scconv_deploy.records.gates import FlipCount, Refusal
from scconv_deploy.records.metrics import OutputMetrics
from scconv_deploy.records.parity import (
    Check,
    EngineOutput,
    EngineParity,
    FreeRunning,
    Histogram,
    Latency,
    LayerError,
    Link,
    OutputParity,
    ParityReport,
    Quantity,
    SRUParity,
    WorstInput,
)
from scconv_deploy.records.stage import StageRecord
from scconv_deploy.records.tolerances import Tolerance

TOLERANCES = {
    "unexplained_flips": Tolerance(0, "gates that differ beyond rounding", "a fault moved them"),
    "replay_multiple": Tolerance(8, "error of the replay, in multiples of the noise floor", "other summation orders"),
    "smallest_floor": Tolerance(2.0**-24, "smallest noise floor", "half a unit in the last place"),
    "largest_floor": Tolerance(1e-5, "largest noise floor", "a noisier reference proves nothing"),
}
HOSTILE = "<script>alert(1)</script>|`x`\"'&$\\alpha$\x1b[31m @all http://evil.example/"


def replay(ratio: float) -> Check:
    """The check of a replay at this multiple of the noise floor."""
    quantities = (Quantity("largest_floor", 1e-7, 1e-5), Quantity("replay_multiple", ratio, 8.0))
    reason = f"logits: replay error {ratio * 1e-7:.1e}, {ratio:.1f}x the noise floor 1.0e-07 (limit 8x)"
    return Check("replay", "passed" if ratio <= 8 else "failed", reason, quantities)


def gates(unexplained: int) -> Check:
    text = f"same input, gates changed: 3 of 1,000 ({unexplained} unexplained)"
    quantity = Quantity("unexplained_flips", unexplained, 0)
    return Check("teacher-forced gates", "failed" if unexplained else "passed", text, (quantity,))


def sru(site: str, unexplained: int = 0) -> SRUParity:
    static = Check("static", "passed", "bit for bit")
    margins = Histogram((1e-4, 1e-3, 1e-2, 0.1), (1, 9, 490))
    forced = FlipCount(500, 2, unexplained, 1, 2, 1e-6)
    free = FreeRunning(500, 7, 0)
    return SRUParity(site, "groupbn-hard (G=4)", static, FlipCount(500), forced, 0.625, free, margins, 0.5)


def full_report(ratio: float = 2.0, unexplained: int = 0) -> ParityReport:
    """Every field filled."""
    metrics = OutputMetrics(1e-5, 1e-6, 2e-6, 0.999999, 114.0, 1.0, 120.0, {"p50": 1e-7, "p99.9": 9e-6}, 0.99)
    links = (
        Link.of("PyTorch with SRUs swapped", [Check("gates", "passed", "no gate changed")]),
        Link.of("onnxruntime", [gates(unexplained), replay(ratio), Check("static", "not run", "no scconv node")]),
        Link("engine", "not run", "no engine was built"),
    )
    engine = EngineParity(
        "tensorrt", "10.3.0", "device/model.tensorrt.engine", "cd" * 32, "Orin (compute capability 8.7)",
        (sru("layer1.SRU", unexplained), replace(sru("layer2.SRU"), teacher_forced=None)),
        (EngineOutput("logits", metrics, 1.5e-6, True),),
        Latency(("image 2x3x8x8",), 100, 1.25, 1.5, 2.0, 1.3, 1.1),
        {"bundle": "ef" * 32, "jetson_linux": "36.4"},
    )  # fmt: skip
    return ParityReport(
        model="net.py:make",
        artifact="model.onnx",
        artifact_sha256="ab" * 32,
        links=links,
        srus=(sru("layer1.SRU", unexplained), sru("layer2.SRU")),
        outputs=(OutputParity("logits", metrics, ratio * 1e-7, 1e-7, True),),
        samples=("seeded noise: image 2x3x8x8",),
        left_alone=(Refusal("neck.attention", "12 gates differ"),),
        provenance={"torch": "2.13.0", "command": "scconv-deploy deploy net.py:make -o out"},
        stages=(
            StageRecord("export", 1.5, ("opset 18",), ()),
            StageRecord("verify", 0.5, (), (("noise floor", "no float64"),)),
        ),
        layers=(LayerError("conv_1", "layer1.conv", 1e-7, 1e-7), LayerError("relu_1", "", float("inf"), 0.0)),
        first_departure="relu_1: not finite",
        worst_inputs=(WorstInput("seeded noise", 1, 3e-6),),
        accuracy=Accuracy(100, 0.91, 0.9, -0.01, -0.03, 0.01, 0.95),
        overrides={"replay_multiple": 8.5},
        tolerances=TOLERANCES,
        engines=(engine,),
        plans=(
            PlanTraffic("model.engine", "tensorrt-rtx", False, 8, 3_000_000, 4, (10**6, 5 * 10**5) * 2, (1,)),
            PlanTraffic("resnet20", "tensorrt-rtx", True, 8, 2_000_000, 2, (15 * 10**5, 5 * 10**5), ()),
        ),
    )


def hostile_report() -> ParityReport:
    """Names, reasons and facts that every format could take for its own markup."""
    made = full_report()
    text = HOSTILE
    metrics = replace(made.outputs[0].end_to_end, quantiles_abs={text: 1.0})
    return replace(
        made,
        model=text,
        artifact=text,
        links=(Link.of(text, [Check(text, "failed", text)]), Link(text, "not run", text)),
        srus=(replace(sru(text), variant=text, static=Check(text, "failed", text)),),
        outputs=(replace(made.outputs[0], name=text, end_to_end=metrics),),
        samples=(text,),
        left_alone=(Refusal(text, text),),
        provenance={text: text},
        stages=(StageRecord(text, 1.0, (text,), ((text, text),)),),
        layers=(LayerError(text, text, 1e-7, 1e-7),),
        first_departure=text,
        worst_inputs=(WorstInput(text, 0, 1e-6),),
        overrides={text: 1.0},
        engines=(
            replace(
                made.engines[0], backend=text, artifact=text, gpu=text, provenance={text: text},
                outputs=(replace(made.engines[0].outputs[0], name=text),),
                latency=replace(made.engines[0].latency, shapes=(text,)),
            ),
        ),
        plans=(replace(made.plans[0], name=text, backend=text),),
    )  # fmt: skip
