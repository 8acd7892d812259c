"""Gates read from an SRU's output, where they are not seen: an engine's inner tensors are not read. NumPy only.

The gates of the channels c and c' = c + C/2 make the outputs of both, and nothing else does::

    y_c  = w1(open_c) * d_c + w2(open_c') * d_c'      hard: w1 = 1 or 0, w2 = 0 or 1     d = x, or n * gamma + beta
    y_c' = w1(open_c') * d_c' + w2(open_c) * d_c      soft: w1 = 1 or r, w2 = 0 or r     d = x
                                                            r = sigmoid(n * scale + shift)

So there are four outputs that x allows, one for each way that the pair can stand, and each is known up to a rounding
error ``e``: of the parameters' arithmetic and of the output's type. The nearest one says how the gates stood.

- A gate is *readable* if every way in which it stands the other way lies more than 2e from the nearest one: whatever
  came out within e of the one is not within e of the other. A gate over zero, over equal data or over data that the
  other channel's drowns is not readable. It is counted apart, and never as agreement.
- A pair is *foreign* if its output lies further than e from all four: no gate explains it, so the data are wrong.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

import numpy as np

from scconv_deploy.gate.margins import UNIT_ROUNDOFF, count_flips, margins
from scconv_deploy.records.gates import FlipCount
from scconv_deploy.verification.reference.run import Site

ROUNDOFF = {"float32": 2.0**-24, "float16": 2.0**-11, "bfloat16": 2.0**-8}
"""Half a unit in the last place of one, by the type of the data."""
_SMALLEST = {"float32": 2.0**-149, "float16": 2.0**-24, "bfloat16": 2.0**-133}
_APPROXIMATE = 2.0**-20
"""Error of a GPU's fast exp and division, relative to the sigmoid's range; sixteen units in float32's last place."""
_STATES = ((True, True), (True, False), (False, True), (False, False))


@dataclass(frozen=True, eq=False)
class Decoded:
    """What an output shows.

    Attributes:
        gates: how each gate stood, bool ``[N, C, H, W]``; meaningless where it is not readable.
        readable: bool ``[N, C, H, W]``.
        foreign: bool ``[N, C, H, W]``, both channels of a pair that no gates explain.
        apart: relative L2 of the output from the nearest of what x allows, ill-conditioned groups left out.
    """

    gates: np.ndarray
    readable: np.ndarray
    foreign: np.ndarray
    apart: float

    def count(self, expected: np.ndarray, x: np.ndarray, site: Site) -> FlipCount:
        """Flips of the readable gates against the expected ones, on the same input x."""
        found = count_flips((self.gates != expected) & self.readable, x, site.form)
        unread = ~self.readable & ~self.foreign
        return replace(found, gates=int(self.readable.sum()), undecidable=int(unread.sum()))


def decode(y: np.ndarray, x: np.ndarray, site: Site, data: str) -> Decoded:
    """Read the gates of an SRU.

    Args:
        y: its output, floating ``[N, C, H, W]``.
        x: its input, exactly as it was fed, floating ``[N, C, H, W]``.
        site: operator, parameters and form.
        data: the type of x and y in the engine, a key of :data:`ROUNDOFF`.
    """
    half = x.shape[1] // 2
    weights, values, error, ill = _weighted_data(np.asarray(x, np.float64), site, data)
    y64 = np.asarray(y, np.float64)
    lower, upper = y64[:, :half], y64[:, half:]
    slack = error[:, :half] + error[:, half:]
    allowed = [_outputs(weights, values, state, half) for state in _STATES]
    with np.errstate(invalid="ignore"):  # what is not finite is near nothing
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
    """y_c and y_c' for one way in which a pair stands; weights are w1 and w2 open, w1 and w2 closed."""
    w1 = [weights[0 if opened else 2] for opened in state]
    w2 = [weights[1 if opened else 3] for opened in state]
    lower, upper = slice(None, half), slice(half, None)
    own, other = w1[0][:, lower] * d[:, lower], w2[1][:, upper] * d[:, upper]
    return own + other, w1[1][:, upper] * d[:, upper] + w2[0][:, lower] * d[:, lower]


def _weighted_data(
    x: np.ndarray, site: Site, data: str
) -> tuple[tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray], np.ndarray, np.ndarray, np.ndarray]:
    """The weights of both ways, the data, the error that each channel brings to an output, and, by pair, whether one of
    its groups is ill-conditioned (only where the data depend on the groups' statistics)."""
    half, roundoff = x.shape[1] // 2, ROUNDOFF[data]
    one, zero = np.ones_like(x), np.zeros_like(x)
    hard, smallest = (one, zero, zero, one), _SMALLEST[data]
    if site.operator == "SRU":  # x as it is, and one sum rounded to the type
        return hard, x, roundoff * np.abs(x) * 1.001 + smallest, np.zeros((len(x), half, *x.shape[2:]), bool)
    affine, error, ill = _affine(x, site)
    if site.operator == "SRUNorm":  # the data are rounded to the type, and so is the sum
        return hard, affine, error + 2 * roundoff * np.abs(affine) + smallest, ill
    with np.errstate(over="ignore"):
        r = 1 / (1 + np.exp(-affine))
    error = np.abs(x) * (error / 4 + _APPROXIMATE + 3 * roundoff) + smallest  # r, the product and the sum are rounded
    return (one, zero, r, r), x, error, ill


def _affine(x: np.ndarray, site: Site) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """n times the first parameter plus the second one in float64, what float32 can differ from it, and by pair where a
    group is ill-conditioned."""
    form, half = site.form, x.shape[1] // 2
    nothing = np.zeros(x.shape[1])
    # a margin whose cut is 0 is the centred x, and its bound that of the mean and the subtraction
    found = margins(x, replace(form, cut=nothing, reach=nothing, sign=nothing + 1))
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
