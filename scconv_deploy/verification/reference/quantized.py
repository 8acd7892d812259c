"""Fake-quantised PyTorch as the reference of a quantised file, with the float model's results beside it."""

from __future__ import annotations

from dataclasses import replace

import torch

from scconv_deploy.graph.quantization import Quantization
from scconv_deploy.model.fake_quantize import fake_quantized, quantized_weights
from scconv_deploy.model.fake_quantizers import SOURCE, fake_quantizers, levels_of, quantized_layers
from scconv_deploy.model.prepare import Reference
from scconv_deploy.model.replay import record_gates
from scconv_deploy.records.quantization import CODE, QuantizationRecord
from scconv_deploy.verification.reference.expected import ExpectedQuantization, ExpectedWeights
from scconv_deploy.verification.reference.pytorch import TorchReference, weights_of
from scconv_deploy.verification.reference.run import Arrays, ReferenceRun


class TrainedReference(TorchReference):
    """:class:`.run.ReferenceSource` of a model that was trained with fake quantisation: its own operators round.

    Args:
        reference: the model, its quantisers fixed.
        quantization: quantisers of the file, by :func:`.graph.quantization.read_trained`.
    """

    rounds_to_codes = True

    def __init__(self, reference: Reference, quantization: Quantization) -> None:
        super().__init__(reference)
        own = fake_quantizers(reference.swapped)
        levels = {
            one.value: levels_of(own[gate.split("#")[0].removesuffix(CODE)])
            for gate, one in quantization.named.items()
            if gate.split("#")[0].removesuffix(CODE) in own
        }
        record = QuantizationRecord("trained", 0, reference.name, "", "", activations=levels)
        weights = {
            path: ExpectedWeights(layer.source.numpy(), layer.weight_scales.numpy(), layer.codes.numpy(), False)
            for path, layer in quantized_layers(reference.swapped)
        }
        found = {site.path for site in quantization.layers}
        for path in weights.keys() - found:
            quantization.unknown[path] = "its weights are not stored as int8"
        self.expected = ExpectedQuantization(replace(quantization, record=record), weights)

    @property
    def weights(self) -> Arrays:
        """Parameters and buffers of the model by name, without the weights that the file stores as integers."""
        rounded = [path for path, _ in quantized_layers(self._reference.swapped)]
        stored = {f"{path}.{name}" for path in rounded for name in ("weight", SOURCE)}
        return {name: value for name, value in weights_of(self._reference.swapped).items() if name not in stored}


class QuantizedReference(TorchReference):
    """:class:`.run.ReferenceSource` of a PyTorch model with fake quantisation at a file's sites.

    Args:
        reference: the float model.
        quantization: quantisers of the file.

    Raises:
        ModelError: the model lacks a module that the file quantises.
    """

    rounds_to_codes = True

    def __init__(self, reference: Reference, quantization: Quantization) -> None:
        super().__init__(fake_quantized(reference, quantization.plan))
        self._float, self._plan = reference, quantization.plan
        found = quantized_weights(reference.model, self._plan)
        norms = {layer.path: bool(layer.norm) for layer in self._plan.layers}
        weights = {
            path: ExpectedWeights(one.weight.numpy(), one.scales.numpy(), one.codes.numpy(), norms[path])
            for path, one in found.items()
        }
        self.expected = ExpectedQuantization(quantization, weights)

    @property
    def weights(self) -> Arrays:
        """Parameters and buffers of the float model by name, without the weights that the file stores as integers."""
        stored = {f"{path}.weight" for path in self.expected.weights}
        return {name: value for name, value in weights_of(self._float.model).items() if name not in stored}

    def run(self, sample: object) -> ReferenceRun:
        """Run a :class:`.samples.Sample`, and the float model on it."""
        run = super().run(sample)
        inputs = {name: torch.from_numpy(value) for name, value in run.inputs.items()}
        outputs, gates = record_gates(self._float.swapped, self._float.signature, inputs)
        return replace(
            run,
            unquantized={name: y.numpy() for name, y in outputs.items()},
            unquantized_masks={site: gate.mask.numpy() for site, gate in gates.items()},
        )
