"""The same rules after our own exporter: what recognition left alone is still improved."""

import torch
from torch import nn

import scconv_deploy
from tests import wild
from tests.rewrite import naive


class InlineGate(nn.Module):
    """An SRU that is no module: its code stands in the block, so that recognition cannot swap it."""

    def __init__(self):
        super().__init__()
        self.conv = nn.Conv2d(3, 16, 3, 1, 1)
        self.gn = wild.OriginalGroupBatchnorm2d(16, 4)
        self.head = nn.Conv2d(16, 4, 1)

    def forward(self, x):
        x = self.conv(x)
        r = torch.sigmoid(self.gn(x) * (self.gn.gamma / self.gn.gamma.sum()))
        return self.head(wild.cross((r >= 0.5) * x, (r < 0.5) * x))


def test_an_sru_that_is_no_module_is_fused_and_judged_by_the_outputs(tmp_path):
    torch.manual_seed(0)
    model = wild.randomize(InlineGate())
    result = scconv_deploy.deploy(model, naive.noise(2, 3, 16, 16), tmp_path / "out")
    assert result, result.report.failures
    stage = next(s for s in result.report.stages if s.name == "rewrite")
    assert "scconv node [groupbn-hard" in stage.applied[0]  # (torch.sum) where that rounds otherwise
    assert any("read from the graph" in caveat for caveat in result.report.caveats)
    assert result.report.outputs[0].replay_ratio < 8
