"""Weights as training code saves them: what fits is loaded and named, and two that fit are for the user to choose."""

from __future__ import annotations

import argparse
import datetime
from collections import OrderedDict
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import save_file
from torch import nn
from torch.optim.swa_utils import AveragedModel

from scconv_deploy.errors import ModelError, UntrustedError, UsageError
from scconv_deploy.model.weights import read_weights
from scconv_deploy.model.weights_load import load_weights


class Net(nn.Module):
    """Convolution, norm and classifier, so that buffers count too."""

    def __init__(self, channels=4):
        super().__init__()
        self.conv = nn.Conv2d(3, channels, 3)
        self.norm = nn.BatchNorm2d(channels)
        self.fc = nn.Linear(channels, 2)


@pytest.fixture(autouse=True)
def _workplace(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)


def state(fill, model=None):
    """A state dict whose values nothing else has."""
    return {k: torch.full_like(t, fill + n / 100) for n, (k, t) in enumerate((model or Net()).state_dict().items())}


GOOD, BAD = state(7), state(3)
AVERAGE = [GOOD[name] for name, _ in Net().named_parameters()]  # as torch_ema keeps it
PARAMETERS = {k: v for k, v in GOOD.items() if "running" not in k and "num_batches" not in k}


def prefixed(prefix, tensors):
    return {prefix + key: tensor for key, tensor in tensors.items()}


def loaded(value, model=None, trust=False, **options):
    torch.save(value, "w.pt")
    model = model or Net()
    return model, load_weights(model, read_weights(Path("w.pt"), trust), "Net", **options)


def holds(model, tensors):
    return all(torch.equal(t, tensors[k]) for k, t in model.state_dict().items() if k in tensors)


def averaged():
    model = Net()
    model.load_state_dict(GOOD)
    return AveragedModel(model).state_dict()


@pytest.mark.parametrize(
    ("value", "entry", "prefix"),
    [
        (GOOD, "", ""),
        (OrderedDict(GOOD), "", ""),
        ({"epoch": 1, "state_dict": GOOD, "best_acc1": torch.tensor(71.3)}, "state_dict", ""),
        ({"checkpoint": {"model": GOOD, "step": torch.tensor(1)}}, "checkpoint.model", ""),
        ({"generator": GOOD, "discriminator": state(3, nn.Linear(9, 1))}, "generator", ""),
        ([{"lr": 0.1}, GOOD], "1", ""),
        ({"state_dict": prefixed("model.", GOOD) | {"criterion.weight": torch.ones(3)}}, "state_dict", "model."),
        (prefixed("module.", GOOD), "", "module."),
        (prefixed("_orig_mod.module.", GOOD), "", "_orig_mod.module."),
        (prefixed("module.module.", GOOD), "", "module.module."),
        (prefixed("anything.at.all.", GOOD) | {"loss.weight": torch.ones(2)}, "", "anything.at.all."),
        (averaged(), "", "module."),
        (
            {"optimizer": {"state": {"momentum": BAD}, "param_groups": [{"lr": 0.1}]}, "weights_of_epoch_3": GOOD},
            "weights_of_epoch_3", "",
        ),
        ({"args": argparse.Namespace(lr=0.1, nested=argparse.Namespace(a=[1])), "net": GOOD}, "net", ""),
    ],
)  # fmt: skip
def test_the_entry_and_the_prefix_that_fit(value, entry, prefix):
    model, record = loaded(value)
    assert holds(model, GOOD)
    assert (record.entry, record.prefix, record.added) == (entry, prefix, "")
    assert (record.loaded, record.expected, record.misfits) == (9, 9, ())
    assert "w.pt: 9 of 9 tensors loaded" in record.summary
    assert (f"entry {entry}" in record.summary) == bool(entry)
    assert (f"prefix {prefix} taken off" in record.summary) == bool(prefix)


