"""A command's MODEL or ARTIFACT: what the text names, by its form and by whether it is a folder. Nothing is opened."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from scconv_deploy.bundle.artifact import bundled_model
from scconv_deploy.bundle.contents import ENGINE, REJECTED


@dataclass(frozen=True)
class Model:
    """A PyTorch model: zoo name, factory or checkpoint, see :class:`scconv_deploy.model.spec.ModelSpec`."""

    source: str


@dataclass(frozen=True)
class OnnxFile:
    """An ONNX file.

    Attributes:
        path: of the file.
        seed: of the noise that it runs on where it is a reference.
    """

    path: Path
    seed: int = 0

    @property
    def rejected(self) -> bool:
        """Whether its name says that it failed parity."""
        return self.path.name.endswith(REJECTED)

    def model_file(self) -> tuple[Path, dict[str, str]]:
        """The file, and notes about it for a report."""
        return self.path, {}


@dataclass(frozen=True)
class Engine:
    """A TensorRT engine."""

    path: Path


@dataclass(frozen=True)
class Bundle:
    """A folder that ``deploy`` wrote."""

    path: Path

    def model_file(self) -> tuple[Path, dict[str, str]]:
        """Its ONNX file, and notes about it for a report (UsageError, IntegrityError)."""
        return bundled_model(self.path)


def artifact_of(path: Path) -> OnnxFile | Engine | Bundle:
    """What a path is where only an artifact can be meant; a file of any name but an engine's is read as ONNX."""
    if path.name.endswith(ENGINE):
        return Engine(path)
    return Bundle(path) if path.is_dir() else OnnxFile(path)


def subject_of(text: str) -> Model | OnnxFile | Engine | Bundle:
    """What a text names where a model can be meant too; an ONNX file is then told by its name."""
    artifact = artifact_of(Path(text))
    named = not isinstance(artifact, OnnxFile) or text.endswith((".onnx", REJECTED))
    return artifact if named else Model(text)
