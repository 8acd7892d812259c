"""Rewrite rules on onnxscript's rewriter, one a file; :data:`.apply.RULES` lists them in their order."""
