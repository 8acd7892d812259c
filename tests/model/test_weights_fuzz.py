"""Checkpoints drawn at random, of which it is known what must come of them."""

from __future__ import annotations

import random
from pathlib import Path

import pytest
import torch
from torch import nn

from scconv_deploy.errors import ModelError, UsageError
from scconv_deploy.model.weights import read_weights
from scconv_deploy.model.weights_load import load_weights

WRAPPERS = ("module.", "model.", "_orig_mod.", "net.", "backbone.", "ema.", "any.thing.")
DRAWS = 80


def model_of(draw):
    channels = draw.choice([4, 8])
    return draw.choice(
        [
            lambda: nn.Sequential(nn.Conv2d(3, channels, 3), nn.BatchNorm2d(channels), nn.Linear(channels, 2)),
            lambda: nn.Sequential(nn.Sequential(nn.Conv2d(3, channels, 1), nn.GroupNorm(2, channels)), nn.Linear(2, 2)),
            lambda: nn.ModuleDict({"backbone": nn.Sequential(nn.Conv2d(3, channels, 3)), "head": nn.Linear(4, 2)}),
            lambda: nn.Conv2d(3, channels, 3),
        ]
    )()  # fmt: skip


def filled(model, value):
    return {k: torch.full_like(t, value + n / 64) for n, (k, t) in enumerate(model.state_dict().items())}


def wrapped(draw, state):
    prefix = "".join(draw.choice(WRAPPERS) for _ in range(draw.choice([0, 0, 1, 1, 2])))
    return {prefix + key: tensor for key, tensor in state.items()}


def checkpoint(draw, good, bad):
    """A checkpoint, and what must come of it: loaded, two that fit, or too little that fits."""
    kind = draw.choice(["entry", "deep", "optimizer", "two entries", "two prefixes", "one lost"])
    inner = wrapped(draw, good)
    if kind == "entry":
        return {draw.choice(["a", "state_dict", "zz"]): inner, "epoch": 3, "best": torch.tensor(1.0)}, "loaded"
    if kind == "deep":
        return {"a": {"b": [{"c": inner}]}, "tensors": [torch.ones(3)]}, "loaded"
    if kind == "optimizer":
        return {"m": inner, "o": {"state": dict(bad), "param_groups": [{"lr": 0.1}]}}, "loaded"
    if kind == "two entries":
        return {"model": wrapped(draw, bad), "ema": inner}, "two"
    if kind == "two prefixes":
        other = {f"q.{k}": v for k, v in wrapped(draw, bad).items()}
        return {f"p.{k}": v for k, v in inner.items()} | other, "two"
    lost = draw.choice([k for k in good if not k.endswith("num_batches_tracked")])
    return {"s": wrapped(draw, {k: v for k, v in good.items() if k != lost})}, "misfit"


@pytest.mark.parametrize("first", range(0, DRAWS, 20))
def test_drawn_checkpoints(first, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for seed in range(first, first + 20):
        draw = random.Random(seed)
        model = model_of(draw)
        good, bad = filled(model, 7.0), filled(model, 3.0)
        value, wanted = checkpoint(draw, good, bad)
        torch.save(value, "w.pt")
        try:
            load_weights(model, read_weights(Path("w.pt")), "model")
            found = "loaded"
        except UsageError:
            found = "two"
        except ModelError:
            found = "misfit"
        assert found == wanted, (seed, list(value))
        if found == "loaded":
            assert all(torch.equal(tensor, good[key]) for key, tensor in model.state_dict().items()), seed
