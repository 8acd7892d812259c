"""What a model is verified on: seeded noise, and the user's own data."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
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
    """The example inputs and others, for what was traced may hold what the trace saw.

    With open axes: fresh noise, every open axis at its minimum (the other end of the profile). Else: the example with
    the values of each floating tensor shuffled, which keeps their range; indices and masks stay.
    """
    samples = [Sample("seeded noise", signature.tensors)]
    generator = torch.Generator().manual_seed(seed + 1)
    if signature.dynamic:
        smallest = {}
        for name, tensor in signature.tensors.items():
            shape = list(tensor.shape)
            for axis in signature.dynamic:
                if axis.input in (None, name):
                    shape[axis.axis] = axis.minimum
            smallest[name] = random_tensor(shape, tensor.dtype, generator)
        return [*samples, Sample("seeded noise at the smallest sizes", smallest)]
    shuffled = {n: _shuffled(t, generator) if t.is_floating_point() else t for n, t in signature.tensors.items()}
    return [*samples, Sample("seeded noise, shuffled", shuffled)]


def _shuffled(tensor: Tensor, generator: torch.Generator) -> Tensor:
    return tensor.flatten()[torch.randperm(tensor.numel(), generator=generator)].reshape(tensor.shape)


def load_samples(source: str, signature: Signature, preprocessing: Preprocessing) -> list[Sample]:
    """Read ``--data``: ``photos``, a folder of images, or an ``.npz`` with one array per input.

    Images are resized to the input's H and W (bilinear, antialiased), scaled to [0, 1] and preprocessed; arrays are
    taken as they are. Data is cut into batches of the input's own size; the last one is filled up from the start when
    the batch cannot be smaller.

    Raises:
        UsageError: no such file or folder, no images in it, or data that does not fit the inputs.
        IntegrityError: a file in it is damaged.
        MissingRuntimeError: Pillow or scikit-learn is missing.
    """
    path = Path(source)
    if source == PHOTOS:
        return _batches(PHOTOS, _images(_shipped_photos(), signature, preprocessing), signature)
    if not path.exists():
        raise UsageError(f"--data {source} does not exist.", f"Give a folder of images, an .npz, or {PHOTOS!r}.")
    if path.is_dir():
        files = sorted(p for p in path.iterdir() if p.suffix.lower() in _IMAGE_SUFFIXES)
        if not files:
            raise UsageError(f"--data {source}: no image in this folder.", f"Known: {', '.join(_IMAGE_SUFFIXES)}.")
        return _batches(path.name, _images(files, signature, preprocessing), signature)
    if path.suffix == ".npz":
        return _batches(path.name, _arrays(path, signature), signature)
    raise UsageError(f"--data {source} is neither a folder nor an .npz.", "Put images into a folder of their own.")


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
        from PIL import Image
    except ImportError as error:
        raise MissingRuntimeError("Reading images needs Pillow.", "pip install 'scconv-deploy[data]'") from error
    if len(signature.tensors) != 1:
        raise UsageError(f"Images fit one input, but the model has {', '.join(signature.names)}.", "Give an .npz.")
    ((name, example),) = signature.tensors.items()
    if example.dim() != 4 or example.shape[1] not in (1, 3) or not example.is_floating_point():
        found = f"{str(example.dtype).removeprefix('torch.')}{list(example.shape)}"
        raise UsageError(f"Input {name} is {found}, not an image float[N, 1 or 3, H, W].", "Give an .npz.")
    height, width = example.shape[2:]
    images = []
    for file in files:
        try:
            with Image.open(file) as image:
                mode = "RGB" if example.shape[1] == 3 else "L"
                converted = image.convert(mode).resize((width, height), Image.Resampling.BILINEAR)
        except Exception as error:  # each of Pillow's readers raises its own on a damaged file
            raise IntegrityError(f"{file} is damaged or not an image.", "Remove it from the folder.") from error
        images.append(np.asarray(converted, dtype=np.float32).reshape(height, width, -1).transpose(2, 0, 1) / 255)
    mean = np.asarray(preprocessing.mean, dtype=np.float32).reshape(-1, 1, 1)
    std = np.asarray(preprocessing.std, dtype=np.float32).reshape(-1, 1, 1)
    return {name: torch.from_numpy((np.stack(images) - mean) / std).to(example.dtype)}


def _arrays(path: Path, signature: Signature) -> dict[str, Tensor]:
    try:
        with np.load(path, allow_pickle=False) as archive:
            arrays = {name: np.asarray(archive[name]) for name in archive.files}
    except Exception as error:  # zipfile, zlib and NumPy each raise their own on a damaged file
        reason = (str(error).strip() or type(error).__name__).splitlines()[0].split(". ")[0].rstrip(".")
        raise IntegrityError(f"--data {path} is damaged or not an .npz: {reason}.", "Save it with np.savez.") from error
    if set(arrays) != set(signature.names):
        raise UsageError(
            f"--data {path} holds {', '.join(arrays) or 'nothing'}.",
            f"Save one array per input: {', '.join(signature.names)}.",
        )
    tensors = {}
    for name, example in signature.tensors.items():
        array, sizes = arrays[name], list(example.shape[1:])
        fits = 0 < array.ndim == example.dim() and list(array.shape[1:]) == sizes
        if not fits or array.dtype.kind not in "biuf":
            expected = ", ".join(map(str, ["N", *sizes]))
            raise UsageError(
                f"--data {path}: {name} is {array.dtype}{list(array.shape)}, expected numbers [{expected}].",
                "Save it in the input's shape.",
            )
        native = np.ascontiguousarray(array, dtype=array.dtype.newbyteorder("="))
        tensors[name] = torch.from_numpy(native).to(example.dtype)
    return tensors


def _batches(name: str, tensors: Mapping[str, Tensor], signature: Signature) -> list[Sample]:
    sizes = {key: (len(example), len(tensors[key])) for key, example in signature.tensors.items()}
    if len(set(sizes.values())) != 1 or not all(count for _, count in sizes.values()):
        found = ", ".join(f"{key} {count} for batches of {batch}" for key, (batch, count) in sizes.items())
        raise UsageError(f"--data {name}: {found}; expected as many of each.", "Give every input the same length.")
    ((batch, count),) = set(sizes.values())
    samples = []
    for start in range(0, count, batch):
        stop = min(start + batch, count)
        index = list(range(start, stop))
        if len(index) < _smallest_batch(signature, batch):
            index = [i % count for i in range(start, start + batch)]
        samples.append(Sample(f"{name} {start}-{stop - 1}", {key: tensor[index] for key, tensor in tensors.items()}))
    return samples


def _smallest_batch(signature: Signature, batch: int) -> int:
    """How few samples a batch may have: those of the input that allows the least freedom."""
    minima = dict.fromkeys(signature.names, batch)
    for axis in signature.dynamic:
        if axis.axis == 0:
            minima |= {name: axis.minimum for name in signature.names if axis.input in (None, name)}
    return max(minima.values())
