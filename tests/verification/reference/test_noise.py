"""The noise of a reference: several right runs, what they may touch, and what is too noisy to be a reference."""

from __future__ import annotations

from dataclasses import replace
from functools import partial

import numpy as np
import onnxruntime
import pytest
import torch
import torch.nn.functional as F
from onnx import TensorProto, helper
from torch import nn

from scconv_deploy.errors import ModelError
from scconv_deploy.model.orders import LastPlace, OtherOrder
from scconv_deploy.model.prepare import reference_from_module
from scconv_deploy.records import tolerances
from scconv_deploy.verification.reference import noise
from scconv_deploy.verification.reference.pytorch import TorchReference
from scconv_deploy.verification.reference.rounding import RoundedRuns
from scconv_deploy.verification.reference.run import ReferenceRun, RoundedRun
from scconv_deploy.verification.samples import Sample
from tests.verification.judging import checks_by_hand

X = torch.randn(2, 8, 6, 6, generator=torch.Generator().manual_seed(0))


def weight(*shape):
    return torch.randn(shape, generator=torch.Generator().manual_seed(1))


OPERATORS = {
    "convolution": lambda x: F.conv2d(x, weight(6, 4, 3, 3), weight(6), padding=1, groups=2),
    "transposed convolution": lambda x: F.conv_transpose2d(x, weight(8, 3, 2, 2), stride=2, groups=2),
    "depthwise convolution": lambda x: F.conv2d(x, weight(8, 1, 3, 3), groups=8) + 1,
    "convolution in one axis": lambda x: F.conv1d(x.flatten(2), weight(4, 8, 3)),
    "mean": lambda x: x.mean((2, 3)),
    "sum of all": lambda x: x.square().sum(),
    "variance": lambda x: x.var(1),
    "deviation": lambda x: x.std((0, 2), correction=0, keepdim=True),
    "layer norm": lambda x: F.layer_norm(x, (6, 6), weight(6, 6), weight(6, 6)),
    "group norm": lambda x: F.group_norm(x, 4, weight(8), weight(8)),
    "batch norm": lambda x: F.batch_norm(x, weight(8), weight(8).abs(), weight(8), weight(8)),
    "softmax": lambda x: x.softmax(1),
    "log softmax": lambda x: x.log_softmax(-1),
    "linear": lambda x: F.linear(x, weight(5, 6), weight(5)),
    "product": lambda x: x @ x.transpose(-1, -2),
    "einsum": lambda x: torch.einsum("abcd,abde->abce", x, x),
}


@pytest.mark.parametrize("mode", [OtherOrder, LastPlace])
@pytest.mark.parametrize("name", OPERATORS)
def test_a_right_run_is_within_rounding_of_the_usual_one(name, mode):
    operator, x = OPERATORS[name], X.clone()
    usual, exact = operator(x), operator(x.double().to(torch.float64).float())
    with mode([x], 3):
        found = operator(x)
    assert found.shape == usual.shape
    assert (found - usual).norm() < 2e-6 * usual.norm()
    assert torch.equal(usual, exact)
    with mode([], 3):  # what does not depend on the inputs is a constant
        assert torch.equal(operator(x), usual)


def test_what_is_exact_in_any_order_stays():
    x = X.clone()

    def choices(x):
        grid = torch.arange(6.0) * 0.1 + 0.3  # of shapes alone
        kept = torch.cat([x.relu(), x.amax(1, keepdim=True), F.max_pool2d(F.pad(x, (1, 1)), (1, 3), 1)], 1)
        return torch.where(kept > 0, kept, -kept)[..., :3].clamp(max=1.0).reshape(-1), grid

    for mode in (OtherOrder, LastPlace):
        with mode([x], 0):
            found, grid = choices(x)
        assert torch.equal(found, choices(x)[0])
        assert torch.equal(grid, choices(x)[1])


