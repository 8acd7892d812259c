"""Machine code of CUDA kernels as NVIDIA's disassembler lists it: what a kernel accesses, and instructions an element.

Control flow is read from ``nvdisasm -c``: branches, convergence barriers (BSSY and BSYNC), indirect branches with their
targets. Calls count as cold: what ptxas calls is the slow path of a division or of a root.
"""

from __future__ import annotations

import re
import subprocess
from collections import Counter
from collections.abc import Collection, Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path

import networkx as nx

_FUNCTION = re.compile(r"^\.text\.(\S+):$")
_LABEL = re.compile(r"^(\S+):$")
_INSTRUCTION = re.compile(r"^/\*([0-9a-f]{4,})\*/\s+(?:(@!?U?P\w+)\s+)?([A-Z]\w*)((?:\.\w+)*)\s*(.*?)\s*;?$")
_TARGET = re.compile(r"`\(([^)]+)\)")
_TARGETS = re.compile(r'BRANCH_TARGETS ([^"]*)"')
_ALWAYS = ("", "@PT", "@UPT")
_ADDITIONS = ("FADD", "FADD2")
_COLD = 100_000
"""Instructions that a call counts on a path, so that the path avoids it."""


@dataclass(frozen=True)
class Instruction:
    """One line of a listing: ``@!P0 LDG.E.128 R8, desc[UR6][R52.64]`` of family LDG with the modifiers E and 128."""

    address: int
    guard: str
    family: str
    modifiers: tuple[str, ...]
    operands: str

    def accesses(self, bits: int) -> str:
        """LDG, STG, LDS or STS of so many bits; "" of any other instruction."""
        return self.family if self.family in ("LDG", "STG", "LDS", "STS") and str(bits) in self.modifiers else ""

    @property
    def targets(self) -> list[str]:
        """Labels of a branch, or of the place where threads converge."""
        several = _TARGETS.search(self.operands)
        return several[1].replace(" ", "").split(",") if several else _TARGET.findall(self.operands)

    @property
    def is_branch(self) -> bool:
        """Within the kernel; ptxas also calls a label there, and never returns."""
        return self.family in ("BRA", "BRX", "JMP", "JMX") or (self.family == "CALL" and "`(.L" in self.operands)

    @property
    def is_call(self) -> bool:
        return self.family == "CALL" and not self.is_branch

    @property
    def falls_through(self) -> bool:
        """Whether what follows may run next: a branch has a guard, or a predicate before its target."""
        before_target = self.family in ("BRA", "JMP") and not self.operands.startswith("`")
        return not self.ends_block or self.guard not in _ALWAYS or before_target

    @property
    def ends_block(self) -> bool:
        return self.is_branch or self.family in ("BSYNC", "EXIT", "RET", "KILL")

    @property
    def is_barrier(self) -> bool:
        """Of the whole block, or of a cluster."""
        return self.family in ("BAR", "UCGABAR_WAIT")


@dataclass(frozen=True)
class Function:
    """A kernel's instructions by address, and the index of each label."""

    instructions: list[Instruction]
    labels: dict[str, int]

    def count(self, *families: str) -> int:
        return sum(one.family in families for one in self.instructions)

    def accesses(self, bits: int) -> Counter[str]:
        """LDG, STG, LDS and STS of so many bits."""
        return _counted(self.instructions, bits)


@dataclass(frozen=True)
class Step:
    """A loop over vectors, or the code outside of loops that meets vectors: one pass.

    Of all ways through, those with the most accesses of a vector's size, and then with the most additions and
    comparisons of floats (what an element needs, and one beyond the end skips), are passes over whole vectors.

    Attributes:
        address: of the first instruction.
        is_loop: False for the code outside of loops.
        fewest: instructions of the cheapest such pass.
        most: of the dearest one without a call: over a ragged end, or of a warp whose threads take several ways.
        accesses: of a vector's size by LDG, STG, LDS, STS, in the cheapest pass.
        additions: of floats, in the cheapest pass.
        phase: barriers of the block on the way here.
    """

    address: int
    is_loop: bool
    fewest: int
    most: int
    accesses: Mapping[str, int]
    additions: int
    phase: int

    def vectors(self, elements: int) -> int:
        """Vectors of x, of so many elements each, that a pass is about; 0 where it reads parameters or moments alone.

        Those written to y, else those read from x and kept on chip. What only reads adds up: about a mean that is known
        twice an element; about the mean of the pass's own vectors three times, and it may read them again for that.
        """
        written, read, kept = (self.accesses.get(kind, 0) for kind in ("STG", "LDG", "STS"))
        if written == 1 != read:  # moments; y is written in as many vectors as x is read
            written = 0
        if written or (read and kept):
            return written or read
        read = read or self.accesses.get("LDS", 0)
        additions = self.additions / (read * elements) if read else 0.0
        return read if additions >= 2 else read // 2 if additions >= 1.5 else 0


