"""Metrics of an output over the samples."""

from __future__ import annotations

import numpy as np
import pytest

from scconv_deploy.records import tolerances
from scconv_deploy.verification.checks.end_to_end import EndToEnd
from scconv_deploy.verification.checks.shared import Shared
from scconv_deploy.verification.metrics import compare


def test_metrics_are_the_worst_of_each_and_agreement_counts_all_rows():
    outputs = EndToEnd(Shared(tolerances.table()))
    reference = np.array([[1.0, 0.0], [1.0, 0.999999]], np.float32)
    far = reference * np.float32(1.001)  # the farthest in relative L2, every row agrees
    near = np.array([[1.0, 0.0], [0.999999, 1.0]], np.float32)  # one row of two does not
    for y in (far, near, reference):
        outputs.tally.add("y", compare(y, reference), len(y))
    found = outputs.metrics["y"]
    assert found.relative_l2 == compare(far, reference).relative_l2
    assert found.snr_db == compare(far, reference).snr_db
    assert found.top1_agreement == pytest.approx(5 / 6)
    assert found.top5_agreement is None
    assert found.quantiles_abs == compare(far, reference).quantiles_abs
