"""Small networks, exported once for all tests that look at the result."""

from __future__ import annotations

import copy
import functools
import gc
import hashlib
import inspect
import os
import shutil
import signal
from pathlib import Path

import pytest
import torch
from torch import nn

from scconv_deploy.gate import recognize
from scconv_deploy.gate.hypotheses import gate_of
from scconv_deploy.gate.identify import Identified
from scconv_deploy.gate.trial_run import NotIdentifiedError
from scconv_deploy.nn import ScConv
from scconv_deploy.system.environment import bound_of_threads
from scconv_deploy.trt_plugins.cpu.build import CPU_LIBRARY, build_cpu, source_digest
from tests import made_once, wild
from tests.made_once import key_of, once
from tests.runtimes.tensorrt.cuda_host import HostCuda, compile_host_cuda

REFERENCE_ROOMS = ("gate", "model", "verification/reference", "verification/checks")
WORKER = "PYTEST_XDIST_WORKER" in os.environ

for number, usual in ((signal.SIGINT, signal.default_int_handler), (signal.SIGHUP, signal.SIG_DFL)):
    if signal.getsignal(number) == signal.SIG_IGN:  # in a background job, or under nohup; what tests start inherits it
        signal.signal(number, usual)


gc.disable()  # a fifth of the time of collecting the tests, nearly all of which stays


def pytest_collection_finish():
    """What was imported and collected stays until the end: collections of garbage need not walk it again and again."""
    gc.collect()
    gc.freeze()
    gc.set_threshold(50_000, 10, 10)
    gc.enable()


@pytest.hookimpl(tryfirst=True)
def pytest_cmdline_main(config):
    """The whole suite takes every core, where pytest-xdist is installed. What is named runs here, unless -n says else.

    A worker takes its share in the order of the files and gives up half of what is left (worksteal), so that fixtures
    of modules are made once but for those at a border; those of a session are made in each worker.
    """
    whole = config.args_source is not pytest.Config.ArgsSource.ARGS
    if whole and config.pluginmanager.hasplugin("xdist") and config.option.numprocesses is None and not WORKER:
        config.option.numprocesses = "auto"
        config.option.dist = "worksteal"
    if getattr(config.option, "numprocesses", None):
        # one process a core: threads within them would only wait for each other. NumPy reads this when it is imported
        os.environ["OMP_NUM_THREADS"] = "1"


@pytest.fixture(scope="session")
def cpu_path(tmp_path_factory) -> Path:
    """The fused SRU for CPUs, compiled once for all workers of a run; skip where no compiler is."""
    if shutil.which("g++") is None:
        pytest.skip("g++ is not installed")
    path = tmp_path_factory.mktemp("cpu") / CPU_LIBRARY
    content = once(f"cpu-{source_digest()}", lambda: build_cpu(path).path.read_bytes())
    path.write_bytes(content)
    return path


class TinyNet(nn.Module):
    """Three ScConvs of user code and ours, one called twice, dictionary out."""

    def __init__(self):
        super().__init__()
        self.stem = nn.Conv2d(3, 16, 3, 2, 1)
        self.a = wild.randomize(wild.OriginalScConv(16, 4))
        self.b = wild.randomize(ScConv(16, 4, variant="groupbn-hard-normalized"), 1)
        self.c = wild.randomize(wild.SoftSRU(16), 2)
        self.head = nn.Linear(16, 5)

    def forward(self, image):
        x = torch.relu(self.stem(image))
        x = self.c(self.b(self.a(x))) + x
        x = self.a(x)
        return {"logits": self.head(x.mean((2, 3))), "features": x}


def tiny_net():
    """A seeded TinyNet in eval mode; also a factory for the command line."""
    torch.manual_seed(0)
    return TinyNet().eval()