LIGHTNING = {
    "epoch": 3, "pytorch-lightning_version": "2.5.0", "hyper_parameters": {"lr": 0.1}, "loops": {},
    "callbacks": {"ModelCheckpoint": {"best_model_score": torch.tensor(0.4), "dirpath": "/tmp"}},
    "optimizer_states": [{"state": {0: {"exp_avg": BAD["conv.weight"]}}, "param_groups": [{"lr": 0.1}]}],
}  # fmt: skip
METADATA = {
    "best": np.float64(0.5), "step": np.int64(3), "done": np.bool_(True), "history": np.ones(3), "folder": Path("runs"),
    "started": datetime.datetime(2026, 1, 2),
}  # fmt: skip


@pytest.mark.parametrize(
    ("value", "entry", "prefix", "wrappers"),
    [
        (LIGHTNING | {"state_dict": prefixed("model.", GOOD) | {"loss.w": torch.ones(2)}}, "state_dict", "model.", ()),
        (LIGHTNING | {"state_dict": prefixed("net._orig_mod.", GOOD)}, "state_dict", "net._orig_mod.", ()),
        (prefixed("module._orig_mod.", GOOD), "", "module._orig_mod.", ()),
        (METADATA | {"model": GOOD}, "model", "", ()),
        (METADATA | {"model": GOOD | {"fc.bias": GOOD["fc.bias"].double()}}, "model", "", ()),
        ({k.replace("conv.", "conv._orig_mod."): v for k, v in GOOD.items()}, "", "", ("_orig_mod",)),
        (
            prefixed("model.", {k.replace("fc.", "fc.module._orig_mod."): v for k, v in GOOD.items()}),
            "", "model.", ("module", "_orig_mod"),
        ),
    ],
)  # fmt: skip
def test_checkpoints_as_people_have_them(value, entry, prefix, wrappers):
    model, record = loaded(value)
    assert holds(model, GOOD)
    assert (record.entry, record.prefix, record.wrappers) == (entry, prefix, wrappers)
    assert record.misfits == ()
    assert not record.others
    assert ("left out of keys" in record.summary) == bool(wrappers)


@pytest.mark.parametrize("average", ["ema", "model_ema", "state_dict_ema"])
def test_a_moving_average_beside_numbers_of_numpy_is_for_the_user_to_choose(average):
    value = METADATA | {"state_dict": BAD, average: GOOD, "optimizer": {"state": {}, "param_groups": []}}
    with pytest.raises(UsageError, match=f"--weights-key state_dict or --weights-key {average}"):
        loaded(value)
    assert holds(loaded(value, key=average)[0], GOOD)


def test_arrays_of_objects_need_trust():
    with pytest.raises(UntrustedError, match=r"more than tensors \(numpy.dtype\[O8\]\).*--trust-checkpoint"):
        loaded({"model": GOOD, "names": np.array(["a", None], dtype=object)})


def test_safetensors_with_metadata():
    save_file(GOOD, "w.safetensors", metadata={"format": "pt", "epoch": "3"})
    assert holds_after("w.safetensors")


def test_a_prefix_that_only_the_model_has():
    model = nn.Sequential(OrderedDict(net=Net()))
    _, record = loaded({"model": GOOD}, model)
    assert holds(model.net, GOOD)
    assert (record.prefix, record.added) == ("", "net.")
    assert "prefix net. put on" in record.summary


def test_another_wrapper_in_the_file_than_in_the_model():
    model = nn.Sequential(OrderedDict(net=Net()))
    _, record = loaded(prefixed("module.", GOOD), model)
    assert holds(model.net, GOOD)
    assert (record.prefix, record.added) == ("module.", "net.")


def test_one_block_of_a_larger_network():
    block, larger = nn.Conv2d(3, 4, 3), {"conv.weight": GOOD["conv.weight"], "conv.bias": GOOD["conv.bias"]}
    loaded(larger | {"head.weight": torch.ones(5)}, block)
    assert torch.equal(block.weight, GOOD["conv.weight"])


