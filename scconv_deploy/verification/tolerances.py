"""Every tolerance of a verdict, with its reason, in one table; the report prints it."""

from __future__ import annotations

from dataclasses import dataclass

from scconv_deploy.gate.behaviour import VALUE_TOLERANCE


@dataclass(frozen=True)
class Tolerance:
    """A limit, what it limits, and why it is what it is."""

    value: float
    limits: str
    reason: str


UNEXPLAINED_FLIPS = Tolerance(
    0,
    "gates that differ on the same input beyond the rounding bound",
    "rounding cannot move such a gate, so a fault did",
)
SWAPPED_VALUES = Tolerance(
    VALUE_TOLERANCE,
    "relative L2 of an SRU as given against its variant, elements with a changed gate left out",
    "torch sums in several orders itself; a wrong eps, ddof or data path is at least 1e-5 away",
)
REPLAY_MULTIPLE = Tolerance(
    8,
    "error of the replay with the reference's gates, in multiples of the noise floor",
    "with the gates fixed the model is continuous; other summation orders stay within a small multiple of "
    "PyTorch fp32 against float64",
)
SMALLEST_FLOOR = Tolerance(
    2.0**-24,
    "smallest noise floor, relative L2",
    "half a unit in the last place of float32; a shorter chain of roundings can be exact by luck",
)
LARGEST_FLOOR = Tolerance(
    1e-5,
    "largest noise floor, relative L2",
    "a hundred times what ScConv networks show; a reference noisier than this (random, or stepping where no gate is "
    "recognised) proves nothing",
)
ASSUMED_FLOOR = Tolerance(
    1e-6,
    "noise floor where the reference cannot run in float64, relative L2",
    "ten times what ScConv networks show (about 1e-7)",
)

SMALLEST_SHARE = Tolerance(
    1e-4,
    "smallest noise floor of an output of indices or masks, share of entries that differ",
    "an index changes where two scores are closer than rounding; nothing finer can be asked of it",
)
LARGEST_SHARE = Tolerance(
    1e-2,
    "largest noise floor of an output of indices or masks, share of entries that differ",
    "a reference that changes more of them by its own rounding proves nothing",
)
EQUAL_SCORES = Tolerance(
    1e-5,
    "difference of two scores, in [0, 1], whose detections may change places",
    "detections are sorted by score, so rounding decides the order of closer ones (in 5 of 658 images, measured on a "
    "small RetinaNet); a gate that upstream rounding moves shifts scores by more, 1e-4",
)

ALL = {
    "unexplained_flips": UNEXPLAINED_FLIPS,
    "swapped_values": SWAPPED_VALUES,
    "replay_multiple": REPLAY_MULTIPLE,
    "smallest_floor": SMALLEST_FLOOR,
    "largest_floor": LARGEST_FLOOR,
    "assumed_floor": ASSUMED_FLOOR,
    "smallest_share": SMALLEST_SHARE,
    "largest_share": LARGEST_SHARE,
    "equal_scores": EQUAL_SCORES,
}
