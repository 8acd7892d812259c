"""Int8 plans of one float model: the same ranges, more or fewer sites."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import onnx

from scconv_deploy.precision.calibration import Calibration
from scconv_deploy.precision.int8 import Prepared, prepared, quantized_proto
from scconv_deploy.precision.placement import PlacementOptions, Unprovable
from scconv_deploy.precision.sites import sites_of
from scconv_deploy.records.quantization import QuantizationRecord


class Plans:
    """Int8 plans of a float model.

    Args:
        proto: float model.
        found: the model prepared with these options; not quantised yet.
        calibration: ranges of all values that ``found`` quantises.
        record: origin of the scales for a file's metadata.
        proved_by: why PyTorch has no layer that could be fake-quantised; None if the plans are not to be proved.

    Attributes:
        sites: what the options quantise, in the graph's order.
        multiply_adds: of all layers for one row; None if a shape is not known.
        weight_bytes: bytes of all constants.
    """

    def __init__(
        self,
        proto: onnx.ModelProto,
        found: Prepared,
        options: PlacementOptions,
        calibration: Calibration,
        record: QuantizationRecord,
        proved_by: Unprovable | None = None,
    ) -> None:
        self.proto, self.calibration = proto, calibration
        self._options, self._record, self._proved_by = options, record, proved_by
        self.sites = sites_of(found)
        self.multiply_adds = None if found.placement.multiply_adds is None else found.placement.multiply_adds[1]
        constants = found.model.graph.initializers.values()
        self.weight_bytes = sum(value.const_value.nbytes for value in constants if value.const_value is not None)

    def keeping(self, keep: Sequence[str]) -> PlacementOptions:
        """Placement with these sites in float too."""
        return replace(self._options, keep=(*self._options.keep, *keep))

    def without(self, keep: Sequence[str]) -> onnx.ModelProto:
        """The model in int8, with these sites in float (UsageError if no layer is left)."""
        return self._quantized(self.keeping(keep))

    def alone(self, site: str) -> onnx.ModelProto:
        """The model in float, with this site in int8."""
        return self._quantized(replace(self._options, only=(site,), skips_alone=True))

    def record(self, options: PlacementOptions) -> QuantizationRecord:
        """Origin of the scales and of the placement, for a file's metadata."""
        return replace(self._record, keep=options.keep, only=options.only)

    def share_of(self, multiply_adds: int | None) -> float | None:
        """Part of the multiply-adds of all layers; None if a shape is not known."""
        return None if multiply_adds is None or not self.multiply_adds else multiply_adds / self.multiply_adds

    def _quantized(self, options: PlacementOptions) -> onnx.ModelProto:
        found = prepared(self.proto, options, self._proved_by)
        return quantized_proto(found, self.calibration.ranges, self.record(options))