ACTIVATIONS = {
    "silu": F.silu,
    "silu in place": lambda x: F.silu(x.clone(), inplace=True),
    "gelu": F.gelu,
    "gelu by tanh": partial(F.gelu, approximate="tanh"),
    "elu": partial(F.elu, alpha=0.7),
    "selu": F.selu,
    "expm1": torch.expm1,
    "log1p": lambda x: torch.log1p(x.exp()),
    "log of sigmoid": F.logsigmoid,
    "glu": lambda x: F.glu(torch.cat([x + 3, x]), 0),
}


@pytest.mark.parametrize("name", ACTIVATIONS)
def test_an_activation_of_several_operators_is_moved_inside(name):
    """Its small results are what rounding leaves of larger numbers: off by more than a unit in their last place."""
    activation, near = ACTIVATIONS[name], torch.linspace(-1.5, 1.5, 1000)
    small = -near * 1e-5 if name in ("elu", "selu", "expm1") else near - (4 if "gelu" in name else 9)
    small = -small if name == "log of sigmoid" else small
    for x, least, most in ((near, 1e-8, 4e-7), (small, 1e-5, 0.2)):
        usual = activation(x)
        with LastPlace([x], 0):
            found = activation(x)
        assert found.shape == usual.shape
        kept = usual.abs() > 0.1 * usual.abs().median()
        assert least < ((found - usual)[kept].norm() / usual[kept].norm()) < most


@pytest.mark.parametrize("special", [float("inf"), float("-inf"), float("nan"), 3e38])
def test_numbers_at_the_end_of_the_range_stay_and_the_others_move(special):
    """3e38 is finite, and two of them add up to more than float32 holds."""
    x = X.clone()
    x[0, :2] = special
    with LastPlace([x], 0):
        y = x * 1
    rest = x.abs() < 1e38
    assert not torch.equal(y[rest], x[rest])
    assert (y[rest] - x[rest]).norm() < 1e-6 * x[rest].norm()
    if special == 3e38:
        assert torch.isfinite(y).all()
    else:
        assert torch.equal(y[~rest].nan_to_num(), x[~rest].nan_to_num())


def test_views_and_writing_in_place_reach_the_same_memory():
    x = X.clone()
    with LastPlace([x], 0):
        y = x * 1
        y[:, :4].add_(1).mul_(2)
        seen = y.clone()
    expected = x.clone()
    expected[:, :4].add_(1).mul_(2)
    assert not torch.equal(seen, expected)
    assert (seen - expected).norm() < 1e-6 * expected.norm()


def test_a_small_sigmoid_is_moved_as_far_as_onnx_runtime_moves_it():
    x = torch.linspace(-12, -8, 4096)
    model = helper.make_model(
        helper.make_graph(
            [helper.make_node("Sigmoid", ["x"], ["y"])], "g",
            *([helper.make_tensor_value_info(name, TensorProto.FLOAT, [4096])] for name in "xy"),
        ),
        opset_imports=[helper.make_opsetid("", 18)], ir_version=10,
    )  # fmt: skip
    (found,) = onnxruntime.InferenceSession(model.SerializeToString()).run(None, {"x": x.numpy()})
    exact = torch.sigmoid(x.double())
    with LastPlace([x], 0):
        moved = torch.sigmoid(x)
        in_place = x.clone().sigmoid_()
    noise, theirs = (moved - exact).norm(), (torch.from_numpy(found) - exact).norm()
    assert theirs > 1e-5 * exact.norm()
    assert noise / 2 < theirs < 2 * noise
    assert (in_place - exact).norm() > theirs / 2


def run_of(model, x=X):
    torch.manual_seed(0)
    reference, _ = reference_from_module(model.eval(), x)
    return TorchReference(reference).run(Sample("x", reference.signature.tensors))


class Made(nn.Module):
    """Computes a function."""

    def __init__(self, function):
        super().__init__()
        self.function = function

    def forward(self, x):
        return self.function(x)


