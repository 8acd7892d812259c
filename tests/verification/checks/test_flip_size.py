"""The size of a jump, against what PyTorch's own SRU gives when one gate is changed."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from scconv_deploy.verification.checks import flip_size
from scconv_deploy.verification.reference.pytorch import TorchReference
from scconv_deploy.verification.samples import noise_samples


@pytest.fixture(scope="module")
def sites(tiny_reference):
    reference = tiny_reference[0]
    return TorchReference(reference).run(noise_samples(reference.signature, 0)[0]).sites


def output(reference, site, x, mask):
    gate = reference.swapped.get_submodule(site.path).gate
    return gate.apply(torch.as_tensor(x).double(), torch.from_numpy(mask)).numpy()


def data_of(reference, site, x):
    """What the gates let through: y with every gate open, the halves uncrossed."""
    opened = output(reference, site, x, np.ones(x.shape, dtype=bool))
    closed = output(reference, site, x, np.zeros(x.shape, dtype=bool))
    half = x.shape[1] // 2
    if site.operator == "SRUSoft":  # r times x crosses over into it
        return x.astype(np.float64)
    assert np.array_equal(np.roll(closed, half, axis=1), opened)
    return opened


@pytest.mark.parametrize(("name", "operator"), [("a.SRU", "SRU"), ("b.SRU", "SRUNorm"), ("c", "SRUSoft")])
def test_a_jump_is_what_the_output_does(tiny_reference, sites, name, operator):
    run, reference = sites[name], tiny_reference[0]
    site, x = run.site, run.x
    assert site.operator == operator
    before = output(reference, site, x, run.mask)
    rms = np.sqrt(np.mean(np.square(data_of(reference, site, x))))
    sizes, every = [], np.zeros(x.shape, dtype=bool)
    for place in np.argwhere(x)[[7, 400, -9]]:  # where x is 0, as a ReLU leaves it, nothing jumps
        flipped = np.zeros(x.shape, dtype=bool)
        flipped[tuple(place)] = every[tuple(place)] = True
        change = np.abs(output(reference, site, x, run.mask ^ flipped) - before).max()
        sizes.append(flip_size.largest(x, flipped, site))
        assert change > 0
        assert sizes[-1] == pytest.approx(change / rms, rel=1e-4)
    assert flip_size.largest(x, every, site) == max(sizes)


def test_nothing_to_let_through_is_no_jump(sites):
    site = sites["a.SRU"].site
    x = np.zeros((1, 16, 2, 2), np.float32)
    assert flip_size.largest(x, np.ones(x.shape, dtype=bool), site) == 0.0
