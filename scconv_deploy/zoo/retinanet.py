"""RetinaNet (Lin et al. 2017) on ResNet-50 with ScConv in the backbone, as ScConv (CVPR 2023) has it on PASCAL VOC.

The default input is 480x640, landscape as VOC's images: with 20 classes the baseline then takes 63.61 G multiply-adds,
the paper's 63.09 G within 1 %. The paper's 41.36 G with ScConv is out of reach there (ours: 54.57 G), for pyramid and
heads alone take 38.6 G. Its ratio of the two, 0.656, is that of the backbones alone (0.660 for its ResNet-50), and at
864x896 ours take 63.06 G and 40.27 G without pyramid and heads; so the paper seems to count the backbone.
"""

from __future__ import annotations

import math
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from scconv_deploy.errors import ConfigurationError
from scconv_deploy.zoo.detection import DetectionOptions, anchor_shapes, detect, grid_anchors
from scconv_deploy.zoo.layers import SpatialConv, conv3x3, initialize, scconv3x3
from scconv_deploy.zoo.resnet import Bottleneck, ResNet

STRIDES = (8, 16, 32, 64, 128)
RATIOS = (0.5, 1.0, 2.0)
SCALES = (1.0, 2 ** (1 / 3), 2 ** (2 / 3))
ANCHOR_SIZE = 4
"""Size of the smallest anchors, in strides: 32 to 512 pixels on P3 to P7."""

PRIOR = 0.01
"""Score of an untrained anchor, set by the last bias (section 4.1 of the RetinaNet paper)."""

_COARSEST_BACKBONE_STRIDE = 32
_LOGIT_DEVIATION, _DELTA_DEVIATION = 1.0, 0.25


class FeaturePyramid(nn.Module):
    """P3 to P7 from C3 to C5 (Lin et al. 2017): lateral 1x1s, a top-down path, a 3x3 each; P6 and P7 are strided 3x3s.

    Shape: three ``[N, in_channels[i], H_i, W_i]`` to five ``[N, channels, H_i, W_i]``.
    """

    def __init__(self, in_channels: tuple[int, int, int], channels: int) -> None:
        super().__init__()
        self.lateral = nn.ModuleList(nn.Conv2d(c, channels, 1) for c in in_channels)
        self.output = nn.ModuleList(nn.Conv2d(channels, channels, 3, 1, 1) for _ in in_channels)
        self.p6 = nn.Conv2d(in_channels[-1], channels, 3, 2, 1)
        self.p7 = nn.Conv2d(channels, channels, 3, 2, 1)

    def forward(self, c3: Tensor, c4: Tensor, c5: Tensor) -> list[Tensor]:
        m3, m4, m5 = (lateral(c) for lateral, c in zip(self.lateral, (c3, c4, c5), strict=True))
        m4 = m4 + F.interpolate(m5, scale_factor=2.0, mode="nearest")
        m3 = m3 + F.interpolate(m4, scale_factor=2.0, mode="nearest")
        p6 = self.p6(c5)
        p7 = self.p7(F.relu(p6))
        return [*(output(m) for output, m in zip(self.output, (m3, m4, m5), strict=True)), p6, p7]


class Head(nn.Module):
    """Four 3x3s and a last one, shared by all feature maps.

    Shape: ``[N, channels, H, W]`` to ``[N, H * W * anchors, values]``, places row by row.
    """

    def __init__(self, channels: int, anchors: int, values: int) -> None:
        super().__init__()
        self.values = values
        self.convs = nn.ModuleList(nn.Conv2d(channels, channels, 3, 1, 1) for _ in range(4))
        self.last = nn.Conv2d(channels, anchors * values, 3, 1, 1)

    def forward(self, x: Tensor) -> Tensor:
        for conv in self.convs:
            x = F.relu(conv(x))
        return self.last(x).permute(0, 2, 3, 1).reshape(x.shape[0], -1, self.values)


