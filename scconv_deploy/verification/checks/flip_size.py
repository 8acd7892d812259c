"""What one flipped gate does to an SRU's output."""

from __future__ import annotations

import numpy as np

from scconv_deploy.verification.reference.run import Site


def largest(x: np.ndarray, flipped: np.ndarray, site: Site) -> float:
    """The largest change of the output that a flipped gate made, in units of the rms of the data it lets through.

    A hard gate moves its data from one output to the one half the channels apart: the change of each is the data. A
    soft one multiplies it by 1 and 0 or by r and r, r = sigmoid(n * scale + shift): the change is max(r, 1 - r) of it.

    Args:
        x: the gate's input, ``[N, C, H, W]``.
        flipped: bool ``[N, C, H, W]``, at least one of them.
    """
    x = np.asarray(x, dtype=np.float64)
    data, share = x, np.ones(())
    if site.operator != "SRU":
        form = site.form
        groups = x.reshape(x.shape[0], form.num_groups, -1)
        centred = groups - groups.mean(axis=2, keepdims=True)
        variance = np.square(centred).sum(axis=2, keepdims=True) / (groups.shape[2] - form.ddof)
        n = (centred / (np.sqrt(variance + form.eps_var) + form.eps_std)).reshape(x.shape)
        first, second = (np.asarray(p, np.float64).reshape(1, -1, 1, 1) for p in list(site.parameters.values())[2:])
        if site.operator == "SRUNorm":
            data = n * first + second
        else:
            r = 1 / (1 + np.exp(-(n * first + second)))
            share = np.maximum(r, 1 - r)
    rms = float(np.sqrt(np.mean(np.square(data))))
    change = float((np.abs(data) * share)[flipped].max())
    return change / rms if rms else 0.0
