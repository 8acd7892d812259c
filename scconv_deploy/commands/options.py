"""Options that several commands share, single and in groups."""

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable
from dataclasses import dataclass, fields, is_dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal, get_type_hints

import typer

from scconv_deploy.errors import UsageError

if TYPE_CHECKING:
    from scconv_deploy.model.spec import ModelSpec
    from scconv_deploy.verification.options import Checks
    from scconv_deploy.workflows.export import ExportOptions
    from scconv_deploy.workflows.quantize import QuantizeOptions

_INPUTS, _WEIGHTS, _PRECISION = "Inputs", "Weights", "Precision"
Model = Annotated[
    str, typer.Argument(help="A zoo name, package.module:factory, path/file.py:factory, or a pickled module.")
]
Kwargs = Annotated[str | None, typer.Option(metavar="JSON", help="Arguments of the factory, a JSON object.")]
Weights = Annotated[Path | None, typer.Option(help="State dict: .safetensors, or .pt/.pth.", rich_help_panel=_WEIGHTS)]
WeightsKey = Annotated[
    str | None,
    typer.Option(
        metavar="ENTRY", help="Entry of the weights file if several fit: a dotted path, such as ema.",
        rich_help_panel=_WEIGHTS,
    ),
]  # fmt: skip
NonStrict = Annotated[
    bool,
    typer.Option("--non-strict", help="Accept missing and unexpected keys; they are listed.", rich_help_panel=_WEIGHTS),
]
Embed = Annotated[
    str | None,
    typer.Option(metavar="RULE|JSON", help="Replace 3x3 convolutions by ScConv: 'paper', or patterns of their paths."),
]
Trust = Annotated[
    bool,
    typer.Option("--trust-checkpoint", help="Allow files that execute code when read.", rich_help_panel=_WEIGHTS),
]
Paths = Annotated[
    list[Path] | None,
    typer.Option(
        "--path", metavar="FOLDER", help="Where the model's code is looked for first, such as the fork that trained a "
        "checkpoint; repeatable.",
    ),
]  # fmt: skip
RawOutputs = Annotated[
    bool,
    typer.Option(
        "--raw-outputs", help="Keep all outputs of an ultralytics checkpoint, not only those of its own exporter.",
    ),
]  # fmt: skip
Inputs = Annotated[
    list[str] | None,
    typer.Option(
        "--input", metavar="[NAME:]SHAPE[:DTYPE]", help="One per input; a zoo model knows its own.",
        rich_help_panel=_INPUTS,
    ),
]  # fmt: skip
Batch = Annotated[
    str | None,
    typer.Option(metavar="MIN:OPT:MAX[:STEP]", help="Make axis 0 of every input dynamic.", rich_help_panel=_INPUTS),
]
Dynamic = Annotated[
    list[str] | None,
    typer.Option(
        metavar="NAME:AXIS=MIN:OPT:MAX[:STEP]",
        help="Make another axis dynamic; repeatable. Axes of one size share it: x:2,x:3=64:128:256:32.",
        rich_help_panel=_INPUTS,
    ),
]
Seed = Annotated[
    int,
    typer.Option(
        min=0, max=2**32 - 1, help="Seed of the initialisation and of random inputs.", rich_help_panel=_INPUTS
    ),
]
Data = Annotated[
    str | None,
    typer.Option(
        metavar="SOURCE",
        help="Also use real data: a folder of images (class subfolders give labels), an ultralytics data.yaml, a COCO "
        "instances .json, a folder with images/ and masks/, an .npz (with labels, if you have them), file.py:loader, "
        "or 'photos' (those scikit-learn ships).",
        rich_help_panel=_INPUTS,
    ),
]
Deep = Annotated[
    int | None,
    typer.Option(
        metavar="N", min=0, help="How many inputs of --data are judged in full, 64 by default (8 of int8); the others "
        "run free (gates, end to end, accuracy), at less than half the cost.", rich_help_panel=_INPUTS,
    ),
]  # fmt: skip
Preprocess = Annotated[
    str | None,
    typer.Option(
        "--preprocessing", metavar="JSON", help="Mean, std and resize of images; a zoo model knows its own.",
        rich_help_panel=_INPUTS,
    ),
]  # fmt: skip
Tolerances = Annotated[
    list[str] | None,
    typer.Option(metavar="NAME=VALUE", help="Change a tolerance; the report says so. Repeatable."),
]
Provider = Annotated[
    str,
    typer.Option(
        help="Execution provider of ONNX Runtime, for example cuda; cpu+fused: also with the fused SRU for CPUs."
    ),
]
Opset = Annotated[
    int | None,
    typer.Option(help="ONNX opset, 18 to 23; by default 18, for bf16 22."),
]
Cru = Annotated[
    Literal["auto", "as-is", "halves", "merged"],
    typer.Option(help="Form of CRUs: halves (for ONNX Runtime: less concatenation), merged (for TensorRT)."),
]
MaskForm = Annotated[
    Literal["auto", "where", "multiply"],
    typer.Option(help="How a mask is applied: Where (for TensorRT) or Cast and Mul (faster in ONNX Runtime)."),
]
Force = Annotated[bool, typer.Option("--force", help="Overwrite the output.")]
Json = Annotated[bool, typer.Option("--json", help="Print one JSON document on stdout and nothing else.")]
Quiet = Annotated[bool, typer.Option("--quiet", help="Print errors only.")]
Digest = Annotated[
    str, typer.Option(metavar="SHA256", help="Digest of the bundle, as deploy printed it; exit 7 if it differs.")
]
Precision = Annotated[
    Literal["fp32", "fp16", "bf16", "int8", "int8+fp16", "int8+bf16"],
    typer.Option(
        help="Type of the data; statistics and gates stay in float32. int8 is calibrated on --data.",
        rich_help_panel=_PRECISION,
    ),
]
Io = Annotated[
    Literal["float32", "half"],
    typer.Option("--io", help="Types of the graph's inputs and outputs.", rich_help_panel=_PRECISION),
]
Keep = Annotated[
    list[str] | None,
    typer.Option(
        metavar="PATTERN", help="Nodes or weights that stay in float32, with * and ?; repeatable.",
        rich_help_panel=_PRECISION,
    ),
]  # fmt: skip


