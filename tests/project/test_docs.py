"""What the documentation tells to type, compile and configure is right as far as this machine can tell."""

from __future__ import annotations

import configparser
import inspect
import os
import re
import shlex
import shutil
import subprocess
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import onnx
import onnxruntime
import pytest
import torch
import typer

from scconv_deploy.cli import app
from scconv_deploy.system.machine import Machine, find_nvcc, find_tensorrt_headers
from scconv_deploy.zoo import MODELS

ROOT = Path(__file__).parents[2]
DOCS = ROOT / "docs"
PAGES = [ROOT / "README.md", *sorted(DOCS.rglob("*.md"))]
WARNINGS = ("-Wall", "-Wextra", "-Werror")


def blocks(page: Path, *languages: str) -> list[str]:
    """The fenced blocks of a page in these languages, continued lines joined in those for a shell."""
    found = re.findall(rf"^```(?:{'|'.join(languages)})\n(.*?)^```$", page.read_text(), re.S | re.M)
    return [block.replace("\\\n", " ") for block in found] if {"console", "sh"} & set(languages) else found


def program(page: str, name: str) -> str:
    """The C++ program of a page that includes this header."""
    (found,) = [block for block in blocks(DOCS / page, "cpp") if f"<{name}>" in block]
    return found


def commands(page: Path) -> Iterator[list[str]]:
    """The words after each ``scconv-deploy`` in shell blocks and in indented lines."""
    lines = [line for block in blocks(page, "console", "sh") for line in block.splitlines()]
    lines += [line for line in page.read_text().splitlines() if line.startswith("    scconv-deploy ")]
    for line in lines:
        words = shlex.split(line, comments=True)
        called = [i for i, word in enumerate(words) if Path(word).name == "scconv-deploy"]
        if called:
            yield words[called[-1] + 1 :]


def parse(words: list[str]) -> None:
    """Let the command line itself parse them; nothing runs."""
    command = typer.main.get_command(app)
    name = "scconv-deploy"
    while (below := getattr(command, "commands", None)) is not None:
        name, *words = words
        command = below[name]
    command.make_context(name, list(words))


def ids(page: Path) -> str:
    return page.relative_to(ROOT).as_posix()


@pytest.mark.parametrize("page", [page for page in PAGES if list(commands(page))], ids=ids)
def test_the_command_line_takes_every_command(page):
    for words in commands(page):
        parse(words)


def test_a_wrong_command_is_found():
    with pytest.raises(KeyError):
        parse(["deplyo", "scconv_resnet20"])
    for words in (["deploy", "scconv_resnet20"], ["build", "a.onnx", "-o", "b", "--backend", "trt"]):
        with pytest.raises(Exception, match=r"output|is not one of"):
            parse(words)


def options(command) -> set[str]:
    """Of a command and of those below it."""
    own = {name for parameter in command.params for name in (*parameter.opts, *parameter.secondary_opts)}
    return own.union(*(options(below) for below in getattr(command, "commands", {}).values()), {"--help"})


ELSEWHERE = {  # options of other programs that the text names
    "--backend-config", "--branch", "--depth", "--dynamicPlugins", "--setPluginsToSerialize", "--staticPlugins",
    "--versionCompatible",
}  # fmt: skip


@pytest.mark.parametrize("page", [page for page in PAGES if page.parent != DOCS / "hosts"], ids=ids)
def test_every_option_in_the_text_exists(page):
    known = options(typer.main.get_command(app)) | ELSEWHERE
    for program in (ROOT / "benchmarks").glob("*.py"):
        known |= set(re.findall(r'"(--[a-z-]+)"', program.read_text()))
    assert set(re.findall(r"(?<![\w-])--[a-zA-Z][\w-]*", page.read_text())) <= known


@pytest.mark.parametrize("page", [page for page in PAGES if blocks(page, "python")], ids=ids)
def test_python_compiles(page):
    for block in blocks(page, "python"):
        compile(block, page.name, "exec")


# --- C++ ---