def test_a_sum_that_float64_confirms_by_luck_has_noise_all_the_same():
    """Numbers of few digits: PyTorch's sum of them is exact, and so is float64's; other right sums of their squares
    are not, for the last step rounds."""
    whole = torch.randint(-8, 9, (2, 512, 8, 8), generator=torch.Generator().manual_seed(0)).float()
    run = run_of(Made(lambda x: x.mean((2, 3)) * 3), whole)
    assert 2.0**-25 < run.floors["output"] < 1e-6
    assert run.spread >= 1


def noisy(function):
    return run_of(Made(function))


def cancelled(x):
    """Continuous, and noisy: what is left of a sum a thousand times as large."""
    return (x + 3000.0) * 1.1 - 3300.0


def test_a_noisy_reference_is_judged_by_its_noise_where_it_is_continuous():
    run = noisy(cancelled)
    assert run.floors["output"] > tolerances.ALL["largest_floor.float32"].value
    assert run.continuous
    checks = checks_by_hand()
    checks.shared.ruler.add(run)
    value = run.outputs["output"]
    floor = run.floors["output"]
    for factor, status in ((1.0, "passed"), (10.0, "failed")):
        checks.replay.outputs.clear()
        moved = value * np.float32(1 + factor * floor)
        checks.replay.keep("y", checks.shared.ruler.measure(moved, value, floor), run)
        assert [check.status for check in checks.replay.checks()] == [status]


def drops(x):
    return F.dropout(x, 1e-3, training=True)


def steps(x):
    """Noisy, and then put into bins whose edges some of the noise crosses: no comparison that could be fixed."""
    return torch.bucketize(x + 3000.0 - 3000.0, torch.arange(-512, 512) / 64) / 64


@pytest.mark.parametrize("function", [drops, steps])
def test_a_random_or_stepping_reference_proves_nothing(function):
    run = noisy(function)
    assert run.floors["output"] > tolerances.ALL["largest_floor.float32"].value
    assert not run.continuous
    checks = checks_by_hand()
    checks.shared.ruler.add(run)
    value = run.outputs["output"]
    checks.replay.keep("y", checks.shared.ruler.measure(value, value, run.floors["output"]), run)
    (check,) = checks.replay.checks()
    assert check.status == "failed"
    assert "nothing can be judged by it" in check.reason


@pytest.mark.parametrize(
    ("apart", "continuous"),
    [
        ({1: (1e-6, 1e-4, 1e-3), 2: (3e-5, 2.4e-4, 2e-3)}, True),  # one draw was near by luck
        ({1: (9.9e-6, 1.3e-4, 1.2e-3), 2: (5.1e-5, 1.7e-4, 8.4e-4)}, True),  # or far
        ({1: (3e-5, 8e-5, 2.4e-4), 2: (1e-5, 3e-5, 1e-4)}, False),  # steps: by the root of the noise
    ],
)
def test_whether_noise_grows_in_proportion_is_read_from_the_mean_of_several_draws(monkeypatch, apart, continuous):
    """Ten numbers of a classifier whose noise cancels in some draws: measured 1.8e-6 and 2.7e-5 for two seeds."""

    def distances(self, run, mode):
        if not isinstance(mode, LastPlace):
            return {("output", "output"): 3e-5}
        draws = apart[min(mode._generator.initial_seed(), 2)]
        return {("output", "output"): draws[noise._UNITS.index(mode._relative * 2.0**23)]}

    monkeypatch.setattr(noise.NoiseRuns, "_distances", distances)
    assert noisy(cancelled).continuous == continuous


