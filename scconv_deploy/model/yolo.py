"""Checkpoints of ultralytics and its forks: recognised by what they hold, prepared as their own exporter does it.

Nothing of ultralytics is imported here. A checkpoint is recognised by its module: ``model`` is a list of layers that
say where their inputs come from (``f``) and which they are (``i``), beside ``yaml``, ``stride`` and ``names``. What
follows is their exporter's contract (ultralytics 8.x, YOLOv5): an input ``images``, an output ``output0`` (for instance
segmentation also ``output1``, the mask prototypes), batch norms folded by the model's own ``fuse()``, and metadata from
which ``YOLO("model.onnx")`` takes the task, the class names and the image size.
"""

from __future__ import annotations

import copy
import inspect
import math
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import PurePath
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils import _pytree as pytree

from scconv_deploy.errors import first_line
from scconv_deploy.model.input_range import USUAL, InputRange, fitted
from scconv_deploy.model.inputs import InputSpec

INPUT = "images"
OUTPUTS = ("output0", "output1")
TASKS = ("detect", "segment", "classify", "pose", "obb")

_HEADS = {
    "classify": "classify",
    "segment": "segment",
    "pose": "pose",
    "obb": "obb",
    "detect": "detect",
    "detr": "detect",
}
"""Part of a head's class name -> task, for checkpoints that do not say it (YOLOv5)."""
_USUAL_STRIDE = 32
"""Image sizes are whole multiples of the largest stride; of this one where a checkpoint does not say it."""
_SAME_OUTPUT = 1e-5
"""Relative L2 between outputs with and without the head's ``export`` flag: a pose head adds in another order there."""
_FUSED_ALIKE = 1e-2
"""Relative L2 that folding batch norms may change: rounding, and the few gates that it moves."""
_CACHES = ("shape", "shapes")
"""Attributes of heads that hold the sizes for which anchors were made last; None makes them anew."""


@dataclass(frozen=True, kw_only=True)
class YoloCheckpoint:
    """What a checkpoint says of its model.

    Attributes:
        task: one of :data:`TASKS`.
        names: class number -> name.
        image_size: height and width that it was trained at, in pixels.
        stride: largest step of its feature maps, in pixels; image sizes are multiples of it.
        channels: of an image; 3 are RGB, in [0, 1].
        end_to_end: whether the model itself selects detections (``[N, K, 6]``: corners, score, class).
        head: class name of the last layer.
        keypoints: number of keypoints and of values for each; () but for ``pose``.
        said: their metadata that does not depend on the export: ``description``, ``author``, ``date`` ...
    """

    task: str
    names: Mapping[int, str]
    image_size: tuple[int, int]
    stride: int
    channels: int
    end_to_end: bool
    head: str
    keypoints: tuple[int, ...] = ()
    said: Mapping[str, str] = field(default_factory=dict)

    @property
    def letterboxed(self) -> bool:
        """Whether images are scaled to fit and padded with grey (114); images to classify are cropped instead."""
        return self.task != "classify"

    @property
    def inputs(self) -> tuple[InputSpec, ...]:
        """The image as it was trained on."""
        return (InputSpec((1, self.channels, *self.image_size)),)

    def metadata(self, shape: Sequence[int], dynamic: bool) -> dict[str, str]:
        """Metadata that ``YOLO("model.onnx")`` reads.

        Args:
            shape: of the input, ``[N, C, H, W]``.
            dynamic: whether an axis is open. Their loader then takes the batch as it comes.
        """
        batch, _, height, width = shape
        arguments = {"batch": batch, "half": False, "dynamic": dynamic, "simplify": True, "nms": False}
        facts: dict[str, Any] = {
            "stride": self.stride, "task": self.task, "head": self.head, "batch": batch, "imgsz": [height, width],
            "names": dict(self.names), "args": arguments, "channels": self.channels, "end2end": self.end_to_end,
        }  # fmt: skip
        if self.keypoints:
            facts["kpt_shape"] = list(self.keypoints)
        return {**self.said, **{key: str(value) for key, value in facts.items()}}


def is_yolo(module: object) -> bool:
    """Whether a module is built as those of ultralytics and YOLOv5 are."""
    layers = getattr(module, "model", None)
    if not isinstance(module, nn.Module) or not isinstance(layers, (nn.Sequential, nn.ModuleList)) or not len(layers):
        return False
    described = isinstance(getattr(module, "yaml", None), Mapping) and hasattr(module, "stride")
    return described and all(hasattr(layer, "f") and hasattr(layer, "i") for layer in layers)


