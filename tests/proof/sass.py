"""What machine code says of a kernel's speed: its hot loop, and the cheapest way around it.

`functions(text)` parses what `cuobjdump -sass` prints. The hot loop of a function is found by its
back edge: the smallest loop that, on one way around, loads the most 16-byte vectors. Of the ways
around it that load them all and take an exponential of every element, the one with the fewest
reciprocals and calls, then instructions, is counted: rare branches (a new maximum, a tie, a logit
beyond softcap's polynomial) are not on it. A predicated instruction counts, taken or not.
"""

from __future__ import annotations

import itertools
import re
from collections import Counter
from dataclasses import dataclass
from functools import cached_property

INSTRUCTION = re.compile(
    r"^\s+/\*([0-9a-f]{4,})\*/\s+(?:(@!?U?P\w+)\s+)?([A-Z][\w.]*)([^;]*);", re.MULTILINE
)


@dataclass(frozen=True)
class Instruction:
    address: int
    predicate: str
    op: str
    args: str

    @property
    def target(self) -> int | None:
        """Where a branch goes."""
        if self.op.split(".")[0] not in ("BRA", "JMP"):
            return None
        found = re.findall(r"0x([0-9a-f]+)", self.args)
        return int(found[-1], 16) if found else None

    @property
    def conditional(self) -> bool:
        return bool(self.predicate) or "," in self.args or ".DIV" in self.op

    @property
    def ends(self) -> bool:
        """Nothing follows it."""
        if self.target is not None:
            return not self.conditional
        return self.op.split(".")[0] in ("EXIT", "RET", "BRX") and not self.predicate

    @property
    def wide(self) -> bool:
        """Brings one 16-byte vector into registers: from memory or from a ring in shared memory."""
        return bool(re.match(r"(LDG|LDS)\b.*\.128", self.op))

    def is_a(self, *ops: str) -> bool:
        return any(self.op == op or self.op.startswith(op + ".") for op in ops)


Way = tuple[int, int, tuple[int, ...]]  # reciprocals and calls, instructions, blocks


@dataclass(frozen=True)
class Loop:
    function: Function
    head: int  # indices of blocks
    tails: frozenset[int]
    blocks: frozenset[int]

    @cached_property
    def instructions(self) -> list[Instruction]:
        return [i for b in sorted(self.blocks) for i in self.function.blocks[b]]

    @cached_property
    def vectors(self) -> int:
        """The most 16-byte vectors of a way around."""
        return max((key[0] for tail in self.tails for key in self._ways.get(tail, {})), default=0)

    def path(self, exponentials: int) -> list[Instruction]:
        """The cheapest way around that loads all vectors and takes so many exponentials."""
        best: Way | None = None
        for tail in self.tails:
            for (vectors, taken), way in self._ways.get(tail, {}).items():
                if vectors == self.vectors and taken >= exponentials:
                    best = way if best is None else min(best, way)
        assert best is not None, f"no way around takes {exponentials} exponentials"
        return [i for b in best[2] for i in self.function.blocks[b]]

    @cached_property
    def _ways(self) -> dict[int, dict[tuple[int, int], Way]]:
        """Of each block the cheapest ways from the head, by vectors and exponentials so far."""
        order = self.function.order(self.head, self.blocks)
        ways: dict[int, dict[tuple[int, int], Way]] = {}
        position = {block: n for n, block in enumerate(order)}
        for block in order:
            instructions = self.function.blocks[block]
            vectors = sum(i.wide for i in instructions)
            taken = sum(i.op == "MUFU.EX2" for i in instructions)
            # Softcap's far branch, or the slow path of a division: where there is another way. A
            # call is rarer: a division's short way takes a reciprocal, its long one a call.
            rare = sum(
                2 * i.is_a("CALL") + i.is_a("MUFU.RCP") for i in instructions if not i.predicate
            )
            arrivals = [((0, 0), (0, 0, ()))] if block == self.head else []
            for before in self.function.before[block]:
                if before in ways and position[before] < position[block]:
                    arrivals += ways[before].items()
            found = ways.setdefault(block, {})
            for (v, t), (slow, count, blocks) in arrivals:
                key = (v + vectors, t + taken)
                way = (slow + rare, count + len(instructions), (*blocks, block))
                found[key] = min(found.get(key, way), way)
        return ways


