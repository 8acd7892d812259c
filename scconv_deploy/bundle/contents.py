"""Every file of a bundle: its name, and what it is for. A test holds the table against real bundles."""

from __future__ import annotations

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
"""After the name of an artifact that failed parity."""
ENGINE = (".engine", ".engine.rejected")
"""How the name of an engine ends."""

ALWAYS = {
    MODEL: "the artifact",
    REPORT: "the verdict and everything that it rests on",
    REPORT_PAGE: "the same for people (not where matplotlib or jinja2 is missing)",
    REFERENCE: "inputs and what PyTorch computed from them, so that the bundle can be judged where the model is not",
    RUN_SCRIPT: "runs the artifact in ONNX Runtime, or an engine in TensorRT; NumPy besides",
    MANIFEST: "SHA-256 of every other file, versions, command; its own digest is what deploy prints",
}
"""What every bundle holds. Engines that were built on the way lie beside it as ``model.BACKEND.engine`` with a manifest
of their own, ``model.BACKEND.engine.json``, and the plugin library that one of them was built with
(``libscconv_sru.so``)."""

FOR_DEVICE = {
    DEVICE_PLAN: "what is left for the device, and what its builder must know of the graph",
    PLUGIN_SOURCES: "the sources of the fused SRU",
    TRTEXEC: "lines for trtexec, with and without the plugin",
    FINISH: "builds plugin and engine on the device, judges and times them",
}
"""What it holds besides when a target is a device. Of a model without SRUs there are no sources."""

FOR_OLD_TENSORRT = {
    PLUGIN_MODEL: "the SRUs' functions left out, for TensorRT before 10.7 with the plugin",
    INLINED_MODEL: "the functions expanded, for TensorRT before 10.7 without it",
}
"""What it holds besides when a target's TensorRT reads functions wrongly. Of a model without SRUs there are none."""

ON_DEVICE = {
    DEVICE: "what finish.pyz writes there: engine, plugin, report.json, and a manifest that names this bundle's digest",
}
