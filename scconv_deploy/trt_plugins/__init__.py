"""The fused SRU for TensorRT.

This file holds the plugin's identity: what an ONNX node must carry so that TensorRT's parser binds the plugin. The
parser looks a node up by its type, the attribute ``plugin_version`` and the attribute ``plugin_namespace``; without
the namespace TensorRT 10.15 and later prefer the function. The kernels and the plugin follow in this folder.
"""

PLUGIN_NAMESPACE = "scconv"
PLUGIN_VERSION = "1"