@dataclass(frozen=True)
class Passes:
    """The steps of a kernel, and the instructions of the cheapest way through the kernel outside of them."""

    steps: tuple[Step, ...]
    outside: int
    elements: int

    def per_element(self, *, dearest: bool = False) -> list[float]:
        """Instructions an element, step by step."""
        return [
            (step.most if dearest else step.fewest) / (step.vectors(self.elements) * self.elements)
            for step in self.steps
        ]


def disassemble(nvdisasm: str, cubin: Path) -> dict[str, Function]:
    """The functions of a cubin by their mangled names."""
    done = subprocess.run([nvdisasm, "-c", str(cubin)], capture_output=True, text=True, check=True)
    return read_listing(done.stdout)


def read_listing(text: str) -> dict[str, Function]:
    """The functions of a listing of ``nvdisasm -c`` by their mangled names."""
    functions: dict[str, Function] = {}
    function = Function([], {})
    for line in map(str.strip, text.splitlines()):
        if start := _FUNCTION.match(line):
            function = functions[start[1]] = Function([], {})
        elif found := _INSTRUCTION.match(line):
            address, guard, family, modifiers, operands = found.groups("")
            parts = tuple(modifiers.split(".")[1:])
            function.instructions.append(Instruction(int(address, 16), guard, family, parts, operands))
        elif label := _LABEL.match(line):
            function.labels[label[1]] = len(function.instructions)
    return functions


def passes_of(function: Function, bits: int, elements: int) -> Passes:
    """A kernel's loops over x, and its other code where that reads x or writes y.

    Args:
        bits: of a vector.
        elements: of a vector.

    Vectors count for the innermost loop. A loop within a step that does the same is for the ragged end. Of several
    loops in one phase with the same kinds of accesses (an unrolled one and what is left of it) the cheapest counts.
    """
    flow = Flow(function, bits)
    found: list[tuple[frozenset[int], Step]] = []
    within: set[int] = set()
    for loop in reversed(flow.loops):  # inner ones first
        step = flow.pass_of(loop, within)
        if step is not None and step.vectors(elements):
            found.append((loop.blocks, step))
            within |= loop.blocks
    outside = flow.pass_of(None, within)
    rest = 0 if outside is None else outside.fewest
    if outside is not None and (outside.accesses.keys() & {"LDG", "STG"}) and outside.vectors(elements):
        found.append((flow.blocks, outside))
        rest = 0
    versions: dict[tuple[frozenset[str], int], Step] = {}
    for blocks, step in found:
        if not any(blocks < others and step.accesses.keys() <= other.accesses.keys() for others, other in found):
            key = frozenset(step.accesses), step.phase
            versions[key] = min(versions.get(key, step), step, key=lambda one: one.fewest / one.vectors(elements))
    return Passes(tuple(sorted(versions.values(), key=lambda one: one.address)), rest, elements)


# --- control flow ---


@dataclass(frozen=True)
class _Loop:
    """Blocks that reach each other; ``ways_back`` lead to its head."""

    head: int
    blocks: frozenset[int]
    ways_back: frozenset[int]


