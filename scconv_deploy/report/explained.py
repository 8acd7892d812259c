"""Explanations of all checks for readers of a report: what is compared, when it fails, what to do.

The HTML report shows them beside its checks, and docs/report.md lists them all. A test compares the names with the code
that judges.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

from scconv_deploy.records.parity import ParityReport

_REWRITTEN, _REPLACED = "rewrite", "PyTorch with SRUs swapped"
_ENGINE = "tensorrt, tensorrt-rtx, onnxruntime+fused"
_ARTIFACT = "onnxruntime, budget, precision"
LINKS = (_REWRITTEN, _REPLACED, _ARTIFACT, _ENGINE)
"""Places of checks in the chain; a check of two places is listed at the first."""

_ON_ITS_GPU = "the engine on its GPU"
STEPS = {
    "rewrite": "the user's ONNX file and its rewritten form; only in a bundle of a file",
    "PyTorch with SRUs swapped": "the model in PyTorch, each recognised SRU replaced by the tool's own",
    "onnxruntime": "the float32 ONNX file in ONNX Runtime",
    "budget": "what int8 costs against the float model; only for a quantised file",
    "precision": "the ONNX file in half precision or int8; not run where nothing was converted",
    "onnxruntime+fused": "the ONNX file in ONNX Runtime with the fused SRU for CPUs (`--provider cpu+fused`, "
    "`--plugin-cpu`)",
    "tensorrt": _ON_ITS_GPU,
    "tensorrt-rtx": _ON_ITS_GPU,
    "engine": "an engine that was not built here: there is none, or a device builds it",
}
"""What each link of the chain compares with the model."""

TERMS = {
    "SRU": "The gated part of a ScConv (spatial reconstruction unit): a gate for every element of its input, then the "
    "two halves of the channels cross.",
    "gate": "Open where a normalised value reaches a threshold, else closed. It is a step: one unit in the last "
    "place can change it, and then the output jumps.",
    "margin": "How far a gate is from its threshold; |margin| / s is in deviations of its group.",
    "unexplained": "A changed gate is explained where its margin is within what rounding can move it by, and "
    "unexplained where it is not: then something else was computed.",
    "ill-conditioned": "Groups whose deviation is below a millionth of their mean: PyTorch itself has no answer "
    "there, so their gates are counted apart.",
    "running free": "The artifact as it ships: each layer is fed by the one before.",
    "replay": "The artifact with PyTorch's gates put in, so that no step is left and errors are comparable.",
    "noise floor": "The distance between runs of the model in PyTorch that are equally right, with the same gates: "
    "float32, float64, other orders of summation, results moved in their last place. It is the error that nobody "
    "can avoid. For a half file, the same in PyTorch with every value rounded.",
    "relative L2": "The norm of a difference over the norm of the reference: 1e-6 is a millionth.",
}
"""Glossary of the HTML report; entries are those of docs/glossary.md."""

_EXPORT_AGAIN = "Export again from these weights. If another program changed the file after the export, leave it out."
_WRONG_COMPUTATION = "Look at what departs first. Export again; if that does not help, report it with the model's code."


@dataclass(frozen=True)
class Meaning:
    """Explanation of a check.

    Attributes:
        link: place in the chain, one of :data:`LINKS`.
        compares: the two things that are compared.
        fails: condition of a failure; "" for a check that only names what was not compared.
        remedy: what to do if the check failed or was not run.
    """

    link: str
    compares: str
    fails: str
    remedy: str


CHECKS: dict[str, Meaning] = {
    "rewrite": Meaning(
        _REWRITTEN,
        "The gates of the user's file and of the rewritten one with PyTorch's formula, on the input that the file's "
        "SRUs have; the outputs of both with the file's own gates. Only where a file was deployed.",
        "a gate of the rewritten file changed that rounding cannot move, or an output is farther off than rounding "
        "moves it",
        "Report it with the file. Until then deploy the model itself.",
    ),
    "gates": Meaning(
        _REPLACED,
        "Each SRU of the model with the tool's own SRU that replaces it, both in PyTorch on the same input, gate by "
        "gate.",
        "a gate changed that rounding cannot move",
        "The SRU was taken for a variant that it is not: a bug. Report it with the module's code.",
    ),
    "values": Meaning(
        _REPLACED,
        "The outputs of the same two modules, without elements whose gate changed.",
        "they are farther apart than `swapped_values`",
        "As for `gates`.",
    ),
    "whole model": Meaning(
        _REPLACED,
        "The outputs of the model as given with those of the model after its SRUs were replaced.",
        "they differ by more than the limit in multiples of the model's own rounding noise (`replay_multiple`, more "
        "where more is compared), or that noise is too large to judge by",
        "As for `gates`. A noise too large means that the model is random, or steps where no SRU was recognised.",
    ),
    "swap": Meaning(
        _REPLACED,
        "Nothing: no SRU was recognised, and the model was exported as it is.",
        "",
        "See *Modules left alone* for the reason.",
    ),
    "static": Meaning(
        _ARTIFACT,
        "Threshold (cut), sign and attributes of every SRU's node, computed anew from the model's weights, bit for "
        "bit; the functions by hash.",
        "one bit differs, or a node is missing. Often nothing else shows it",
        _EXPORT_AGAIN,
    ),
    "rewritten": Meaning(
        _ARTIFACT,
        "Nothing for the SRUs named: they were read from the graph, and no module of the model is known to match them. "
        "The outputs judge them.",
        "",
        "Give `rewrite` the model with `--reference`.",
    ),
    "weights": Meaning(
        _ARTIFACT,
        "Each stored weight with the model's weight of that name, bit for bit; where a BatchNorm was folded in, up to "
        "one factor per channel. Weights of a CRU's merged convolutions are computed anew from the model's.",
        "a weight is off by a bit, or by more than `weight_ulps` where a BatchNorm was folded in or the weight is in "
        "half",
        _EXPORT_AGAIN,
    ),
    "teacher-forced gates": Meaning(
        _ARTIFACT,
        "Each SRU of the artifact, fed the input that PyTorch's got, gate by gate. Of an engine, and of the fused "
        "SRU for CPUs, each SRU runs alone, and its gates are read from its output.",
        "a gate changed that rounding cannot move",
        "This SRU computes something else. " + _WRONG_COMPUTATION,
    ),
    "second opinion": Meaning(
        _ARTIFACT,
        "Each SRU of the artifact in onnx.reference, which shares no code with ONNX Runtime, on small inputs: "
        "gates and values.",
        "a gate changed that rounding cannot move, or values are farther apart than `second_opinion`",
        "This SRU computes something else. " + _WRONG_COMPUTATION,
    ),
    "free-running gates": Meaning(
        _ARTIFACT,
        "The gates of the artifact as it ships. Rounding before an SRU has moved its input, and may change gates by as "
        "much as was measured there.",
        "a gate changed that this does not explain",
        "Where it alone fails, the runtime computes an SRU otherwise within the whole graph: report it with its "
        "version.",
    ),
    "other gates": Meaning(
        _ARTIFACT,
        "Gates that belong to no known SRU (comparisons and roundings of data), with PyTorch's decisions injected at "
        "all gates: the decisions of the artifact, and their operands.",
        "a decision changed that the operand's noise does not explain, or operands are more than `other_gates` times "
        "their noise away (`other_gates_half` of a half file)",
        "This gate, or what comes before it, computes something else. " + _WRONG_COMPUTATION,
    ),
    "jumps": Meaning(
        _ARTIFACT,
        "Nothing for the tensors named: the model jumps at places that could not be fixed in the replay (a comparison "
        "that is not in the graph, or in a subgraph; argmax, top-k). Their errors are no larger than the changes of "
        "PyTorch's own tensors when its inputs are off by rounding. The link is then not run, and the report has no "
        "verdict.",
        "",
        "This is no verdict: the artifact may be right or wrong. Give labelled `--data`, and judge it by its accuracy.",
    ),
    "replay": Meaning(
        _ARTIFACT,
        "The outputs of the artifact with PyTorch's gates injected: the rest is continuous, and its error is compared "
        "with the noise floor. A half file is compared with PyTorch with every value rounded; without that run, this "
        "check is not run, and `rounding` decides.",
        "the error is more than the limit in multiples of that noise (`replay_multiple`, `half_multiple`; more where "
        "more is compared), or the noise is too large to judge by",
        _WRONG_COMPUTATION,
    ),
    "parts": Meaning(
        _ARTIFACT,
        "Slices of an output that are more than 64 times smaller than its largest (scores beside boxes in pixels), in "
        "the replay: the error of the whole output does not show them. In half, slices that are zeros, or whose own "
        "noise is too large, are named and not judged (`--keep` leaves their layers in float32). Engines have no such "
        "check.",
        "an error is more than the replay's limit in multiples of the slices' own noise",
        _WRONG_COMPUTATION,
    ),
    "layers": Meaning(
        _ARTIFACT,
        "The input of every SRU in the replay: later layers can hide its error. An input whose own noise is too large "
        "is not judged.",
        "an error is more than the same limit in multiples of its noise",
        _WRONG_COMPUTATION,
    ),
    "contract": Meaning(
        _ARTIFACT,
        "Shape and type of the outputs.",
        "an output has another shape or type than PyTorch's",
        "What calls the artifact would break. Export again.",
    ),
    "finite": Meaning(
        _ARTIFACT,
        "Nothing for the tensors named: they hold NaN or Inf, so they cannot be compared.",
        "either side has NaN or Inf",
        "If PyTorch has it too, look at the input and the model; if only the artifact has it, at its precision.",
    ),
    "range": Meaning(
        _ARTIFACT,
        "The largest values that the float32 model reaches, with the largest that half can hold.",
        "a layer's values are larger",
        "Keep the layers named in float32 (`--keep`), or take bf16.",
    ),
    "rounding": Meaning(
        _ARTIFACT,
        "What half costs: the outputs of the half file with PyTorch's in float32, both with the same gates.",
        "they are farther apart than `half_budget` of the type: values vanish or overflow, and it is another network",
        "Keep layers in float32 (`--keep`), or take bf16, which holds the range of float32.",
    ),
    "runtime": Meaning(
        _ARTIFACT,
        "The half file in ONNX Runtime by itself, which multiplies in float32 and rounds at fewer places than the file "
        "says, with PyTorch rounded and in float32.",
        "it is farther from both than rounding explains",
        "This runtime computes something else: report it with its version.",
    ),
    "stand-in": Meaning(
        _ARTIFACT,
        "Nothing: ONNX Runtime cannot run the artifact here. A stand-in that computes in float32 and rounds each value "
        "was judged.",
        "",
        "Verify again where the artifact will run.",
    ),
    "quantization": Meaning(
        _ARTIFACT,
        "Only the SRUs and the int8 weights of a quantised file whose quantisers have no known place in the reference: "
        "no limit for the rounding of floats says what its scales may cost. The reason names what was judged. The link "
        "is then not run, and the report has no verdict.",
        "",
        "Give the model with `--reference`. A file of another tool: compare its answers on real data with the float "
        "model's.",
    ),
    "scales": Meaning(
        _ARTIFACT,
        "Scales and zero points of an int8 file: those of activations with the record in its metadata, those of "
        "weights with what PyTorch's own weights give, bit for bit. Without a record they are not proved, which the "
        "headline says.",
        "one bit differs, a weight has one scale for all channels, a value is quantised that the record does not name, "
        "or a scale is not above 0 and finite",
        "Quantise the float file again. If another program changed the file after that, leave it out.",
    ),
    "weight codes": Meaning(
        _ARTIFACT,
        "The int8 weights with those of `torch.fake_quantize_per_channel_affine` on the model's own weights, "
        "BatchNorms folded in. Where the layer's place is not known: with the reference's weights of that name, or the "
        "only ones that fit, each within half a step of its code, but for a factor of each channel.",
        "a code differs, unless by one where the weight lies within rounding of the boundary between two codes",
        "Quantise the float file again. If another program changed the file after that, leave it out.",
    ),
    "codes": Meaning(
        _ARTIFACT,
        "The codes of every activation quantiser, with the gates and codes of fake-quantised PyTorch injected "
        "everywhere, and their operands.",
        "a code changed that the operand's noise does not explain, or operands are more than `other_gates` times their "
        "noise away (`other_gates_half` of a half file)",
        "This quantiser, or what comes before it, computes something else. " + _WRONG_COMPUTATION,
    ),
    "budget": Meaning(
        _ARTIFACT,
        "What int8 costs: the outputs of fake-quantised PyTorch with the float model's, their answers, and the gates "
        "that change.",
        "accuracy falls by more than `max_drop` (option --max-drop); without labels, more answers change",
        "Keep layers in float (`--keep`), calibrate on more data, or try `--calibration entropy` or `percentile`.",
    ),
    "budget interval": Meaning(
        _ARTIFACT,
        "Nothing: the drop is within the budget, and its interval is not. The rows are too few to show that the budget "
        "holds.",
        "",
        "Give more labelled `--data`, about as many rows as the reason names.",
    ),
    "integer kernels": Meaning(
        _ARTIFACT,
        "The outputs of an int8 file in ONNX Runtime with all its optimisations, whose integer kernels this CPU runs, "
        "with its outputs in float arithmetic. Judged where its codes are unsigned, which are for CPUs.",
        "they are farther apart than `integer_kernels` times what quantising cost",
        "On x86-64 without VNNI (`doctor` says so) two products are added in 16 bits and saturate: quantise with "
        "`--target cpu --reduce-range`.",
    ),
    "seal": Meaning(
        _ARTIFACT,
        "Nothing: the file's bytes are not those in the bundle's manifest, and the bundle's reference holds no "
        "weights. This file was judged on the recorded inputs alone.",
        "",
        "Find out who changed it, or verify it with `--reference MODEL`.",
    ),
    "accuracy": Meaning(
        _ARTIFACT,
        "Nothing: the data have labels, but the model has no output to compare them with.",
        "",
        "Give data whose labels are the classes of a logits output, or leave the labels out.",
    ),
    "values of SRUs": Meaning(
        _ENGINE,
        "The output of each SRU alone with the nearest output that its input allows, for any gates.",
        "the distance is more than `engine_sru` of its type",
        "Build again without the plugin. If it passes then, the plugin is at fault; if not, the library.",
    ),
    "SRUs alone": Meaning(
        _ENGINE,
        "Nothing for the SRUs named: they could not be built alone, or their input was not recorded.",
        "",
        "Verify with `--reference MODEL`, unless the reason names something else.",
    ),
    "gates inside": Meaning(
        _ENGINE,
        "Each SRU inside the engine (`build --debug-tensors srus`) or the session, gate by gate: its output with the "
        "gates of its own input there. No error of the layers before counts.",
        "a gate changed that rounding cannot move",
        "The library computes this SRU otherwise within the whole engine. Build again without the plugin, or with "
        "`--optimization-level` lower.",
    ),
    "values inside": Meaning(
        _ENGINE,
        "The output of each SRU inside the engine or the session with the nearest output that its own input there "
        "allows, for any gates.",
        "the distance is more than `engine_sru` of its type",
        "As for `gates inside`.",
    ),
    "SRUs inside": Meaning(
        _ENGINE,
        "Nothing for the SRUs named: their ends were not marked when the engine was built, or not shown when it ran.",
        "",
        "The SRUs alone and the outputs judge them.",
    ),
    "segments": Meaning(
        _ENGINE,
        "The input of each SRU, and the outputs, with those that PyTorch computes from the SRUs' own outputs there: "
        "the layers in between, without a gate. Not run where the reference is not a model in PyTorch.",
        "an error is more than `engine_multiple` times the rounding of its type (`engine_noise`)",
        "The first one named is where the fault is. Build again with `--optimization-level` lower.",
    ),
    "end to end": Meaning(
        _ENGINE,
        "The outputs of the whole engine or session with PyTorch's. The noise is the change that explained flips cause "
        "in PyTorch.",
        "an error is more than `engine_multiple` times that noise",
        "Build again with `--optimization-level` lower, or without the plugin, to find which part it is.",
    ),
    "top-1": Meaning(
        _ENGINE,
        "The top-1 classes of the engine or session with PyTorch's.",
        "a class differs although its logits in PyTorch are farther apart than rounding",
        "As for `end to end`.",
    ),
    "samples": Meaning(
        _ENGINE,
        "Nothing for the inputs named: the engine's profile does not take their shapes.",
        "",
        "Build with a profile for the shapes that you will use (`--batch`, `--dynamic`).",
    ),
}  # fmt: skip


def meanings(names: Iterable[str]) -> dict[str, Meaning]:
    """Explanations of these checks, in the table's order; unknown names are skipped."""
    wanted = set(names)
    return {name: meaning for name, meaning in CHECKS.items() if name in wanted}


def meanings_of(report: ParityReport) -> dict[str, Meaning]:
    """Explanations of the checks in a report."""
    return meanings(check.name for link in report.links for check in link.checks)


def markdown_rows(link: str) -> list[str]:
    """Rows of the table in docs/report.md for one place in the chain."""
    return [
        f"| **{name}** | {m.compares} | {m.fails or 'never: it names what was not compared'} | {m.remedy} |"
        for name, m in CHECKS.items()
        if m.link == link
    ]
