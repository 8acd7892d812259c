"""SRUs built alone by the real TensorRT-RTX, which needs no GPU for it, and which form each version is given."""

from __future__ import annotations

import numpy as np
import onnx
import pytest

from scconv_deploy.errors import BuildError
from scconv_deploy.gate.margins import GateForm, decide
from scconv_deploy.graph.contract import node_attributes
from scconv_deploy.runtimes.half import runner_of
from scconv_deploy.runtimes.tensorrt.engine import EngineLayer
from scconv_deploy.verification import sru_models
from scconv_deploy.verification.engine.decode import decode
from scconv_deploy.verification.engine.sru_alone import build_sru, form_of
from scconv_deploy.verification.reference.run import Site
from tests.exporters.tensorrt.engines import recorded
from tests.runtimes.tensorrt.test_engine import DATA, manifest_of

SHAPE = (2, 24, 6, 6)
TYPES = {"float32": "FLOAT", "float16": "HALF", "bfloat16": "BF16"}


def site_of(operator, groups):
    rng = np.random.default_rng(0)
    cut, sign = (rng.normal(size=24) * 0.3).astype(np.float32), rng.choice([-1.0, 1.0], 24).astype(np.float32)
    more = {"SRU": (), "SRUNorm": ("gamma", "beta"), "SRUSoft": ("scale", "shift")}[operator]
    parameters = {"cut": cut, "sign": sign} | {n: rng.normal(size=24).astype(np.float32) for n in more}
    form = GateForm(groups, 1, 0.0, 1e-10, False, cut, sign, np.abs(cut).astype(np.float64))
    attributes = node_attributes(groups, 1, 0.0, 1e-10)
    return Site("block.sru", "block.sru", operator, operator, parameters, attributes, bool(24 % groups), form)


def models_of(operator, groups, data):
    manifest = manifest_of(DATA, layers=(EngineLayer("conv", "CONVOLUTION", (TYPES[data],)),))
    return sru_models.of_site(site_of(operator, groups), manifest, SHAPE)


@pytest.mark.parametrize("data", TYPES)
@pytest.mark.parametrize("groups", [4, 16])
@pytest.mark.parametrize("operator", ["SRU", "SRUNorm", "SRUSoft"])
def test_the_node_that_a_site_must_have_computes_its_gates(operator, groups, data):
    """In ONNX Runtime, function and inlined form alike; the plugin's has the node and nothing else."""
    models, site = models_of(operator, groups, data), site_of(operator, groups)
    x = np.random.default_rng(1).normal(size=SHAPE).astype(np.float32)
    with runner_of(onnx.load_model_from_string(models["function"])) as whole:
        y = whole.run({sru_models.SRU_X: x})[sru_models.SRU_Y]
    with runner_of(onnx.load_model_from_string(models["inlined"])) as inlined:
        np.testing.assert_array_equal(inlined.run({sru_models.SRU_X: x})[sru_models.SRU_Y], y)
    rounded = x if data == "float32" else _rounded(x, data)
    found = decode(y, rounded, site, data)
    count = found.count(decide(rounded, site.form), rounded, site)
    assert count.unexplained == 0
    assert count.gates > 0.8 * x.size
    alone = onnx.load_model_from_string(models["plugin"])
    assert (len(alone.graph.node), len(alone.functions)) == (1, 0)
    assert alone.graph.node[0].op_type == operator


def _rounded(x, data):
    from scconv_deploy.verification.engine.srus import rounded as as_engine

    return as_engine(x, data)


@pytest.mark.tensorrt
@pytest.mark.parametrize("data", TYPES)
@pytest.mark.parametrize("groups", [4, 16])
@pytest.mark.parametrize("operator", ["SRU", "SRUNorm", "SRUSoft"])
def test_tensorrt_rtx_builds_every_sru_alone(operator, groups, data):
    module = pytest.importorskip("tensorrt_rtx", reason="needs tensorrt-rtx")
    models = models_of(operator, groups, data)
    for form in ("function", "inlined"):
        plan = build_sru(module, "tensorrt-rtx", "block.sru", models[form], "SM89")
        assert plan.data[:4] == b"vtrt"
        (x,), (y,), (profile,) = plan.inputs, plan.outputs, plan.profiles
        assert (x.name, x.dtype, x.shape) == (sru_models.SRU_X, TYPES[data], SHAPE)
        assert (y.name, y.dtype, y.shape) == (sru_models.SRU_Y, TYPES[data], SHAPE)
        assert profile.minimum == profile.maximum == SHAPE


@pytest.mark.tensorrt
def test_a_refusal_names_the_sru():
    module = pytest.importorskip("tensorrt_rtx", reason="needs tensorrt-rtx")
    with pytest.raises(BuildError, match=r"TensorRT-RTX cannot build the SRU block\.sru alone: ") as refused:
        build_sru(module, "tensorrt-rtx", "block.sru", models_of("SRU", 4, "float32")["plugin"], "SM89")
    assert refused.value.exit_code == 5
    with pytest.raises(BuildError, match="alone: "):
        build_sru(module, "tensorrt-rtx", "block.sru", b"no model", "SM89")


@pytest.mark.parametrize(
    ("version", "fused", "loaded", "form"),
    [
        ("tensorrt-10.3", True, True, "plugin"),
        ("tensorrt-10.9", True, True, "plugin"),
        ("tensorrt-10.3", False, False, "inlined"),  # it binds a function's inputs wrongly
        ("tensorrt-10.7", False, False, "function"),
        ("tensorrt-11.4", False, True, "inlined"),  # it would take the plugin
        ("tensorrt-rtx-1.7", False, False, "function"),
    ],
)
def test_the_form_makes_each_version_do_what_it_did_in_the_whole_engine(version, fused, loaded, form):
    backend = "tensorrt-rtx" if "rtx" in version else "tensorrt"
    assert form_of(recorded(version), backend, fused, loaded) == form
