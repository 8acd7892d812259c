"""The fused SRU for TensorRT and PyTorch: CUDA kernels and plugin in ``sru``, their build, check and binding beside it.

This file holds the plugin's identity: what an ONNX node must carry so that TensorRT's parser binds the plugin. The
parser looks a node up by its type, the attribute ``plugin_version`` and the attribute ``plugin_namespace``; without
the namespace TensorRT 10.15 and later prefer the function.
"""

PLUGIN_NAMESPACE = "scconv"
PLUGIN_VERSION = "1"
