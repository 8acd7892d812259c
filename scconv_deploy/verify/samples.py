"""What a model is verified on: seeded noise, and the user's own data."""

from __future__ import annotations

import zipfile
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from scconv_deploy import zoo
from scconv_deploy.errors import IntegrityError, MissingRuntimeError, UsageError
from scconv_deploy.signature import Signature, random_tensor

PHOTOS = "photos"
"""``--data photos``: the photographs that scikit-learn ships."""

_IMAGE_SUFFIXES = (".jpg", ".jpeg", ".png", ".bmp", ".webp", ".tif", ".tiff")


@dataclass(frozen=True, eq=False)
class Sample:
    """One run: where it comes from, and the input tensors by name."""

    name: str
    tensors: Mapping[str, Tensor]

    def __str__(self) -> str:
        shapes = ", ".join(f"{name} {'x'.join(map(str, t.shape))}" for name, t in self.tensors.items())
        return f"{self.name}: {shapes}"


@dataclass(frozen=True)
class Preprocessing:
    """Values in [0, 1] become ``(value - mean) / std``, per channel. The default changes nothing."""

    mean: tuple[float, ...] = (0.0,)
    std: tuple[float, ...] = (1.0,)

    @classmethod
    def of(cls, source: str) -> Preprocessing:
        """A zoo model's own; for any other model values stay in [0, 1]."""
        entry = zoo.MODELS.get(source)
        return cls(entry.mean, entry.std) if entry else cls()


def noise_samples(signature: Signature, seed: int) -> list[Sample]:
    """The example inputs, and the same with every open axis at its minimum (the other end of the profile)."""
    samples = [Sample("seeded noise", signature.tensors)]
    if signature.dynamic:
        generator = torch.Generator().manual_seed(seed + 1)
        smallest = {}
        for name, tensor in signature.tensors.items():
            shape = list(tensor.shape)
            for axis in signature.dynamic:
                if axis.input in (None, name):
                    shape[axis.axis] = axis.minimum
            smallest[name] = random_tensor(shape, tensor.dtype, generator)
        samples.append(Sample("seeded noise at the smallest sizes", smallest))
    return samples


def load_samples(source: str, signature: Signature, preprocessing: Preprocessing) -> list[Sample]:
    """Read ``--data``: ``photos``, a folder of images, or an ``.npz`` with one array per input.

    Images are resized to the input's H and W (bilinear, antialiased) and scaled to [0, 1]. Data is cut into batches
    of the input's own size; the last ones are filled up from the start when the batch is not dynamic.

    Raises:
        UsageError: no such file or folder, no images in it, or an input that is no image.
        IntegrityError: a file in it is damaged.
    """
    path = Path(source)
    if source == PHOTOS:
        return _batches(PHOTOS, _images(_shipped_photos(), signature, preprocessing), signature)
    if path.is_dir():
        files = sorted(p for p in path.iterdir() if p.suffix.lower() in _IMAGE_SUFFIXES)
        if not files:
            raise UsageError(f"--data {source}: no image in this folder.", f"Known: {', '.join(_IMAGE_SUFFIXES)}.")
        return _batches(path.name, _images(files, signature, preprocessing), signature)
    if path.suffix == ".npz":
        return _batches(path.name, _arrays(path, signature), signature)
    if not path.exists():
        raise UsageError(f"--data {source} does not exist.", f"Give a folder of images, an .npz, or {PHOTOS!r}.")
    raise UsageError(f"--data {source} is neither a folder of images nor an .npz.")


def _shipped_photos() -> list[Path]:
    try:
        import sklearn.datasets
    except ImportError as error:
        raise MissingRuntimeError(
            "--data photos needs scikit-learn, which ships them.", "pip install 'scconv-deploy[data]'"
        ) from error
    folder = Path(sklearn.datasets.__file__).parent / "images"
    return sorted(folder.glob("*.jpg"))


def _images(files: Sequence[Path], signature: Signature, preprocessing: Preprocessing) -> dict[str, Tensor]:
    try:
        from PIL import Image, UnidentifiedImageError
    except ImportError as error:
        raise MissingRuntimeError("Reading images needs Pillow.", "pip install 'scconv-deploy[data]'") from error
    if len(signature.tensors) != 1:
        raise UsageError(f"Images fit one input, but the model has {', '.join(signature.names)}.", "Give an .npz.")
    ((name, example),) = signature.tensors.items()
    if example.dim() != 4 or example.shape[1] not in (1, 3):
        raise UsageError(f"Input {name} is {list(example.shape)}, not an image [N, 1 or 3, H, W].", "Give an .npz.")
    height, width = example.shape[2:]
    images = []
    for file in files:
        try:
            with Image.open(file) as image:
                converted = image.convert("RGB" if example.shape[1] == 3 else "L").resize(
                    (width, height), Image.Resampling.BILINEAR
                )
        except (UnidentifiedImageError, OSError) as error:
            raise IntegrityError(f"{file} is damaged or not an image.", "Remove it from the folder.") from error
        images.append(np.asarray(converted, dtype=np.float32).reshape(height, width, -1).transpose(2, 0, 1) / 255)
    mean = np.asarray(preprocessing.mean, dtype=np.float32).reshape(-1, 1, 1)
    std = np.asarray(preprocessing.std, dtype=np.float32).reshape(-1, 1, 1)
    return {name: torch.from_numpy((np.stack(images) - mean) / std)}


def _arrays(path: Path, signature: Signature) -> dict[str, Tensor]:
    if not path.is_file():
        raise UsageError(f"--data {path} does not exist.")
    try:
        with np.load(path, allow_pickle=False) as archive:
            arrays = {name: archive[name] for name in archive.files}
    except (ValueError, OSError, EOFError, zipfile.BadZipFile) as error:
        raise IntegrityError(f"--data {path} is damaged or not an .npz: {error}") from error
    if set(arrays) != set(signature.names):
        raise UsageError(
            f"--data {path} holds {', '.join(arrays) or 'nothing'}.",
            f"The model's inputs are {', '.join(signature.names)}.",
        )
    tensors = {}
    for name, example in signature.tensors.items():
        array = arrays[name]
        if array.ndim != example.dim() or array.shape[1:] != tuple(example.shape[1:]):
            raise UsageError(f"--data {path}: {name} is {list(array.shape)}, expected [N, {list(example.shape[1:])}].")
        tensors[name] = torch.from_numpy(array).to(example.dtype)
    if len({len(t) for t in tensors.values()}) != 1 or not len(next(iter(tensors.values()))):
        raise UsageError(f"--data {path}: its arrays are empty or differ in length.")
    return tensors


def _batches(name: str, tensors: Mapping[str, Tensor], signature: Signature) -> list[Sample]:
    count = len(next(iter(tensors.values())))
    batch = len(next(iter(signature.tensors.values())))
    free = next((axis for axis in signature.dynamic if axis.axis == 0), None)
    samples = []
    for start in range(0, count, batch):
        index: Iterable[int] = range(start, min(start + batch, count))
        short = batch - len(list(index))
        if short and (free is None or batch - short < free.minimum):
            index = [*index, *(i % count for i in range(short))]
        chosen = list(index)
        samples.append(Sample(f"{name} {start}-{chosen[-1] if chosen[-1] >= start else count - 1}", {
            key: tensor[chosen] for key, tensor in tensors.items()
        }))  # fmt: skip
    return samples