def cpp(page: str, header: str, tmp_path: Path) -> Path:
    source = tmp_path / "program.cpp"
    source.write_text(program(page, header))
    return source


def compiled(command: list[str]) -> None:
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr


@pytest.mark.nvcc
def test_the_program_for_tensorrt_compiles(tmp_path):
    nvcc, headers = find_nvcc(Machine()), find_tensorrt_headers(Machine())
    if nvcc is None or shutil.which("g++") is None:
        pytest.skip("nvcc (for CUDA's headers) or g++ was not found")
    if headers is None:
        pytest.skip("TensorRT's headers were not found; set TENSORRT_INCLUDE_DIR")
    source = cpp("hosts/cpp.md", "NvInfer.h", tmp_path)
    compiled(
        [nvcc, "-std=c++17", "-isystem", str(headers[0]), "-Xcompiler", ",".join(WARNINGS), "-c", str(source),
         "-o", str(tmp_path / "program.o")]
    )  # fmt: skip


def onnxruntime_headers() -> Path:
    places = [os.environ.get("ONNXRUNTIME_INCLUDE_DIR"), "/usr/include/onnxruntime", "/usr/local/include/onnxruntime"]
    for place in places:
        if place and (Path(place) / "onnxruntime_cxx_api.h").is_file():
            return Path(place)
    pytest.skip("ONNX Runtime's C++ headers were not found; set ONNXRUNTIME_INCLUDE_DIR")


def test_the_program_for_onnx_runtime_gives_pythons_output(tmp_path):
    headers = onnxruntime_headers()
    if shutil.which("g++") is None:
        pytest.skip("g++ is not installed")
    source = cpp("hosts/cpp.md", "onnxruntime_cxx_api.h", tmp_path)
    compile_only = ["g++", "-std=c++17", *WARNINGS, "-isystem", str(headers), str(source)]
    compiled([*compile_only, "-fsyntax-only"])
    library = os.environ.get("ONNXRUNTIME_LIBRARY")
    if library is None:
        pytest.skip("it compiles; to run it set ONNXRUNTIME_LIBRARY to libonnxruntime.so")
    binary = tmp_path / "run_onnx"
    compiled([*compile_only, library, f"-Wl,-rpath,{Path(library).parent}", "-o", str(binary)])
    model = onnx.parser.parse_model("""
        <ir_version: 10, opset_import: ["": 18, "scconv": 1]>
        two (float[batch, 3] image) => (float[batch, 3] doubled, float[batch, 3] negated)
        { doubled = scconv.Twice(image)  negated = Neg(image) }
        <domain: "scconv", opset_import: ["": 18]> Twice (x) => (y) { y = Add(x, x) }""")
    onnx.save(model, tmp_path / "model.onnx")
    image = np.random.default_rng(0).standard_normal((4, 3), dtype=np.float32)
    image.tofile(tmp_path / "image.bin")
    run = [str(binary), "model.onnx", "cpu", "4", "image.bin"]
    subprocess.run(run, cwd=tmp_path, check=True, capture_output=True)
    expected = onnxruntime.InferenceSession(tmp_path / "model.onnx").run(None, {"image": image})
    for name, value in zip(("doubled", "negated"), expected, strict=True):
        assert np.array_equal(np.fromfile(tmp_path / f"{name}.bin", np.float32).reshape(4, 3), value)
    refused = subprocess.run([*run[:3], "5", "image.bin"], cwd=tmp_path, check=False, capture_output=True, text=True)
    assert (refused.returncode, refused.stderr) == (1, "run_onnx: image.bin: expected 60 bytes\n")


# --- pictures ---


def test_the_picture_of_a_report_is_small_and_its_script_damages_an_sru_that_there_is():
    (site,) = re.findall(r'^SITE = "(.+)"$', (DOCS / "report_picture.py").read_text(), re.M)
    assert site in dict(MODELS["scconv_resnet20"].build().named_modules())
    assert (DOCS / "report.png").stat().st_size < 400_000


# --- trtexec, Triton, DeepStream ---


