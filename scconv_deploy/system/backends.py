"""The libraries that build and run engines: names, installation, targets, GPU. Standard library only."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

Backend = Literal["tensorrt", "tensorrt-rtx"]


@dataclass(frozen=True)
class BackendFacts:
    """Facts of a library that are known before it is imported.

    Attributes:
        title: in messages.
        module: of Python; the package has the backend's own name.
        install: the command that brings it.
        purpose: what is missing without it.
        targets: what ``--target`` takes on this machine, the default first.
        for_devices: whether ``--target`` also takes a device, which builds its engine itself.
        why_gpu: why every build needs a GPU, "" where it does not.
    """

    title: str
    module: str
    install: str
    purpose: str
    targets: tuple[str, ...]
    for_devices: bool
    why_gpu: str


BACKENDS: dict[str, BackendFacts] = {
    "tensorrt": BackendFacts(
        title="TensorRT",
        module="tensorrt",
        install="pip install tensorrt --extra-index-url https://pypi.nvidia.com (on Jetson: apt install tensorrt)",
        purpose="engines with the fused SRU",
        targets=("local",),
        for_devices=True,
        why_gpu="it times its kernels on the GPU that it builds for",
    ),
    "tensorrt-rtx": BackendFacts(
        title="TensorRT-RTX",
        module="tensorrt_rtx",
        install="pip install 'scconv-deploy[rtx]'",
        purpose="engines for RTX GPUs with the fused SRU, built without one",
        targets=("portable", "local", "smNN"),
        for_devices=False,
        why_gpu="",
    ),
}
