"""What is measured: user code, its naive export, our artifact, and torch.compile."""

from __future__ import annotations

import contextlib
import hashlib
import json
import logging
import tempfile
import time
import warnings
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Any

import onnxruntime
import torch
from torch import Tensor, nn

import scconv_deploy
from benchmarks.environment import THREADS
from scconv_deploy.nn import SRU
from scconv_deploy.workflows.export import CruFormChoice
from scconv_deploy.zoo import MODELS
from tests.wild import OriginalScConv, OriginalSRU

CACHE = Path(__file__).parent / ".cache"
torch.set_num_threads(THREADS)

Call = Callable[[], Tensor]


@dataclass(frozen=True)
class NaiveExport:
    """What ``torch.onnx.export`` gives a user: nodes of the graph, the operator set, and how long it took."""

    nodes: int
    opset: int
    seconds: float


def noise(shape: tuple[int, ...], seed: int) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def plain_network(name: str, seed: int) -> tuple[nn.Module, nn.Module]:
    """ScConv ``resnet50`` or ``resnet20`` as a user writes it (``tests/wild.py``), and the zoo's, weights the same."""

    def spatial(channels: int, stride: int) -> nn.Module:
        scconv = OriginalScConv(channels)
        return scconv if stride == 1 else nn.Sequential(nn.AvgPool2d(stride, stride), scconv)

    ours = zoo_network(f"scconv_{name}", seed)
    torch.manual_seed(seed)
    plain = MODELS[name].build(**{"spatial" if name == "resnet50" else "second": spatial}).eval()
    plain.load_state_dict(ours.state_dict())
    return plain, ours


def zoo_network(name: str, seed: int) -> nn.Module:
    """A network of the zoo, with seeded weights."""
    return scconv_deploy.load(scconv_deploy.ModelSpec(name, seed=seed))


def naive_onnx(model: nn.Module, x: Tensor) -> tuple[bytes, NaiveExport]:
    """The model exported as the documentation of torch says, with its defaults."""
    start = time.perf_counter()
    with _quiet():
        program = torch.onnx.export(model, (x,), dynamo=True, verbose=False)
    seconds = time.perf_counter() - start
    if program is None:
        raise RuntimeError("torch.onnx.export(dynamo=True) returned no program.")
    proto = program.model_proto
    return proto.SerializeToString(), NaiveExport(len(proto.graph.node), proto.opset_import[0].version, seconds)


def cached_naive_onnx(model: nn.Module, x: Tensor) -> tuple[bytes, NaiveExport]:
    """The same, paid once for these weights, this shape, this code and this torch (minutes for a ResNet-50)."""
    digest = hashlib.sha256(repr([list(x.shape), version("torch"), version("onnxscript")]).encode())
    digest.update((Path(__file__).parent.parent / "tests" / "wild.py").read_bytes())
    for tensor_name, tensor in model.state_dict().items():
        digest.update(tensor_name.encode() + tensor.numpy().tobytes())
    file = CACHE / f"naive-{digest.hexdigest()[:16]}.onnx"
    facts = file.with_suffix(".json")
    if not facts.exists():
        print("exporting the naive graph, which may take minutes; it is kept in benchmarks/.cache")
        data, export = naive_onnx(model, x)
        CACHE.mkdir(exist_ok=True)
        file.write_bytes(data)
        facts.write_text(json.dumps(asdict(export)), encoding="utf-8")  # last: it says that the graph is complete
    return file.read_bytes(), NaiveExport(**json.loads(facts.read_text(encoding="utf-8")))


def our_onnx(
    model: nn.Module, x: Tensor, mask_form: Any = "multiply", opset: int = 18, cru: CruFormChoice = "auto"
) -> bytes:
    """The model through ``scconv_deploy.export``; every SRU must become a node, or the comparison means nothing."""
    options = scconv_deploy.ExportOptions(mask_form=mask_form, opset=opset, cru=cru)
    with tempfile.TemporaryDirectory() as folder:
        result = scconv_deploy.export(model, x, Path(folder) / "model.onnx", options=options)
        expected = sum(isinstance(module, (OriginalSRU, SRU)) for module in model.modules())
        if len(result.sites) != expected:
            raise RuntimeError(f"{len(result.sites)} of {expected} SRUs were recognised: {result.stages}")
        return result.path.read_bytes()


def session(data: bytes) -> onnxruntime.InferenceSession:
    """On the CPU, with the fixed number of threads."""
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = THREADS
    options.log_severity_level = 3
    return onnxruntime.InferenceSession(data, options, providers=["CPUExecutionProvider"])


def in_ort(data: bytes, x: Tensor) -> Call:
    """A model as a call without arguments that returns its first output."""
    loaded = session(data)
    feed = {loaded.get_inputs()[0].name: x.numpy()}
    return lambda: torch.from_numpy(loaded.run(None, feed)[0])


def in_torch(model: Callable[[Tensor], Tensor], x: Tensor) -> Call:
    """The module as a call without arguments, in inference mode."""

    def call() -> Tensor:
        with torch.inference_mode():
            return model(x)

    return call


def compiled(model: nn.Module, x: Tensor, name: str) -> tuple[Call | None, float]:
    """torch.compile's call and the seconds of its first one; None, and the reason printed, where it cannot."""
    start = time.perf_counter()
    call = in_torch(torch.compile(model), x)
    try:
        with _quiet():
            call()
    except Exception as error:  # whatever dynamo, inductor or the C++ compiler raises: the reason is shown
        print(f"{name} is skipped: {type(error).__name__}: {str(error).strip().splitlines()[0]}")
        return None, time.perf_counter() - start
    return call, time.perf_counter() - start


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """The exporter logs every operator that is not installed."""
    previous = logging.root.manager.disable
    logging.disable(logging.WARNING)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        logging.disable(previous)
