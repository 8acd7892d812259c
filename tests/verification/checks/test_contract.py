"""What is not finite, by name."""

from __future__ import annotations

from scconv_deploy.verification.checks.contract import Finite
from scconv_deploy.verification.reference.run import ReferenceRun


def test_non_finite_tensors_are_named_and_do_not_grow_with_the_data():
    finite = Finite()
    for number in range(300):
        run = ReferenceRun(f"d.npz {number}", {}, {}, {}, {}, {}, {}, kind="d.npz")
        finite.note("output y", run)
    assert list(finite.found)[:2] == ["output y on d.npz 0", "output y on d.npz 1"]
    assert len(finite.found) == 9
    assert finite.found["output y on d.npz"] == 292
