"""The doctor: what it says of machines that answer as recorded."""

import json
import sys

import pytest

from scconv_deploy.system.machine import Machine, find_nvcc
from scconv_deploy.workflows.doctor import diagnose

REQUIREMENTS = ["torch>=2.9", "onnx>=1.19,<2", "pytest>=8; extra == 'test'"]
INSTALLED = {"torch": "2.13.0+cpu", "onnx": "1.23.2"}
TORCH_CPU = json.dumps({"cuda": None, "available": False, "devices": []})
TORCH_CUDA = json.dumps({"cuda": "13.0", "available": True, "devices": [["GPU", "9.0"]]})
ORT = json.dumps({"providers": ["CPUExecutionProvider"]})
SMI = "NVIDIA GeForce RTX 4090, 8.9, 570.10, 24564 MiB\n"


def machine(tmp_path, *, torch=TORCH_CPU, ort=ORT, smi=None, smi_table=None, installed=INSTALLED, which=None, **more):
    answers = {"torch.version": torch, "onnxruntime.get": ort, "--query-gpu": smi, "tensorrt": more.pop("trt", None)}

    def run(command):
        if command == ["nvidia-smi"]:
            return smi_table
        if command[1:] == ["--version"]:
            return f"{command[0]}: NVIDIA (R) release 12.6, V12.6.20" if "nvcc" in command[0] else "g++ 12.2.0\nmore"
        return next((answer for key, answer in answers.items() if key in " ".join(command)), None)

    which = which or {}
    return Machine(
        run=run, which=which.get, installed=installed.get, requirements=lambda: REQUIREMENTS,
        environ=more.pop("environ", {}), root=tmp_path, site_packages=more.pop("site_packages", ()),
    )  # fmt: skip


def by_name(diagnosis, group=None):
    return {f.name: f for f in diagnosis.findings if group in (None, f.group)}


def test_a_bare_machine_is_complete_and_says_what_more_there_could_be(tmp_path):
    diagnosis = diagnose(machine(tmp_path))
    assert diagnosis
    found = by_name(diagnosis)
    assert (found["torch"].status, found["torch"].found, found["torch"].required) == ("ok", "2.13.0+cpu", True)
    assert "pytest" not in found  # of an extra
    assert found["pytorch"].found == "CPU build"
    assert found["onnxruntime-run"].found == "CPUExecutionProvider"
    missing = {name: f.remedy for name, f in found.items() if f.status == "missing"}
    assert set(missing) == {
        "scikit-learn", "pillow", "tensorrt-rtx", "tensorrt", "gpu", "nvcc", "g++", "cmake", "tensorrt-headers",
    }  # fmt: skip
    assert missing["tensorrt-rtx"] == "pip install 'scconv-deploy[rtx]'"
    assert all(missing.values())
    assert not by_name(diagnosis, "versions")


def test_a_missing_or_too_old_requirement(tmp_path):
    diagnosis = diagnose(machine(tmp_path, installed={"torch": "2.8.0"}))
    found = by_name(diagnosis)
    assert (found["onnx"].status, found["onnx"].remedy) == ("missing", "pip install 'onnx<2,>=1.19'")
    assert (found["torch"].status, found["torch"].found) == ("warning", "2.8.0, expected >=2.9")
    assert not diagnosis
    assert [f.name for f in diagnosis.lacking(["gpu", "abacus"])] == ["onnx", "gpu", "abacus"]


def test_a_library_that_does_not_load_is_a_finding(tmp_path):
    installed = INSTALLED | {"tensorrt": "10.3.0"}
    found = by_name(diagnose(machine(tmp_path, installed=installed, torch="Segmentation fault")))
    assert (found["pytorch"].status, found["pytorch"].required) == ("missing", True)
    assert found["tensorrt-run"].found == "installed, but its libraries do not load"


def test_gpu_jetson_compilers_and_headers(tmp_path):
    include = tmp_path / "usr" / "include" / "aarch64-linux-gnu"
    include.mkdir(parents=True)
    (include / "NvInfer.h").touch()
    defines = {"NV_TENSORRT_MAJOR": "TRT_MAJOR_ENTERPRISE", "TRT_MAJOR_ENTERPRISE": "10"}
    defines |= {"NV_TENSORRT_MINOR": "3", "NV_TENSORRT_PATCH": "0"}
    (include / "NvInferVersion.h").write_text("".join(f"#define {k} {v}\n" for k, v in defines.items()))
    (tmp_path / "etc").mkdir()
    (tmp_path / "etc" / "nv_tegra_release").write_text("# R36 (release), REVISION: 4.0\n")
    which = {"g++": "/usr/bin/g++", "nvcc": "/usr/local/cuda/bin/nvcc"}
    found = by_name(diagnose(machine(tmp_path, smi=SMI, which=which)))
    assert found["NVIDIA GeForce RTX 4090"].found == "compute capability 8.9, driver 570.10, 24564 MiB"
    assert found["jetson"].found == "L4T R36.4 (JetPack 6)"
    assert found["nvcc"].found == "CUDA 12.6 at /usr/local/cuda/bin/nvcc"
    assert found["g++"].found == "g++ 12.2.0"
    assert found["tensorrt-headers"].found == f"10.3.0 at {include}"


@pytest.mark.parametrize("place", ["CUDA_HOME", "usr/local/cuda", "nvidia/cu13", "nvidia/cuda_nvcc"])
def test_nvcc_off_the_path(tmp_path, place):
    folder = tmp_path / place
    (folder / "bin").mkdir(parents=True)
    (folder / "bin" / "nvcc").touch()
    environ = {"CUDA_HOME": str(folder)} if place == "CUDA_HOME" else {}
    found = find_nvcc(machine(tmp_path, environ=environ, site_packages=(tmp_path,)))
    assert found == str(folder / "bin" / "nvcc")


