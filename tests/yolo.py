"""Stand-ins for the classes in a checkpoint of ultralytics: the same structure and flags, in a few layers.

As there, a layer says which it is (``i``) and where its input comes from (``f``), heads keep the anchors of the last
size, ``fuse()`` folds batch norms, and a checkpoint holds the model in half precision beside its training's arguments.
"""

from __future__ import annotations

import copy

import torch
from torch import nn

from tests import wild


class Conv(nn.Module):
    """Convolution, norm and activation; ``forward_fuse`` once the norm is folded."""

    def __init__(self, cin, cout, kernel=1, stride=1):
        super().__init__()
        self.conv = nn.Conv2d(cin, cout, kernel, stride, kernel // 2, bias=False)
        self.bn = nn.BatchNorm2d(cout)
        self.act = nn.SiLU()

    def forward(self, x):
        return self.act(self.bn(self.conv(x)))

    def forward_fuse(self, x):
        return self.act(self.conv(x))


class Bottleneck(nn.Module):
    """A bottleneck that holds a ScConv."""

    def __init__(self, channels):
        super().__init__()
        self.cv1 = Conv(channels, channels, 3)
        self.cv2 = wild.randomize(wild.OriginalScConv(channels, 4))

    def forward(self, x):
        return x + self.cv2(self.cv1(x))


class Detect(nn.Module):
    """Boxes and scores of each cell, ``[N, 4 + nc, cells]``; beside them its maps, unless it exports."""

    export = False
    dynamic = False
    format = None
    shape = None
    anchors = torch.empty(0)

    def __init__(self, channels, nc=3, extra=0):
        super().__init__()
        self.nc, self.stride = nc, torch.tensor([4.0])
        self.cv = nn.Conv2d(channels, 4 + nc + extra, 1)

    def decoded(self, x):
        maps = self.cv(x)
        if self.dynamic or self.shape != maps.shape:
            ys, xs = (torch.arange(n, dtype=x.dtype) + 0.5 for n in maps.shape[2:])
            self.anchors = torch.stack(torch.meshgrid(xs, ys, indexing="xy")).flatten(1)
            self.shape = maps.shape
        boxes, scores, extra = maps.flatten(2).split((4, self.nc, maps.shape[1] - 4 - self.nc), 1)
        centres = boxes[:, :2] + self.anchors[None]
        return torch.cat([centres * 4, boxes[:, 2:].exp() * 4, scores.sigmoid(), extra], 1), maps

    def forward(self, x):
        y, maps = self.decoded(x)
        return y if self.export else (y, [maps])


class Segment(Detect):
    """Also mask prototypes."""

    def __init__(self, channels, nc=3):
        super().__init__(channels, nc, extra=2)
        self.proto = nn.Conv2d(channels, 2, 1)

    def forward(self, x):
        y, maps = self.decoded(x)
        proto = self.proto(x)
        return (y, proto) if self.export else ((y, proto), {"maps": maps})


class Pose(Detect):
    """Also two keypoints of three values each."""

    kpt_shape = (2, 3)

    def __init__(self, channels, nc=1):
        super().__init__(channels, nc, extra=6)


class Classify(nn.Module):
    """Probabilities; beside them the logits, unless it exports."""

    export = False

    def __init__(self, channels, nc=3):
        super().__init__()
        self.linear = nn.Linear(channels, nc)

    def forward(self, x):
        logits = self.linear(x.mean((2, 3)))
        return logits.softmax(1) if self.export else (logits.softmax(1), logits)


class Selecting(Detect):
    """Selects its best detections itself: ``[N, K, 6]``, corners, score and class."""

    end2end = True

    def forward(self, x):
        y, maps = self.decoded(x)
        boxes, scores = y.transpose(1, 2).split((4, self.nc), 2)
        best, index = scores.flatten(1).topk(5)
        rows = (index // self.nc)[..., None].expand(-1, -1, 4)
        found = torch.cat([boxes.gather(1, rows), best[..., None], (index % self.nc)[..., None].to(x.dtype)], 2)
        return found if self.export else (found, [maps])


class Gridded(Detect):
    """As in YOLOv5: grids in a list, by height and width alone; the output is in a tuple."""

    shape = property()  # it has none

    def __init__(self, channels, nc=3):
        super().__init__(channels, nc)
        self.grid = [torch.empty(0)]

    def forward(self, x):
        maps = self.cv(x)
        if self.dynamic or self.grid[0].shape[2:4] != maps.shape[2:4]:
            ys, xs = (torch.arange(n, dtype=x.dtype) for n in maps.shape[2:])
            self.grid[0] = torch.stack(torch.meshgrid(xs, ys, indexing="xy"))[None]
        y = torch.cat([maps[:, :2] + self.grid[0], maps[:, 2:].sigmoid()], 1).flatten(2).transpose(1, 2)
        return (y,) if self.export else (y, [maps])


class RawMaps(Detect):
    """As in YOLOv7: the flag means the maps of training."""

    def forward(self, x):
        y, maps = self.decoded(x)
        return [maps] if self.export else (y, [maps])


class BrokenExport(Detect):
    """A fork whose path for export nobody has run."""

    def forward(self, x):
        y, maps = self.decoded(x)
        return self.exported(y) if self.export else (y, [maps])


class DetectionModel(nn.Module):
    """Layers that are run one after the other, with what a trained model knows of itself."""

    def __init__(self, head=Detect, task="detect", names=("red", "green", "blue")):
        super().__init__()
        layers = [Conv(3, 16, 3, 2), Conv(16, 16, 3, 2), Bottleneck(16), head(16)]
        self.model = nn.Sequential(*layers)
        for i, layer in enumerate(layers):
            layer.i, layer.f = i, -1
        self.stride = torch.tensor([4.0])
        self.names = dict(enumerate(names))
        self.yaml = {"nc": len(names), "yaml_file": "/home/somebody/yolov8n-scconv.yaml"}
        if task is not None:
            self.task = task
        generator = torch.Generator().manual_seed(0)
        for module in self.modules():
            if isinstance(module, nn.BatchNorm2d):
                module.running_mean.normal_(0, 0.1, generator=generator)
                module.running_var.uniform_(0.5, 2, generator=generator)

    @property
    def end2end(self):
        return getattr(self.model[-1], "end2end", False)

    def forward(self, x, augment=False):
        return self.model(x)

    def fuse(self, verbose=True):
        for module in self.modules():
            if isinstance(module, Conv) and hasattr(module, "bn"):
                module.conv = nn.utils.fuse_conv_bn_eval(module.conv, module.bn)
                del module.bn
                module.forward = module.forward_fuse
        return self


class Attention(nn.Module):
    """Attention over all places, its projections normalised, as in YOLO12."""

    def __init__(self, channels):
        super().__init__()
        self.qkv, self.proj = Conv(channels, 3 * channels), Conv(channels, channels)
        self.qkv.act = self.proj.act = nn.Identity()

    def forward(self, x):
        q, k, v = self.qkv(x).flatten(2).chunk(3, 1)
        weights = (q.transpose(1, 2) @ k * q.shape[1] ** -0.5).softmax(-1)
        return x + self.proj((v @ weights.transpose(1, 2)).reshape(x.shape))


class AttentiveModel(DetectionModel):
    """Four layers of attention before the bottleneck."""

    def __init__(self, **options):
        super().__init__(**options)
        first, second, *rest = self.model
        blocks = [nn.Sequential(Conv(16, 16, 3), Attention(16)) for _ in range(4)]
        self.model = nn.Sequential(first, second, *blocks, *rest)
        for i, layer in enumerate(self.model):
            layer.i, layer.f = i, -1


class UnfusableModel(DetectionModel):
    """A fork whose ``fuse()`` does not know its layers."""

    def fuse(self, verbose=True):
        raise AttributeError("'ScConv' object has no attribute 'bn'")


class WronglyFusedModel(DetectionModel):
    """A fork whose layers inherit a ``forward_fuse`` that leaves something out."""

    def fuse(self, verbose=True):
        for module in self.modules():
            if isinstance(module, Bottleneck):
                module.forward = module.cv1.__call__
        return super().fuse()


def model(kind=DetectionModel, seed=0, **options):
    torch.manual_seed(seed)
    return kind(**options).eval()


def settled(model, mean, contrast):
    """Give the batch norms of a model the statistics of images of this mean and contrast."""
    norms = [module for module in model.modules() if isinstance(module, nn.BatchNorm2d)]
    for norm in norms:
        norm.reset_running_stats()
        norm.train().momentum = None  # the mean over all that it sees
    images = mean + contrast * torch.randn((8, 3, 32, 32), generator=torch.Generator().manual_seed(1))
    with torch.no_grad():
        model(images)
    return model.eval()


def checkpoint(trained=None, imgsz=32, **entries):
    """The dictionary that training leaves: half weights, arguments, metadata."""
    trained = model() if trained is None else trained
    return {
        "epoch": -1, "model": copy.deepcopy(trained).half(), "ema": None, "optimizer": None,
        "train_args": {"imgsz": imgsz, "data": "/home/somebody/coco8.yaml", "task": "detect"},
        "train_metrics": {"fitness": 0.5}, "date": "2026-01-02T03:04:05", "version": "8.4.0",
        "license": "AGPL-3.0 License", "docs": "https://docs.ultralytics.com", **entries,
    }  # fmt: skip
