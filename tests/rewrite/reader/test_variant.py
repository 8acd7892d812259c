"""Gates whose gamma a simplifier has multiplied by the weight: what is read of them, and that no gate is lost."""

from dataclasses import replace

import numpy as np
import onnx_ir as ir
import onnxsim
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from scconv_deploy.gate.cut import open_by_cut
from scconv_deploy.gate.gate import Gate
from scconv_deploy.gate.margins import LARGEST_WEIGHT_ERROR
from scconv_deploy.gate.variant import VARIANTS
from scconv_deploy.records.stage import StageLog
from scconv_deploy.rewrite.prepare import prepare
from scconv_deploy.rewrite.reader.variant import FOLDED, REORDERED, weight_error
from tests import wild
from tests.gate.plain import Choices, PlainSRU
from tests.rewrite import naive
from tests.tolerances import ONE_SRU


def without_beta(name):
    """A new network's SRU: beta is 0, and simplifiers make one constant of gamma and the gate weight."""
    module = wild.randomize(wild.SoftSRU(8, 4) if name == "groupnorm-soft" else wild.OriginalSRU(8, 4))
    beta = module.gn.bias if name == "groupnorm-soft" else module.gn.beta
    with torch.no_grad():
        beta.zero_()
    return module


@pytest.mark.parametrize("dynamo", [True, False], ids=["torch.export", "TorchScript"])
@pytest.mark.parametrize("name", ["groupbn-hard", "groupnorm-soft"])
def test_gamma_and_weight_in_one_constant(name, dynamo):
    module = without_beta(name)
    x = naive.noise(2, 8, 4, 6)
    proto = onnxsim.simplify(naive.export(module, x, dynamo))[0]
    affine = [node for node in proto.graph.node if node.op_type in ("Mul", "Add")]
    result, applied = naive.rewritten(proto)
    (fused,) = applied.fused
    assert fused.gate.variant.name == f"{name}-unweighted"
    assert FOLDED in fused.note
    gamma = (module.gn.weight if name == "groupnorm-soft" else module.gn.gamma).detach().reshape(-1)
    np.testing.assert_allclose(fused.gate.gamma.numpy(), (gamma * (gamma / gamma.sum())).numpy(), rtol=1e-6)
    assert len(affine) > 3
    np.testing.assert_allclose(naive.run(result, x), module(x).detach().numpy(), **ONE_SRU)


@settings(max_examples=15, deadline=None)
@given(seed=st.integers(0, 2**31), variant=st.sampled_from(["groupbn-hard", "groupnorm-soft"]))
def test_a_folded_gamma_loses_no_gate(seed, variant):
    """The cut of fl(gamma * w) beside PyTorch's gate, which multiplies by gamma and then by w."""
    generator = torch.Generator().manual_seed(seed)
    known = VARIANTS[variant]
    gamma, beta = 1 + 0.5 * torch.randn(32, generator=generator), torch.zeros(32)
    x = torch.randn(2, 32, 32, 32, generator=generator)
    exact = Gate(known, gamma, beta)
    folded = Gate(replace(known, weighting="none"), gamma * exact.weight, beta)
    np.testing.assert_allclose(folded.form.cut, exact.form.cut, rtol=3e-7)
    differs = open_by_cut(x, folded.form) != exact.mask(x)
    assert exact.count_flips(differs, x).unexplained == 0
    assert int(differs.sum()) <= 1


def test_a_gate_that_reads_n_a_plus_b():
    """Where a simplifier has multiplied out gamma, beta and the weight: cut = (tau - b) / a."""

    class Multiplied(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.inner = wild.randomize(wild.OriginalSRU(8, 4))
            weight = self.inner.gn.gamma / self.inner.gn.gamma.sum()
            with torch.no_grad():
                self.a, self.b = (torch.nn.Parameter(t * weight) for t in (self.inner.gn.gamma, self.inner.gn.beta))
                self.inner.gn.gamma.fill_(1)
                self.inner.gn.beta.zero_()

        def forward(self, x):
            r = torch.sigmoid(self.inner.gn(x) * self.a + self.b)
            return wild.cross((r >= 0.5) * x, (r < 0.5) * x)

    module, x = Multiplied(), naive.noise(2, 8, 4, 6)
    result, applied = naive.rewritten(onnxsim.simplify(naive.export(module, x, False))[0])
    (fused,) = applied.fused
    assert fused.gate.variant.name == "groupbn-hard-unweighted"
    np.testing.assert_array_equal(fused.gate.beta.numpy(), module.b.detach().reshape(-1).numpy())
    np.testing.assert_array_equal(naive.run(result, x), module(x).detach().numpy())


def cancelling(order):
    """An SRU whose sum(gamma) depends on its order, by more than rounding explains."""
    for seed in range(10_000):
        module = PlainSRU(Choices(groups=4, threshold=0.47, weight=order), seed)
        gamma = module.gamma.detach().reshape(-1)
        sums = [float(value) for value in (sum(gamma), gamma.sum(), np.sum(gamma.numpy()))]
        if weight_error(gamma.double().numpy()) > LARGEST_WEIGHT_ERROR:  # lost to rounding in any order
            continue
        if min(abs(a - b) for a, b in zip(sums, [*sums[1:], sums[0]], strict=True)) > 2e-6 * abs(sums[0]):
            return module
    raise AssertionError("no draw has three different sums")


@pytest.mark.parametrize("prepared", [True, False], ids=["prepared", "as exported"])
@pytest.mark.parametrize("order", ["python", "torch"])
def test_whose_sum_it_is_is_read_from_the_file(order, prepared):
    """A chain of additions is Python's, to the bit; a ReduceSum is torch's where this package folds it, and the file's
    own weight where somebody else did."""
    module, x = cancelling(order), naive.noise(2, 32, 4, 4)
    proto = naive.export(module, x, dynamo=False)
    if prepared:
        with StageLog().stage("prepare") as stage:
            proto = ir.to_proto(prepare(proto, 18, stage))
    _, applied = naive.rewritten(proto)
    (fused,) = applied.fused
    gamma, beta = module.gamma.detach().reshape(-1), module.beta.detach().reshape(-1)
    label = "groupbn-hard" if order == "python" else "groupbn-hard (torch.sum)"
    assert fused.gate.variant.label == label
    assert (fused.gate.file_weight is None) == (prepared or order == "python")
    assert (REORDERED in fused.note) == (fused.gate.file_weight is not None)
    expected = gamma / (sum(gamma) if order == "python" else gamma.sum())
    if fused.gate.file_weight is None:
        assert torch.equal(fused.gate.weight, expected)
        assert torch.equal(fused.gate.beta, beta)
    else:  # numpy's order here: the cut follows the file, not what torch would have made of it
        assert torch.equal(fused.gate.weight, gamma / float(np.sum(gamma.numpy())))
        assert not torch.equal(fused.gate.weight, expected)
