"""What the tests of the verdict share: judging, reading a check, and networks and edits to judge."""

from dataclasses import dataclass

import numpy as np
import onnx
import torch
from onnx import helper, numpy_helper
from torch import nn

from scconv_deploy.graph import instrument
from scconv_deploy.graph.contract import FunctionKey
from scconv_deploy.graph.file import serialize
from scconv_deploy.graph.functions import function_text
from scconv_deploy.model.prepare import reference_from_module
from scconv_deploy.records import tolerances
from scconv_deploy.records.stage import StageLog
from scconv_deploy.runtimes.onnxruntime import RuntimeOptions
from scconv_deploy.verification.checks.artifact_run import ArtifactRuns
from scconv_deploy.verification.checks.jumps import Jumps
from scconv_deploy.verification.checks.other_gates import OtherGates
from scconv_deploy.verification.checks.replay import Replay
from scconv_deploy.verification.checks.shared import Shared
from scconv_deploy.verification.checks.swapped import Swapped
from scconv_deploy.verification.onnx.parity import Artifact, verify_onnx
from scconv_deploy.verification.samples import noise_samples
from scconv_deploy.workflows.export import ExportOptions, export_to_ir
from tests import wild


def judge(reference, model, samples=None):
    """Verify on seeded noise, or on samples."""
    data = model.SerializeToString()
    artifact = Artifact(model, "model.onnx", data)
    return verify_onnx(reference, artifact, samples or noise_samples(reference.signature, 0), StageLog())


def check_of(report, name):
    """The check of this name; a failed one first, for there is one replay per output."""
    checks = [c for link in report.links for c in link.checks if c.name == name]
    return min(checks, key=lambda c: c.status != "failed")


@dataclass
class Checks:
    """Checks of a model without SRUs, fed by hand: no runtime in it."""

    shared: Shared
    others: OtherGates
    jumps: Jumps
    replay: Replay
    swapped: Swapped


def checks_by_hand(limits=None, data=np.float32, source=None, nodes=()):
    """The checks of an artifact of this type, whose graph holds these nodes."""
    shared = Shared(limits or tolerances.table(), np.dtype(data))
    graph = helper.make_graph(list(nodes), "g", [], [])
    runs = ArtifactRuns(source, helper.make_model(graph), shared, RuntimeOptions())
    others = OtherGates(shared, runs)
    jumps = Jumps(source, shared, runs, others)
    return Checks(shared, others, jumps, Replay(shared, runs, jumps), Swapped(True, shared, jumps))


class Calls(nn.Module):
    """Uses its SRUs as the argument says; a and b have equal parameters."""

    def __init__(self, use):
        super().__init__()
        self.conv = nn.Conv2d(3, 16, 3)
        self.a, self.b = wild.randomize(wild.OriginalSRU(16, 4)), wild.randomize(wild.OriginalSRU(16, 4))
        self.c = wild.randomize(wild.OriginalSRU(16, 4), 3)
        self.use = use

    def forward(self, image):
        return self.use(self, self.conv(image))


def export_of(model):
    """The reference and the ONNX model of a module that takes 10x10 images."""
    reference, log = reference_from_module(model, torch.randn(2, 3, 10, 10, generator=torch.manual_seed(0)))
    return reference, onnx.load_model_from_string(serialize(export_to_ir(reference, ExportOptions(), log)))


def initializer(model, site, index):
    """The constant that a site has as this input."""
    name = instrument.sites(model)[site].input[index]
    return next(t for t in model.graph.initializer if t.name == name)


def set_attribute(model, name, value):
    """Set an attribute of the site a.SRU."""
    node = instrument.sites(model)["a.SRU"]
    kept = [a for a in node.attribute if a.name != name]
    del node.attribute[:]
    node.attribute.extend([*kept, helper.make_attribute(name, value)])


def edit_body(model, old, new, operator="SRU"):
    """Replace a part of a function body's text."""
    key = FunctionKey(operator, False, "multiply", 18)
    text = function_text(key)
    assert text.count(old) == 1
    functions = [f for f in model.functions if f.name != operator]
    del model.functions[:]
    model.functions.extend([*functions, onnx.parser.parse_function(text.replace(old, new))])


def damage_weight(model, relative):
    """Move one element of stem.weight, relative to the weight's norm."""
    tensor = next(t for t in model.graph.initializer if t.name == "stem.weight")
    value = numpy_helper.to_array(tensor).copy()
    value.flat[0] += relative * np.linalg.norm(value)
    tensor.CopyFrom(numpy_helper.from_array(value, tensor.name))