class Flow:
    """A function's control flow: basic blocks that the entry reaches, named by the index of their first instruction."""

    def __init__(self, function: Function, bits: int):
        self._function, self._bits = function, bits
        self._ends = _block_ends(function)
        self._graph = self._reached()
        self.loops = _loops(self._graph)
        """Outer before inner."""
        self.blocks = frozenset(self._graph)
        self._forward = self._graph.copy()
        self._forward.remove_edges_from([(back, loop.head) for loop in self.loops for back in loop.ways_back])
        self._order = list(nx.topological_sort(self._forward))
        self._phase: dict[int, int] = {}
        for block in self._order:
            before = [self._phase[p] + self._is_barrier(p) for p in self._forward.predecessors(block)]
            self._phase[block] = max(before, default=0)

    def pass_of(self, loop: _Loop | None, without: Collection[int]) -> Step | None:
        """One pass of a loop; of the whole function where it is None.

        Args:
            without: blocks that count nothing: they belong to loops within.
        """
        head = 0 if loop is None else loop.head
        blocks = self._graph.nodes if loop is None else loop.blocks
        ends = [b for b in blocks if self._graph.out_degree(b) == 0] if loop is None else loop.ways_back
        cheapest = self._way(head, blocks, ends, without, dearest=False)
        dearest = self._way(head, blocks, ends, without, dearest=True)
        if cheapest is None or dearest is None:
            return None
        accesses = _counted(cheapest, self._bits)
        address = self._function.instructions[head].address
        additions = sum(one.family in _ADDITIONS for one in cheapest)
        return Step(address, loop is not None, len(cheapest), len(dearest), accesses, additions, self._phase[head])

    def _way(
        self, head: int, blocks: Collection[int], ends: Collection[int], without: Collection[int], *, dearest: bool
    ) -> list[Instruction] | None:
        """Instructions from a block to one of the ends: the most accesses, then work, then by their number."""
        best: dict[int, tuple[tuple[int, int, int], int | None]] = {}
        for block in self._order:
            if block not in blocks:
                continue
            before = [(best[p][0], p) for p in self._forward.predecessors(block) if p in best]
            if block != head and not before:
                continue
            value, previous = ((0, 0, 0), None) if block == head else max(before)
            if block not in without:
                inside = self._inside(block)
                accesses = sum(bool(one.accesses(self._bits)) for one in inside)
                work = sum(one.family in (*_ADDITIONS, "FSET", "FSETP") for one in inside)
                calls = _COLD * sum(one.is_call for one in inside)
                cost = (len(inside) if dearest else -len(inside)) - calls
                value = value[0] + accesses, value[1] + work, value[2] + cost
            best[block] = value, previous
        last: int | None = max((b for b in ends if b in best), key=lambda b: best[b][0], default=None)
        if last is None:
            return None
        way = []
        while last is not None:
            way += [] if last in without else self._inside(last)
            last = best[last][1]
        return way

    def _reached(self) -> nx.DiGraph:
        graph = nx.DiGraph()
        waiting: list[tuple[int, dict[str, int]]] = [(0, {})]
        seen: set[int] = set()
        while waiting:
            block, converging = waiting.pop()
            if block in seen:
                continue
            seen.add(block)
            graph.add_node(block)
            known = dict(converging)
            for one in self._inside(block):
                if one.family == "BSSY":  # names where threads meet again after the BSYNC of the same register
                    known[one.operands.partition(",")[0]] = self._function.labels[one.targets[0]]
            for following in self._following(block, known):
                graph.add_edge(block, following)
                waiting.append((following, known))
        return graph

    def _following(self, block: int, converging: Mapping[str, int]) -> list[int]:
        one, after = self._inside(block)[-1], self._ends[block]
        found = [after] if one.falls_through and after in self._ends else []
        if one.family == "BSYNC":
            found.append(converging.get(one.operands, after))
        elif one.is_branch and "DIV" not in one.modifiers:  # DIV: to a shuffle's slow path
            found += [self._function.labels[name] for name in one.targets]
        return [b for b in found if b in self._ends]

    def _inside(self, block: int) -> list[Instruction]:
        return self._function.instructions[block : self._ends[block]]

    def _is_barrier(self, block: int) -> bool:
        return self._inside(block)[-1].is_barrier


def _block_ends(function: Function) -> dict[int, int]:
    """Where the block that begins at an instruction ends; barriers end blocks too."""
    after = {i + 1 for i, one in enumerate(function.instructions) if one.ends_block or one.is_barrier}
    starts = sorted({0, *function.labels.values(), *after} - {len(function.instructions)})
    return dict(zip(starts, [*starts[1:], len(function.instructions)], strict=True))


def _loops(graph: nx.DiGraph) -> list[_Loop]:
    """What reaches itself; within it, the same without the ways back to its head."""
    found = []
    for blocks in nx.strongly_connected_components(graph):
        if len(blocks) == 1 and not any(graph.has_edge(b, b) for b in blocks):
            continue
        entered = [b for b in blocks if any(p not in blocks for p in graph.predecessors(b))]
        head = min(entered or blocks)
        back = frozenset(p for p in graph.predecessors(head) if p in blocks)
        found.append(_Loop(head, frozenset(blocks), back))
        within = graph.subgraph(blocks).copy()
        within.remove_edges_from([(p, head) for p in back])
        found += _loops(within)
    return found


def _counted(instructions: Iterable[Instruction], bits: int) -> Counter[str]:
    return Counter(kind for one in instructions if (kind := one.accesses(bits)))
