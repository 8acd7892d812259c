"""``scconv-deploy convert``: convert a float32 ONNX file to half, with float32 gates; verify against the original.

read --> half --> check --> verify against the original --> write
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import onnx
import onnx_ir as ir

from scconv_deploy.errors import ModelError, UsageError
from scconv_deploy.graph import inputs
from scconv_deploy.graph.contract import IR_VERSION
from scconv_deploy.graph.file import check, read_onnx
from scconv_deploy.graph.hygiene import tidy
from scconv_deploy.graph.types import precision_of, quantization_of
from scconv_deploy.graph.unknown import foreign_operators
from scconv_deploy.precision.float32 import as_ir
from scconv_deploy.precision.half import HalfOptions, converted
from scconv_deploy.records.parity import ParityReport
from scconv_deploy.records.stage import Progress, StageLog, silent
from scconv_deploy.report.verdict import parity_error
from scconv_deploy.system.atomic import check_output_file, write_file
from scconv_deploy.system.environment import sha256_of
from scconv_deploy.verification.checks.half_range import VANISHING
from scconv_deploy.verification.onnx.chain import Artifact, verify_artifact
from scconv_deploy.verification.reference.onnx_file import NamedArrays, OnnxReference


@dataclass(frozen=True)
class ConvertResult:
    """Result of a conversion.

    Attributes:
        precision: type of the data; ``fp32`` if no part of the model can be half.
        half, casts: number of nodes that compute in half, and of inserted casts.
        kept: (node, reason) of nodes that stay in float32.
        bytes_before, bytes_after: sizes of the files.
        report: parity with the original.
    """

    path: Path
    sha256: str
    precision: str
    half: int
    casts: int
    kept: tuple[tuple[str, str], ...]
    bytes_before: int
    bytes_after: int
    report: ParityReport

    def as_json(self) -> dict[str, Any]:
        return {
            **{name: getattr(self, name) for name in ("sha256", "precision", "half", "casts", "kept")},
            **{name: getattr(self, name) for name in ("bytes_before", "bytes_after")},
            "path": str(self.path), "report": self.report.as_json(),
        }  # fmt: skip


def convert_onnx(
    source: str | Path,
    output: str | Path,
    options: HalfOptions,
    *,
    data: str | None = None,
    seed: int = 0,
    force: bool = False,
    command: str = "",
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
        ModelError: the file is in half precision already, or cannot be converted.
        ParityError: a gate changed, or the error is beyond the type's rounding; nothing was written.
    """
    source, output = Path(source), Path(output)
    check_output_file(output, force)
    if source.exists() and output.exists() and source.samefile(output):
        raise UsageError(f"{output} is the input itself.", "Name another output.")
    original = read_onnx(source)
    if quantization := quantization_of(original):
        why = f"{source} is {quantization}: its scales and integers were made for the type that its data have."
        raise ModelError(why, "Convert the float32 file that it was quantised from.")
    if foreign := foreign_operators(original):
        why = f"{source} has operators that neither ONNX nor ONNX Runtime knows ({', '.join(foreign)})"
        raise ModelError(f"{why}, so nothing could be compared.", "Convert the model without them.")
    given = [NamedArrays(data, inputs.load(data, original))] if data else None
    log = StageLog()
    progress("converting")
    with log.stage("precision") as stage:
        conversion = converted(as_ir(original), options)
        stage.skipped += conversion.kept
        proto = ir.to_proto(conversion.model)
        proto.ir_version = min(proto.ir_version, IR_VERSION)
        tidy(proto)
        check(proto, "converted graph")
    progress("comparing with the original")
    content = proto.SerializeToString(deterministic=True)
    reference = OnnxReference(str(source), original)
    report = verify_artifact(
        reference, Artifact(proto, str(output), content, original), given or reference.samples(seed), log,
        provenance={"command": command, "seed": str(seed)},
    )  # fmt: skip
    if not report:
        raise parity_error(source, report, f"Nothing was written; {_remedy(report)}")
    write_file(output, content)
    return ConvertResult(
        output, sha256_of(content), precision_of(proto), conversion.half, conversion.casts,
        conversion.kept, _size(original), len(content), report,
    )  # fmt: skip


def _remedy(report: ParityReport) -> str:
    """Advice on what to keep in float32, from the range check if it names tensors."""
    reasons = [check.reason for link in report.links for check in link.checks if check.name == "range"]
    vanishing = next((part for reason in reasons for part in reason.split("; ") if part.startswith(VANISHING)), "")
    return f"{vanishing}: try --keep with what gives or reads it." if vanishing else "see --keep."


def _size(model: onnx.ModelProto) -> int:
    return len(model.SerializeToString())
