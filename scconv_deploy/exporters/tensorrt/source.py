"""Input of an engine build: the model's bytes in the form that a version reads, and a few facts about its graph.

Standard library only: a device builds an engine from a bundle without the ``onnx`` library.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Literal, Protocol

from scconv_deploy.errors import IntegrityError
from scconv_deploy.system.environment import sha256_of

Form = Literal["whole", "plugin", "inlined"]
"""Form of a model. ``whole``: as it is. For TensorRT before 10.7 ``plugin``: without the SRUs' functions, or
``inlined``: with functions expanded."""


@dataclass(frozen=True)
class SRUNode:
    """A node of the domain ``scconv``.

    Attributes:
        name: its own, or its first output's.
        x, y: names of its input and output; "" in a device's plan of before they were kept.
    """

    name: str
    operator: str
    x: str = ""
    y: str = ""


@dataclass(frozen=True)
class GraphInput:
    """Input of a graph; open axes are -1."""

    name: str
    shape: tuple[int, ...]


@dataclass(frozen=True)
class GraphFacts:
    """Facts of a graph that a builder needs without the ``onnx`` library.

    Attributes:
        inputs: in the graph's order, without initializers.
        srus: in the graph's order.
        operators: (domain, type) of each operator, those of functions included.
        undefined: the operators that neither ONNX nor a function of the model defines.
        quantized: names of the nodes whose weights are integers behind a DequantizeLinear, in the graph's order.
    """

    inputs: tuple[GraphInput, ...]
    srus: tuple[SRUNode, ...]
    operators: tuple[tuple[str, str], ...]
    undefined: tuple[tuple[str, str], ...] = ()
    quantized: tuple[str, ...] = ()

    @property
    def shapes(self) -> dict[str, tuple[int, ...]]:
        """Shapes of the inputs by name."""
        return {tensor.name: tensor.shape for tensor in self.inputs}


class NetworkSource(Protocol):
    """A model that an engine is built from.

    ``content_sha256`` covers everything that the engine depends on, ``structure_sha256`` all of it but the values of
    weights; "" if that is not known.
    """

    @property
    def facts(self) -> GraphFacts: ...

    @property
    def content_sha256(self) -> str: ...

    @property
    def structure_sha256(self) -> str: ...

    def read(self, form: Form) -> bytes:
        """The model's bytes in a form."""
        ...

    def folded(self, form: Form) -> bytes | None:
        """The model's bytes with constants folded; None if they cannot be folded."""
        ...


@dataclass(frozen=True)
class FileSource:
    """Model files on disk, one for each form."""

    facts: GraphFacts
    files: Mapping[Form, Path]

    @property
    def content_sha256(self) -> str:
        return sha256_of(self.read("whole"))

    @property
    def structure_sha256(self) -> str:
        """Empty: it takes the ``onnx`` library to know it."""
        return ""

    def read(self, form: Form) -> bytes:
        """The bytes of a form's file (IntegrityError if it is missing)."""
        path = self.files.get(form)
        if path is None or not path.is_file():
            raise IntegrityError(
                f"There is no file of the form {form!r}, which TensorRT before 10.7 needs.",
                "Make the bundle for this device: scconv-deploy deploy --backend tensorrt --target orin-jp6.",
            )
        return path.read_bytes()

    def folded(self, form: Form) -> None:
        """Return None: folding needs the ``onnx`` library."""
