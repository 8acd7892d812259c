"""``scconv-deploy sensitivity``: the cost of each int8 site of a float ONNX file, when it alone is int8.

read --> place --> calibrate once --> for each site: quantise it alone, run, compare with the float model
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path

import onnx

from scconv_deploy.errors import UsageError
from scconv_deploy.graph.file import read_onnx
from scconv_deploy.graph.unknown import foreign_operators
from scconv_deploy.precision.int8 import prepared
from scconv_deploy.precision.placement import PlacementOptions
from scconv_deploy.records.quantization import Target, largest_code
from scconv_deploy.records.sensitivity import Cost, Sensitivity, SiteCost
from scconv_deploy.records.stage import Progress, silent
from scconv_deploy.system.environment import sha256_of
from scconv_deploy.verification.costs import CostMeter
from scconv_deploy.workflows.calibrate import CalibrationOptions, Rows, calibrate
from scconv_deploy.workflows.plans import Plans

_ALL = "all sites"


def sensitivity_onnx(
    source: str | Path,
    calibration: CalibrationOptions,
    placement: PlacementOptions = PlacementOptions(),
    *,
    target: Target = "gpu",
    reduce_range: bool = False,
    progress: Progress = silent,
) -> Sensitivity:
    """Measure the cost of each int8 site of a float file, on the rows that it is calibrated on.

    Args:
        source: float32, float16 or bfloat16, rewritten; external data beside it.
        target: hardware that the codes are for.
        reduce_range: weights of 7 bits, whose products do not saturate in 16 bits.

    Raises:
        UsageError, IntegrityError: the file or the data cannot be read, or a pattern matches nothing.
        ModelError: the file is quantised already, or cannot be run.
    """
    source = Path(source)
    proto = read_onnx(source)
    refuse_foreign(proto)
    found = prepared(proto, placement)
    rows = Rows(proto, calibration)
    ranges, _ = calibrate(proto, sha256_of(source), found, rows, calibration, progress)
    plans = Plans(proto, found, placement, ranges, ranges.record(target, largest_code(reduce_range)))
    meter = CostMeter(proto, lambda: rows.batches(calibration.samples), progress)
    return sensitivity_of(plans, meter, source.name)


def refuse_foreign(proto: onnx.ModelProto) -> None:
    """Refuse a model with operators that ONNX Runtime does not know (UsageError)."""
    if foreign := foreign_operators(proto):
        why = f"The model has operators that neither ONNX nor ONNX Runtime knows ({', '.join(foreign)})"
        raise UsageError(f"{why}, so it cannot be calibrated.", "Quantise the model without them.")


def sensitivity_of(plans: Plans, meter: CostMeter, model: str) -> Sensitivity:
    """Measure each site alone, and all of them together.

    Args:
        model: name of the float file.
    """
    models: dict[str, Callable[[], onnx.ModelProto]] = {s.name: partial(plans.alone, s.name) for s in plans.sites}
    costs = meter.measure({_ALL: partial(plans.without, ()), **models})
    together = costs.pop(_ALL)
    parts = _shares([costs[site.name].noise for site in plans.sites])
    found = [
        SiteCost(
            site.name,
            site.kind,
            costs[site.name],
            part,
            plans.share_of(site.multiply_adds),
            site.weight_bytes / max(plans.weight_bytes, 1),
        )
        for site, part in zip(plans.sites, parts, strict=True)
    ]
    made = plans.calibration
    return Sensitivity(
        model, made.data, made.method, tuple(sorted(found, key=lambda one: _rank(one.cost))), together,
        plans.multiply_adds, plans.weight_bytes,
    )  # fmt: skip


def _rank(cost: Cost) -> tuple[float, int, int]:
    """The costliest first; where nothing changed at the outputs, by the gates."""
    return cost.snr_db, -cost.changed, -cost.gates_changed


def _shares(noises: Sequence[float]) -> list[float]:
    """Parts of a sum; infinite ones share all of it."""
    if math.inf in noises:
        noises = [float(noise == math.inf) for noise in noises]
    total = math.fsum(noises)
    return [noise / total if total else 0.0 for noise in noises]
