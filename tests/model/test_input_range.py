"""The range of generated inputs, fitted to the images that a model's batch norms have seen."""

import pytest
import torch
from torch import nn

from scconv_deploy.errors import ModelError
from scconv_deploy.model.input_range import USUAL, InputRange, fitted
from scconv_deploy.model.inputs import InputSpec
from scconv_deploy.model.prepare import reference_from_spec
from scconv_deploy.model.spec import ModelSpec
from scconv_deploy.verification.samples import noise_samples
from tests import yolo

NOISE = torch.randn((1, 3, 32, 32), generator=torch.Generator().manual_seed(0))


def trained_on(mean, contrast):
    return yolo.settled(yolo.model(), mean, contrast)


def range_of(model):
    return fitted(model, lambda given: model(given.of(NOISE)))


@pytest.mark.parametrize(
    ("mean", "contrast"), [(0.0, 0.05), (0.5, 0.05), (0.5, 0.1), (127.5, 10.0)], ids=lambda value: f"{value:g}"
)
def test_the_range_is_that_of_the_images(mean, contrast):
    found = range_of(trained_on(mean, contrast))
    assert found.mean == mean
    assert contrast / 2 < found.deviation < 2 * contrast


@pytest.mark.parametrize(("mean", "contrast"), [(0.0, 1.0), (0.5, 0.5)])
def test_a_model_that_takes_normal_noise_is_given_it_to_the_bit(mean, contrast):
    found = range_of(trained_on(mean, contrast))
    assert found is USUAL
    assert found.of(NOISE) is NOISE


def test_a_model_without_a_training_is_not_run():
    for model in (nn.Sequential(nn.BatchNorm2d(3)).eval(), nn.Conv2d(3, 3, 1), trained_on(0.5, 0.1).train()):
        assert fitted(model, lambda given: pytest.fail("it ran")) is USUAL


def test_where_no_range_fits_it_is_the_usual_one():
    norm = nn.BatchNorm2d(3)
    norm.running_mean.fill_(-1e3)
    assert range_of(norm.eval()) is USUAL


class OfLogarithms(nn.Module):
    """NaN from 2 on, which normal noise exceeds."""

    def __init__(self):
        super().__init__()
        self.net = yolo.model()

    def forward(self, x):
        return self.net(torch.log(2 - x))


def test_features_that_are_no_numbers_are_too_large():
    found = range_of(yolo.settled(OfLogarithms(), 0.5, 0.1))
    assert found.mean == 0.5
    assert 0.05 < found.deviation < 0.2


def test_a_refusal_of_the_model_is_left_to_its_next_run():
    def refuse(given):
        raise ModelError("no", "such input")

    assert fitted(trained_on(0.5, 0.1), refuse) is USUAL


def attentive():
    return yolo.settled(yolo.model(yolo.AttentiveModel), 0.5, 0.1)


def test_inputs_of_a_factory_are_drawn_in_its_range():
    reference, log = reference_from_spec(ModelSpec(f"{__name__}:attentive", inputs=(InputSpec((1, 3, 32, 32)),)))
    for sample in noise_samples(reference.signature, 0):
        (image,) = sample.tensors.values()
        assert float(image.mean()) == pytest.approx(0.5, abs=0.02)
        assert 0.05 < float(image.std()) < 0.2
    assert any("inputs drawn at 0.5 +- 0." in line for line in log.records[0].applied)


def test_a_range_reads_as_text():
    assert str(InputRange(0.5, 0.1234)) == "0.5 +- 0.12"
