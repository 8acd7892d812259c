"""Gates decoded from an SRU's output: an engine shows no gate, with the fused plugin not even inside. NumPy only.

The outputs of the channels c and c' = c + C/2 depend on x and the gates of these two channels alone::

    y_c  = w1(open_c) * d_c + w2(open_c') * d_c'      hard: w1 = 1 or 0, w2 = 0 or 1     d = x, or n * gamma + beta
    y_c' = w1(open_c') * d_c' + w2(open_c) * d_c      soft: w1 = 1 or r, w2 = 0 or r     d = x
                                                            r = sigmoid(n * scale + shift)

For a given x there are four possible outputs, one for each state of the two gates. Each is known up to a rounding
error ``e``, from the arithmetic of the parameters and from the output's type. The nearest one gives the state.

- A gate is *readable* if every output with this gate in the other state is more than 2e from the nearest one: an output
  within e of one is not within e of the other. A gate over zero, over equal data or over data much smaller than the
  other channel's is not readable. It is counted apart, and never as agreement.
- A pair is *foreign* if its output is farther than e from all four: no gates explain it, so the data are wrong.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

import numpy as np

from scconv_deploy.gate.margins import UNIT_ROUNDOFF, count_flips, margins
from scconv_deploy.records.gates import FlipCount
from scconv_deploy.verification.reference.run import Site

ROUNDOFF = {"float32": 2.0**-24, "float16": 2.0**-11, "bfloat16": 2.0**-8}
"""Unit roundoff (half a unit in the last place of 1) by dtype."""
_SMALLEST = {"float32": 2.0**-149, "float16": 2.0**-24, "bfloat16": 2.0**-133}
_APPROXIMATE = 2.0**-20
"""Error of a GPU's fast exp and division, relative to the sigmoid's range: sixteen units in float32's last place."""
_STATES = ((True, True), (True, False), (False, True), (False, False))


@dataclass(frozen=True, eq=False)
class Decoded:
    """Gates decoded from an output.

    Attributes:
        gates: state of each gate, bool ``[N, C, H, W]``; meaningless if not readable.
        readable: readable gates, bool ``[N, C, H, W]``.
        foreign: pairs that no gates explain, bool ``[N, C, H, W]``, set for both channels.
        apart: relative L2 of the output from the nearest possible one, without ill-conditioned groups.
    """

    gates: np.ndarray
    readable: np.ndarray
    foreign: np.ndarray
    apart: float

    def count(self, expected: np.ndarray, x: np.ndarray, site: Site) -> FlipCount:
        """Count the flips of readable gates against the expected mask, on the same input x."""
        found = count_flips((self.gates != expected) & self.readable, x, site.form)
        unread = ~self.readable & ~self.foreign
        return replace(found, gates=int(self.readable.sum()), undecidable=int(unread.sum()))


def decode(y: np.ndarray, x: np.ndarray, site: Site, data: str) -> Decoded:
    """Decode the gates of an SRU from its input and output.

    Args:
        y: output of the SRU, floating ``[N, C, H, W]``.
        x: input of the SRU, bit for bit, floating ``[N, C, H, W]``.
        site: operator, parameters and form.
        data: dtype of x and y in the engine, a key of :data:`ROUNDOFF`.
    """
    half = x.shape[1] // 2
    weights, values, error, ill = _weighted_data(np.asarray(x, np.float64), site, data)
    y64 = np.asarray(y, np.float64)
    lower, upper = y64[:, :half], y64[:, half:]
    slack = error[:, :half] + error[:, half:]
    allowed = [_outputs(weights, values, state, half) for state in _STATES]
    with np.errstate(invalid="ignore"):  # an output that is not finite is near none
        off = np.stack([np.maximum(np.abs(lower - a), np.abs(upper - b)) for a, b in allowed])
    off = np.where(np.isfinite(off), off, np.inf)
    nearest = np.argmin(off, axis=0)
    least = np.take_along_axis(off, nearest[None], axis=0)[0]
    sound = least <= slack
    best = [np.choose(nearest, [pair[side] for pair in allowed]) for side in (0, 1)]
    apart = np.stack([np.maximum(np.abs(best[0] - a), np.abs(best[1] - b)) for a, b in allowed])
    stood, readable = [], []
    for gate in (0, 1):
        opened = np.array([state[gate] for state in _STATES])[nearest]
        other_way = np.array([state[gate] for state in _STATES]).reshape(-1, 1, 1, 1, 1) != opened[None]
        closest = np.where(other_way, apart, np.inf).min(axis=0)
        stood.append(opened)
        readable.append(sound & (closest > 2 * slack) & ~ill)
    both = [np.concatenate(parts, axis=1) for parts in (stood, readable)]
    foreign = np.concatenate([~sound & ~ill] * 2, axis=1)
    return Decoded(
        both[0], both[1], foreign, _distance(y64, np.concatenate(best, axis=1), np.concatenate([ill] * 2, 1))
    )


