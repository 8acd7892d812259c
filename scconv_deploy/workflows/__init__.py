"""Use cases, one a file, and the Python API: export, deploy, rewrite, build, verify and so on."""
