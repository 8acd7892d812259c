"""Results of a run file: one record for each cell, a model in a variant."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Literal

SCHEMA_VERSION = 1
CellStatus = Literal["passed", "failed", "not judged", "error", "not done"]
SEVERITY = (0, 3, 2, 4, 5, 6, 7, 1, 141, 143, 130)
"""Exit codes from the best to the worst. An environment can be repaired, then a run file; models and engines that were
not made come next, then a wrong artifact, a file that is not what it claims, and a bug. An interrupt is the worst:
nothing is known of the cells that are left."""


def worst_exit_code(codes: list[int]) -> int:
    """Worst of some exit codes by :data:`SEVERITY`; 0 of none. An unknown code counts as a bug."""
    return max(codes, key=lambda code: SEVERITY.index(code if code in SEVERITY else 1), default=0)


@dataclass(frozen=True)
class Inputs:
    """Everything that shaped a bundle, to tell whether it must be made again.

    Attributes:
        files: SHA-256 of each file and folder that was named, imported or opened, by path.
        packages: SHA-256 of the list of files of each installed package that was imported, by name.
        open_ended: whether something was read that cannot be hashed, a loader's data.
    """

    files: dict[str, str] = field(default_factory=dict)
    packages: dict[str, str] = field(default_factory=dict)
    open_ended: bool = False


@dataclass(frozen=True)
class CellFacts:
    """What the overview shows of a bundle.

    Attributes:
        artifact: name of the ONNX file in the bundle.
        artifact_bytes: size of the ONNX file.
        bundle_bytes: size of all files.
        accuracy, reference_accuracy: share of right answers on labelled data; None without.
        latency_ms: median latency by backend: of each engine that was timed on a device, and (``onnxruntime``) of the
            ONNX file on the machine of the run, at batch 1 where the batch is open.
        moved_bytes: bytes that the compiled plan of an engine moves in one pass, by file of the engine.
    """

    artifact: str
    artifact_bytes: int
    bundle_bytes: int
    accuracy: float | None = None
    reference_accuracy: float | None = None
    latency_ms: dict[str, float] = field(default_factory=dict)
    moved_bytes: dict[str, int] = field(default_factory=dict)


@dataclass(frozen=True)
class CellRecord:
    """One cell of a run.

    Attributes:
        model, variant: names in the run file.
        folder: folder of the bundle, from the run's folder.
        command: command line that makes the same bundle.
        status: passed, failed or not judged, as the bundle's report says; error if there is no bundle; not done if the
            run ended before.
        exit_code: exit code of that command.
        message: the verdict's reason, or the error.
        remedy: what to do about an error.
        digest: SHA-256 of the bundle's manifest; "" without a bundle.
        seconds: wall clock of making it.
        peak_bytes: largest memory of its process; 0 if unknown.
        unchanged: whether it was made by an earlier run.
        facts: facts of the bundle; None without one.
        inputs: what shaped it.
    """

    model: str
    variant: str
    folder: str
    command: str
    status: CellStatus
    exit_code: int
    message: str = ""
    remedy: str = ""
    digest: str = ""
    seconds: float = 0.0
    peak_bytes: int = 0
    unchanged: bool = False
    facts: CellFacts | None = None
    inputs: Inputs = Inputs()

    @property
    def name(self) -> str:
        return f"{self.model}/{self.variant}"


@dataclass(frozen=True)
class RunRecord:
    """All cells of a run, in the order of the run file; ``run.json``.

    Attributes:
        schema_version: changes when a field changes its meaning.
        cells: one record for each cell.
    """

    schema_version: int
    cells: tuple[CellRecord, ...]

    @property
    def exit_code(self) -> int:
        """The worst exit code of all cells."""
        return worst_exit_code([cell.exit_code for cell in self.cells])

    @property
    def counts(self) -> dict[str, int]:
        """Number of cells by status, without statuses that no cell has."""
        statuses = [cell.status for cell in self.cells]
        return {status: statuses.count(status) for status in dict.fromkeys(statuses)}
