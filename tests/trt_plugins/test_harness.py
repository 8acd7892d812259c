"""The plugin through enqueue in the hands of a host without TensorRT: emulated on the CPU, and on a GPU."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from scconv_deploy.gate.gate import Gate
from scconv_deploy.gate.variant import VARIANTS
from scconv_deploy.trt_plugins.build import BuildRequest, build
from tests.trt_plugins.test_kernels import BACKENDS, draw, judge

TYPES = {"float": torch.float32, "half": torch.float16, "bfloat16": torch.bfloat16}


@pytest.fixture(params=BACKENDS)
def host(request):
    """A host, and the plugin that it loads."""
    if request.param == "gpu":
        harness = request.getfixturevalue("harness")
        return harness, build(BuildRequest(tensorrt_include=harness.include)).path
    harness = request.getfixturevalue("emulated_harness")
    return harness, harness.plugin


def run(host, folder, x, type_name, parameters, variant, tactic, how, layout="LINEAR"):
    """The host's own checks, and y; x and y lie in memory as ``layout`` says."""
    harness, plugin = host
    folder.mkdir()
    stored = x if layout == "LINEAR" else x.permute(0, 2, 3, 1).contiguous()
    (folder / "x.bin").write_bytes(stored.view(torch.uint8).numpy().tobytes())
    for name, value in zip(("cut", "sign", "first", "second"), parameters, strict=False):
        (folder / f"{name}.bin").write_bytes(value.view(torch.uint8).numpy().tobytes())
    parameter_type = next(name for name, dtype in TYPES.items() if dtype == parameters[0].dtype)
    done = harness.run("run", plugin, variant.operator, type_name, parameter_type, layout, *x.shape, variant.num_groups,
                       variant.ddof, variant.eps_var, variant.eps_std, tactic, how, folder)  # fmt: skip
    assert [line for line in done.stdout.splitlines() if not line.startswith("passed")] == []
    assert done.returncode == 0, done.stderr
    assert "passed enqueue" in done.stdout
    y = torch.frombuffer(bytearray((folder / "y.bin").read_bytes()), dtype=x.dtype).reshape(stored.shape)
    return y if layout == "LINEAR" else y.permute(0, 3, 1, 2).contiguous()


def layouts(channels, groups, type_name):
    """Formats in which the plugin takes x."""
    if channels % groups:
        return ("LINEAR",)
    return ("LINEAR", "HWC") if type_name == "float" or channels % 8 else ("LINEAR", "HWC", "HWC8")


@pytest.mark.nvcc
@pytest.mark.parametrize("how", ["plain", "graph"])
@pytest.mark.parametrize("name", VARIANTS)
def test_the_plugin_computes_in_a_hosts_hands(host, tmp_path, name, how):
    for shape, groups in (((2, 64, 14, 14), 8), ((1, 24, 6, 4), 16)):
        variant = replace(VARIANTS[name], num_groups=groups)
        if variant.statistics == "group_norm" and shape[1] % groups:
            continue  # torch.nn.GroupNorm knows no groups that straddle channels
        x, gamma, beta = draw(shape)
        for type_name, dtype in TYPES.items():
            for tactic in (0, 1, 2):
                data, parameters = x.to(dtype), list(Gate(variant, gamma, beta).operator_inputs().values())
                for layout in layouts(shape[1], groups, type_name):
                    folder = tmp_path / f"{type_name}{tactic}{groups}{layout}"
                    y = run(host, folder, data, type_name, parameters, variant, tactic, how, layout)
                    judge(y, data, gamma, beta, variant)


@pytest.mark.nvcc
@pytest.mark.parametrize("type_name", ["half", "bfloat16"])
def test_parameters_in_16_bits_are_refused(host, tmp_path, type_name):
    """They would be other cuts, which move gates: half data come with float32 parameters alone."""
    variant = replace(VARIANTS["groupbn-hard"], num_groups=4)
    x = torch.randn(1, 16, 6, 6, generator=torch.Generator().manual_seed(0)).to(TYPES[type_name])
    cut, sign = torch.arange(-8, 8).to(TYPES[type_name]) / 16, torch.ones(16).to(TYPES[type_name])
    with pytest.raises(AssertionError, match="FAILED configured"):
        run(host, tmp_path / "refused", x, type_name, [cut, sign], variant, 0, "plain")
    y = run(host, tmp_path / "taken", x, type_name, [cut.float(), sign.float()], variant, 0, "plain")
    groups = x.float().reshape(1, 4, -1)
    centred = (groups - groups.mean(2, keepdim=True)) / groups.std(2, keepdim=True)
    opened = (centred.reshape(x.shape) >= cut.float().reshape(1, 16, 1, 1)).float()
    data, closed = x.float() * opened, x.float() * (1 - opened)
    assert torch.equal(y.float(), (data + closed.roll(8, 1)).to(x.dtype).float())
