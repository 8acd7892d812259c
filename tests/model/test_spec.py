"""What the user names becomes a module, or one line that says why not."""

from __future__ import annotations

import pickle
import sys
import textwrap
from collections import OrderedDict
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import save_file
from torch import nn
from torch.optim.swa_utils import AveragedModel

from scconv_deploy.errors import ConfigurationError, IntegrityError, ModelError, UntrustedError, UsageError
from scconv_deploy.model.inputs import DTYPES, DynamicAxis, InputSpec
from scconv_deploy.model.load import load, load_with_record
from scconv_deploy.model.spec import ModelSpec, folders, parse_kwargs, source_kind
from scconv_deploy.model.weights import read_weights
from scconv_deploy.model.weights_load import load_weights

NET = """
    import torch
    from torch import nn
    from scconv_deploy.nn import SRU

    class Net(nn.Module):
        def __init__(self, channels=8):
            super().__init__()
            self.conv = nn.Conv2d(3, channels, 3, padding=1)
            self.sru = SRU(channels, 4)

        def forward(self, x):
            return self.sru(self.conv(x)).mean((2, 3))

    def make(channels=8):
        return Net(channels)
"""


@pytest.fixture(autouse=True)
def workplace(tmp_path, monkeypatch):
    """An own folder; what loading leaves on sys.path and in sys.modules goes with it."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", [*sys.path])
    monkeypatch.delitem(sys.modules, "net", raising=False)  # another test's
    before = set(sys.modules)
    yield tmp_path
    for name in set(sys.modules) - before:
        if str(tmp_path) in str(getattr(sys.modules[name], "__file__", "")):
            del sys.modules[name]


@pytest.fixture
def net(workplace):
    return write("net.py", NET)


def write(name, code):
    path = Path(name)
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(textwrap.dedent(code))
    return path


def refusal(kind, source, *words, **spec):
    with pytest.raises(kind) as caught:
        load(ModelSpec(source, **spec))
    assert type(caught.value) is kind
    assert "\n" not in str(caught.value)
    assert caught.value.remedy
    for word in words:
        assert word in str(caught.value)
    return str(caught.value)


# --- text -------------------------------------------------------------------------------------------------------


@given(
    shape=st.lists(st.integers(1, 4096), min_size=1, max_size=5),
    name=st.none() | st.from_regex(r"[A-Za-z_][A-Za-z0-9_]{0,8}", fullmatch=True),
    dtype=st.sampled_from(DTYPES),
)
def test_input_spec_reads_what_it_writes(shape, name, dtype):
    spec = InputSpec(tuple(shape), name, dtype)
    assert InputSpec.parse(str(spec)) == spec


@pytest.mark.parametrize(
    "text", ["", "x", "1,3,8,8", "1x3x", "x1x3", "1x-3", "x:", "1x3:float32:y", "x y:1x3", "1X3X8", "1x3 "]
)
def test_malformed_input_says_how_to_write_it(text):
    with pytest.raises(UsageError, match="1x3x224x224"):
        InputSpec.parse(text)


def test_input_of_no_size_or_dtype():
    with pytest.raises(UsageError, match="at least 1"):
        InputSpec.parse("1x0x8")
    with pytest.raises(UsageError, match=r"no dtype 'float33'.*float32, float64"):
        InputSpec.parse("1x3:float33")


def test_batch_and_dynamic_axes():
    assert DynamicAxis.parse_batch("1:4:8") == DynamicAxis(1, 4, 8)
    assert DynamicAxis.parse_batch("1:4:8").symbol == "batch"
    assert DynamicAxis.parse("x:2=64:224:512") == DynamicAxis(64, 224, 512, 2, "x")
    assert DynamicAxis.parse("x:2=64:224:512").symbol == "x_2"


def test_axes_of_one_size_and_of_whole_steps():
    assert DynamicAxis.parse_batch("2:4:8:2") == DynamicAxis(2, 4, 8, step=2)
    assert DynamicAxis.parse("x:2=64:224:512:32") == DynamicAxis(64, 224, 512, 2, "x", 32)
    height, width = DynamicAxis.parse_all("x:2,x:3=64:128:256:32")
    assert (height, width) == (
        DynamicAxis(64, 128, 256, 2, "x", 32, "x_2"), DynamicAxis(64, 128, 256, 3, "x", 32, "x_2")
    )  # fmt: skip
    assert height.symbol == width.symbol == "x_2"
    assert DynamicAxis.parse_all("x:2=64:224:512") == (DynamicAxis(64, 224, 512, 2, "x"),)
    with pytest.raises(UsageError, match="several axes"):
        DynamicAxis.parse("x:2,x:3=64:128:256")
    with pytest.raises(UsageError, match=r"found 100 for 32.*64:224:512:32"):
        DynamicAxis.parse_all("x:2=64:100:512:32")


@pytest.mark.parametrize(
    "text", ["", "4", "1:4", "1:4:8:9", "1:4:8:0", "1:4:8:1:1", "1-4-8", "a:b:c", "4:2:8", "1:8:4", "0:1:2"]
)
def test_malformed_range(text):
    with pytest.raises(UsageError, match="MIN"):
        DynamicAxis.parse_batch(text)
    with pytest.raises(UsageError, match=r"NAME:AXIS=MIN|MIN:OPT|MIN <="):
        DynamicAxis.parse(f"x:2={text}")


@pytest.mark.parametrize("text", ["2=1:2:3", "x=1:2:3", "x:y=1:2:3", "x:-1=1:2:3", "x:2:1:2:3"])
def test_malformed_dynamic_axis(text):
    with pytest.raises(UsageError, match="x:2=64:224:512"):
        DynamicAxis.parse(text)


def test_kwargs():
    assert parse_kwargs(None) == {}
    assert parse_kwargs('{"channels": 16}') == {"channels": 16}
    for text, words in (("{1}", "not JSON"), ("", "not JSON"), ("[1]", "JSON list"), ("3", "JSON int")):
        with pytest.raises(UsageError, match=words) as caught:
            parse_kwargs(text)
        assert "num_classes" in caught.value.remedy


# --- inputs -----------------------------------------------------------------------------------------------------


def test_zoo_model_knows_its_input():
    assert ModelSpec("scconv_resnet20").resolved().inputs == (InputSpec((1, 3, 32, 32)),)
    batched = ModelSpec("scconv_resnet20", dynamic=(DynamicAxis(1, 4, 8),)).resolved()
    assert batched.inputs == (InputSpec((4, 3, 32, 32)),)


def test_batch_sets_axis_0_of_every_input(net):
    inputs = (InputSpec((1, 3, 8, 8)), InputSpec((1, 4), "scale", "float64"))
    resolved = ModelSpec("net.py:make", inputs=inputs, dynamic=(DynamicAxis(1, 4, 8),)).resolved()
    assert resolved.inputs == (InputSpec((4, 3, 8, 8)), InputSpec((4, 4), "scale", "float64"))


def test_other_models_need_inputs(net):
    with pytest.raises(UsageError, match="inputs are not known") as caught:
        ModelSpec("net.py:make").resolved()
    assert caught.value.remedy.endswith(": net.py:make --input 1x3x224x224")


def test_a_wrong_name_is_reported_before_missing_inputs():
    for source in ("scconv_resnet2", "nowhere.py:make", "nowhere.pt"):
        with pytest.raises(UsageError, match=r"Did you mean scconv_resnet20\?|does not exist"):
            ModelSpec(source).resolved()


# --- what MODEL is ----------------------------------------------------------------------------------------------


def test_source_kinds(net):
    Path("best.pt").touch()
    assert source_kind("resnet20") == "zoo"
    assert source_kind("net.py:make") == "file"
    assert source_kind("package.module:Class.method") == "module"
    assert source_kind("best.pt") == "checkpoint"


@pytest.mark.parametrize(
    ("source", "words"),
    [
        ("scconv_resnet65", "Did you mean scconv_resnet56?"),
        ("something", "The zoo has scconv_resnet20"),
        ("", "not a zoo model"),
        (":make", "not a zoo model"),
        ("missing.py:make", "missing.py does not exist"),
        ("missing.py", "missing.py does not exist"),
        (r"C:\models\net.py:make", r"C:\models\net.py does not exist"),
        (r"C:\models\best.pt", r"C:\models\best.pt does not exist"),
        ("net.py", "Write net.py:NAME; it defines Net, make"),
        ("net.py:", "Write net.py:NAME; it defines Net, make"),
        ("net.py:mak", "Did you mean make?"),
        ("net.py:Net.forwrd", "has no 'Net.forwrd'. Did you mean forward?"),
        ("net:mak", "Did you mean make?"),
        ("net.safetensors", "Give a MODEL and these as --weights net.safetensors"),
        ("nowhere.at.all:make", "No module 'nowhere.at.all'"),
        ("net.at.all:make", "No module 'net.at.all'"),
        (".net:make", "No module '.net'"),
        ("folder/net:make", "give the file: path/file.py:factory"),
        ("missing.pt", "missing.pt does not exist"),
    ],
)
def test_refused_sources(net, source, words):
    refusal(UsageError, source, words)


@pytest.mark.parametrize("source", ["net.py:make", "net.py:Net", "net:make", "./net.py:make", "net.py:ready"])
def test_factory_class_and_instance(source):
    write("net.py", NET + "\n    ready = Net().double().train()\n")
    model = load(ModelSpec(source))
    assert type(model).__name__ == "Net"
    assert not model.training
    assert model.conv.weight.dtype == torch.float32


def test_absolute_path_and_kwargs(net):
    model = load(ModelSpec(f"{net.absolute()}:make", {"channels": 16}))
    assert model.conv.out_channels == 16


def test_the_seed_decides_the_initialisation(net):
    first, again, other = (load(ModelSpec("net.py:make", seed=seed)).conv.weight for seed in (3, 3, 4))
    assert torch.equal(first, again)
    assert not torch.equal(first, other)


@pytest.mark.parametrize(
    ("name", "kwargs", "words"),
    [
        ("make", {"channel": 8}, "unexpected keyword argument 'channel'. It takes channels=8"),
        ("needs", {}, "missing a required argument: 'channels'. It takes channels, depth=1"),
        ("Net", {"depth": 2}, "It takes channels=8"),
        ("ready", {"channels": 8}, "is no factory"),
    ],
)
def test_arguments_that_the_factory_does_not_take(name, kwargs, words):
    write("net.py", NET + "\n    ready = Net()\n    def needs(channels, depth=1): return Net(channels)\n")
    refusal(UsageError, f"net.py:{name}", "--kwargs", words, kwargs=kwargs)


def test_arguments_that_a_zoo_model_does_not_take():
    refusal(UsageError, "scconv_resnet20", "'depth'", "--kwargs do not fit", kwargs={"depth": 3})


def test_sizes_that_a_module_cannot_have(net):
    refusal(ConfigurationError, "net.py:make", "9 channels", "even number", kwargs={"channels": 9})


@pytest.mark.parametrize(
    ("body", "words"),
    [
        ("raise ValueError('first\\nsecond')", "net.py:f raised ValueError: first"),
        ("raise KeyError", "net.py:f raised KeyError: no message"),
        ("import sys; sys.exit('bye')", "net.py:f called sys.exit('bye')"),
        ("import not_installed_here", "net.py:f needs the module 'not_installed_here', which is missing"),
        ("raise ImportError('pip install it')", "net.py:f raised ImportError: pip install it"),
    ],
)
def test_a_factory_that_raises(body, words):
    write("net.py", f"def f():\n    {body}\n")
    assert "second" not in refusal(ModelError, "net.py:f", words)


def test_a_factory_that_is_interrupted():
    write("net.py", "def f():\n    raise KeyboardInterrupt\n")
    with pytest.raises(KeyboardInterrupt):
        load(ModelSpec("net.py:f"))


@pytest.mark.parametrize("value", ["3", "None", "dict()", "lambda: 3", "torch.nn"])
def test_what_is_no_module(value):
    write("net.py", f"import torch\nvalue = {value}\n")
    refusal(UsageError, "net.py:value", "expected a torch.nn.Module")


def test_modules_that_cannot_be_used_as_they_are():
    write(
        "net.py",
        """
        import torch
        from torch import nn
        def scripted(): return torch.jit.script(nn.Conv2d(3, 8, 3))
        def compiled(): return torch.compile(nn.Conv2d(3, 8, 3))
        def meta(): return nn.Conv2d(3, 8, 3, device="meta")
        def graph(net=nn.ReLU()): return torch.export.export(net, (torch.ones(1, 3, 8, 8),)).module()
        class Rounded(nn.Module):
            def forward(self, x):
                q = torch.ops.quantized_decomposed.quantize_per_tensor(x, 0.1, 0, -128, 127, torch.int8)
                return torch.ops.quantized_decomposed.dequantize_per_tensor(q, 0.1, 0, -128, 127, torch.int8)
        def quantized():
            import torch.ao.quantization.fx._decomposed
            return nn.Sequential(graph(Rounded()))
        """,
    )
    refusal(ModelError, "net.py:scripted", "is TorchScript")
    refusal(ModelError, "net.py:meta", "cannot be put on the CPU")
    refusal(ModelError, "net.py:graph", "holds a graph that torch.export made")
    said = "a graph of PyTorch's pt2e quantisation (it calls quantized_decomposed.quantize_per_tensor.default)"
    refusal(ModelError, "net.py:quantized", said)
    assert type(load(ModelSpec("net.py:compiled"))) is nn.Conv2d


# --- importing --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("code", "kind", "words"),
    [
        ("def f(:\n", ModelError, "net.py is not Python"),
        ("f = 1\x00", ModelError, "net.py is not Python"),
        ("import not_installed_here", ModelError, "needs the module 'not_installed_here', which is missing"),
        ("1 / 0", ModelError, "Importing net.py raised ZeroDivisionError: division by zero"),
        ("import sys; sys.exit(3)", ModelError, "Importing net.py called sys.exit(3)"),
        ("from . import x", UsageError, "name it"),
        (
            "import argparse; p = argparse.ArgumentParser(); p.add_argument('--a', required=True); p.parse_args()",
            ModelError,
            "called sys.exit(2)",
        ),
        ("import torch\nfor _ in range(3):\n    torch.ones(1).backward()", UsageError, "line 3 calls .backward()"),
        ("with open('x') as f:\n    loss.backward()", UsageError, "line 2 calls .backward()"),
    ],
)
def test_files_that_cannot_be_imported(code, kind, words):
    Path("net.py").write_text(code)
    refusal(kind, "net.py:f", words)
    assert "net" not in sys.modules  # no half-made module stays


def test_a_training_loop_that_does_not_run_on_import():
    write(
        "net.py",
        NET
        + """
    def train(model):
        model(torch.ones(1, 3, 8, 8)).sum().backward()

    if __name__ == "__main__":
        Net()(torch.ones(1, 3, 8, 8)).sum().backward()
    """,
    )
    load(ModelSpec("net.py:make"))


def test_a_file_that_reads_its_own_command_line(monkeypatch):
    monkeypatch.setattr(sys, "argv", ["scconv-deploy", "export", "net.py:make", "-o", "net.onnx"])
    write("net.py", NET + "\n    import argparse\n    args = argparse.ArgumentParser().parse_args()\n")
    load(ModelSpec("net.py:make"))
    assert sys.argv[1:] == ["export", "net.py:make", "-o", "net.onnx"]


def test_a_declared_encoding():
    Path("net.py").write_bytes(
        b"# -*- coding: latin-1 -*-\nimport torch\ndef make():\n    '''\xe9'''\n    return torch.nn.ReLU()\n"
    )
    load(ModelSpec("net.py:make"))


def test_neighbours_are_importable_even_late():
    write("zoo/layers_of_user.py", NET)
    write("zoo/net.py", "def make():\n    from layers_of_user import Net\n    return Net()\n")
    load(ModelSpec("zoo/net.py:make"))


@pytest.mark.parametrize("stem", ["json", "torch", "onnx", "typer", "my net.v2", "sklearn"])
def test_a_file_named_like_an_installed_module(stem):
    write(
        f"models/{stem}.py",
        """
        from __future__ import annotations
        from dataclasses import dataclass
        from torch import nn

        @dataclass
        class Options:
            channels: int = 8

        def make():
            return nn.Conv2d(3, Options().channels, 1)
        """,
    )
    before = {name: sys.modules.get(name) for name in ("json", "torch", "onnx", "typer")}
    assert load(ModelSpec(f"models/{stem}.py:make")).out_channels == 8
    assert {name: sys.modules.get(name) for name in before} == before
    assert "models" not in str(getattr(sys.modules.get("sklearn"), "__file__", ""))


def test_two_files_of_one_name():
    write("a/net.py", NET)
    write("b/net.py", NET.replace("channels=8", "channels=16"))
    assert load(ModelSpec("a/net.py:make")).conv.out_channels == 8
    assert load(ModelSpec("b/net.py:make")).conv.out_channels == 16


def test_a_file_of_a_package():
    write("package/__init__.py", "")
    write("package/models/__init__.py", "")
    write("package/models/layers.py", NET)
    write("package/models/net.py", "from .layers import Net\n")
    message = refusal(UsageError, "package/models/net.py:Net", "name it package.models.net:Net")
    assert f"From {Path.cwd()}," in message
    load(ModelSpec("package.models.net:Net"))


def test_a_package_whose_own_import_is_missing():
    write("package/__init__.py", "import not_installed_here\n")
    refusal(ModelError, "package:Net", "Importing package needs the module 'not_installed_here'")


# --- weights ----------------------------------------------------------------------------------------------------


@pytest.fixture
def state(net):
    return load(ModelSpec("net.py:make", seed=7)).state_dict()


def loaded(weights, **spec):
    return load(ModelSpec("net.py:make", weights=Path(weights), **spec)).state_dict()


def same(a, b):
    return a.keys() == b.keys() and all(torch.equal(a[key], b[key]) for key in a)


def nested(state):
    return {"epoch": 3, "optimizer": {"state": {0: torch.ones(1)}}, "model": state}


@pytest.mark.parametrize(
    "wrap",
    [
        dict,
        OrderedDict,
        lambda s: {"state_dict": s},
        nested,
        lambda s: {"ema": None, "model": s},
        lambda s: {"checkpoint": {"net": s}},
        lambda s: {f"module.{k}": v for k, v in s.items()},
        lambda s: {f"_orig_mod.module.{k}": v for k, v in s.items()},
        lambda s: {"state_dict": {f"model.{k}": v for k, v in s.items()}},
        lambda s: {k: v.double() for k, v in s.items()},
    ],
)
def test_state_dicts_as_training_code_saves_them(state, wrap):
    torch.save(wrap(state), "w.pt")
    assert same(loaded("w.pt"), state)


def test_weights_from_safetensors_and_from_a_relative_path(state):
    Path("weights").mkdir()
    save_file(state, "weights/w.safetensors")
    assert same(loaded("weights/w.safetensors"), state)


def test_a_prefix_that_is_the_models_own():
    write("net.py", NET + "\n    def wrapped():\n        return nn.Sequential(OrderedDict(model=Net()))\n")
    Path("net.py").write_text("from collections import OrderedDict\n" + Path("net.py").read_text())
    model = load(ModelSpec("net.py:wrapped", seed=7))
    torch.save(model.state_dict(), "w.pt")
    again = load(ModelSpec("net.py:wrapped", weights=Path("w.pt")))
    assert same(again.state_dict(), model.state_dict())


def test_weights_of_another_architecture(state):
    torch.save({"fc.weight": torch.ones(2), **{k: v for k, v in state.items() if "sru" not in k}}, "w.pt")
    refusal(
        ModelError, "net.py:make",
        "w.pt do not fit net.py:make", "2 missing (sru.gn.gamma, sru.gn.beta)", "1 unexpected (fc.weight)",
        "--non-strict", weights=Path("w.pt"),
    )  # fmt: skip


def test_non_strict_loads_what_fits(state):
    torch.save({"fc.weight": torch.ones(2), "conv.weight": state["conv.weight"]}, "w.pt")
    got = loaded("w.pt", strict=False)
    _, record = load_with_record(ModelSpec("net.py:make", weights=Path("w.pt"), strict=False))
    assert record.skipped == (
        ("weights w.pt: missing", "3 (conv.bias, sru.gn.gamma, sru.gn.beta)"),
        ("weights w.pt: unexpected", "1 (fc.weight)"),
        ("weights w.pt: parameters that stay at their random initialisation", "2 (conv.bias, sru.gn.gamma)"),
    )
    assert torch.equal(got["conv.weight"], state["conv.weight"])
    assert not torch.equal(got["sru.gn.gamma"], state["sru.gn.gamma"])


def test_non_strict_still_wants_something_that_fits(state):
    torch.save({"fc.weight": torch.ones(2)}, "w.pt")
    words = ("share no key with net.py:make", "4 missing", "1 unexpected (fc.weight)")
    refusal(ModelError, "net.py:make", *words, weights=Path("w.pt"), strict=False)


@pytest.mark.parametrize("strict", [True, False])
def test_weights_of_another_size(state, strict):
    torch.save(load(ModelSpec("net.py:make", {"channels": 16})).state_dict(), "w.pt")
    words = ("none of 4 tensors fits", "conv.weight is 16x3x3x3, expected 8x3x3x3", "Check --kwargs")
    refusal(ModelError, "net.py:make", *words, weights=Path("w.pt"), strict=strict)


def damaged(name, state):
    whole = Path("whole" + Path(name).suffix)
    save_file(state, whole) if whole.suffix == ".safetensors" else torch.save(state, whole)
    return whole.read_bytes()


@pytest.mark.parametrize("name", ["w.pt", "w.pth", "w.safetensors"])
@pytest.mark.parametrize("keep", [0, 1, 3, 7, 100, 0.5, -1])
def test_truncated_weights(state, name, keep):
    data = damaged(name, state)
    Path(name).write_bytes(data[: int(keep * len(data)) if isinstance(keep, float) else keep])
    refusal(IntegrityError, "net.py:make", name, "Copy it again", weights=Path(name))


@settings(max_examples=60, deadline=None, derandomize=True)
@given(data=st.binary(min_size=1, max_size=200) | st.text(min_size=1).map(str.encode))
@pytest.mark.parametrize("name", ["fuzz.pt", "fuzz.safetensors"])
def test_bytes_that_are_no_weights(tmp_path_factory, name, data):
    path = tmp_path_factory.getbasetemp() / name
    path.write_bytes(data)
    with pytest.raises(IntegrityError):
        load_weights(nn.ReLU(), read_weights(path), "ReLU")


class Evil:
    """Unpickling it would create a file."""

    def __reduce__(self):
        return Path.touch, (Path("executed"),)


@pytest.mark.parametrize("save", [torch.save, lambda value, path: Path(path).write_bytes(pickle.dumps(value))])
@pytest.mark.parametrize("value", [Evil(), {"state_dict": Evil()}, {"conv.weight": Evil()}])
def test_a_pickle_that_would_execute_code(net, save, value):
    save(value, "w.pt")
    remedy = "--trust-checkpoint" if save is torch.save else "that torch.save did not write"  # trust would not help
    refusal(UntrustedError, "net.py:make", "w.pt", "execute code", remedy, weights=Path("w.pt"))
    refusal(UntrustedError, "w.pt", "execute code", remedy)
    assert not Path("executed").exists()


@pytest.mark.parametrize(
    ("value", "found"), [({}, "dict"), ({"epoch": 3}, "keys epoch"), ([1], "list"), (torch.ones(2), "Tensor")]
)
def test_a_file_without_a_state_dict(net, value, found):
    torch.save(value, "w.pt")
    refusal(IntegrityError, "net.py:make", f"holds no state dict, found {found}", weights=Path("w.pt"))


def test_weights_that_are_not_there(net):
    refusal(UsageError, "net.py:make", "Weights file w.pt does not exist", weights=Path("w.pt"))
    Path("w.pt").mkdir()
    refusal(UsageError, "net.py:make", "Weights file w.pt is not a file", weights=Path("w.pt"))


def test_a_git_lfs_pointer(net):
    Path("w.pt").write_text("version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 3\n")
    refusal(IntegrityError, "net.py:make", "Git LFS pointer", "git lfs pull", weights=Path("w.pt"))


# --- checkpoints that are modules -------------------------------------------------------------------------------


@pytest.mark.parametrize("wrap", [lambda m: m, lambda m: {"model": m, "epoch": 3}, lambda m: {"ema": m, "model": None}])
def test_a_pickled_module(net, wrap):
    model = load(ModelSpec("net:make", seed=7))  # imported by its name, as a pickle needs it
    torch.save(wrap(model), "best.pt")
    refusal(UntrustedError, "best.pt", "Checkpoint best.pt", "--trust-checkpoint")
    refusal(UsageError, "best.pt", "Leave --kwargs out", kwargs={"channels": 8}, trust_checkpoint=True)
    assert same(load(ModelSpec("best.pt", trust_checkpoint=True)).state_dict(), model.state_dict())


def test_a_pickled_module_is_also_weights(net):
    model = load(ModelSpec("net:make", seed=7))
    torch.save({"model": model}, "best.pt")
    refusal(UntrustedError, "net.py:make", weights=Path("best.pt"))
    assert same(loaded("best.pt", trust_checkpoint=True), model.state_dict())


def test_a_pickled_module_whose_code_is_gone(net):
    torch.save(load(ModelSpec("net:make")), "best.pt")
    del sys.modules["net"]
    net.unlink()
    refusal(ModelError, "best.pt", "needs the module net, which cannot be imported", "--path", trust_checkpoint=True)


@pytest.mark.parametrize(
    "wrap",
    [
        nn.DataParallel, lambda m: nn.DataParallel(torch.compile(m)), AveragedModel, torch.compile,
        lambda m: {"model": nn.DataParallel(m)},
    ],
)  # fmt: skip
def test_modules_pickled_in_a_wrapper(net, wrap):
    model = load(ModelSpec("net:make", seed=7))
    torch.save(wrap(model), "best.pt")
    found = load(ModelSpec("best.pt", trust_checkpoint=True))
    assert type(found).__name__ == "Net"
    assert same(found.state_dict(), model.state_dict())


def test_wrappers_inside_a_module(net):
    model = load(ModelSpec("net:make", seed=7))
    state = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    model.sru = torch.compile(nn.DataParallel(model.sru))
    torch.save(model, "best.pt")
    assert same(load(ModelSpec("best.pt", trust_checkpoint=True)).state_dict(), state)


def test_a_module_pickled_in_a_process_group(net, monkeypatch):
    def refused(self, state):
        raise RuntimeError(
            "Default process group has not been initialized, please make sure to call init_process_group."
        )

    wrapper = nn.parallel.DistributedDataParallel.__new__(nn.parallel.DistributedDataParallel)
    nn.Module.__init__(wrapper)
    monkeypatch.setattr(nn.parallel.DistributedDataParallel, "__getstate__", lambda self: vars(self))
    torch.save(wrapper, "ddp.pt")
    monkeypatch.setattr(nn.parallel.DistributedDataParallel, "__setstate__", refused)
    refusal(ModelError, "ddp.pt", "inside DistributedDataParallel", "Save its model.module", trust_checkpoint=True)


def test_a_class_of_the_script_that_was_run(net, monkeypatch):
    model = load(ModelSpec("net:make"))
    monkeypatch.setattr(type(model), "__module__", "__main__")
    monkeypatch.setattr(sys.modules["__main__"], "Net", type(model), raising=False)
    torch.save(model, "best.pt")
    monkeypatch.delattr(sys.modules["__main__"], "Net")
    refusal(ModelError, "best.pt", "needs the class Net of the script that was run", trust_checkpoint=True)


def test_code_is_looked_for_in_given_folders_first(workplace):
    for folder, channels in (("a", 8), ("b", 16)):
        write(f"{folder}/parts.py", f"CHANNELS = {channels}")
    write(
        "net.py",
        NET.replace("import torch\n", "import torch, parts\n", 1).replace("channels=8", "channels=parts.CHANNELS"),
    )
    model = load(ModelSpec("net.py:make", paths=folders([Path("b"), Path("a")])))
    assert model.conv.out_channels == 16
    with pytest.raises(UsageError, match="--path nowhere does not exist"):
        folders([Path("nowhere")])
    with pytest.raises(UsageError, match=r"--path net.py is not a folder"):
        folders([Path("net.py")])


@pytest.mark.parametrize("trust", [False, True])
def test_weights_given_as_model(state, trust):
    torch.save({"model": state}, "w.pt")
    refusal(UsageError, "w.pt", "holds weights, not a module", "as --weights w.pt", trust_checkpoint=trust)


def test_torchscript(net):
    torch.jit.save(torch.jit.script(nn.Conv2d(3, 8, 3)), "script.pt")
    for trust in (False, True):
        assert "--trust-checkpoint" not in refusal(ModelError, "script.pt", "is a TorchScript", trust_checkpoint=trust)
