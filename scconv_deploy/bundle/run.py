#!/usr/bin/env python3
"""Run this bundle's model: in ONNX Runtime, or an engine in TensorRT or TensorRT-RTX.

    python3 run.py                                          the bundle's own first sample, compared with PyTorch
    python3 run.py inputs.npz -o outputs.npz                arrays by the names of the model's inputs
    python3 run.py --engine device/model.tensorrt.engine --plugin device/libscconv_sru.so

Needs NumPy, and onnxruntime, or tensorrt or tensorrt-rtx with the CUDA runtime. It is an example to read and to change;
the proof is `scconv-deploy verify` or `finish.pyz`. Exit codes are those of scconv-deploy: 2 a file is missing, 3 a
library or GPU is missing or refuses, 4 the model cannot be run, 7 a file differs from its manifest.
"""

import argparse
import ctypes
import ctypes.util
import hashlib
import importlib
import json
import sys
from pathlib import Path


def stop(code, message):
    """Print one line on stderr, and exit with the code."""
    sys.stderr.write(f"run.py: {message}\n")
    sys.exit(code)


def needed(module, remedy):
    """Import a module, or stop with a line that says how to install it."""
    try:
        return importlib.import_module(module)
    except (ImportError, OSError) as error:  # OSError: a library that it loads by itself
        lines = [line.strip() for line in str(error).splitlines() if line.strip()] or [type(error).__name__]
        return stop(3, f"{module} cannot be imported: {lines[-1].rstrip('.')}. {remedy.format(sys.executable)}")


np = needed("numpy", "sudo apt install python3-numpy, or {} -m pip install numpy.")
HERE = Path(__file__).resolve().parent


