"""What is kept over the samples."""

from __future__ import annotations

import numpy as np
import pytest

from scconv_deploy.verification import tolerances
from scconv_deploy.verification.compare import compare
from scconv_deploy.verification.measure import Measured
from scconv_deploy.verification.reference_run import ReferenceRun


def test_metrics_are_the_worst_of_each_and_agreement_counts_all_rows():
    measured = Measured(tolerances.table())
    reference = np.array([[1.0, 0.0], [1.0, 0.999999]], np.float32)
    far = reference * np.float32(1.001)  # the farthest in relative L2, every row agrees
    near = np.array([[1.0, 0.0], [0.999999, 1.0]], np.float32)  # one row of two does not
    for y in (far, near, reference):
        measured.keep_metrics("y", compare(y, reference), len(y))
    found = measured.end_to_end["y"]
    assert found.relative_l2 == compare(far, reference).relative_l2
    assert found.snr_db == compare(far, reference).snr_db
    assert found.top1_agreement == pytest.approx(5 / 6)
    assert found.top5_agreement is None
    assert found.quantiles_abs == compare(far, reference).quantiles_abs


def test_non_finite_tensors_are_named_and_do_not_grow_with_the_data():
    measured = Measured(tolerances.table())
    for number in range(300):
        run = ReferenceRun(f"d.npz {number}", {}, {}, {}, {}, {}, {}, kind="d.npz")
        measured.note_non_finite("output y", run)
    assert list(measured.non_finite)[:2] == ["output y on d.npz 0", "output y on d.npz 1"]
    assert len(measured.non_finite) == 9
    assert measured.non_finite["output y on d.npz"] == 292
