"""Alignment of detections before a comparison: rounding swaps rows whose scores are nearly equal.

Detections are sorted by score. Outputs named ``boxes`` ``[N, K, 4]``, ``scores`` ``[N, K]`` and ``labels`` ``[N, K]``
are taken for detections; so is ``output0`` ``[N, K, 6 or more]`` of an ultralytics model that selects them itself: its
columns are four of the box, score, class, and more of the task.
"""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np

from scconv_deploy.records import tolerances

_BOXES, _SCORES, _LABELS = "boxes", "scores", "labels"
_PACKED = "output0"


def align_rows(
    outputs: Mapping[str, np.ndarray],
    reference: Mapping[str, np.ndarray],
    tie: float = tolerances.ALL["equal_scores"].value,
) -> dict[str, np.ndarray]:
    """Move each detection to the row of the reference's detection that it matches.

    A row moves only among rows whose reference scores are equal up to the tolerance ``equal_scores``. Detections in a
    wrong order, or that the reference does not have, stay in place and count as different. Other outputs are unchanged.
    """
    aligned = dict(outputs)
    if _is_packed(outputs, reference):
        aligned[_PACKED] = outputs[_PACKED].copy()
        for image, theirs in enumerate(reference[_PACKED]):
            ours = outputs[_PACKED][image]
            aligned[_PACKED][image] = ours[_matching_rows(_columns(ours), _columns(theirs), tie)]
        return aligned
    names = (_BOXES, _SCORES, _LABELS)
    if not all(name in outputs and name in reference for name in names):
        return aligned
    boxes, scores, labels = (outputs[name] for name in names)
    if boxes.ndim != 3 or boxes.shape[2] != 4 or not scores.shape == labels.shape == boxes.shape[:2]:
        return aligned
    if any(outputs[name].shape != reference[name].shape for name in names):
        return aligned
    for name in names:
        aligned[name] = outputs[name].copy()
    for image in range(len(scores)):
        ours, theirs = ({n: side[n][image] for n in names} for side in (outputs, reference))
        rows = _matching_rows(ours, theirs, tie)
        for name in names:
            aligned[name][image] = outputs[name][image][rows]
    return aligned


def _is_packed(outputs: Mapping[str, np.ndarray], reference: Mapping[str, np.ndarray]) -> bool:
    """Whether ``output0`` holds detections by row: scores that do not rise, and whole numbers for classes."""
    ours, theirs = outputs.get(_PACKED), reference.get(_PACKED)
    if ours is None or theirs is None or ours.shape != theirs.shape or theirs.ndim != 3 or theirs.shape[2] < 6:
        return False
    scores, labels = theirs[..., 4], theirs[..., 5]
    within = (scores >= 0) & (scores <= 1)
    return bool(within.all() and (np.diff(scores, axis=1) <= 0).all() and (labels == np.rint(labels)).all())


def _columns(rows: np.ndarray) -> dict[str, np.ndarray]:
    return {_BOXES: rows[:, :4], _SCORES: rows[:, 4], _LABELS: rows[:, 5]}


def _matching_rows(outputs: Mapping[str, np.ndarray], reference: Mapping[str, np.ndarray], tie: float) -> np.ndarray:
    """Row of the outputs that matches each row of the reference; a permutation of K."""
    scores = reference[_SCORES]
    near = np.abs(scores[None] - scores[:, None]) <= tie
    near &= np.abs(outputs[_SCORES][None] - scores[:, None]) <= tie
    near &= outputs[_LABELS][None] == reference[_LABELS][:, None]
    apart = np.abs(outputs[_BOXES][None] - reference[_BOXES][:, None]).max(2)
    apart = np.where(near, apart, np.inf)
    rows = np.full(len(near), -1)
    for row in range(len(near)):
        best = int(np.argmin(apart[row]))
        if np.isfinite(apart[row, best]):
            rows[row] = best
            apart[:, best] = np.inf
    free = np.flatnonzero(rows < 0)
    rows[free] = np.setdiff1d(np.arange(len(near)), rows)
    return rows