def _outputs(
    weights: tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray], d: np.ndarray, state: tuple[bool, bool], half: int
) -> tuple[np.ndarray, np.ndarray]:
    """y_c and y_c' for one state of a pair; weights are w1 and w2 for open, then w1 and w2 for closed."""
    w1 = [weights[0 if opened else 2] for opened in state]
    w2 = [weights[1 if opened else 3] for opened in state]
    lower, upper = slice(None, half), slice(half, None)
    own, other = w1[0][:, lower] * d[:, lower], w2[1][:, upper] * d[:, upper]
    return own + other, w1[1][:, upper] * d[:, upper] + w2[0][:, lower] * d[:, lower]


def _weighted_data(
    x: np.ndarray, site: Site, data: str
) -> tuple[tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray], np.ndarray, np.ndarray, np.ndarray]:
    """Weights of both states, data, rounding error that each channel adds to an output, and pairs with an
    ill-conditioned group (only where the data depend on the statistics of groups)."""
    half, roundoff = x.shape[1] // 2, ROUNDOFF[data]
    one, zero = np.ones_like(x), np.zeros_like(x)
    hard, smallest = (one, zero, zero, one), _SMALLEST[data]
    if site.operator == "SRU":  # the data are x; the sum is rounded to the type
        return hard, x, roundoff * np.abs(x) * 1.001 + smallest, np.zeros((len(x), half, *x.shape[2:]), bool)
    affine, error, ill = _affine(x, site)
    if site.operator == "SRUNorm":  # the data are rounded to the type, and so is the sum
        return hard, affine, error + 2 * roundoff * np.abs(affine) + smallest, ill
    with np.errstate(over="ignore"):
        r = 1 / (1 + np.exp(-affine))
    error = np.abs(x) * (error / 4 + _APPROXIMATE + 3 * roundoff) + smallest  # r, the product and the sum are rounded
    return (one, zero, r, r), x, error, ill


def _affine(x: np.ndarray, site: Site) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """n times the first parameter plus the second in float64, its largest error in float32, and pairs with an
    ill-conditioned group."""
    form, half = site.form, x.shape[1] // 2
    nothing = np.zeros(x.shape[1])
    # with a cut of 0 the margin is the centred x, and its bound is that of the mean and the subtraction
    found = margins(x, replace(form, cut=nothing, cut_scale=nothing, sign=nothing + 1))
    first, second = (np.asarray(p, np.float64).reshape(1, -1, 1, 1) for p in list(site.parameters.values())[2:])
    with np.errstate(divide="ignore", invalid="ignore"):
        n = found.margin / found.spread
        k = np.log2(x[0].size / form.num_groups) + 8
        error = np.abs(first) * (2 * found.bound / found.spread + k * UNIT_ROUNDOFF * np.abs(n))
    scaled = n * first
    error = error + 4 * UNIT_ROUNDOFF * (np.abs(scaled) + np.abs(second))
    ill = found.ill | ~np.isfinite(scaled)
    return np.where(ill, 0.0, scaled + second), np.where(ill, 0.0, error), ill[:, :half] | ill[:, half:]


def _distance(y: np.ndarray, nearest: np.ndarray, ill: np.ndarray) -> float:
    if not np.isfinite(y[~ill]).all():
        return float("inf")
    off, size = float(np.linalg.norm((y - nearest)[~ill])), float(np.linalg.norm(nearest[~ill]))
    return off / size if size else (0.0 if off == 0.0 else float("inf"))
