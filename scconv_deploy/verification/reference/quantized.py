"""Fake-quantised PyTorch as the reference of a quantised file, with the float model's results beside it."""

from __future__ import annotations

from dataclasses import replace

import torch

from scconv_deploy.graph.quantization import Quantization
from scconv_deploy.model.fake_quantize import fake_quantized, quantized_weights
from scconv_deploy.model.prepare import Reference
from scconv_deploy.model.replay import record_gates
from scconv_deploy.verification.reference.expected import ExpectedQuantization, ExpectedWeights
from scconv_deploy.verification.reference.pytorch import TorchReference, weights_of
from scconv_deploy.verification.reference.run import Arrays, ReferenceRun


class QuantizedReference(TorchReference):
    """:class:`.run.ReferenceSource` of a PyTorch model with fake quantisation at a file's sites.

    Args:
        reference: the float model.
        quantization: quantisers of the file.

    Raises:
        ModelError: the model lacks a module that the file quantises.
    """

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
