"""Plugin libraries in TensorRT's registry. Standard library and the bindings only: it also runs on the device.

The registry refuses a library if one of its plugins is registered already, even from the same file
(``IPluginRegistry`` in NvInferRuntimeCommon.h; measured in TensorRT-RTX 1.7). One process builds, verifies and times an
engine, so it remembers the libraries that it loaded, by SHA-256.
"""

from __future__ import annotations

import functools
from pathlib import Path
from types import ModuleType

from scconv_deploy.graph.contract import PLUGIN_NAMESPACE, PLUGIN_VERSION
from scconv_deploy.system.environment import sha256_of
from scconv_deploy.trt_plugins.elf import read_library

_FIRST_OPERATOR = "SRU"


@functools.cache
def _loaded(module: ModuleType) -> set[str]:
    """SHA-256 of each library that this process loaded into a module's registry."""
    return set()


def load_once(module: ModuleType, path: Path) -> str:
    """Load a plugin library unless it is loaded already; return the reason if the registry refuses it, else "".

    Raises:
        IntegrityError: the file is no shared library, or truncated (the system's loader would end the process).
    """
    digest, loaded = sha256_of(path), _loaded(module)
    if digest in loaded:
        return ""
    read_library(path)
    registry = module.get_plugin_registry()
    there = registry.get_creator(_FIRST_OPERATOR, PLUGIN_VERSION, PLUGIN_NAMESPACE) is not None
    if registry.load_library(str(path.resolve())) is None:
        return "another library of this plugin is loaded in this process" if there else "the registry refuses it"
    loaded.add(digest)
    return ""
