"""One rewrite rule a file, on onnxscript's rewriter; :data:`.apply.RULES` lists them in their order."""
