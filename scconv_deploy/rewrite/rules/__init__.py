"""One rewrite rule a file, on onnxscript's rewriter; :data:`.registry.RULES` lists them in their order."""