@pytest.mark.parametrize(
    ("value", "labels"),
    [
        ({"model": BAD, "ema": GOOD}, ["model", "ema"]),
        ({"model": BAD, "model_ema": GOOD}, ["model", "model_ema"]),
        ({"state_dict": BAD, "state_dict_ema": GOOD}, ["state_dict", "state_dict_ema"]),
        ({"net": BAD, "teacher": prefixed("module.", GOOD)}, ["net", "teacher.module"]),
        ({"net": BAD, "callbacks": {"EMA": {"weights": GOOD}}}, ["net", "callbacks.EMA.weights"]),
        (BAD | prefixed("ema.", GOOD), [".", "ema"]),
        (prefixed("student.", BAD) | prefixed("teacher.", GOOD), ["student", "teacher"]),
        ({"sd": prefixed("student.", BAD) | prefixed("teacher.", GOOD)}, ["sd.student", "sd.teacher"]),
        ({"model": BAD, "ema": PARAMETERS}, ["model", "ema"]),  # a moving average of the parameters alone
        ({"model": BAD, "ema": {"decay": 0.9, "shadow_params": AVERAGE}}, ["model", "ema.shadow_params"]),
        ({"model": BAD, "shadow": tuple(AVERAGE)}, ["model", "shadow"]),
        ([BAD, GOOD], ["0", "1"]),
        ({"model": BAD, "ema": {k: v.half() for k, v in BAD.items()}}, ["model", "ema"]),
    ],
)
@pytest.mark.parametrize("strict", [True, False])
def test_two_that_fit_are_for_the_user_to_choose(value, labels, strict):
    with pytest.raises(UsageError, match="2 sets that fit Net and differ") as error:
        loaded(value, strict=strict)
    assert all(f"--weights-key {label}" in error.value.remedy for label in labels)


@pytest.mark.parametrize(
    ("value", "key", "wanted"),
    [
        ({"model": BAD, "ema": GOOD}, "ema", GOOD),
        ({"model": BAD, "ema": GOOD}, "model", BAD),
        ({"model": BAD, "ema": prefixed("module.", GOOD)}, "ema", GOOD),
        ({"net": BAD, "callbacks": {"EMA": {"weights": GOOD}}}, "callbacks", GOOD),
        (BAD | prefixed("ema.", GOOD), "ema", GOOD),
        (BAD | prefixed("ema.", GOOD), ".", BAD),
        (prefixed("student.", BAD) | prefixed("teacher.", GOOD), "teacher", GOOD),
        ({"sd": BAD | prefixed("ema.", GOOD)}, "sd", BAD),
        ({"sd": BAD | prefixed("ema.", GOOD)}, "sd.ema", GOOD),
    ],
)
def test_the_key_chooses(value, key, wanted):
    model, record = loaded(value, key=key)
    assert holds(model, wanted)
    assert not record.misfits


def test_a_list_of_tensors_is_read_in_the_order_of_the_parameters():
    model, record = loaded({"model": BAD, "ema": {"shadow_params": AVERAGE}}, key="ema.shadow_params", strict=False)
    assert all(torch.equal(p, given) for p, given in zip(model.parameters(), AVERAGE, strict=True))
    assert set(record.missing) == {key for key in GOOD if key not in PARAMETERS and "num_batches" not in key}


@pytest.mark.parametrize("tensors", [AVERAGE[:-1], AVERAGE[::-1], [torch.ones(1)] * len(AVERAGE)])
def test_a_list_of_other_shapes_is_no_set_of_weights(tensors):
    model, record = loaded({"model": GOOD, "history": tensors})
    assert holds(model, GOOD)
    assert not record.others


def test_the_same_numbers_twice_are_no_conflict():
    model, record = loaded({"model": GOOD, "ema": {k: v.clone() for k, v in GOOD.items()}})
    assert holds(model, GOOD)
    assert record.others == {"ema": 9}
    nan = {k: v.clone() for k, v in GOOD.items()}
    nan["fc.bias"][0] = float("nan")
    loaded({"model": nan, "ema": {k: v.clone() for k, v in nan.items()}})


