"""Instructions of this CPU for int8 products, and what they mean for ONNX Runtime's kernels. Standard library only."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

_FLAGS = {
    "avx2": "AVX2",
    "avx512_vnni": "AVX512-VNNI",
    "avx_vnni": "AVX-VNNI",
    "asimddp": "NEON dotprod",
    "i8mm": "NEON i8mm",
}
"""Names in /proc/cpuinfo -> usual names; Arm's begin with NEON."""


@dataclass(frozen=True)
class Int8Instructions:
    """Instructions for int8 products.

    Attributes:
        names: usual names of those that are there.
        known: whether this system tells.
    """

    names: tuple[str, ...] = ()
    known: bool = False

    def __str__(self) -> str:
        return (", ".join(self.names) or "none for int8") if self.known else "instructions not known"

    @property
    def saturating(self) -> bool:
        """Whether ONNX Runtime adds two products in 16 bits, which saturate: on x86-64 without VNNI."""
        return self.known and "AVX2" in self.names and not any("VNNI" in name for name in self.names)


def int8_instructions(root: Path = Path("/")) -> Int8Instructions:
    """Read the instructions from /proc/cpuinfo; not known on systems without it."""
    try:
        text = (root / "proc" / "cpuinfo").read_text(encoding="utf-8", errors="replace")
    except OSError:
        return Int8Instructions()
    listed = next((line for line in text.splitlines() if line.lower().startswith(("flags", "features"))), "")
    flags = set(listed.partition(":")[2].split())
    return Int8Instructions(tuple(name for flag, name in _FLAGS.items() if flag in flags), bool(flags))