def main():
    """Parse the arguments, run the model, print its outputs."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("inputs", nargs="?", type=Path, help="an .npz; the bundle's first sample by default")
    parser.add_argument("-o", "--output", type=Path, help="an .npz to write")
    parser.add_argument("--engine", type=Path, help="an engine instead of model.onnx")
    parser.add_argument("--plugin", type=Path, help="the plugin library that it was built with")
    options = parser.parse_args()
    for path in filter(None, (options.inputs, options.engine, options.plugin)):
        if not path.is_file():
            stop(2, f"{path} does not exist.")
    expected = {}
    if options.inputs is None:
        inputs, expected = first_sample()
    else:
        with np.load(options.inputs, allow_pickle=False) as archive:
            inputs = dict(archive)
    outputs = run_onnx(inputs) if options.engine is None else run_engine(options.engine, options.plugin, inputs)
    for name, value in outputs.items():
        against = ""
        if name in expected:
            size = max(float(np.linalg.norm(expected[name])), 1e-30)
            apart = float(np.linalg.norm(value.astype("f8") - expected[name])) / size
            against = f", relative L2 against PyTorch {apart:.1e}"
        print(f"{name}: {value.dtype}{list(value.shape)}{against}")  # noqa: T201
    if options.output is not None:
        np.savez(options.output, **outputs)


def first_sample():
    """Inputs of the bundle's first sample, and PyTorch's outputs for them."""
    document = json.loads((HERE / "reference" / "reference.json").read_text(encoding="utf-8"))["samples"][0]
    with np.load(HERE / "reference" / "sample-0.npz", allow_pickle=False) as archive:
        inputs = {name: archive[f"input:{i}"] for i, name in enumerate(document["inputs"])}
        return inputs, {name: archive[f"given:{i}"] for i, name in enumerate(document["outputs"])}


def run_onnx(inputs):
    """Run the ONNX file in ONNX Runtime with its available providers.

    It expands the SRUs' functions, unless the fused SRU for CPUs lies here and runs on this machine.
    """
    onnxruntime = needed("onnxruntime", "{} -m pip install onnxruntime.")
    path = next(p for p in (HERE / "model.onnx", HERE / "model.onnx.rejected") if p.is_file())
    providers = onnxruntime.get_available_providers()
    settings = fused_sru(onnxruntime, providers)
    session = onnxruntime.InferenceSession(str(path), settings, providers=providers)
    names = [output.name for output in session.get_outputs()]
    return dict(zip(names, session.run(names, inputs)))  # noqa: B905  # strict is Python 3.10's


def fused_sru(onnxruntime, providers):
    """Settings of a session, with the fused SRU for CPUs if it lies here; it is native code, so its bytes are checked.

    Not with a GPU's provider: the SRUs would drag their tensors to the host.
    """
    settings = onnxruntime.SessionOptions()
    library = HERE / "libscconv_sru_cpu.so"
    if not library.is_file() or set(providers) - {"CPUExecutionProvider", "AzureExecutionProvider"}:
        return settings
    sealed = json.loads((HERE / "manifest.json").read_text(encoding="utf-8"))["files"].get(library.name, {})
    if hashlib.sha256(library.read_bytes()).hexdigest() != sealed.get("sha256"):
        stop(7, f"{library} is not the library that manifest.json describes, so it is not loaded. Copy it again.")
    try:
        settings.register_custom_ops_library(str(library))
    except Exception as error:  # of another processor, or another system
        reason = " ".join(str(error).split())
        sys.stderr.write(f"run.py: {library.name} does not load here, its function runs instead: {reason}\n")
        return onnxruntime.SessionOptions()
    return settings


def run_engine(path, plugin, inputs):
    """Run an engine in its library. It is native code, so its bytes are compared with its manifest first."""
    data = path.read_bytes()
    beside = path.with_name(path.name + ".json")
    if not beside.is_file():
        stop(7, f"{path} has no manifest {beside.name} beside it, so it is not opened. Copy both.")
    manifest = json.loads(beside.read_text(encoding="utf-8"))
    if hashlib.sha256(data).hexdigest() != manifest["sha256"]:
        stop(7, f"{path} is not the engine that {beside.name} describes. Copy both again.")
    rtx = manifest.get("backend") == "tensorrt-rtx"
    compatible = "VERSION_COMPATIBLE" in manifest.get("flags", ())
    # of TensorRT's engines only a version-compatible one holds its plugin
    inside = (rtx or compatible) and bool(manifest.get("settings", {}).get("plugins_to_serialize"))
    if manifest["plugin_sha256"] and plugin is None and not inside:
        stop(3, f"{path} was built with a plugin: add --plugin FILE.")
    if plugin is not None and hashlib.sha256(plugin.read_bytes()).hexdigest() != manifest["plugin_sha256"]:
        stop(7, f"{plugin} is not the plugin that {path} was built with. Give that one.")
    get = "{} -m pip install tensorrt --extra-index-url https://pypi.nvidia.com (on a Jetson: apt install tensorrt)."
    tensorrt = needed("tensorrt_rtx", "{} -m pip install tensorrt-rtx.") if rtx else needed("tensorrt", get)
    logger = tensorrt.Logger(tensorrt.Logger.WARNING)
    if plugin is not None and not inside:
        tensorrt.get_plugin_registry().load_library(str(plugin.resolve()))
    runtime = tensorrt.Runtime(logger)
    if compatible or inside:  # code for the host, which the library refuses unless it is allowed
        runtime.engine_host_code_allowed = True
    engine = runtime.deserialize_cuda_engine(data)
    if engine is None:
        stop(3, f"{tensorrt.__name__} cannot open {path} here; its reason is above. Build it with this release.")
    context = engine.create_execution_context()
    names = [engine.get_tensor_name(i) for i in range(engine.num_io_tensors)]
    types = {name: numpy_type(tensorrt, engine.get_tensor_dtype(name), name) for name in names}
    wanted = [name for name in names if engine.get_tensor_mode(name).name == "INPUT"]
    if set(wanted) != set(inputs):
        stop(4, f"The engine takes {', '.join(wanted)}; given were {', '.join(inputs) or 'none'}.")
    for name in wanted:
        if not context.set_input_shape(name, inputs[name].shape):
            stop(4, f"The engine's first profile does not take {name} of shape {inputs[name].shape}.")
    for name in names:
        if -1 in tuple(context.get_tensor_shape(name)):
            stop(4, f"The size of {name} is not known for these inputs.")
    arrays = {n: np.ascontiguousarray(inputs[n], types[n]) if n in inputs else None for n in names}
    outputs = {n: np.empty(tuple(context.get_tensor_shape(n)), types[n]) for n in names if n not in inputs}
    arrays.update(outputs)
    with_device_memory(context, arrays, outputs)
    return outputs


def numpy_type(tensorrt, kind, name):
    """NumPy dtype of an input or output; NumPy has no bfloat16."""
    try:
        return tensorrt.nptype(kind)
    except TypeError:
        stop(4, f"{name} is {kind}, which NumPy does not have: convert the model with float32 inputs and outputs.")


def with_device_memory(context, arrays, outputs):
    """Copy the inputs to the GPU, run on a stream, copy the outputs back. cudart returns 0 where all is well."""
    try:
        cuda = ctypes.CDLL(ctypes.util.find_library("cudart") or "libcudart.so")
    except OSError as error:
        stop(3, f"The CUDA runtime does not load: {error}. Add /usr/local/cuda/lib64 to LD_LIBRARY_PATH.")

    def checked(status, what):
        if status:
            stop(3, f"{what}: CUDA error {status}.")

    stream, pointers = ctypes.c_void_p(), {}
    checked(cuda.cudaStreamCreate(ctypes.byref(stream)), "cudaStreamCreate")
    for name, array in arrays.items():
        pointer = pointers[name] = ctypes.c_void_p()
        checked(cuda.cudaMalloc(ctypes.byref(pointer), ctypes.c_size_t(max(array.nbytes, 1))), "cudaMalloc")
        if name not in outputs:
            host = ctypes.c_void_p(array.ctypes.data)
            checked(cuda.cudaMemcpy(pointer, host, ctypes.c_size_t(array.nbytes), 1), "cudaMemcpy")
        context.set_tensor_address(name, pointer.value)
    if not context.execute_async_v3(stream.value):
        stop(4, "TensorRT cannot run the engine; its reason is above.")
    checked(cuda.cudaStreamSynchronize(stream), "cudaStreamSynchronize")
    for name, array in outputs.items():
        host = ctypes.c_void_p(array.ctypes.data)
        checked(cuda.cudaMemcpy(host, pointers[name], ctypes.c_size_t(array.nbytes), 2), "cudaMemcpy")
    for pointer in pointers.values():
        cuda.cudaFree(pointer)


if __name__ == "__main__":
    main()