def test_the_more_is_compared_the_larger_the_largest_may_be():
    run = ReferenceRun("x", {}, {}, {}, {}, {}, {})
    base = tolerances.ALL["replay_multiple"].value

    def limit(spread, compared, table=None):
        checks = checks_by_hand(table)
        ruler = checks.shared.ruler
        ruler.add(replace(run, spread=spread))
        value = ruler.measure(np.ones(2, np.float32), np.ones(2, np.float32), 1e-7)
        for sample in range(3):  # of each value the worst over the samples
            for number in range(compared):
                checks.replay.keep(f"y{number}", replace(value, error=sample * 1e-7), run)
        return ruler.largest_multiple("replay_multiple")

    assert limit(1.5, 1) == base
    assert limit(1.5, 100) == pytest.approx(base * 1.5 ** np.sqrt(2 * np.log(100)))
    assert limit(1.5, 100) > limit(1.5, 10) > limit(1.3, 10)
    assert limit(1.0, 10) == limit(1.25, 10)  # a handful of runs can agree by luck
    assert limit(9.0, 10) == limit(2.0, 10)
    assert limit(1.5, 100, tolerances.table({"replay_multiple": 16})) == 16


class Masked(nn.Module):
    """Counts where a convolution is large: all that leaves it is computed of the decisions."""

    def __init__(self):
        super().__init__()
        self.conv, self.fc = nn.Conv2d(8, 16, 3), nn.Linear(16, 10)

    def forward(self, x):
        return self.fc((self.conv(x) > 0.1).float().mean((2, 3)))


def test_what_follows_from_a_decision_is_disturbed():
    torch.manual_seed(0)
    reference, _ = reference_from_module(Masked().eval(), X)
    source = TorchReference(reference)
    run = source.run(Sample("x", reference.signature.tensors))
    assert run.others
    assert 2.0**-26 < run.floors["output"] < 1e-6
    (_, _, _, floor) = next(iter(source.modules(run, ["fc"])))
    assert 2.0**-26 < floor < 1e-6
    in_half = source.rounded(run, None, "float16")
    assert 2.0**-13 < in_half.floors["output"] < 1e-2
    np.testing.assert_array_equal(in_half.outputs["output"], in_half.outputs["output"].astype(np.float16))
    assert not np.array_equal(in_half.outputs["output"], run.outputs["output"])


def test_the_limit_of_half_takes_the_spread_of_half_alone():
    run = ReferenceRun("x", {}, {}, {}, {}, {}, {})
    checks = checks_by_hand(data=np.float16)
    ruler = checks.shared.ruler
    for name in ("y", "z"):
        checks.replay.keep(name, ruler.measure(X.numpy(), X.numpy(), 1e-3), run)
    before = ruler.largest_multiple("half_multiple")
    ruler.add(replace(run, spread=1.9))
    assert ruler.largest_multiple("half_multiple") == before
    ruler.add_rounded(RoundedRun({}, {}, spread=1.9))
    assert ruler.largest_multiple("half_multiple") > before


def test_rows_that_run_apart_at_one_size_may_not_at_another(monkeypatch):
    """They were seen to on a sample before; this one's code wants all of them. What no run is left of has no noise."""
    rows = torch.randn(4, 8, 6, 6, generator=torch.Generator().manual_seed(0))
    model = Made(lambda x: (x.reshape(4, -1) * 0.3 + 1.7) * 0.7).eval()
    reference, _ = reference_from_module(model, rows)
    sample = Sample("x", reference.signature.tensors)
    monkeypatch.setattr(noise, "_ELEMENTS_AT_ONCE", 1)

    def seen():
        source = TorchReference(reference)
        source._float64._by_rows = True
        run = source.run(sample)
        return run, source.rounded(run, None, "float16")

    run, in_half = seen()
    assert 2.0**-26 < run.floors["output"] < 1e-6
    assert 2.0**-13 < in_half.floors["output"] < 1e-2

    def refuses(*args):
        raise ModelError("The model comes to a comparison that it did not come to before.", "")

    monkeypatch.setattr(noise.NoiseRuns, "_distances", refuses)
    monkeypatch.setattr(RoundedRuns, "_run", refuses)
    run, in_half = seen()
    assert 0 < run.floors["output"] < 1e-6  # float64's
    assert in_half is None
