"""Commands of ``scconv-deploy plugin``: build, check."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from scconv_deploy.commands.options import Force, Json, Quiet
from scconv_deploy.commands.session import run_session
from scconv_deploy.errors import IntegrityError, UsageError

plugin = typer.Typer(help="Build and check the fused SRU for TensorRT, ONNX Runtime's CPU and PyTorch.")


def parse_architectures(text: str) -> tuple[str, ...]:
    """Architectures in ``--arch`` (UsageError for an empty one)."""
    parts = tuple(part.strip() for part in text.split(","))
    if "" in parts:
        what = f"its part {parts.index('') + 1} is empty" if any(parts) else "it names no architecture"
        raise UsageError(
            f"--arch {text!r}: {what}.", "Write for example --arch 87,89, or leave it out for the GPUs here."
        )
    return parts


@plugin.command("build")
def plugin_build(
    arch: Annotated[
        str | None,
        typer.Option(metavar="87,89", help="Compute capabilities without the dot; default: of the GPUs present."),
    ] = None,
    tensorrt_include: Annotated[
        Path | None,
        typer.Option(metavar="FOLDER", help="Where NvInfer.h is; default: TENSORRT_INCLUDE_DIR, the system."),
    ] = None,
    output: Annotated[
        Path | None, typer.Option("--output", "-o", metavar="FILE", help="The library; default: in the cache.")
    ] = None,
    kernels_only: Annotated[
        bool, typer.Option("--kernels-only", help="For PyTorch alone: no plugin, needs no TensorRT headers.")
    ] = False,
    register: Annotated[
        bool,
        typer.Option(
            "--register", help="Also write FILE_register.so, for hosts that only dlopen (Triton, DeepStream)."
        ),
    ] = False,
    cpu: Annotated[
        bool,
        typer.Option("--cpu", help="For CPUs, ONNX Runtime's and PyTorch's: compiled with g++ or clang++, or CXX."),
    ] = False,
    force: Force = False,
    as_json: Json = False,
    quiet: Quiet = False,
) -> None:
    """Compile the fused SRU with this machine's nvcc, or for CPUs with its C++ compiler."""
    from scconv_deploy.commands.printing import print_cpu_build, print_plugin_build

    with run_session(as_json, quiet) as session:
        if cpu:
            given = {"--arch": arch, "--tensorrt-include": tensorrt_include, "--kernels-only": kernels_only,
                     "--register": register}  # fmt: skip
            if names := ", ".join(name for name, value in given.items() if value):
                raise UsageError(f"These options belong to GPUs: {names}.", "Leave them out, or leave --cpu out.")
            from scconv_deploy.trt_plugins.cpu.build import build_cpu

            session.progress("compiling the fused SRU for CPUs")
            session.show(build_cpu(output, force=force), print_cpu_build)
            return
        from scconv_deploy.trt_plugins.build import BuildRequest, build

        session.progress("compiling the fused SRU")
        request = BuildRequest(
            () if arch is None else parse_architectures(arch), tensorrt_include, kernels_only, register
        )
        session.show(build(request, output, force=force), print_plugin_build)


@plugin.command("check")
def plugin_check(
    file: Annotated[Path, typer.Argument(help="A library that plugin build wrote.")],
    as_json: Json = False,
    quiet: Quiet = False,
) -> None:
    """Check a built library and load it through an installed runtime's registry; exit 7 if a check fails."""
    from scconv_deploy.commands.printing import print_plugin

    with run_session(as_json, quiet) as session:
        from scconv_deploy.trt_plugins.check import check_plugin
        from scconv_deploy.trt_plugins.cpu.check import check_cpu_library, is_cpu_library

        session.progress("loading the plugin")
        for_cpus = file.is_file() and is_cpu_library(file)
        result = check_cpu_library(file) if for_cpus else check_plugin(file)
        session.show(result, print_plugin)
        if not result:
            first = result.failures[0]
            again = f"Build it again: scconv-deploy plugin build{' --cpu' * for_cpus}"
            raise IntegrityError(f"{file}: {first.name}: {first.found}.", again)
