"""Networks with ScConv in them, by name. A network is one file here and one line in :data:`MODELS`."""

from __future__ import annotations

import importlib
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from torch import nn

IMAGENET_MEAN, IMAGENET_STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)
CIFAR_MEAN, CIFAR_STD = (0.4914, 0.4822, 0.4465), (0.2470, 0.2435, 0.2616)
CIFAR100_MEAN, CIFAR100_STD = (0.5071, 0.4865, 0.4409), (0.2673, 0.2564, 0.2762)

_PAPER = "Li, Wen, He, CVPR 2023"


@dataclass(frozen=True)
class ZooModel:
    """A network of the zoo: its factory (imported when it is called), its default input and its source.

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


def _cifar100(factory: str, source: str) -> ZooModel:
    return ZooModel(factory, (1, 3, 32, 32), CIFAR100_MEAN, CIFAR100_STD, source)


MODELS: dict[str, ZooModel] = {
    "scconv_resnet20": _cifar("cifar_resnet:scconv_resnet20", "ResNet-20 (He et al. 2016) with ScConv"),
    "scconv_resnet56": _cifar100("cifar_resnet:scconv_resnet56", _PAPER),
    "scconv_cifar_resnet50": _cifar100("cifar_resnet:scconv_cifar_resnet50", _PAPER),
    "scconv_resnext29": _cifar100("resnext:scconv_resnext29", _PAPER),
    "scconv_wrn28_10": _cifar100("wide_resnet:scconv_wrn28_10", _PAPER),
    "scconv_densenet121": _cifar100("densenet:scconv_densenet121", _PAPER),
    "scconv_resnet50": _imagenet("resnet:scconv_resnet50", _PAPER),
    "scconv_resnet50_alpha34": _imagenet("resnet:scconv_resnet50_alpha34", f"{_PAPER}, alpha = 3/4"),
    "scconv_resnet101": _imagenet("resnet:scconv_resnet101", _PAPER),
    "scconv_retinanet_r50": _voc("retinanet:scconv_retinanet_r50", f"{_PAPER}, detection on PASCAL VOC"),
    "resnet20": _cifar("cifar_resnet:resnet20", "baseline: He et al. 2016"),
    "resnet56": _cifar100("cifar_resnet:resnet56", "baseline: He et al. 2016, option B"),
    "cifar_resnet50": _cifar100("cifar_resnet:cifar_resnet50", "baseline: He et al. 2016, 3x3 stem"),
    "resnext29": _cifar100("resnext:resnext29", "baseline: Xie et al. 2017, 4x64d"),
    "wrn28_10": _cifar100("wide_resnet:wrn28_10", "baseline: Zagoruyko and Komodakis 2016"),
    "densenet121": _cifar100("densenet:densenet121", "baseline: Huang et al. 2017"),
    "resnet50": _imagenet("resnet:resnet50", "baseline: He et al. 2016, stride in the 3x3"),
    "retinanet_r50": _voc("retinanet:retinanet_r50", "baseline: Lin et al. 2017, 20 classes (VOC)"),
    "resnet101": _imagenet("resnet:resnet101", "baseline: He et al. 2016, stride in the 3x3"),
}