class Function:
    def __init__(self, name: str, instructions: list[Instruction]):
        self.name, self.instructions = name, instructions
        starts = {0}
        at = {i.address: n for n, i in enumerate(instructions)}
        for n, i in enumerate(instructions):
            if i.target is not None and i.target in at:
                starts.add(at[i.target])
            if (i.target is not None or i.ends) and n + 1 < len(instructions):
                starts.add(n + 1)
        edges = [*sorted(starts), len(instructions)]
        self.blocks = [instructions[a:b] for a, b in itertools.pairwise(edges)]
        block_at = {b[0].address: n for n, b in enumerate(self.blocks)}
        self.after: list[list[int]] = []
        for n, block in enumerate(self.blocks):
            last, after = block[-1], []
            if last.target in block_at:
                after.append(block_at[last.target])
            if not last.ends and n + 1 < len(self.blocks):
                after.append(n + 1)
            self.after.append(after)
        self.before: list[list[int]] = [[] for _ in self.blocks]
        for n, after in enumerate(self.after):
            for m in after:
                self.before[m].append(n)

    def order(self, head: int, blocks: frozenset[int]) -> list[int]:
        """The blocks of a loop from its head on, each after what leads to it."""
        done: dict[int, bool] = {}
        order: list[int] = []
        stack = [(head, iter(self.after[head]))]
        done[head] = False
        while stack:
            block, following = stack[-1]
            for n in following:
                if n in blocks and n not in done:
                    done[n] = False
                    stack.append((n, iter(self.after[n])))
                    break
            else:
                order.append(block)
                stack.pop()
        return order[::-1]

    @cached_property
    def loops(self) -> list[Loop]:
        """Natural loops: a back edge, and what leads to it without the head."""
        tails: dict[int, set[int]] = {}
        for n, after in enumerate(self.after):
            for head in after:
                if head <= n:
                    tails.setdefault(head, set()).add(n)
        found = []
        for head, ends in tails.items():
            blocks, todo = {head}, list(ends)
            while todo:
                block = todo.pop()
                if block not in blocks:
                    blocks.add(block)
                    todo += self.before[block]
            found.append(Loop(self, head, frozenset(ends), frozenset(blocks)))
        return found

    @cached_property
    def through(self) -> Loop:
        """The whole function, from its entry to its ends: of a kernel without a loop."""
        ends = frozenset(n for n, after in enumerate(self.after) if not after)
        return Loop(self, 0, ends, frozenset(range(len(self.blocks))))

    @cached_property
    def hot(self) -> Loop | None:
        """The loop that loads the most vectors on one way around; of several the smallest."""
        loops = [loop for loop in self.loops if loop.vectors]
        return max(loops, key=lambda loop: (loop.vectors, -len(loop.instructions)), default=None)


def functions(text: str) -> list[Function]:
    found = []
    for part in text.split("Function : ")[1:]:
        name, _, body = part.partition("\n")
        made = [
            Instruction(int(address, 16), predicate, op, args.strip())
            for address, predicate, op, args in INSTRUCTION.findall(body)
        ]
        while made and made[-1].op in ("NOP", "BRA") and len(made) > 1:  # what fills the end
            if made[-1].op == "BRA" and made[-1].target != made[-1].address:
                break
            made.pop()
        found.append(Function(name.strip(), made))
    return found


def counts(instructions: list[Instruction]) -> Counter[str]:
    return Counter(i.op.split(".")[0] for i in instructions)