def test_trtexec_has_every_option():
    headers = find_tensorrt_headers(Machine())
    source = headers and headers[0].parent / "samples" / "common" / "sampleOptions.cpp"
    if not source or not source.is_file():
        pytest.skip(
            "trtexec's source was not found; set TENSORRT_INCLUDE_DIR to include of NVIDIA/TensorRT's repository"
        )
    known = set(re.findall(r'"(--\w+)', source.read_text()))
    page = (DOCS / "hosts" / "trtexec.md").read_text()
    told = set(re.findall(r"--\w+", re.sub(r"`(?:scconv-deploy|deploy) [^`]*`", "", page))) - {"--fp16"}  # gone in 11
    for block in (block for page in ("jetson.md", "triton.md") for block in blocks(DOCS / "hosts" / page, "sh")):
        told |= {
            option for line in block.splitlines() for option in re.findall(r"--\w+", line.partition("trtexec ")[2])
        }
    assert len(told) >= 15
    assert told <= known


def test_tritons_configurations_fit_its_schema(tmp_path):
    schema, protoc = os.environ.get("TRITON_MODEL_CONFIG_PROTO"), shutil.which("protoc")
    if schema is None or protoc is None:
        pytest.skip("set TRITON_MODEL_CONFIG_PROTO to Triton's model_config.proto, and have protoc on PATH")
    found = blocks(DOCS / "hosts" / "triton.md", "pbtxt")
    assert len(found) == 2
    for block in found:
        encode = [protoc, f"-I{Path(schema).parent}", "--encode=inference.ModelConfig", Path(schema).name]
        done = subprocess.run(encode, input=block.encode(), capture_output=True, check=False)
        assert done.returncode == 0, done.stderr.decode()


def test_tritons_names_and_sizes_are_the_networks():
    page = DOCS / "hosts" / "triton.md"
    entry = MODELS["scconv_resnet50"]
    (argument,) = inspect.signature(entry.build().forward).parameters
    (layout,) = blocks(page, "text")
    for block in blocks(page, "pbtxt"):
        name = re.search(r'^name: "(\w+)"', block)
        assert name is not None
        assert f"  {name[1]}/\n" in layout
        assert (
            f'name: "{argument}" data_type: TYPE_FP32 dims: [ {", ".join(map(str, entry.input_shape[1:]))} ]' in block
        )
        assert 'name: "output" data_type: TYPE_FP32 dims: [ 1000 ]' in block


def test_nvinfers_configurations_parse():
    found = blocks(DOCS / "hosts" / "deepstream.md", "ini")
    assert len(found) == 2
    for block in found:
        read = configparser.ConfigParser(interpolation=None)
        read.read_string(block)
        (section,) = read.sections()
        assert section == "property"
        settings = read[section]
        assert len(settings["offsets"].split(";")) == 3
        assert [int(size) for size in settings["infer-dims"].split(";")] == [3, 224, 224]
        assert settings.getint("batch-size") == 4
        assert settings.getfloat("net-scale-factor") == 1
        assert settings["custom-lib-path"].endswith("_register.so")


def test_the_network_on_pixels_is_the_network_after_normalising(tmp_path):
    (block,) = blocks(DOCS / "hosts" / "deepstream.md", "python")
    namespace: dict = {"__name__": "pixels"}
    exec(compile(block, "pixels.py", "exec"), namespace)  # noqa: S102
    torch.manual_seed(0)
    on_pixels = namespace["build"]("scconv_resnet20").eval()
    entry = MODELS["scconv_resnet20"]
    image = torch.rand(2, 3, 32, 32)
    mean, std = (torch.tensor(values).reshape(1, 3, 1, 1) for values in (entry.mean, entry.std))
    seen = []
    on_pixels.network.register_forward_pre_hook(lambda module, arguments: seen.append(arguments[0]))
    with torch.no_grad():
        on_pixels(image * 255)
    torch.testing.assert_close(seen[0], (image - mean) / std, rtol=1e-5, atol=1e-5)  # one rounding of 255 * mean
