"""Table of tolerances: every limit of a verdict, with its reason. Reports print it, and mark what a user changed."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

import numpy as np

from scconv_deploy.errors import UsageError
from scconv_deploy.records.gates import ILL_CONDITIONED, VALUE_TOLERANCE

GIVEN = "given by the user"


@dataclass(frozen=True)
class Tolerance:
    """One limit, the quantity that it limits, and the reason for its value."""

    value: float
    limits: str
    reason: str

    @property
    def given(self) -> bool:
        """Whether the user gave this limit."""
        return self.reason == GIVEN


FOLDED_ULPS = 8
"""Largest difference, in units in the last place, of an SRU's parameters after a simplifier multiplied gamma by its
weight: four roundings (sum, quotient, product, cut) of one unit each, on both sides. Gates are judged one by one."""

SAME_PLACE = 0.1
"""Largest relative L2 between two tensors that are taken for the same place in a network. Flips upstream cause some
hundredths; different places are 1 and more apart. It decides which tensors are compared, and no verdict."""

Table = Mapping[str, Tolerance]
"""Tolerances by name."""

ALL: dict[str, Tolerance] = {
    "unexplained_flips": Tolerance(
        0,
        "gates that differ beyond the rounding bound, on the same input or running free",
        "rounding cannot move such a gate, so a fault did",
    ),
    "swapped_values": Tolerance(
        VALUE_TOLERANCE,
        "relative L2 of an SRU as given against its variant, elements with a changed gate left out",
        "torch sums in several orders itself; a wrong data path is at least 1e-1 away. A wrong eps or ddof moves gates "
        "and need not move values: recognition's probes tell those, and the gates are compared one by one",
    ),
    "second_opinion": Tolerance(
        2e-6,
        "relative L2 of an SRU in onnx.reference against PyTorch on the same input, changed gates left out",
        "sixteen times float32's rounding of a sum; a wrong data path is at least 1e-1 away. A wrong eps or ddof, "
        "on inputs of unit variance, moves normalised data by 8e-6 or more, a soft gate's by as little as 3e-8 and a "
        "hard gate's on x not at all (measured): the static link catches those, bit for bit",
    ),
    "weight_ulps": Tolerance(
        8,
        "difference of a weight from PyTorch's, in units of its own last place; folding a BatchNorm is allowed for, "
        "and in half any weight may have been folded, for rounding hides it: 8 units are 0.8 % in float16, 6 % in "
        "bfloat16",
        "folding multiplies by gamma / sqrt(var + eps), four roundings on each side",
    ),
    "replay_multiple": Tolerance(
        4,
        "error of the replay with the reference's gates, in multiples of the noise, where one value is compared; of n "
        "values, each the worst of its samples, the largest may be spread^sqrt(2 ln n) times as large, with the spread "
        "of the reference's own right runs. A value given by the user is the limit itself, however many are compared",
        "with the gates fixed the model is continuous, and the noise is the farthest of several runs that are all "
        "right, so that another one is about as far. The largest of n draws grows as the root of 2 ln n in units of "
        "their spread. Healthy artifacts reach 1.5x their noise, 0.3 of their limit; faults in one layer reach 1.1 "
        "times the limit (one value in float16, in a network of one output) to 1e5 times (benchmarks receiver_curve). "
        "One weight of a grouped convolution moved by 1e-4 of its norm cannot be told from rounding: the weights are "
        "compared for that",
    ),
    "half_multiple": Tolerance(
        1.5,
        "error of the replay of a half artifact's float outputs, in multiples of the noise of PyTorch with every value "
        "rounded",
        "the noise is that of random roundings and of weights rounded elsewhere, which is larger than the error of "
        "another right file: exported files agree to the bit, or reach 0.4x the noise where gelu is five operators "
        "(measured: benchmarks receiver_curve)",
    ),
    "smallest_floor.float32": Tolerance(
        2.0**-24,
        "smallest noise floor of a float32 output, relative L2",
        "half a unit in the last place; a shorter chain of roundings can be exact by luck",
    ),
    "smallest_floor.float16": Tolerance(
        2.0**-11, "smallest noise floor of a float16 output, relative L2", "half a unit in the last place"
    ),
    "smallest_floor.bfloat16": Tolerance(
        2.0**-8, "smallest noise floor of a bfloat16 output, relative L2", "half a unit in the last place"
    ),
    "smallest_floor.index": Tolerance(
        1e-4,
        "smallest noise floor of an output of indices or masks, share of entries that differ",
        "an index changes where two scores are closer than rounding; nothing finer can be asked of it",
    ),
    "largest_floor.float32": Tolerance(
        3e-5,
        "largest noise floor of a float32 output, relative L2",
        "three hundred times what ScConv networks show on their own inputs; fed 50 times too large ones they reach "
        "1e-5 (measured). One gate that no one recognised and that flips in float64 makes 1e-4: a reference noisier "
        "than this (random, or stepping) proves nothing",
    ),
    "largest_scatter.float32": Tolerance(
        1e-3,
        "largest noise of a float32 output, relative L2, where a larger disturbance of the reference was seen to move "
        "it in proportion",
        "such a reference is noisy and neither random nor stepping, so its noise is a measure; deep networks of "
        "normalised SRUs reach 3e-5. The limit, a few times this, still tells a part that was lost or mixed up, "
        "which costs more than 1e-2",
    ),
    "largest_floor.float16": Tolerance(
        0.25,
        "largest noise floor of a float16 output, relative L2",
        "the half budget (half_budget) is smaller; if right roundings are farther apart, no file can be right",
    ),
    "largest_floor.bfloat16": Tolerance(
        0.5,
        "largest noise floor of a bfloat16 output, relative L2",
        "the half budget (half_budget) is smaller; if right roundings are farther apart, no file can be right",
    ),
    "half_budget.float16": Tolerance(
        0.1,
        "what rounding to float16 may cost an output, relative L2 with the same gates",
        "plain ResNet-50 without training loses 2 %, and answers as before; a network that loses a tenth is another "
        "network: values that vanish or overflow cost half and more",
    ),
    "half_budget.bfloat16": Tolerance(
        0.4,
        "what rounding to bfloat16 may cost an output, relative L2 with the same gates",
        "eight times float16's roundings: plain ResNet-50 without training loses 16 %; beyond this more than a tenth "
        "of the output's energy is noise",
    ),
    "largest_floor.index": Tolerance(
        1e-2,
        "largest noise floor of an output of indices or masks, share of entries that differ",
        "a reference that changes more of them by its own rounding proves nothing",
    ),
    "equal_scores": Tolerance(
        1e-5,
        "difference of two scores, in [0, 1], whose detections may change places",
        "a hundred units in the last place; detections are sorted by score, so rounding orders closer ones",
    ),
    "engine_multiple": Tolerance(
        4,
        "error of an engine's output, end to end, in multiples of the noise of explained changes of gates and codes; "
        "of a segment between SRUs, in multiples of the smallest noise of its type (engine_noise), or of that of codes",
        "an engine's gates cannot be fixed as in the replay: end to end the error includes the effect of explained "
        "gate changes. The noise is the largest of eight draws with inputs of gates disturbed more than an "
        "engine's rounding does. In ONNX Runtime healthy artifacts reach 0.06x in float32, 1.1x in float16 and 0.6x in "
        "bfloat16; inverted gates, halves not crossed, a dropped layer, swapped outputs are at least 4.9x "
        "(benchmarks/engine_noise.py). In half, a fault of one SRU can be smaller: the SRU alone shows it. "
        "A segment has no gate: healthy ones reach 0.05x in float32 and 0.7x in half",
    ),
    "engine_noise.float32": Tolerance(
        2.0**-17,
        "smallest noise of a float32 engine's output, relative L2",
        "without a changed gate ScConv networks end 5e-7 from PyTorch (measured in ONNX Runtime); Winograd "
        "convolutions, which engines choose, lose up to four bits more",
    ),
    "engine_noise.tf32": Tolerance(
        2.0**-10,
        "smallest noise of an engine's output with TF32, relative L2",
        "TF32 keeps the ten bits of float16's mantissa",
    ),
    "engine_noise.float16": Tolerance(
        2.0**-10,
        "smallest noise of a float16 engine's output, relative L2",
        "a unit in the last place; without a changed gate ScConv networks end 4e-4 to 7e-4 from PyTorch (measured)",
    ),
    "engine_noise.bfloat16": Tolerance(
        2.0**-7,
        "smallest noise of a bfloat16 engine's output, relative L2",
        "a unit in the last place; without a changed gate ScConv networks end 3e-3 to 6e-3 from PyTorch (measured)",
    ),
    "engine_noise.index": Tolerance(
        2.5e-3,
        "smallest noise of an engine's output of indices or masks, share of entries that differ",
        "an index changes where two scores are closer than rounding",
    ),
    "engine_noise.unmeasured": Tolerance(
        2.5e-4,
        "smallest noise of an engine's output where the reference cannot be disturbed, relative L2",
        "a naive export of ScConv-ResNet-50, which changes hundreds of gates, ends 1.8e-4 from PyTorch (measured)",
    ),
    "engine_sru.float32": Tolerance(
        5e-6,
        "relative L2 of a float32 SRU, alone or inside the engine, from the nearest of what its input allows, whatever "
        "its gates",
        "GPUs approximate exp and division to a few units in the last place; a wrong data path is at least 1e-4 away",
    ),
    "engine_sru.float16": Tolerance(
        2.0**-10,
        "relative L2 of a float16 SRU, alone or inside the engine, from the nearest of what its input allows",
        "the data and their sum are rounded, half a unit in the last place each",
    ),
    "engine_sru.bfloat16": Tolerance(
        2.0**-7,
        "relative L2 of a bfloat16 SRU, alone or inside the engine, from the nearest of what its input allows",
        "the data and their sum are rounded, half a unit in the last place each",
    ),
    "other_gates": Tolerance(
        32,
        "of a gate that belongs to no known SRU: margin of a changed gate, and relative L2 of its operands, in "
        "multiples of PyTorch's float32 noise there (of the channel, for a changed gate)",
        "the operands are not a formula's, whose rounding could be bounded, but the model's own tensors: other orders "
        "of summation reach 17x the noise of one pair of runs (behind a global average of 512 channels). A threshold "
        "moved by 1e-3 is at 13,000x, a weight before the gate off by 1e-3 at 1,200x (measured)",
    ),
    "other_gates_half": Tolerance(
        8,
        "of a gate that belongs to no known SRU in a half artifact: margin of a changed gate, and relative L2 of its "
        "operands, in multiples of the noise of PyTorch with every value rounded",
        "the noise is the farthest of several right roundings and float32, so that another right file is about as far "
        "(healthy files reach 0.8x, measured). A threshold moved by 2 % of the operand's rms is at 25x in float16",
    ),
    "jump_multiple": Tolerance(
        4,
        "error of the replay where a gate could not be fixed, in multiples of what the reference itself jumps by: "
        "within it the artifact is not judged, beyond it a fault did it",
        "the jump is the largest of eight draws with inputs off by rounding; an artifact may flip other elements, or a "
        "few more. Damage moves more than the few elements that lie within rounding of a threshold",
    ),
    "max_drop": Tolerance(
        1.0,
        "loss of accuracy by quantisation to int8 (of detectors mAP50-95, of segmenters mIoU); without labels, share "
        "of changed answers",
        "no loss is right or wrong by itself: without --max-drop the cost is shown and not judged",
    ),
    "integer_kernels": Tolerance(
        1.5,
        "relative L2 of an int8 file in ONNX Runtime's integer kernels from itself in float arithmetic, in multiples "
        "of what quantising cost the same output; of a file for CPUs, on all rows together",
        "two files whose roundings had nothing in common would be sqrt(2) of that apart, and kernels that compute what "
        "the file says share nearly all of them: healthy files reach 0.7 (measured). Sums that saturate reach ten",
    ),
    "assumed_floor": Tolerance(
        1e-6,
        "noise floor where it was not measured (outputs whose sizes depend on the values), relative L2",
        "ten times what ScConv networks show (about 1e-7)",
    ),
}

FIXED: dict[str, Tolerance] = {
    "smallest_spread": Tolerance(
        1.25,
        "smallest factor by which equally right runs of a reference are taken to scatter",
        "part of the definition of the replay's limit: a handful of runs can agree by luck, and a runtime has orders "
        "of summation that none of them has",
    ),
    "largest_spread": Tolerance(
        2.0,
        "largest factor by which equally right runs of a reference are taken to scatter",
        "part of the definition of the replay's limit: where they scatter more, few numbers are compared (one number's "
        "error has a spread of 3), and the limit would let faults pass",
    ),
    "ill_conditioned": Tolerance(
        ILL_CONDITIONED,
        "deviation of a group, in units of its mean, below which its gates are counted apart",
        "part of the specification, not a choice: there the rounding of PyTorch's own mean, 1e-7 of it, is a tenth "
        "of the deviation and more, so that no gate is right or wrong",
    ),
}
"""Limits that are part of a definition; printed like the others, but a user cannot change them."""

REWRITE: dict[str, Tolerance] = {
    "rewrite_replay": Tolerance(
        1e-4,
        "relative L2 of a rewritten file's output, with the original file's gates",
        "other kernels and orders of summation cost 1e-6 over the depth of a ResNet-50; a part of the graph that was "
        "lost or mixed up costs more than 1e-2",
    ),
    "rewrite_gates": Tolerance(
        1e-5,
        "distance in z from the threshold of a gate that the original file decides otherwise than PyTorch",
        "float32 around sigmoid 0.5 is 1.2e-7 wide in z, and its statistics are good to 1e-6: further out it was "
        "another gate. For groups beyond 65,536 elements in proportion to their size: a naive sum errs by so much "
        "(measured 4.7e-5 for a volume's group of 2**20 elements in ONNX Runtime)",
    ),
}
"""Limits of the guard of ``scconv-deploy rewrite`` (:mod:`.rewrite_guard`), which has no option to change them."""


def table(overrides: Mapping[str, float] | None = None) -> dict[str, Tolerance]:
    """Make the table of tolerances with a user's values in it.

    Raises:
        UsageError: no tolerance has this name, it cannot be changed, or the value is negative or no number.
    """
    found = dict(ALL)
    for name, value in (overrides or {}).items():
        if name in FIXED:
            raise UsageError(f"{name} defines what is counted and cannot be changed.", f"Can be: {', '.join(ALL)}.")
        if name not in found:
            raise UsageError(f"No tolerance is called {name!r}.", f"There are {', '.join(ALL)}.")
        if not (math.isfinite(value) and value >= 0):
            raise UsageError(f"Tolerance {name} is {value}, expected a number of at least 0.", f"{name}=8 is one.")
        found[name] = replace(found[name], value=value, reason=GIVEN)
    return found


def parse_overrides(texts: Sequence[str]) -> dict[str, float]:
    """Parse ``--tolerance NAME=VALUE`` options (UsageError if the name or the value is not allowed)."""
    overrides = parse_values(texts)
    table(overrides)
    return overrides


def parse_values(texts: Sequence[str]) -> dict[str, float]:
    """Parse NAME=VALUE options without checking the names (UsageError if one is not NAME=VALUE)."""
    values = {}
    for text in texts:
        name, _, value = text.partition("=")
        try:
            values[name.strip()] = float(value)
        except ValueError as error:
            raise UsageError(
                f"--tolerance {text!r} is not NAME=VALUE.", "Write for example --tolerance replay_multiple=16."
            ) from error
    return values


def name_of(limits: Table, name: str, dtype: np.dtype) -> str:
    """Full name of a tolerance that depends on the output's dtype."""
    if f"{name}.{dtype.name}" in limits:
        return f"{name}.{dtype.name}"
    return f"{name}.float32" if dtype.kind == "f" else f"{name}.index"
