"""``--plugin auto``: which library is taken from the cache, what is compiled, and what is said where nothing can be."""

from __future__ import annotations

import os
from dataclasses import replace
from pathlib import Path

import pytest

from scconv_deploy.errors import MissingRuntimeError
from scconv_deploy.exporters.tensorrt import plugin_choice
from scconv_deploy.exporters.tensorrt.options import AUTO, BuildOptions
from scconv_deploy.exporters.tensorrt.plugin_choice import architectures_of, with_plugin
from scconv_deploy.system.gpu import Gpu
from scconv_deploy.trt_plugins.build import LIBRARY
from scconv_deploy.trt_plugins.check import ENTRY_POINTS
from scconv_deploy.trt_plugins.elf import SharedLibrary
from tests.trt_plugins.test_build import calls, driver, machine  # noqa: F401


def asking(target="sm89", backend="tensorrt-rtx"):
    return BuildOptions(backend, target).with_plugin(AUTO)


def test_auto_is_a_word_and_everything_else_a_file():
    options = BuildOptions("tensorrt-rtx")
    assert (asking().plugin, asking().auto_plugin) == (None, True)
    given = options.with_plugin("./auto")
    assert (given.plugin, given.auto_plugin) == (Path("./auto"), False)
    assert options.with_plugin(None) == options
    assert with_plugin([options, given], lambda text: None) == [options, given]


@pytest.mark.parametrize(
    ("target", "expected"),
    [("sm89", ("89",)), ("sm120,SM89", ("120", "89")), ("portable", ("80", "120")), ("", ("80", "120"))],
)
def test_the_architectures_are_those_of_the_target(target, expected):
    assert architectures_of(asking(target)) == expected


def test_local_is_the_gpus_of_this_machine(monkeypatch):
    monkeypatch.setattr(plugin_choice, "gpus", lambda: (Gpu("a", "8.9"), Gpu("b", "8.9"), Gpu("c", "12.0")))
    assert architectures_of(asking("local")) == ("89", "120")
    monkeypatch.setattr(plugin_choice, "gpus", lambda: ())
    assert architectures_of(asking("", "tensorrt")) == ()


def test_it_is_compiled_once_for_all_engines_and_then_taken_from_the_cache(machine, monkeypatch):  # noqa: F811
    told = []
    wanted = [asking("sm89"), BuildOptions("tensorrt-rtx", "sm75"), asking("sm87")]
    first = with_plugin(wanted, told.append, machine)
    assert told == ["compiling the fused SRU"]
    plugin = first[0].plugin
    assert plugin is not None
    assert plugin.name == LIBRARY
    assert first == [
        replace(wanted[0], plugin=plugin, auto_plugin=False), wanted[1],
        replace(wanted[2], plugin=plugin, auto_plugin=False),
    ]  # fmt: skip
    (command,) = calls(machine)
    assert "sm_87" in command
    assert "sm_89" in command
    assert "sm_75" not in command

    holds(monkeypatch, {plugin: ("8.7", "8.9")})
    assert with_plugin([asking("sm89")], told.append, machine)[0].plugin == plugin
    assert len(calls(machine)) == len(told) == 1  # nothing more was compiled


def test_a_library_of_other_gpus_or_for_pytorch_alone_is_not_taken(machine, monkeypatch):  # noqa: F811
    told = []
    plugin = with_plugin([asking("sm89")], told.append, machine)[0].plugin
    holds(monkeypatch, {plugin: ("8.9",)})
    with_plugin([asking("sm87")], told.append, machine)
    assert len(told) == 2
    holds(monkeypatch, {plugin: ("8.9",)}, exported=())
    with_plugin([asking("sm89")], told.append, machine)
    assert len(told) == 3  # built under the same key, so from the cache all the same


def holds(monkeypatch, cubins, exported=ENTRY_POINTS):
    """What libraries hold, instead of reading the stand-ins that the stand-in of nvcc writes."""

    def read(path):
        return SharedLibrary("x86-64", "", (), frozenset(exported), frozenset(), {}, cubins.get(path, ()), ())

    monkeypatch.setattr(plugin_choice, "read_library", read)
    monkeypatch.setattr(plugin_choice, "built_libraries", lambda _: list(cubins))


def test_without_headers_or_nvcc_it_is_exit_3_with_what_brings_them(machine):  # noqa: F811
    (machine.root / "usr" / "include" / "NvInfer.h").unlink()
    with pytest.raises(MissingRuntimeError, match=r"--plugin auto: TensorRT's headers .* were not found") as refused:
        with_plugin([asking()], lambda text: None, machine)
    assert refused.value.remedy.startswith("git clone --depth 1 --branch v10.3.0 https://github.com/NVIDIA/TensorRT")
    assert refused.value.remedy.endswith("or leave --plugin out.")
    os.remove(machine.root / "cuda" / "bin" / "nvcc")
    with pytest.raises(MissingRuntimeError, match="--plugin auto: nvcc was not found") as refused:
        with_plugin([asking()], lambda text: None, machine)
    assert "pip install 'scconv-deploy[cuda]'" in refused.value.remedy
