"""--embed on any MODEL: weights of the network before and after, the command line, and the record in the report."""

from __future__ import annotations

import json
import shlex
import sys
import textwrap
from pathlib import Path

import pytest
import torch
from typer.testing import CliRunner

from scconv_deploy import cli
from scconv_deploy.errors import ModelError, UsageError
from scconv_deploy.model.inputs import InputSpec
from scconv_deploy.model.load import load, load_with_record
from scconv_deploy.model.spec import EmbedSpec, ModelSpec

NET = """
    import torch
    from torch import nn

    class Net(nn.Module):
        def __init__(self):
            super().__init__()
            self.stem = nn.Conv2d(3, 16, 3, 2, 1)
            self.block = nn.Sequential(
                nn.Conv2d(16, 32, 1), nn.Conv2d(32, 32, 3, 2, 1, bias=False), nn.BatchNorm2d(32),
                nn.ReLU(), nn.Conv2d(32, 16, 1),
            )

        def forward(self, x):
            return self.block(self.stem(x)).mean((2, 3))
"""
INPUTS = (InputSpec((2, 3, 16, 16)),)
SHAPE = ("--input", "2x3x16x16")


@pytest.fixture(autouse=True)
def _workplace(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", [*sys.path])
    Path("embed_net.py").write_text(textwrap.dedent(NET))
    yield
    sys.modules.pop("embed_net", None)


@pytest.fixture
def run(monkeypatch):
    def runner(*args):
        monkeypatch.setattr(sys, "argv", ["scconv-deploy", *args])
        return CliRunner().invoke(cli.app, list(args))

    return runner


def spec(**options):
    return ModelSpec("embed_net.py:Net", inputs=INPUTS, embed=EmbedSpec(options.pop("rule", "paper")), **options)


def trained(model, path):
    """A state dict whose values nothing else draws."""
    state = {name: torch.full_like(tensor, 0.5) for name, tensor in model.state_dict().items()}
    torch.save({"state_dict": {f"module.{name}": tensor for name, tensor in state.items()}}, path)
    return Path(path)


def test_weights_of_the_original_load_before():
    weights = trained(load(ModelSpec("embed_net.py:Net")), "before.pt")
    model, loaded = load_with_record(spec(weights=weights))
    record = loaded.embedded
    assert (model.stem.weight == 0.5).all()
    assert (model.block[2].running_var == 0.5).all()
    assert not (model.block[1][1].SRU.gn.gamma == 0.5).any()
    assert record.untrained
    assert "fine-tune" in record.summary[-1]


def test_weights_of_the_embedded_network_load_after():
    weights = trained(load(spec()), "after.pt")
    model, loaded = load_with_record(spec(weights=weights))
    record = loaded.embedded
    assert all((tensor == 0.5).all() for name, tensor in model.state_dict().items() if "num_batches" not in name)
    assert not record.untrained
    assert not any("fine-tune" in line for line in record.summary)
    with pytest.raises(UsageError, match="weights of the embedded network"):
        load(ModelSpec("embed_net.py:Net", inputs=INPUTS, weights=weights, embed=EmbedSpec(calibrate=True)))


@pytest.mark.parametrize(
    ("lost", "named"), [("stem.bias", "Net: 1 missing"), ("block.1.1.CRU.GWC.bias", "--embed paper")]
)
def test_strict_is_judged_against_what_the_weights_are_of(lost, named):
    of = load(spec()) if "CRU" in lost else load(ModelSpec("embed_net.py:Net"))
    state = of.state_dict()
    del state[lost]
    torch.save(state, "lost.pt")
    with pytest.raises(ModelError, match=named) as error:
        load(spec(weights=Path("lost.pt")))
    assert lost in str(error.value)
    assert load(spec(weights=Path("lost.pt"), strict=False)).stem.weight.equal(of.stem.weight)


def test_a_seed_gives_one_network():
    first, second = load(spec()), load(spec())
    assert all(torch.equal(a, b) for a, b in zip(first.parameters(), second.parameters(), strict=True))
    assert not torch.equal(first.block[1][1].SRU.gn.gamma, load(spec(seed=1)).block[1][1].SRU.gn.gamma)
    assert not first.training


def test_without_inputs_the_structure_decides():
    model, record = load_with_record(ModelSpec("embed_net.py:Net", embed=EmbedSpec("block.1")))
    assert record.embedded.multiply_adds_before is None
    assert len(model.block[1]) == 2


def test_a_pickled_module_is_embedded_too():
    torch.manual_seed(0)
    module = load(ModelSpec("embed_net.py:Net"))
    torch.save(module, "net.pt")
    model = load(ModelSpec("net.pt", inputs=INPUTS, trust_checkpoint=True, embed=EmbedSpec()))
    assert torch.equal(model.stem.weight, module.stem.weight)
    assert hasattr(model.block[1][1], "SRU")


def test_deploy_records_what_was_embedded_and_verify_agrees(run):
    model = ("embed_net.py:Net", *SHAPE, "--embed", '{"calibrate": true}')
    result = run("deploy", *model, "-o", "out")
    assert result.exit_code == 0, result.output
    report = json.loads(Path("out/report.json").read_text())
    assert sum(sru["teacher_forced"]["unexplained"] for sru in report["srus"]) == 0
    assert [sru["site"] for sru in report["srus"]] == ["block.1.1.SRU"]
    stage = next(stage for stage in report["stages"] if stage["name"] == "embed")
    # before: stem 432+16 at 8x8, 1x1 512+32 at 8x8, 3x3 9216 at 4x4, norm 64, 1x1 512+16 at 4x4
    # ScConv in place of the 3x3: weights 128+128+1152+256+192 at 4x4, 32 biases, gammas and betas
    assert stage["applied"][:4] == [
        "rule paper: 1 convolutions replaced, 1 left",
        "parameters 10,800 -> 3,536 (-67.3%)",
        "multiply-adds a sample 216,064 -> 98,304 (-54.5%)",
        "statistics of 1 norms taken from the example inputs",
    ]
    assert stage["applied"][-1] == "block.1: 3x3 32 -> 32, stride 2x2: average pooling, ScConv 32"
    assert stage["skipped"] == [["stem", "the stem, the network's first convolution"]]
    assert (
        report["model"] == f"embed_net.py:Net --embed {shlex.quote(json.dumps({'rule': 'paper', 'calibrate': True}))}"
    )
    assert report["provenance"]["embed"] == '{"rule": "paper", "calibrate": true}'
    assert "embed    parameters 10,800 -> 3,536 (-67.3%)" in result.stdout
    assert "left     stem: the stem" in result.stdout
    verify = ("verify", "out", "--reference", *model[:-2])
    assert run(*verify, "--embed", model[-1], "--quiet").exit_code == 0
    assert run(*verify, "--embed", "paper", "--quiet").exit_code == 6  # without calibration it is another network


def test_inspect_and_export_say_it(run):
    args = ("embed_net.py:Net", *SHAPE, "--embed", "block.*")
    document = json.loads(run("inspect", *args, "--json").stdout)
    stage = next(stage for stage in document["stages"] if stage["name"] == "embed")
    assert stage["skipped"][0] == ["stem", "the pattern does not name it"]
    assert stage["skipped"][1] == ["block.0", "its kernel is 1x1, ScConv replaces 3x3"]
    assert (document["parameters"], document["multiply_adds"]) == (3_536, 98_304)
    exported = run("export", *args, "-o", "net.onnx").stdout
    assert "embed    block.1: 3x3 32 -> 32" in exported
    assert "net.onnx: 1 SRUs as nodes" in exported


@pytest.mark.parametrize(
    ("rule", "code", "words"),
    [
        ("block.7", 2, "names no convolution of the model. The nearest are block.1"),
        ("stem.*", 2, "The nearest are stem"),
        ('{"alpha": "x"}', 2, "expected int or float"),
        ("block.0", 4, "nothing was replaced"),
        ('{"alpha": 7}', 4, "alpha is 7"),
    ],
)
def test_what_cannot_be_embedded(run, rule, code, words):
    result = run("export", "embed_net.py:Net", *SHAPE, "--embed", rule, "-o", "net.onnx")
    assert result.exit_code == code, result.output
    assert len(result.stderr.splitlines()) == 1
    assert words in result.stderr
    assert not Path("net.onnx").exists()
