"""Kind of a command's MODEL or ARTIFACT (model, ONNX file, engine, bundle), from its name. No file is opened."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from scconv_deploy.bundle.artifact import bundled_model
from scconv_deploy.bundle.contents import ENGINE, REJECTED


@dataclass(frozen=True)
class Model:
    """PyTorch model: zoo name, factory or checkpoint, see :class:`scconv_deploy.model.spec.ModelSpec`."""

    source: str


@dataclass(frozen=True)
class OnnxFile:
    """ONNX file.

    Attributes:
        path: path of the file.
        seed: seed of the noise inputs if the file is a reference.
    """

    path: Path
    seed: int = 0

    @property
    def rejected(self) -> bool:
        """Whether the name marks a file that failed parity."""
        return self.path.name.endswith(REJECTED)

    def model_file(self) -> tuple[Path, dict[str, str]]:
        """Path of the file, and notes for the report."""
        return self.path, {}


@dataclass(frozen=True)
class Engine:
    """TensorRT engine."""

    path: Path


@dataclass(frozen=True)
class Bundle:
    """Bundle: a folder that ``deploy`` wrote."""

    path: Path

    def model_file(self) -> tuple[Path, dict[str, str]]:
        """Path of the bundle's ONNX file, and notes for the report (UsageError, IntegrityError)."""
        return bundled_model(self.path)


def artifact_of(path: Path) -> OnnxFile | Engine | Bundle:
    """Kind of an artifact; any file whose name is not an engine's is taken for ONNX."""
    if path.name.endswith(ENGINE):
        return Engine(path)
    return Bundle(path) if path.is_dir() else OnnxFile(path)


def subject_of(text: str) -> Model | OnnxFile | Engine | Bundle:
    """Kind of a text that may also name a model; an ONNX file is recognised by its suffix."""
    artifact = artifact_of(Path(text))
    named = not isinstance(artifact, OnnxFile) or text.endswith((".onnx", REJECTED))
    return artifact if named else Model(text)
