"""Whether a release of TensorRT-RTX takes plugins, found out in a child process.

A release whose parser does not find the plugin interface ends its process (measured in 1.7.1 without
:mod:`scconv_deploy.runtimes.tensorrt.rtx_library`). So a child parses the model with the plugin first. That it lives is
kept for the release; that it ended is asked again, for it takes a second. Standard library and the bindings only: it
also runs on the device.
"""

from __future__ import annotations

import json
import subprocess
import sys
import tempfile
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from types import ModuleType

from scconv_deploy.errors import MissingRuntimeError
from scconv_deploy.runtimes.tensorrt.plugin_library import load_once
from scconv_deploy.runtimes.tensorrt.versions import load_module
from scconv_deploy.system.atomic import write_file
from scconv_deploy.system.backends import BACKENDS
from scconv_deploy.system.environment import cache_folder, platform_facts, sha256_of
from scconv_deploy.version import __version__

_TAKEN, _NOT_TRIED = "the parser takes the plugin", "the parser did not come to the plugin"
_TIMEOUT_S = 300
_CHILD = (
    f"import sys; sys.path[:0] = {{path!r}}; from {__name__} import parse_with_plugin; "
    "parse_with_plugin({plugin!r}, {model!r}, {answer!r})"
)


def require_plugins(module: ModuleType, plugin: Path, model: Callable[[], bytes]) -> None:
    """Refuse a release of TensorRT-RTX whose parser would end this process.

    Args:
        plugin: a library that can be loaded.
        model: gives an ONNX model with at least one node that the plugin is for.

    Raises:
        MissingRuntimeError: with what the child said.
    """
    known = _answer_file(module)
    if known.is_file():
        return
    answer = _ask_child(plugin, model())
    if answer == _NOT_TRIED:
        return  # it lives, and the caller is told why when it does the same
    if answer != _TAKEN:
        raise MissingRuntimeError(
            f"{BACKENDS['tensorrt-rtx'].title} {module.__version__} takes no plugins here: {answer}.",
            f"Build without --plugin, or install another release: {BACKENDS['tensorrt-rtx'].install}.",
        )
    with suppress(Exception):  # an answer that cannot be kept is asked for again
        write_file(known, f"{module.__version__} takes plugins\n".encode())


def _answer_file(module: ModuleType) -> Path:
    """One file for each release, copy of it, and version of this package; it is there if the release takes plugins."""
    facts = (module.__version__, module.__file__, platform_facts()["machine"], __version__)
    return cache_folder() / "plugin-probes" / sha256_of(json.dumps(facts).encode())[:16]


def _ask_child(plugin: Path, model: bytes) -> str:
    """Answer of a child that parses the model with the plugin, see :func:`parse_with_plugin`; else how it ended."""
    with tempfile.TemporaryDirectory(ignore_cleanup_errors=True) as folder:
        file, answer = Path(folder) / "model.onnx", Path(folder) / "answer"
        file.write_bytes(model)
        code = _CHILD.format(path=sys.path, plugin=str(plugin.resolve()), model=str(file), answer=str(answer))
        try:
            done = subprocess.run(
                [sys.executable, "-c", code], capture_output=True, text=True, timeout=_TIMEOUT_S, check=False
            )
        except (OSError, subprocess.TimeoutExpired) as error:
            return f"a process that tries it cannot be asked ({error})"
        if done.returncode == 0 and answer.is_file():
            return answer.read_text(encoding="utf-8")
    last = (done.stderr.strip().splitlines() or ["no word"])[-1]
    ended = f"signal {-done.returncode}" if done.returncode < 0 else f"exit status {done.returncode}"
    return f"a process that tries it ends with {ended} ({last})"


def parse_with_plugin(plugin: str, model: str, answer: str) -> None:
    """The child: load the plugin, parse the model, and write to a file how far that came."""
    module = load_module("tensorrt-rtx")
    found = _NOT_TRIED
    if not load_once(module, Path(plugin)):
        logger = module.Logger(module.Logger.ERROR)
        builder = module.Builder(logger)
        network = builder.create_network(1 << int(module.NetworkDefinitionCreationFlag.STRONGLY_TYPED))
        parser = module.OnnxParser(network, logger)
        parser.parse(Path(model).read_bytes())
        if any(network.get_layer(i).type.name == "PLUGIN_V3" for i in range(network.num_layers)):
            found = _TAKEN
    Path(answer).write_text(found, encoding="utf-8")