def _groups(command: Callable[..., None]) -> dict[str, Any]:
    """Parameters of a command that are groups of options, with their classes."""
    hints = get_type_hints(command, include_extras=True)
    return {name: hint for name, hint in hints.items() if is_dataclass(hint)}


def regrouped(command: Callable[..., None], given: dict[str, Any]) -> dict[str, Any]:
    """Arguments of a command as it is written, from the values of its single options (which are taken out)."""
    made = {n: kind(**{f.name: given.pop(f.name) for f in fields(kind)}) for n, kind in _groups(command).items()}
    return {**given, **made}


def grouped(command: Callable[..., None]) -> Callable[..., None]:
    """Replace each parameter whose type is one of the groups below by the options of the group."""
    hints, groups = get_type_hints(command, include_extras=True), _groups(command)
    parameters = []
    for parameter in inspect.signature(command).parameters.values():
        group = groups.get(parameter.name)
        if group is None:
            parameters.append(parameter.replace(annotation=hints[parameter.name]))
        else:
            types = get_type_hints(group, include_extras=True)
            parameters += [
                parameter.replace(name=f.name, annotation=types[f.name], default=f.default) for f in fields(group)
            ]

    @functools.wraps(command)
    def called(**given: Any) -> None:
        command(**regrouped(command, given))

    called.__signature__ = inspect.Signature(parameters)  # type: ignore[attr-defined]
    called.__annotations__ = {parameter.name: parameter.annotation for parameter in parameters}
    return called


def _given(group: Any, *but: str) -> tuple[str, ...]:
    """The given options of a group: those that differ from their defaults, as written on the command line."""
    names = [f.name for f in fields(group) if f.name not in but and getattr(group, f.name) != f.default]
    return tuple(f"--{name.replace('_', '-').replace('inputs', 'input')}" for name in names)


