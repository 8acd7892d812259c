"""``scconv-deploy convert``: a float32 ONNX file in half precision, the gate in float32, compared with the original.

read --> ranges --> half --> check --> compare --> write
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnx_ir as ir

from scconv_deploy.bundle.atomic import check_output_file, write_file
from scconv_deploy.errors import ParityError, UsageError
from scconv_deploy.exporters.onnx import check
from scconv_deploy.pipeline import Progress, silent
from scconv_deploy.precision.compare import PrecisionReport, compare_precision
from scconv_deploy.precision.half import LARGEST, HalfOptions, to_half
from scconv_deploy.precision.ranges import activations_beyond
from scconv_deploy.verification import feeds
from scconv_deploy.verification.onnx_file import read_onnx

PRECISION = "scconv_deploy.precision"
"""Metadata of a converted file."""


@dataclass(frozen=True)
class ConvertResult:
    """What was written.

    Attributes:
        precision: of the data.
        half, casts: nodes that compute in half, and casts that were put in.
        kept: (node, why it stays in float32).
        beyond: tensors whose values half cannot hold, with their largest absolute value on the data.
        bytes_before, bytes_after: of the files.
        comparison: with the original.
    """

    path: Path
    sha256: str
    precision: str
    half: int
    casts: int
    kept: tuple[tuple[str, str], ...]
    bytes_before: int
    bytes_after: int
    comparison: PrecisionReport
    beyond: Mapping[str, float] = field(default_factory=dict)

    def as_json(self) -> dict[str, Any]:
        beyond = {name: value if np.isfinite(value) else str(value) for name, value in self.beyond.items()}
        return {
            **{name: getattr(self, name) for name in ("sha256", "precision", "half", "casts", "kept")},
            **{name: getattr(self, name) for name in ("bytes_before", "bytes_after")},
            "path": str(self.path), "beyond": beyond, "comparison": self.comparison.as_json(),
        }  # fmt: skip


def convert_onnx(
    source: str | Path,
    output: str | Path,
    options: HalfOptions,
    *,
    data: str | None = None,
    seed: int = 0,
    force: bool = False,
    progress: Progress = silent,
) -> ConvertResult:
    """Convert a file to half precision.

    Args:
        source: float32, simplified; external data beside it.
        output: where to write; external data goes into the file.
        data: an ``.npz`` with one array per input; seeded noise without it.
        force: overwrite.

    Raises:
        UsageError, IntegrityError: the file cannot be read, or the output not written.
        ModelError: it is in half precision already, or cannot be converted.
        ParityError: a gate changed, or the error is beyond the type's rounding; nothing was written.
    """
    source, output = Path(source), Path(output)
    check_output_file(output, force)
    if source.exists() and output.exists() and source.samefile(output):
        raise UsageError(f"{output} is the input itself.", "Name another output.")
    original = read_onnx(source)
    feed = feeds.load(data, original) if data else feeds.noise(original, seed)
    progress("looking for values that half cannot hold")
    beyond = activations_beyond(original, [feed], LARGEST[options.precision])
    progress("converting")
    conversion = to_half(ir.from_proto(original), options)
    conversion.model.metadata_props[PRECISION] = json.dumps(
        {"precision": options.precision, "io": options.io, "keep": list(options.keep)}
    )
    proto = ir.to_proto(conversion.model)
    check(proto)
    progress("comparing with the original")
    report = compare_precision(original, proto, [feed], options.precision)
    if not report:
        hint = f"; {next(iter(beyond))} is beyond half's range" if beyond else ""
        raise ParityError(f"{source}: {report.failures[0]}{hint}.", "Nothing was written; see --keep.")
    content = proto.SerializeToString(deterministic=True)
    write_file(output, content)
    return ConvertResult(
        output, hashlib.sha256(content).hexdigest(), options.precision, conversion.half, conversion.casts,
        conversion.kept, _size(original), len(content), report, beyond,
    )  # fmt: skip


def _size(model: onnx.ModelProto) -> int:
    return len(model.SerializeToString())