def checkpoint_of(module: nn.Module, file: Mapping[str, Any]) -> YoloCheckpoint | None:
    """What a checkpoint says of its module; None if the module is none of theirs, or of another task.

    Args:
        module: from the file.
        file: the dictionary that it was in; empty where the module itself was pickled.
    """
    if not is_yolo(module):
        return None
    layers: Any = module.model
    head = layers[-1]
    task = getattr(module, "task", None) or _task_of(head)
    if task not in TASKS:
        return None
    stride = max(int(_largest(module.stride)), 1)
    size = _image_size(module, file)
    step = 1 if task == "classify" else max(stride, _USUAL_STRIDE if stride == 1 else 1)
    return YoloCheckpoint(
        task=task,
        names=_names(module, head),
        image_size=(math.ceil(size[0] / step) * step, math.ceil(size[1] / step) * step),
        stride=stride,
        channels=next((m.in_channels for m in module.modules() if isinstance(m, nn.Conv2d)), 3),
        end_to_end=bool(getattr(module, "end2end", getattr(head, "end2end", False))),
        head=type(head).__name__,
        keypoints=tuple(int(n) for n in getattr(head, "kpt_shape", ())) if task == "pose" else (),
        said=_said(module, file),
    )


def _task_of(head: nn.Module) -> str | None:
    """Task by the class names of a head and its parents."""
    names = [kind.__name__.lower() for kind in type(head).__mro__]
    return next((task for part, task in _HEADS.items() if any(part in name for name in names)), None)


def _largest(stride: Any) -> float:
    return float(torch.as_tensor(stride, dtype=torch.float32).max())


def _image_size(module: nn.Module, file: Mapping[str, Any]) -> tuple[int, int]:
    """Height and width that it was trained at; 640, their default, where nothing says it."""
    default = 224 if "classif" in type(module).__name__.lower() else 640
    for settings in (file.get("train_args"), file.get("opt"), getattr(module, "args", None)):
        found = settings if isinstance(settings, Mapping) else getattr(settings, "__dict__", {})
        size = found.get("imgsz", found.get("img_size"))
        if isinstance(size, int) and size > 0:
            return size, size
        if isinstance(size, (list, tuple)) and size and all(isinstance(n, int) and n > 0 for n in size):
            return size[0], size[-1]
    return default, default


def _names(module: nn.Module, head: nn.Module) -> dict[int, str]:
    names = getattr(module, "names", None) or ()
    pairs = names.items() if isinstance(names, Mapping) else enumerate(names)
    found = {int(number): str(name) for number, name in pairs}
    return found or {n: f"class{n}" for n in range(int(getattr(head, "nc", 0)))}


def _said(module: nn.Module, file: Mapping[str, Any]) -> dict[str, str]:
    """Their metadata. Of paths only the last part: a file must not tell where it was trained."""
    settings = file.get("train_args") or file.get("opt")
    data = settings.get("data") if isinstance(settings, Mapping) else None
    layout: Any = module.yaml
    name = PurePath(str(layout.get("yaml_file") or type(module).__name__)).stem.replace("yolo", "YOLO")
    trained = f" trained on {PurePath(str(data)).name}" if data else ""
    said = {"description": f"Ultralytics {name} model{trained}"}
    if type(module).__module__.startswith("ultralytics."):
        said["author"] = "Ultralytics"
    return said | {key: file[key] for key in ("date", "version", "license", "docs") if isinstance(file.get(key), str)}


# --- preparation -----------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Prepared:
    """A prepared model, what was done to it, and what was not with the reason.

    Attributes:
        drawn: range of generated images, by the batch norms before they were folded.
    """

    model: nn.Module
    applied: tuple[str, ...]
    skipped: tuple[tuple[str, str], ...] = ()
    drawn: InputRange = USUAL


class _Exported:
    """Mixin of a prepared model's class: ``images`` in, named outputs out, and no trace of a call in its heads.

    A head keeps the anchors of the last image size. torch.export refuses a model that assigns tensors to its
    attributes, and a cached size ties the graph to its batch; so what a call assigned is taken back.
    """

    _outputs: int | None = None
    """Number of outputs that are kept; None for all, as the model returns them."""

    def forward(self, images: Tensor) -> Any:
        with _untouched(heads_of(self)):
            found = super().forward(images)  # type: ignore[misc]
        if self._outputs is None:
            return found
        leaves = [leaf for leaf in pytree.tree_leaves(found) if isinstance(leaf, Tensor)]
        return dict(zip(OUTPUTS, leaves[: self._outputs], strict=False))


def heads_of(model: Any) -> list[nn.Module]:
    """Layers with their exporter's flag."""
    return [module for module in model.modules() if isinstance(getattr(module, "export", None), bool)]


@contextmanager
def _untouched(heads: Sequence[nn.Module]) -> Iterator[None]:
    """Give heads back what they held before: attributes, and the lists among them."""
    before = [{k: list(v) if isinstance(v, list) else v for k, v in vars(head).items()} for head in heads]
    try:
        yield
    finally:
        for head, held in zip(heads, before, strict=True):
            vars(head).clear()
            vars(head).update(held)