@dataclass(frozen=True)
class LoadOptions:
    """Options that build and load a MODEL."""

    kwargs: Kwargs = None
    weights: Weights = None
    weights_key: WeightsKey = None
    non_strict: NonStrict = False
    trust_checkpoint: Trust = False
    embed: Embed = None
    path: Paths = None
    raw_outputs: RawOutputs = False

    @property
    def given(self) -> tuple[str, ...]:
        """Options that were given, for a message; without the seed, which is not only a model's."""
        return _given(self, "seed")

    def spec(self, source: str) -> ModelSpec:
        """ModelSpec of a source (UsageError if an option is invalid)."""
        from scconv_deploy.model.spec import EmbedSpec, ModelSpec, folders, parse_kwargs

        return ModelSpec(
            source,
            parse_kwargs(self.kwargs),
            self.weights,
            strict=not self.non_strict,
            trust_checkpoint=self.trust_checkpoint,
            embed=None if self.embed is None else EmbedSpec.parse(self.embed),
            weights_key=self.weights_key,
            raw_outputs=self.raw_outputs,
            paths=folders(self.path or ()),
        )


@dataclass(frozen=True)
class ModelOptions(LoadOptions):
    """Options that build and load a MODEL, and its inputs."""

    inputs: Inputs = None
    batch: Batch = None
    dynamic: Dynamic = None
    seed: Seed = 0

    def spec(self, source: str) -> ModelSpec:
        """ModelSpec of a source, with its inputs; see :meth:`LoadOptions.spec`."""
        from scconv_deploy.model.inputs import DynamicAxis, InputSpec

        axes = [] if self.batch is None else [DynamicAxis.parse_batch(self.batch)]
        return replace(
            super().spec(source),
            inputs=tuple(InputSpec.parse(text) for text in self.inputs or ()),
            dynamic=(*axes, *(axis for text in self.dynamic or () for axis in DynamicAxis.parse_all(text))),
            seed=self.seed,
        )


@dataclass(frozen=True)
class CheckOptions:
    """Options of verification: inputs, data, limits, provider."""

    data: Data = None
    deep: Deep = None
    preprocessing: Preprocess = None
    tolerance: Tolerances = None
    provider: Provider = "cpu"

    @property
    def of_model(self) -> tuple[str, ...]:
        """Given options that only a model as the reference can use."""
        return _given(self, "tolerance", "provider")

    def checks(self) -> Checks:
        """Options of verification (UsageError if one is invalid, or is for real data and there is none)."""
        from scconv_deploy.records.tolerances import parse_overrides
        from scconv_deploy.verification.options import DEEP, Checks

        wanted = None
        if self.preprocessing is not None:
            from scconv_deploy.verification.preprocessing import Preprocessing

            wanted = Preprocessing.parse(self.preprocessing)
        if self.data is None and self.of_model:
            option = "--deep" if self.preprocessing is None else "--preprocessing"
            raise UsageError(f"{option} is for real data, and none is given.", "Add --data, or leave it out.")
        deep = DEEP if self.deep is None else self.deep
        return Checks(self.data, wanted, parse_overrides(self.tolerance or ()), self.provider, deep)


@dataclass(frozen=True)
class GraphOptions:
    """Options of the exported graph."""

    opset: Opset = None
    mask_form: MaskForm = "auto"
    precision: Precision = "fp32"
    io: Io = "float32"
    keep: Keep = None
    cru: Cru = "auto"

    @property
    def is_int8(self) -> bool:
        """Whether the graph is quantised."""
        return self.precision.startswith("int8")

    def export(
        self, backends: tuple[str, ...] = ("onnx",), quantization: QuantizeOptions | None = None
    ) -> ExportOptions:
        from scconv_deploy.workflows.export import ExportOptions

        keep = tuple(self.keep or ())
        base: Any = self.precision.removeprefix("int8").removeprefix("+") or "fp32"
        return ExportOptions(self.opset, self.mask_form, backends, base, self.io, keep, self.cru, quantization)
