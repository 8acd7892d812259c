"""Models as the user names them: a zoo model, a factory or a checkpoint, with weights and inputs."""

from __future__ import annotations

import ast
import difflib
import json
import shlex
from collections.abc import Collection, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, Literal

from scconv_deploy import zoo
from scconv_deploy.errors import UsageError
from scconv_deploy.model.file_kind import has_checkpoint_start
from scconv_deploy.model.inputs import DynamicAxis, InputSpec
from scconv_deploy.model.user_code import parse_source
from scconv_deploy.zoo.embed_spec import EmbedSpec

_CHECKPOINT_SUFFIXES = (".pt", ".pth", ".ckpt", ".bin", ".tar", ".pt2", ".pkl")


@dataclass(frozen=True)
class ModelSpec:
    """A model as the user names it.

    Attributes:
        source: a zoo name, ``package.module:factory``, ``path/file.py:factory``, or a checkpoint that is a pickled
            module (with ``trust_checkpoint``).
        kwargs: for the factory.
        weights: a ``.safetensors``, ``.pt`` or ``.pth`` state dict, nested or not.
        weights_key: which entry of the weights, where several fit; or which module of a checkpoint.
        inputs: empty for a zoo model's own default.
        dynamic: axes left open.
        seed: of the initialisation and of every random input.
        strict: missing and unexpected keys of the weights are an error.
        trust_checkpoint: read files whose reading executes code.
        embed: what ScConv is put in the place of, if anything.
        raw_outputs: keep all outputs of an ultralytics checkpoint, also those that only its training needs.
        paths: folders in which the model's code is looked for first.
    """

    source: str
    kwargs: Mapping[str, Any] = field(default_factory=dict)
    weights: Path | None = None
    inputs: tuple[InputSpec, ...] = ()
    dynamic: tuple[DynamicAxis, ...] = ()
    seed: int = 0
    strict: bool = True
    trust_checkpoint: bool = False
    embed: EmbedSpec | None = None
    weights_key: str | None = None
    raw_outputs: bool = False
    paths: tuple[Path, ...] = ()

    @property
    def label(self) -> str:
        """Name of the model on the command line."""
        return self.source if self.embed is None else f"{self.source} --embed {shlex.quote(str(self.embed))}"

    def resolved(self) -> ModelSpec:
        """The spec with a zoo model's default inputs, and the batch's optimum as their axis 0.

        Raises:
            UsageError: an unknown or missing source, or no inputs for a model that is not in the zoo.
        """
        inputs = self.inputs
        if source_kind(self.source) == "zoo" and not inputs:
            inputs = (InputSpec(zoo.MODELS[self.source].input_shape),)
        if not inputs:
            raise UsageError(
                f"{self.source}: its inputs are not known.",
                f"Add --input, for example: {self.source} --input 1x3x224x224",
            )
        batch = next((axis for axis in self.dynamic if axis.input is None), None)
        if batch is not None:
            inputs = tuple(replace(i, shape=(batch.optimum, *i.shape[1:])) for i in inputs)
        return replace(self, inputs=inputs)


def parse_kwargs(text: str | None) -> dict[str, Any]:
    """Read ``--kwargs JSON`` (UsageError if it is not a JSON object)."""
    example = "Write for example --kwargs '{\"num_classes\": 10}'."
    try:
        value = json.loads(text) if text is not None else {}
    except (json.JSONDecodeError, RecursionError) as error:
        raise UsageError(f"--kwargs {text!r} is not JSON: {error}.", example) from error
    if not isinstance(value, dict):
        raise UsageError(f"--kwargs {text!r} is a JSON {type(value).__name__}, expected an object.", example)
    return value


def folders(given: Collection[Path]) -> tuple[Path, ...]:
    """The folders of ``--path``, absolute (UsageError if one is no folder)."""
    for path in given:
        if not path.is_dir():
            what = "is not a folder" if path.exists() else "does not exist"
            raise UsageError(f"--path {path} {what}.", "Give the folder that holds the package or the files.")
    return tuple(path.resolve() for path in given)


SourceKind = Literal["zoo", "checkpoint", "file", "module"]


def source_kind(source: str) -> SourceKind:
    """Kind of a MODEL, told from its form and from whether the file exists; nothing is imported.

    Raises:
        UsageError: it is none of them, or there is no such file.
    """
    if source in zoo.MODELS:
        return "zoo"
    path = Path(source)
    if path.suffix == ".safetensors":
        raise UsageError(f"{source} holds weights, not a module.", f"Give a MODEL and these as --weights {source}.")
    if path.suffix in _CHECKPOINT_SUFFIXES:
        if not path.is_file():
            raise UsageError(f"Checkpoint {path} does not exist.", "Check the path.")
        return "checkpoint"
    where, _, name = source.rpartition(":")
    file = path if path.suffix == ".py" else Path(where)
    if file.suffix == ".py" and not file.is_file():
        raise UsageError(f"{file} does not exist.", "Give path/file.py:factory.")
    if file.suffix == ".py" and (file == path or not name):
        names = [n.name for n in parse_source(file).body if isinstance(n, (ast.FunctionDef, ast.ClassDef))]
        raise UsageError(
            f"{source} names no factory.",
            f"Write {file}:NAME; it defines {', '.join(names) or 'no function or class'}.",
        )
    if file.suffix == ".py":
        return "file"
    if where and name:
        return "module"
    if path.is_file() and has_checkpoint_start(path):
        return "checkpoint"
    if source and (path.is_dir() or path.suffix in (".onnx", ".engine", ".rejected")):
        what = "a folder" if path.is_dir() else "an artifact"
        raise UsageError(
            f"{source} is {what}, expected a model: a zoo name, package.module:factory, file.py:factory or checkpoint.",
            "Name the model that it was made from.",
        )
    near = difflib.get_close_matches(source, zoo.MODELS, n=1, cutoff=0.5)
    hint = f"Did you mean {near[0]}?" if near else f"The zoo has {', '.join(zoo.MODELS)}."
    raise UsageError(f"{source!r} is not a zoo model, package.module:factory, file.py:factory or checkpoint.", hint)