def prepare(
    model: nn.Module, checkpoint: YoloCheckpoint, shape: Sequence[int], *, raw: bool = False, sizes_open: bool = False
) -> Prepared:
    """A model fused and set to export, of a subclass of its class with one input ``images``.

    Args:
        model: in eval mode, float32; changed.
        shape: of an image, ``[N, C, H, W]``.
        raw: keep every output that the model returns.
        sizes_open: whether the height or the width will be an open axis.

    Raises:
        Exception: what the model's code raises where it refuses the image.
    """
    generator = torch.Generator().manual_seed(0)
    image, noise = (draw((1, *shape[1:]), generator=generator) for draw in (torch.rand, torch.randn))
    drawn = fitted(model, lambda given: model(given.of(noise)))
    image = image if drawn == USUAL else drawn.of(noise)
    applied, skipped = [f"an ultralytics checkpoint: task {checkpoint.task}, head {checkpoint.head}"], []
    kind = _exported_class(type(model))
    returned = () if raw else _leaves(model, image)
    model.__class__ = kind
    heads: list[Any] = heads_of(model)
    for head in heads:
        for name in _CACHES:
            if hasattr(head, name):
                setattr(head, name, None)
        if sizes_open and hasattr(head, "dynamic") and not any(hasattr(head, name) for name in _CACHES):
            head.dynamic = True  # its cache has no size to forget (YOLOv5's grids)
    if not raw:
        kind._outputs, reason = _set_to_export(model, checkpoint, image, returned)
        if reason:
            skipped.append(("export flag", reason))
    if callable(getattr(model, "fuse", None)):
        fused, reason = _fused(model, checkpoint, image)
        if fused is not None:
            model = fused
            applied.append("batch norms folded by its own fuse()")
        else:
            skipped.append(("fuse()", f"{reason}; the model was exported as it is"))
    return Prepared(model, tuple(applied), tuple(skipped), drawn)


def _exported_class(kind: type) -> Any:
    """A subclass of a model's class, of the same name, that is :class:`_Exported`."""
    made = type(kind.__name__, (_Exported, kind), {"__module__": kind.__module__})
    made.__qualname__ = kind.__qualname__
    return made


def _leaves(model: nn.Module, image: Tensor) -> list[Tensor]:
    with torch.no_grad():
        return [leaf for leaf in pytree.tree_leaves(model(image)) if isinstance(leaf, Tensor)]


def _set_to_export(
    model: Any, checkpoint: YoloCheckpoint, image: Tensor, returned: Sequence[Tensor]
) -> tuple[int | None, str]:
    """Set the heads' flag, which leaves out what only training needs; the number of outputs, and why it is not all.

    The outputs with the flag must be those that the model returns first without it: in some forks the flag means the
    raw maps of training.
    """
    heads: list[Any] = heads_of(model)
    wanted = 2 if checkpoint.task == "segment" else 1
    before = [head.export for head in heads]
    for head in heads:
        head.export = True
        if hasattr(head, "format"):
            head.format = "onnx"
    try:
        with_flag = _leaves(model, image)
    except Exception:  # the fork's own code, which ran without the flag
        with_flag = []
    if len(with_flag) == wanted and _are_of(with_flag, returned):
        return wanted, ""
    for head, held in zip(heads, before, strict=True):
        head.export = held
    with torch.no_grad():
        found = model(image)
    if wanted == 1 and isinstance(found, (tuple, list)) and isinstance(found[0], Tensor) and len(found) == 2:
        return 1, "the head has none that works; the second of its two outputs, which training needs, was left out"
    return None, f"with it the head returns {len(with_flag)} tensors, expected {wanted}; all outputs were kept"


def _are_of(outputs: Sequence[Tensor], returned: Sequence[Tensor]) -> bool:
    """Whether the first output is the first that was returned, and the others are among them."""
    first, *others = outputs
    return _apart(first, returned[0]) <= _SAME_OUTPUT and all(
        any(_apart(other, one) <= _SAME_OUTPUT for one in returned) for other in others
    )


def _fused(model: Any, checkpoint: YoloCheckpoint, image: Tensor) -> tuple[nn.Module | None, str]:
    """A copy folded by the model's own ``fuse()``, or None and the reason why it was not kept."""
    before = _judged(_leaves(model, image), checkpoint)
    try:
        fused = copy.deepcopy(model)
        quietly = {"verbose": False} if "verbose" in inspect.signature(fused.fuse).parameters else {}
        fused.fuse(**quietly)
        after = _judged(_leaves(fused, image), checkpoint)
    except Exception as error:  # the fork's own code
        return None, f"it raised {type(error).__name__}: {first_line(error).rstrip('.')}"
    apart = _apart(after, before)
    if apart <= _FUSED_ALIKE:
        return fused, ""
    return None, f"what it makes computes something else (relative L2 {apart:.1e}), and so does the fork's predict()"


def _judged(leaves: Sequence[Tensor], checkpoint: YoloCheckpoint) -> Tensor:
    """First output; of selected detections the scores alone, for rounding changes the order of the rows."""
    selected = checkpoint.end_to_end or "detr" in checkpoint.head.lower()
    return leaves[0][..., 4] if selected else leaves[0]


def _apart(a: Tensor, b: Tensor) -> float:
    """Relative L2; infinite between tensors of other shapes."""
    if a.shape != b.shape or a.dtype != b.dtype:
        return math.inf
    difference = float(torch.linalg.vector_norm(a.double() - b.double()))
    return difference / max(float(torch.linalg.vector_norm(b.double())), torch.finfo(torch.float32).tiny)