class RetinaNet(nn.Module):
    """``[N, 3, H, W]`` to boxes; H and W multiples of 32.

    In eval mode the result is what :func:`~scconv_deploy.zoo.detection.detect` says; in train mode, or with ``raw``,
    it is ``logits`` ``[N, A, num_classes]`` and ``deltas`` ``[N, A, 4]`` for the anchors ``[A, 4]`` of
    :meth:`anchors`, all feature maps in a row. The batch may be an open axis of an export; H and W are fixed by it,
    for the number of candidates depends on them.

    Args:
        backbone: its :meth:`~scconv_deploy.zoo.resnet.ResNet.features` are C3, C4 and C5.
        in_channels: of C3, C4 and C5.
        channels: of the pyramid and the heads.
        raw: leave out decoding and suppression.
        options: how the final boxes are chosen.
    """

    def __init__(
        self,
        backbone: ResNet,
        in_channels: tuple[int, int, int],
        num_classes: int,
        channels: int = 256,
        raw: bool = False,
        options: DetectionOptions = DetectionOptions(),
    ) -> None:
        super().__init__()
        self.raw, self.options = raw, options
        backbone.fc = nn.Identity()  # classifies; nothing here uses it
        self.backbone = backbone
        self.pyramid = FeaturePyramid(in_channels, channels)
        per_place = len(RATIOS) * len(SCALES)
        self.classes = Head(channels, per_place, num_classes)
        self.boxes = Head(channels, per_place, 4)
        shapes = [anchor_shapes(ANCHOR_SIZE * stride, RATIOS, SCALES) for stride in STRIDES]
        self.register_buffer("anchor_shapes", torch.stack(shapes), persistent=False)

    def anchors(self, height: int, width: int) -> list[Tensor]:
        """Anchors of every feature map for an image of this size, ``[A, 4]`` each."""
        shapes: Tensor = self.anchor_shapes  # type: ignore[assignment]
        sizes = [(-(-height // stride), -(-width // stride)) for stride in STRIDES]
        return [grid_anchors(s, *size, stride) for s, size, stride in zip(shapes, sizes, STRIDES, strict=True)]

    def forward(self, image: Tensor) -> dict[str, Tensor]:
        height, width = image.shape[2:]
        if height % _COARSEST_BACKBONE_STRIDE or width % _COARSEST_BACKBONE_STRIDE:
            raise ConfigurationError(
                f"RetinaNet: an image of {height}x{width}, expected multiples of {_COARSEST_BACKBONE_STRIDE}.",
                "Resize or pad it.",
            )
        features = self.pyramid(*self.backbone.features(image))
        logits, deltas = [self.classes(p) for p in features], [self.boxes(p) for p in features]
        if self.raw or self.training:
            return {"logits": torch.cat(logits, 1), "deltas": torch.cat(deltas, 1)}
        return detect(logits, deltas, self.anchors(height, width), (height, width), self.options)


def _initialize(model: RetinaNet) -> RetinaNet:
    """:func:`~scconv_deploy.zoo.layers.initialize`, and heads that detect something before they are trained.

    The last biases are those of the RetinaNet paper. Its last weights (deviation 0.01) leave every score near the
    prior, so that a threshold drops all boxes or none. Here they are scaled on a seeded batch to logits of deviation 1
    and deltas of 0.25 (as in Mishkin and Matas 2016): scores lie on either side of the threshold. The batch is noise
    of low frequencies, on which networks answer as on photographs.
    """
    shape = (2, 3, 128, 128)
    initialize(model, shape)
    if any(parameter.is_meta for parameter in model.parameters()):  # built to be counted, see there
        return model
    with torch.no_grad():
        nn.init.constant_(model.classes.last.bias, -math.log((1 - PRIOR) / PRIOR))  # type: ignore[arg-type]
        nn.init.zeros_(model.boxes.last.bias)  # type: ignore[arg-type]
        raw, model.raw = model.raw, True
        coarse = torch.randn((2, 3, 8, 8), generator=torch.Generator().manual_seed(0))
        values = model.eval()(F.interpolate(coarse, size=shape[2:], mode="bilinear"))
        model.raw = raw
        model.classes.last.weight.mul_(_LOGIT_DEVIATION / values["logits"].std())
        model.boxes.last.weight.mul_(_DELTA_DEVIATION / values["deltas"].std())
    return model.train()


def build(
    spatial: SpatialConv,
    num_classes: int = 20,
    raw: bool = False,
    blocks: tuple[int, int, int, int] = (3, 4, 6, 3),
    width: int = 64,
    channels: int = 256,
    residual_gain: float = 1.0,
    options: DetectionOptions = DetectionOptions(),
) -> RetinaNet:
    """A RetinaNet of any size, initialised; see :class:`RetinaNet` and :class:`~scconv_deploy.zoo.resnet.ResNet`.

    Args:
        residual_gain: what the last BatchNorm of every residual branch starts with.
    """
    backbone = ResNet(blocks, spatial, width=width)
    for module in backbone.modules():
        if isinstance(module, Bottleneck):
            nn.init.constant_(module.bn3.weight, residual_gain)
    return _initialize(RetinaNet(backbone, (8 * width, 16 * width, 32 * width), num_classes, channels, raw, options))


def scconv_retinanet_r50(
    num_classes: int = 20,
    raw: bool = False,
    score_threshold: float = 0.05,
    iou_threshold: float = 0.5,
    max_detections: int = 100,
    **scconv: Any,
) -> nn.Module:
    """RetinaNet-R50 with ScConv in the backbone; further arguments are :class:`~scconv_deploy.nn.ScConv`'s."""
    options = DetectionOptions(score_threshold, iou_threshold, max_detections=max_detections)
    return build(scconv3x3(**scconv), num_classes, raw, options=options)


def retinanet_r50(
    num_classes: int = 20,
    raw: bool = False,
    score_threshold: float = 0.05,
    iou_threshold: float = 0.5,
    max_detections: int = 100,
    spatial: SpatialConv = conv3x3,
) -> nn.Module:
    """The baseline; ``spatial`` puts another convolution in place of each 3x3 of the backbone.

    Its residual branches start small (Goyal et al. 2017 start them at 0). Otherwise the untrained network amplifies
    what is unlike the noise that it was initialised on, rounding included: on photographs scores were exactly 1 and
    most boxes had no area. ScConv's branches are small anyway.
    """
    options = DetectionOptions(score_threshold, iou_threshold, max_detections=max_detections)
    return build(spatial, num_classes, raw, residual_gain=0.1, options=options)