def test_one_object_in_two_places_is_found_in_both():
    twice = {"a": GOOD, "b": {"c": GOOD}, "list": [GOOD]}
    twice["itself"] = twice
    model, record = loaded(twice)
    assert holds(model, GOOD)
    assert record.others == {"b.c": 9, "list.0": 9}
    assert loaded({"a": GOOD, "b": GOOD}, key="b")[1].entry == "b"


def test_one_bit_is_a_conflict():
    other = {k: v.clone() for k, v in GOOD.items()}
    other["fc.bias"][1] = torch.nextafter(other["fc.bias"][1], torch.tensor(9.0))
    with pytest.raises(UsageError, match="differ"):
        loaded({"model": GOOD, "ema": other})


def test_a_key_that_names_nothing():
    with pytest.raises(UsageError, match=r"--weights-key emo: w.pt holds no such entry. It holds model, ema\."):
        loaded({"model": BAD, "ema": GOOD}, key="emo")


@pytest.mark.parametrize("strict", [True, False])
def test_an_entry_that_is_named_and_does_not_fit(strict):
    with pytest.raises(ModelError, match="share no key with Net"):
        loaded({"model": GOOD, "critic": {"x.y": torch.ones(1)}}, key="critic", strict=strict)


def test_strict_says_what_is_missing_and_how_much_fits():
    value = {"state_dict": prefixed("model.", {k: v for k, v in GOOD.items() if not k.startswith("fc")})}
    with pytest.raises(ModelError) as error:
        loaded(value)
    for words in (
        "2 missing (fc.weight, fc.bias)",
        "7 of 9 tensors fit",
        "entry state_dict",
        "prefix model. taken off",
    ):
        assert words in error.value.message
    assert "--non-strict" in error.value.remedy


def test_non_strict_says_what_was_not_loaded():
    partly = {k: v for k, v in GOOD.items() if k != "fc.bias"}
    value = partly | {"fc.weight": torch.ones(5, 4), "aux.weight": torch.ones(1)}
    model, record = loaded(value, strict=False)
    assert torch.equal(model.conv.weight, GOOD["conv.weight"])
    assert record.misfits == (
        ("missing", "1 (fc.bias)"),
        ("unexpected", "1 (aux.weight)"),
        ("of another shape", "1 (fc.weight is 5x4, expected 2x4)"),
    )
    assert (record.loaded, record.expected) == (7, 9)
    assert model.fc.weight.shape == (2, 4)
    assert not (model.fc.weight == 1).any()


def test_another_shape_alone_fails_a_strict_load():
    with pytest.raises(ModelError, match=r"1 of another shape \(fc.weight is 5x4, expected 2x4\); 8 of 9 tensors fit"):
        loaded(GOOD | {"fc.weight": torch.ones(5, 4)})


def test_non_strict_of_two_that_fit_as_much():
    partly = [{k: v for k, v in tensors.items() if not k.startswith("fc")} for tensors in (BAD, GOOD)]
    with pytest.raises(UsageError, match="--weights-key"):
        loaded({"a": partly[0], "b": partly[1]}, strict=False)
    model, _ = loaded({"a": partly[0], "b": partly[1]}, strict=False, key="b")
    assert torch.equal(model.conv.weight, GOOD["conv.weight"])


def test_a_backbone_into_a_model_with_a_head():
    model = nn.Sequential(OrderedDict(backbone=Net(), head=nn.Linear(2, 2)))
    with pytest.raises(ModelError, match=r"head.weight, head.bias"):
        loaded(GOOD, model)
    _, record = loaded(GOOD, model, strict=False)
    assert holds(model.backbone, GOOD)
    assert record.added == "backbone."
    assert record.missing == ("head.weight", "head.bias")


def test_what_is_converted_is_said():
    model, record = loaded({k: v.half() for k, v in GOOD.items()})
    assert torch.equal(model.conv.weight, GOOD["conv.weight"].half().float())
    assert record.converted == {"float16 to float32": 8, "float16 to int64": 1}
    assert "8 converted from float16 to float32" in record.summary
    integers = {k: v.to(torch.int8) for k, v in GOOD.items()}
    assert "8 converted from int8 to float32" in loaded(integers)[1].summary