CONTRADICTIONS = {
    "two builds of ONNX Runtime": (
        {"installed": INSTALLED | {"onnxruntime": "1.32.0", "onnxruntime-gpu": "1.32.0"}},
        "onnxruntime-gpu", "overwrite each other's files",
    ),
    "a CPU build beside a GPU": ({"smi": SMI}, "torch", "a GPU is present, but torch is a CPU build"),
    "an old driver": (
        {"smi": SMI, "torch": TORCH_CUDA, "smi_table": "| Driver Version: 570  CUDA Version: 12.8 |"},
        "pytorch", "pytorch is of CUDA 13.0, the driver's is 12.8",
    ),
    "a GPU that RTX leaves out": (
        {
            "smi": "NVIDIA H200, 9.0, 570.10, 143771 MiB", "torch": TORCH_CUDA,
            "installed": INSTALLED | {"tensorrt-rtx": "1.7.1"}, "trt": '{"version": "1.7.1", "no_plugins": ""}',
        },
        "tensorrt-rtx", "no support for compute capability 9.0",
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", CONTRADICTIONS)
def test_versions_that_contradict_each_other(tmp_path, name):
    options, subject, words = CONTRADICTIONS[name]
    warnings = by_name(diagnose(machine(tmp_path, **options)), "versions")
    assert list(warnings) == [subject]
    assert words in warnings[subject].found
    assert warnings[subject].remedy


def test_headers_of_another_tensorrt(tmp_path):
    (tmp_path / "NvInfer.h").touch()
    (tmp_path / "NvInferVersion.h").write_text(
        "#define NV_TENSORRT_MAJOR 11\n#define NV_TENSORRT_MINOR 1\n#define NV_TENSORRT_PATCH 0\n"
    )
    options = {"environ": {"TENSORRT_INCLUDE_DIR": str(tmp_path)}, "trt": '{"version": "10.3.0", "no_plugins": ""}'}
    diagnosis = diagnose(machine(tmp_path, installed=INSTALLED | {"tensorrt": "10.3.0"}, **options))
    (warning,) = by_name(diagnosis, "versions").values()
    assert warning.found == "TensorRT is 10.3.0, its headers 11.1.0"


def test_a_folder_of_headers_that_is_none_is_said(tmp_path):
    environ = {"TENSORRT_INCLUDE_DIR": str(tmp_path / "nope")}
    lost = by_name(diagnose(machine(tmp_path, environ=environ)), "compiler")["tensorrt-headers"]
    assert (lost.status, lost.found) == ("missing", f"TENSORRT_INCLUDE_DIR={tmp_path}/nope holds no NvInfer.h")
    include = tmp_path / "usr" / "include"
    include.mkdir(parents=True)
    (include / "NvInfer.h").touch()
    defines = (f"#define NV_TENSORRT_{part} {value}\n" for part, value in (("MAJOR", 10), ("MINOR", 3), ("PATCH", 0)))
    (include / "NvInferVersion.h").write_text("".join(defines))
    found = by_name(diagnose(machine(tmp_path, environ=environ)), "compiler")["tensorrt-headers"]
    assert found.status == "warning"
    assert found.found == f"10.3.0 at {include}; TENSORRT_INCLUDE_DIR={tmp_path}/nope holds no NvInfer.h"
    assert "unset it" in found.remedy


def test_here_the_doctor_finds_what_runs_this_test():
    found = by_name(diagnose())
    assert found["python"].found.startswith(f"{sys.version_info.major}.{sys.version_info.minor}")
    assert found["onnxruntime-run"].status == "ok"
    assert "CPUExecutionProvider" in found["onnxruntime-run"].found


@pytest.mark.parametrize(
    ("reason", "status", "found"),
    [
        ("", "ok", "1.7.1, takes the fused SRU's plugin"),
        ("it is hidden", "warning", "1.7.1, takes no plugins: it is hidden"),
    ],
)
def test_whether_tensorrt_rtx_takes_plugins_is_said(tmp_path, reason, status, found):
    answer = json.dumps({"version": "1.7.1", "no_plugins": reason})
    diagnosis = diagnose(machine(tmp_path, installed=INSTALLED | {"tensorrt-rtx": "1.7.1"}, trt=answer))
    finding = by_name(diagnosis)["tensorrt-rtx-run"]
    assert (finding.status, finding.found) == (status, found)
    assert bool(finding.remedy) == bool(reason)


@pytest.mark.parametrize(("flags", "status", "words"), [
    ("avx2", "warning", "AVX2, no VNNI: ONNX Runtime's int8 kernels add two products in 16 bits"),
    ("avx2 avx512_vnni", "ok", "AVX2, AVX512-VNNI: sums of int8 products in 32 bits"),
    ("sse2", "ok", "none for int8: int8 is slow here"),
])  # fmt: skip
def test_what_the_cpu_does_with_int8(tmp_path, flags, status, words):
    (tmp_path / "proc").mkdir()
    (tmp_path / "proc" / "cpuinfo").write_text(f"flags : {flags}\n")
    finding = by_name(diagnose(machine(tmp_path)), "cpu")["int8"]
    assert finding.status == status
    assert finding.found.startswith(words)
    assert ("--reduce-range" in finding.remedy) == (status == "warning")
