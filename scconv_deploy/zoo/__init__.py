"""Networks with ScConv in them, by name. A network is one file here and one line in :data:`MODELS`."""

from __future__ import annotations

import importlib
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from torch import nn

IMAGENET_MEAN, IMAGENET_STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)
CIFAR_MEAN, CIFAR_STD = (0.4914, 0.4822, 0.4465), (0.2470, 0.2435, 0.2616)


@dataclass(frozen=True)
class ZooModel:
    """One entry: where the factory is (imported when it is called), what it takes, and where it comes from.

    Attributes:
        factory: ``module:function`` below this package.
        input_shape: ``[N, C, H, W]`` of its default input.
        mean, std: of the normalisation its images get, per channel, for values in [0, 1].
        source: what it reproduces.
    """

    factory: str
    input_shape: tuple[int, ...]
    mean: tuple[float, ...]
    std: tuple[float, ...]
    source: str

    def build(self, **kwargs: Any) -> nn.Module:
        module, _, name = self.factory.partition(":")
        return getattr(importlib.import_module(f"{__name__}.{module}"), name)(**kwargs)


def _imagenet(factory: str, source: str) -> ZooModel:
    return ZooModel(factory, (1, 3, 224, 224), IMAGENET_MEAN, IMAGENET_STD, source)


def _cifar(factory: str, source: str) -> ZooModel:
    return ZooModel(factory, (1, 3, 32, 32), CIFAR_MEAN, CIFAR_STD, source)


def _voc(factory: str, source: str) -> ZooModel:
    return ZooModel(factory, (1, 3, 480, 640), IMAGENET_MEAN, IMAGENET_STD, source)


MODELS: dict[str, ZooModel] = {
    "scconv_resnet20": _cifar("cifar_resnet:scconv_resnet20", "ResNet-20 (He et al. 2016) with ScConv"),
    "scconv_resnet56": _cifar("cifar_resnet:scconv_resnet56", "ScConv, CVPR 2023, table 1"),
    "scconv_resnet50": _imagenet("resnet:scconv_resnet50", "ScConv, CVPR 2023, table 5"),
    "scconv_retinanet_r50": _voc("retinanet:scconv_retinanet_r50", "ScConv, CVPR 2023, detection on PASCAL VOC"),
    "resnet20": _cifar("cifar_resnet:resnet20", "baseline: He et al. 2016"),
    "resnet56": _cifar("cifar_resnet:resnet56", "baseline: He et al. 2016"),
    "resnet50": _imagenet("resnet:resnet50", "baseline: He et al. 2016, stride in the 3x3"),
    "retinanet_r50": _voc("retinanet:retinanet_r50", "baseline: Lin et al. 2017, 20 classes (VOC)"),
}
