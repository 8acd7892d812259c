"""Use cases, one per file, and the Python API: export, deploy, rewrite, build, verify and so on."""