@pytest.fixture(scope="session", autouse=True)
def no_lines_of_progress():
    """However slow the machine is, errors stay one line; tests/system/test_progress_lines.py asks for lines."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("scconv_deploy.system.progress_lines.EVERY_S", 1e6)
        yield


@pytest.fixture(scope="session", autouse=True)
def sessions_of_one_thread():
    """Sessions that tests open themselves have one thread in a worker, as PyTorch has there."""
    try:
        import onnxruntime
    except ImportError:  # a GPU's machine has no onnxruntime
        yield
        return

    def start(self, content, sess_options=None, *rest, **options):
        if sess_options is None:
            sess_options = onnxruntime.SessionOptions()
            sess_options.intra_op_num_threads = 1
        start_anew(self, content, sess_options, *rest, **options)

    start_anew = onnxruntime.InferenceSession.__init__
    with pytest.MonkeyPatch.context() as patch:
        if WORKER:
            patch.setattr(onnxruntime.InferenceSession, "__init__", start)
        yield


@pytest.fixture(scope="session", autouse=True)
def command_line_built_once():
    """Typer reads the signatures of all commands anew for each call, which takes as long as a small command."""
    try:
        from typer import testing
    except ImportError:  # a GPU's machine has no typer
        yield
        return
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(testing, "_get_command", functools.cache(testing._get_command))
        yield


@pytest.fixture(scope="session", autouse=True)
def pictures_left_blank():
    """Pages have empty pictures: drawing takes half a second a page. Where they are tested: :func:`drawn_pictures`."""
    try:
        from scconv_deploy.report import pictures
    except ImportError:  # a GPU's machine has no matplotlib
        yield None
        return
    draw = pictures._svg
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(pictures, "_svg", lambda name, rows, draw: '<svg role="img"></svg>')
        yield draw


@pytest.fixture(scope="module")
def drawn_pictures(pictures_left_blank):
    """Pages have their pictures, in a whole module."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("scconv_deploy.report.pictures._svg", pictures_left_blank)
        yield


@pytest.fixture(scope="session", autouse=True)
def exports_once(tmp_path_factory):
    """The same export is not made twice. For tests about exporting there is :func:`exports_anew`."""
    try:
        import onnx
        import onnx_ir as ir
        from torch.export import decomp_utils, exported_program
        from torch.onnx._internal.exporter import _constants, _registration

        from scconv_deploy.records.stage import StageLog
        from scconv_deploy.workflows import export
    except ImportError:  # a GPU's machine has PyTorch alone, and exports nothing
        yield None
        return

    def export_model(swapped, recognition, signature, log, **options):
        def made():
            own = StageLog()
            model = export_anew(swapped, recognition, signature, own, **options)
            return ir.to_proto(model).SerializeToString(), own.records

        content, records = once(key_of("export", swapped, recognition, signature, options), made)
        log.records += records
        return ir.from_proto(onnx.load_model_from_string(content))

    export_anew, folder, registry = export.export_model, tmp_path_factory.getbasetemp(), _registration.ONNXRegistry
    of_torchlib = functools.cache(registry.from_torchlib)

    def from_torchlib(opset_version=_constants.TORCHLIB_OPSET):
        own = copy.copy(of_torchlib(opset_version))
        own.functions = {target: [*functions] for target, functions in own.functions.items()}
        return own

    @functools.cache
    def composite(registered):  # a library that is loaded later registers more
        return frozenset(composite_operators())

    composite_operators = decomp_utils._collect_all_valid_cia_ops
    names_of = torch._C._dispatch_get_registrations_for_dispatch_key

    with pytest.MonkeyPatch.context() as patch:
        for module in (decomp_utils, exported_program):  # each export looks all operators of PyTorch up, three times
            patch.setattr(
                module, "_collect_all_valid_cia_ops", lambda: composite(len(names_of("CompositeImplicitAutograd")))
            )
        patch.setattr(made_once, "FOLDER", (folder.parent if WORKER else folder) / "made_once")
        patch.setattr(export, "export_model", export_model)
        # of all operators, whose sources torch.onnx parses again with every export: a second each
        patch.setattr(registry, "from_torchlib", staticmethod(from_torchlib))
        yield export_anew


@pytest.fixture
def exports_anew(exports_once, monkeypatch):
    """Every export is made, though it is the same."""
    monkeypatch.setattr("scconv_deploy.workflows.export.export_model", exports_once)


