"""Names and purposes of all files of a bundle. A test compares the tables with real bundles."""

from __future__ import annotations

from scconv_deploy.trt_plugins.cpu.build import CPU_LIBRARY

MODEL = "model.onnx"
PLUGIN_MODEL = "model.plugin.onnx"
INLINED_MODEL = "model.inlined.onnx"
REPORT = "report.json"
REPORT_PAGE = "report.html"
REFERENCE = "reference"
MANIFEST = "manifest.json"
RUN_SCRIPT = "run.py"
PLUGIN_SOURCES = "plugin"
TRTEXEC = "trtexec.txt"
DEVICE_PLAN = "device.json"
FINISH = "finish.pyz"
DEVICE = "device"
REJECTED = ".rejected"
"""Suffix of an artifact that failed parity."""
ENGINE = (".engine", ".engine.rejected")
"""Suffixes of engines."""

ALWAYS = {
    MODEL: "the artifact",
    REPORT: "the verdict with all results it is based on",
    REPORT_PAGE: "the report as a page (needs matplotlib and jinja2)",
    REFERENCE: "inputs and PyTorch's results for them, so that the bundle can be judged without the model",
    RUN_SCRIPT: "runs the artifact in ONNX Runtime, or an engine in TensorRT; also needs NumPy",
    MANIFEST: "SHA-256 of every other file, versions, command; deploy prints its own SHA-256, the digest",
}
"""Files of every bundle. Engines that deploy built lie beside the model as ``model.BACKEND.engine``, with a manifest
``model.BACKEND.engine.json`` each, and the plugin library that one of them was built with (``libscconv_sru.so``)."""

WITH_CPU_PLUGIN = {
    CPU_LIBRARY: "the fused SRU for ONNX Runtime on CPUs; run.py registers it, and without it the function runs",
}
"""Further files with ``--plugin-cpu``, if the model has SRUs."""

FOR_DEVICE = {
    DEVICE_PLAN: "the steps left for the device, and the facts of the graph that its builder needs",
    PLUGIN_SOURCES: "the sources of the fused SRU",
    TRTEXEC: "command lines for trtexec, with and without the plugin",
    FINISH: "builds plugin and engine on the device, judges and times them",
}
"""Further files if a target is a device; plugin sources only if the model has SRUs."""

FOR_OLD_TENSORRT = {
    PLUGIN_MODEL: "the SRUs' functions left out, for TensorRT before 10.7 with the plugin",
    INLINED_MODEL: "the functions expanded, for TensorRT before 10.7 without it",
}
"""Further files if a target's TensorRT reads functions wrongly and the model has SRUs."""

ON_DEVICE = {
    DEVICE: "results of finish.pyz: engine, plugin, report.json, and a manifest that names this bundle's digest",
}
"""The folder that ``finish`` adds on the device."""
