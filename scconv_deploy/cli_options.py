"""Options that several commands share."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Literal

import typer

_INPUTS, _WEIGHTS, _PRECISION = "Inputs", "Weights", "Precision"
Model = Annotated[
    str, typer.Argument(help="A zoo name, package.module:factory, path/file.py:factory, or a pickled module.")
]
Kwargs = Annotated[str | None, typer.Option(metavar="JSON", help="Arguments of the factory, a JSON object.")]
Weights = Annotated[Path | None, typer.Option(help="State dict: .safetensors, or .pt/.pth.", rich_help_panel=_WEIGHTS)]
NonStrict = Annotated[
    bool, typer.Option("--non-strict", help="Accept missing and unexpected keys.", rich_help_panel=_WEIGHTS)
]
Embed = Annotated[
    str | None,
    typer.Option(metavar="RULE|JSON", help="Put ScConv into 3x3 convolutions: 'paper', or patterns over their paths."),
]
Trust = Annotated[
    bool,
    typer.Option("--trust-checkpoint", help="Read files whose reading executes code.", rich_help_panel=_WEIGHTS),
]
Inputs = Annotated[
    list[str] | None,
    typer.Option(
        "--input", metavar="[NAME:]SHAPE[:DTYPE]", help="One per input; a zoo model knows its own.",
        rich_help_panel=_INPUTS,
    ),
]  # fmt: skip
Batch = Annotated[
    str | None,
    typer.Option(metavar="MIN:OPT:MAX", help="Make axis 0 of every input dynamic.", rich_help_panel=_INPUTS),
]
Dynamic = Annotated[
    list[str] | None,
    typer.Option(
        metavar="NAME:AXIS=MIN:OPT:MAX", help="Make another axis dynamic; repeatable.", rich_help_panel=_INPUTS
    ),
]
Seed = Annotated[
    int,
    typer.Option(min=0, max=2**32 - 1, help="Of the initialisation and of random inputs.", rich_help_panel=_INPUTS),
]
Data = Annotated[
    str | None,
    typer.Option(
        metavar="SOURCE",
        help="Also use real data: a folder of images (class subfolders give labels), an .npz (with labels, if you "
        "have them), file.py:loader, or 'photos' (those scikit-learn ships).",
        rich_help_panel=_INPUTS,
    ),
]
Deep = Annotated[
    int | None,
    typer.Option(
        metavar="N", min=0, help="How many inputs of --data are judged in full, 64 by default; the others run free "
        "(gates, end to end, accuracy), at less than half the cost.", rich_help_panel=_INPUTS,
    ),
]  # fmt: skip
Preprocess = Annotated[
    str | None,
    typer.Option(
        "--preprocessing", metavar="JSON", help="Of images: mean, std and resize; a zoo model knows its own.",
        rich_help_panel=_INPUTS,
    ),
]  # fmt: skip
Tolerances = Annotated[
    list[str] | None,
    typer.Option(metavar="NAME=VALUE", help="Change a tolerance; the report says so. Repeatable."),
]
Provider = Annotated[str, typer.Option(help="Execution provider of ONNX Runtime, for example cuda.")]
Opset = Annotated[
    int | None,
    typer.Option(help="ONNX opset, 18 to 23; by default 18, for bf16 22."),
]
MaskForm = Annotated[
    Literal["auto", "where", "multiply"],
    typer.Option(help="How a mask is applied: Where (for TensorRT) or Cast and Mul (faster in ONNX Runtime)."),
]
Force = Annotated[bool, typer.Option("--force", help="Overwrite the output.")]
Json = Annotated[bool, typer.Option("--json", help="Print one JSON document on stdout and nothing else.")]
Quiet = Annotated[bool, typer.Option("--quiet", help="Print errors only.")]
Digest = Annotated[
    str, typer.Option(metavar="SHA256", help="Of the bundle's manifest, as deploy printed it; exit 7 if it is another.")
]
Precision = Annotated[
    Literal["fp32", "fp16", "bf16"],
    typer.Option(help="Of the data; statistics and gates stay in float32.", rich_help_panel=_PRECISION),
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