@pytest.fixture(scope="session", autouse=True)
def references_run_once():
    """The same sample is not run in PyTorch twice, for its noise takes ten runs. Yields the switch."""
    try:
        from scconv_deploy.verification.reference.pytorch import TorchReference
        from scconv_deploy.verification.samples import Sample
    except ImportError:  # a GPU's machine has no onnx
        yield {}
        return

    def run(self, sample):
        noise, exact = self._noise, self._float64

        def state():  # what a source knows of the samples before
            return noise._samples, dict(noise._earlier), exact._by_rows

        def made():
            return run_anew(self, sample), state()

        keyed = settings["once"] and isinstance(sample, Sample) and sample.deep
        key = key_of("run", self._reference, sample, state()) if keyed else None
        found, (noise._samples, earlier, exact._by_rows) = once(key, made)
        noise._earlier.update(earlier)
        return found

    def rounded(self, run, artifact, data):
        rows_apart = self._float64.rows_apart

        def made():
            return rounded_anew(self, run, artifact, data), self._rounded._samples

        state = self._rounded._samples, rows_apart, data
        key = key_of("rounded", self._reference, run, state) if settings["once"] else None
        found, self._rounded._samples = once(key, made)
        return found

    def modules(self, run, paths):
        key = key_of("modules", self._reference, run, paths) if settings["once"] else None
        return once(key, lambda: [*modules_anew(self, run, paths)])

    settings = {"once": True}
    run_anew, rounded_anew, modules_anew = TorchReference.run, TorchReference.rounded, TorchReference.modules
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(TorchReference, "run", run)
        patch.setattr(TorchReference, "rounded", rounded)
        patch.setattr(TorchReference, "modules", modules)
        yield settings


@pytest.fixture(scope="session", autouse=True)
def gates_identified_once(references_run_once):
    """A module whose gate is known is not tried with hundreds of inputs again, a fifth of a second each."""

    def identify(candidate, recorded, seed, remembered):
        def made():
            try:
                found = identify_anew(candidate, recorded, seed, remembered)
            except NotIdentifiedError as error:
                return None, error.reason
            return found.hypothesis, found.flips

        keyed = references_run_once.get("once")
        key = key_of("identify", candidate.module, recorded, seed, remembered) if keyed else None
        hypothesis, told = once(key, made)
        if hypothesis is None:
            raise NotIdentifiedError(told)
        return Identified(hypothesis, gate_of(candidate, hypothesis), told)

    identify_anew = recognize.identify
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(recognize, "identify", identify)
        yield


@pytest.fixture(scope="session", autouse=True)
def sessions_kept(references_run_once):
    """ONNX Runtime does not prepare the same model twice: nearly half of all sessions are of one seen before."""
    try:
        from scconv_deploy.runtimes.onnxruntime import OnnxRuntimeRunner, RuntimeOptions
    except ImportError:  # a GPU's machine has no onnxruntime
        yield
        return

    def start(self, model, options=RuntimeOptions()):
        if options.profile or options.operators or not references_run_once["once"] or model.ByteSize() > 2**20:
            start_anew(self, model, options)
            return
        key = hashlib.sha256(model.SerializeToString()).digest(), options, bound_of_threads()
        found = kept.pop(key, None)
        if found is None:
            start_anew(self, model, options)
            found = dict(vars(self))
        vars(self).update(found)
        kept[key] = found
        if len(kept) > 64:
            del kept[next(iter(kept))]

    kept: dict[object, dict[str, object]] = {}
    start_anew = OnnxRuntimeRunner.__init__
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(OnnxRuntimeRunner, "__init__", start)
        yield


@pytest.fixture(autouse=True)
def references_anew(request, references_run_once):
    """Every reference is run in the rooms that test it, and where a test itself replaces a part of the package."""
    own = {*inspect.signature(request.function).parameters} if hasattr(request, "function") else set()
    room = "/".join(request.path.relative_to(Path(__file__).parent).parts[:-1])
    references_run_once["once"] = "monkeypatch" not in own and room not in REFERENCE_ROOMS
    yield
    references_run_once["once"] = True