@pytest.mark.parametrize(
    ("make", "words"),
    [
        (lambda t: torch.quantize_per_tensor(t.float(), 0.1, 0, torch.qint8), "quantised"),
        (lambda t: t.to(torch.complex64), "complex"),
    ],
)
def test_numbers_that_are_no_float_weights(make, words):
    with pytest.raises(ModelError, match=rf"hold {words} tensors, and Net is float32: 1 \(fc.weight\)"):
        loaded(GOOD | {"fc.weight": make(GOOD["fc.weight"])})


def test_numbers_beyond_float32():
    with pytest.raises(ModelError, match=r"hold numbers in fc.weight that float32 cannot hold"):
        loaded(GOOD | {"fc.weight": torch.full((2, 4), 1e300, dtype=torch.float64)})


def test_shared_parameters():
    class Tied(Net):
        def __init__(self):
            super().__init__()
            self.out = nn.Linear(4, 2)
            self.out.weight = self.fc.weight

    whole = GOOD | {"out.bias": torch.ones(2)}
    model, record = loaded(whole, Tied())  # safetensors keeps one of the two names
    assert torch.equal(model.out.weight, GOOD["fc.weight"])
    assert not record.misfits
    with pytest.raises(ModelError, match=r"other numbers for fc.weight than for out.weight, which are one tensor"):
        loaded(whole | {"out.weight": torch.ones(2, 4)}, Tied())


@pytest.mark.parametrize("strict", [True, False])
def test_counts_of_batches_alone_are_no_fit(strict):
    with pytest.raises(ModelError, match=r"none of 9 tensors fits, 8 of another shape"):
        loaded(state(1, Net(8)) | {"fc.bias": torch.ones(3)}, strict=strict)


@pytest.mark.parametrize("trust", [False, True])
def test_arrays_are_tensors_too(trust):
    model, _ = loaded({"model": {k: v.numpy() for k, v in GOOD.items()}}, trust=trust)
    assert holds(model, GOOD)


@pytest.mark.parametrize("zipped", [True, False])
def test_both_formats_of_torch_save(zipped):
    torch.save({"model": GOOD}, "w.pt", _use_new_zipfile_serialization=zipped)
    model = Net()
    load_weights(model, read_weights(Path("w.pt")), "Net")
    assert holds(model, GOOD)


def test_old_files_lack_the_count_of_batches():
    model, record = loaded({k: v for k, v in GOOD.items() if "num_batches" not in k})
    assert torch.equal(model.norm.running_var, GOOD["norm.running_var"])
    assert not record.misfits


def test_safetensors_go_the_same_road():
    save_file(prefixed("model.", GOOD) | {"criterion.weight": torch.ones(1)}, "w.safetensors")
    model = Net()
    record = load_weights(model, read_weights(Path("w.safetensors")), "Net")
    assert holds(model, GOOD)
    assert (record.prefix, record.outside) == ("model.", ("criterion.weight",))
    assert record.left == (("beside the prefix", "1 (criterion.weight)"),)
    Path("w.safetensors").rename("renamed.pt")
    assert holds_after("renamed.pt")
    torch.save(GOOD, "w.pt")
    Path("w.pt").rename("pickled.safetensors")
    assert holds_after("pickled.safetensors")


def holds_after(path):
    model = Net()
    load_weights(model, read_weights(Path(path)), "Net")
    return holds(model, GOOD)


class Settings:
    """Any class of a training script."""


def test_anything_but_tensors_and_arguments_needs_trust():
    with pytest.raises(UntrustedError, match=r"more than tensors \(.*Settings\)"):
        loaded({"config": Settings(), "model": GOOD})
    model, _ = loaded({"config": Settings(), "model": GOOD}, trust=True)
    assert holds(model, GOOD)
