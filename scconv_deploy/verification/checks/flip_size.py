"""Change of an SRU's output caused by one flip."""

from __future__ import annotations

import numpy as np

from scconv_deploy.verification.reference.run import Site


def largest(x: np.ndarray, flipped: np.ndarray, site: Site) -> float:
    """Largest change of the output caused by one flip, in units of the rms of the gated data.

    A hard gate moves its data between two outputs C/2 channels apart: each changes by the data. A soft gate multiplies
    its data by 1 and 0 or by r and r, r = sigmoid(n * scale + shift): the change is max(r, 1 - r) of the data.

    Args:
        x: input of the gates, ``[N, C, H, W]``.
        flipped: flips, bool ``[N, C, H, W]``, at least one true.
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