@pytest.fixture(autouse=True)
def threads_stay():
    """A test that leaves another number of threads makes all that follow it several times slower."""
    before = torch.get_num_threads()
    yield
    assert torch.get_num_threads() == before


@pytest.fixture(scope="session")
def tiny_reference():
    """(reference, log): TinyNet with a dynamic batch, its SRUs recognised."""
    from scconv_deploy.model.inputs import DynamicAxis
    from scconv_deploy.model.prepare import reference_from_module

    image = torch.randn(2, 3, 16, 16, generator=torch.Generator().manual_seed(0))
    return reference_from_module(tiny_net(), image, (DynamicAxis(1, 2, 8),))


@pytest.fixture(scope="session")
def tiny_bytes(tiny_reference):
    """TinyNet exported: the bytes of model.onnx, and the stages' log."""
    from scconv_deploy.graph.file import serialize
    from scconv_deploy.records.stage import StageLog
    from scconv_deploy.workflows.export import ExportOptions, export_to_ir

    log = StageLog()
    return serialize(export_to_ir(tiny_reference[0], ExportOptions(), log)), log


def in_half(reference, options):
    """(the float32 graph, the half artifact, the stages' log) of a reference, as protos."""
    import onnx_ir as ir

    from scconv_deploy.records.stage import StageLog
    from scconv_deploy.workflows.export import export_to_ir, in_precision

    log = StageLog()
    model = export_to_ir(reference, options, log)
    float32 = ir.to_proto(model)
    return float32, ir.to_proto(in_precision(model, options, log)), log


@pytest.fixture(scope="session")
def tiny_fp16(tiny_reference):
    """:func:`in_half` of TinyNet in float16."""
    from scconv_deploy.workflows.export import ExportOptions

    return in_half(tiny_reference[0], ExportOptions(precision="fp16"))


@pytest.fixture(scope="session")
def tiny_bf16(tiny_reference):
    """The same in bfloat16."""
    from scconv_deploy.workflows.export import ExportOptions

    return in_half(tiny_reference[0], ExportOptions(precision="bf16"))


@pytest.fixture(scope="session")
def device_bundle(tmp_path_factory):
    """A bundle for orin-jp6 and thor-jp7; copy it before changing it."""
    from tests.finished import make_bundle

    return make_bundle(tmp_path_factory.mktemp("device"))


@pytest.fixture(scope="session")
def host_cuda_library(tmp_path_factory):
    """``cuda_on_host.cpp``, compiled."""
    return compile_host_cuda(tmp_path_factory.mktemp("cuda"))


@pytest.fixture
def host_cuda(host_cuda_library):
    """A CUDA runtime on host memory; whatever a test makes with it must be given back."""
    host = HostCuda(host_cuda_library)
    host.fail()
    before = host.live
    host.calls()
    yield host
    host.fail()
    assert host.live == before


@pytest.fixture
def model(tiny_bytes):
    """TinyNet's artifact, a copy of its own for each test."""
    import onnx

    return onnx.load_model_from_string(tiny_bytes[0])


@pytest.fixture(scope="session")
def exported():
    """(reference, bytes of its model.onnx): a small ScConv-ResNet with two heads, one block a stage, 16x16."""
    from scconv_deploy.graph.file import serialize
    from scconv_deploy.model.prepare import reference_from_module
    from scconv_deploy.workflows.export import ExportOptions, export_to_ir
    from tests.mutations import two_heads

    image = torch.randn(2, 3, 16, 16, generator=torch.Generator().manual_seed(0))
    reference, log = reference_from_module(two_heads(1, 16), image)
    return reference, serialize(export_to_ir(reference, ExportOptions(), log))


@pytest.fixture(scope="session")
def real_report(tiny_reference, tiny_bytes):
    """TinyNet exported and verified on noise."""
    import onnx

    from scconv_deploy.verification.onnx.parity import Artifact, verify_onnx
    from scconv_deploy.verification.samples import noise_samples

    reference, log = tiny_reference
    data = tiny_bytes[0]
    samples = noise_samples(reference.signature, 0)
    artifact = Artifact(onnx.load_model_from_string(data), "model.onnx", data)
    return verify_onnx(reference, artifact, samples, log)
