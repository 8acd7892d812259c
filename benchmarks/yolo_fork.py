"""ScConv in the bottlenecks of ultralytics' networks, as forks put it there. Checkpoints name these classes."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

from ultralytics.nn.modules import block
from ultralytics.nn.modules.conv import Conv

from scconv_deploy.nn import ScConv

_GROUPS = 4


class BottleneckScConv(block.Bottleneck):
    """A bottleneck whose second convolution is a ScConv, where its channels allow."""

    def __init__(self, c1, c2, shortcut=True, g=1, k=(3, 3), e=0.5):
        super().__init__(c1, c2, shortcut, g, k, e)
        if c2 % (2 * _GROUPS) == 0:
            self.cv1, self.cv2 = Conv(c1, c2, k[0], 1), ScConv(c2, _GROUPS)


class RepBottleneckScConv(block.RepBottleneck):
    """The same for YOLOv9, whose first convolution has two branches."""

    def __init__(self, c1, c2, shortcut=True, g=1, k=(3, 3), e=0.5):
        super().__init__(c1, c2, shortcut, g, k, e)
        if c2 % (2 * _GROUPS) == 0:
            self.cv1, self.cv2 = block.RepConv(c1, c2, k[0], 1), ScConv(c2, _GROUPS)


@contextmanager
def bottlenecks() -> Iterator[None]:
    """Let ultralytics' blocks (C2f, C3, C3k2, RepCSP) build these bottlenecks."""
    kept = block.Bottleneck, block.RepBottleneck
    block.Bottleneck, block.RepBottleneck = BottleneckScConv, RepBottleneckScConv
    try:
        yield
    finally:
        block.Bottleneck, block.RepBottleneck = kept
