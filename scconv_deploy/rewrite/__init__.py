"""Rewrite an ONNX graph: SRUs become nodes of the domain ``scconv``."""
