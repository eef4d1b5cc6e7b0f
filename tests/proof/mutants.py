"""Kernels edited on purpose: what the tests must notice without a GPU.

A mutant is one edit of one source: a barrier or a wait taken out, an ordered atomic made relaxed, a
wrong constant. `caught(mutant)` applies it to a copy and runs the checks that need no GPU: for CUDA
C++ `cuda_on_host/check.cpp` (for what is about ordering also under ThreadSanitizer), for Triton the
tests of the interpreter.
"""

from __future__ import annotations

import re
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from cuda_on_host import build

TESTS = Path(__file__).parents[1]
PACKAGE = TESTS.parent / "dpo_kernels"
TRITON_TESTS = (
    "ops/test_token_logps.py",
    "ops/test_token_kl.py",
    "loss/test_losses.py",
    "loss/test_dpo.py",
)


@dataclass(frozen=True)
class Mutant:
    file: str  # below csrc/, or the package's backends/triton/
    old: str
    new: str
    line: int = 0  # where `old` begins; 0: it occurs once
    ordering: bool = False  # a race: only ThreadSanitizer need see it

    def __str__(self) -> str:
        at = f":{self.line}" if self.line else ""
        return f"{self.file}{at} {self.old.strip()} -> {self.new.strip() or 'nothing'}"

    def apply(self, root: Path) -> None:
        path = root / self.file
        lines = path.read_text().split("\n")
        if self.line:
            lines[self.line - 1] = lines[self.line - 1].replace(self.old, self.new)
            path.write_text("\n".join(lines))
            return
        text = path.read_text()
        assert text.count(self.old) == 1, f"{self.old!r} occurs {text.count(self.old)} times"
        path.write_text(text.replace(self.old, self.new))


ORDERING = re.compile(
    r"__syncthreads\(\);|__syncwarp\(\);|block_barrier\(\);|async_wait<.*?>\(\);"
    r"|\b(?:arrive|wait_for)\([^;]*\);|add_acq_rel"
)


def cuda_ordering() -> Iterator[Mutant]:
    """Every barrier and wait of the CUDA kernels taken out, every ordered atomic made relaxed."""
    for path in sorted((build.CSRC / "cuda").glob("*.cu")):
        for number, line in enumerate(path.read_text().split("\n"), 1):
            for match in ORDERING.finditer(line.split("//")[0]):
                new = "add_relaxed" if match[0] == "add_acq_rel" else ";"
                yield Mutant(f"cuda/{path.name}", match[0], new, number, ordering=True)


CUDA_CONSTANTS = (
    Mutant("cuda/device.h", "1.4426950408889634", "1.4427"),
    Mutant("cuda/device.h", "- 3.333333125201679e-1f", "- 3.334333125201679e-1f"),
    Mutant("cuda/device.h", "+ 2.166011537475899e-2f", "+ 2.266011537475899e-2f"),
    Mutant("cuda/device.h", "fabsf(x) >= s.limit", "fabsf(x) >= 5.0f * s.limit"),
    Mutant("cuda/device.h", "- 2.0f * reciprocal(", "- 2.001f * reciprocal("),
    Mutant("cuda/device.h", "1.0f - near * near", "1.0f - near"),
    Mutant("cuda/device.h", "(v.w[i] & 0xffff0000u) ^ sign", "(v.w[i] & 0xffe00000u) ^ sign"),
    Mutant("cuda/sequences.h", "row > rows ? rows", "row > rows ? rows - 1"),
    Mutant("cuda/row_sums.h", "column(i) < y", "column(i) <= y"),
    Mutant("cuda/token_logps.cu", "logp != logp ? logp : 0.0", "0.0"),
    Mutant("cuda/token_logps.cu", "log(s.squares) - 2 * log_l", "log(s.squares) - 1 * log_l"),
    Mutant("cuda/token_logps.cu", "const int next = copied + 1", "const int next = copied + 2"),
    Mutant("cuda/token_logps.cu", "next > i && !arrived", "false && !arrived"),
    Mutant("cuda/token_logps.cu", "found < i + AHEAD", "found <= i + AHEAD"),
    Mutant("cuda/token_logps.cu", "shared.ring[to][v][thread]", "shared.ring[slot][v][thread]"),
    Mutant("cuda/token_logps.cu", "j && j * C::THREADS >= left", "false"),
    Mutant("cuda/token_logps.cu", "LOWEST ^ c.sign ^", "LOWEST ^"),
    Mutant("cuda/token_logps.cu", "filled = a.scaling.k > 0", "filled = true"),
    Mutant("cuda/token_logps.cu", "async_wait<C::STAGES - 1>", "async_wait<C::STAGES>"),
    Mutant("cuda/token_logps.cu", "left > (C::VECTORS - 1) * C::THREADS", "left > 0"),
    Mutant("cuda/token_logps.cu", "j * C::THREADS < left", "(j + 1) * C::THREADS < left"),
    Mutant("cuda/token_logps.cu", "thread - N < item.tail", "thread - N + 1 < item.tail"),
    Mutant("cuda/token_logps.cu", "item.zy = scaled<SOFTCAP>(a.scaling, ", "item.zy = ("),
    Mutant("cuda/token_logps.cu", "float zy = scaled<SOFTCAP>(a.scaling, ", "float zy = ("),
    Mutant("cuda/row_sums.h", "c.sign ? -low : high", "c.sign ? -high : low"),
    Mutant("cuda/row_sums.h", "c.sign ? -smallest<T>(v)", "c.sign ? smallest<T>(v)"),
    Mutant("cuda/row_sums.h", "if (weighted != weighted)", "if (false)"),
    Mutant("cuda/row_sums.h", "high >= c.limit || low <= -c.limit", "high >= c.limit"),
    Mutant("cuda/token_logps_backward.cu", "(float)-expm1(", "(float)-1.0001 * expm1("),
    Mutant("cuda/token_logps_backward.cu", "x[i] * row.factor * x[i]", "x[i] * row.factor"),
    Mutant("cuda/token_logps_backward.cu", "- first) % C::THREADS == thread", "- first) == thread"),
    Mutant("cuda/token_logps_backward.cu", "if (edge == y)", "if (false)"),
    Mutant("cuda/token_logps_backward.cu", "a.rows - 1 - block", "a.rows - block"),
    Mutant("cuda/sequence_sum.cu", "(s + p.S / 2) % p.S", "(s + 1) % p.S"),
    Mutant("cuda/sequence_sum.cu", "(1u << lane) - 1", "(1u << lane)"),
    Mutant("cuda/pair_loss.cu", "blockIdx.x * THREADS", "blockIdx.x * (THREADS - 1)"),
)
TRITON_CONSTANTS = (
    Mutant("token_logps.py", "- 3.33332819422e-1", "- 3.33432819422e-1"),
    Mutant("token_logps.py", "size < 0.625", "size < 3.0"),
    Mutant("token_logps.py", "far = 1.0 - 2.0 /", "far = 1.0 - 2.001 /"),
    Mutant("token_logps.py", "hi // tile * tile", "hi // tile * tile + 1"),
    Mutant("token_logps.py", "first < target_tile", "first <= target_tile"),
    Mutant("token_logps.py", "near < target)", "near <= target)"),
    Mutant("token_logps.py", "tl.maximum(end // VEC * VEC, lo)", "end // VEC * VEC"),
    Mutant("token_logps.py", "edge_tied, 0.0, edge_e", "edge_tied, 0.001, edge_e"),
    Mutant("token_logps.py", "tied, l - 1.0, l * shrink", "tied, l - 1.001, l * shrink"),
    Mutant("token_logps.py", "- 2 * log_l", "- 1 * log_l"),
    Mutant("token_logps.py", "(1.0 - p) * g.to", "(1.0001 - p) * g.to"),
    Mutant("token_logps.py", "chain * (1.0 - t) * (1.0 + t)", "chain * (1.0 - t) * (1.01 + t)"),
    Mutant("token_logps.py", "unit * math.log2(math.e)", "unit * 1.442696"),
    Mutant("token_logps.py", "rows - 1 - program", "rows - 2 - program"),
    Mutant("token_logps.py", "cdiv(V + ALIGN - 1", "cdiv(V - 1"),
    Mutant("token_kl.py", "er * (dr - dx)", "er * (dr - 1.001 * dx)"),
    Mutant("token_kl.py", "d_y = (1.0 - p_y)", "d_y = (1.0001 - p_y)"),
    Mutant("token_kl.py", "/ sum_r * unit + (log_x", "/ sum_r * unit + 1.0001 * (log_x"),
    Mutant("sequence_sum.py", "(s + S // 2) % S", "(s + 1) % S"),
    Mutant("sequence_sum.py", "tl.cumsum(count, 0) - count", "tl.cumsum(count, 0)"),
    Mutant("pair_loss.py", "tl.log(u) - ((u - 1.0) - x) / u", "tl.log(u) - ((u - 1.001) - x) / u"),
    Mutant("pair_loss.py", "slope = 2.0 * z", "slope = 2.001 * z"),
)


def cuda_caught(mutant: Mutant, cases: int = 60) -> bool:
    """Whether the checks on the host end badly; what does not compile is not a mutant."""
    with tempfile.TemporaryDirectory() as folder:
        csrc = Path(folder) / "csrc"
        shutil.copytree(build.CSRC, csrc)
        mutant.apply(csrc)
        if build.execute(build.program("", csrc), cases).returncode:
            return True
        return mutant.ordering and build.execute(build.program("thread", csrc), 3).returncode != 0


def triton_caught(mutant: Mutant, select: str = "triton") -> bool:
    """Whether a test of the Triton kernels fails in the interpreter."""
    with tempfile.TemporaryDirectory() as folder:
        package = Path(folder) / "dpo_kernels"
        shutil.copytree(PACKAGE, package, ignore=shutil.ignore_patterns("__pycache__"))
        mutant.apply(package / "backends" / "triton")
        code = (
            f"import sys; sys.path.insert(0, {folder!r}); import dpo_kernels, pytest;"
            f"assert dpo_kernels.__file__.startswith({folder!r});"
            "sys.exit(pytest.main(sys.argv[1:]))"
        )
        tests = [str(TESTS / name) for name in TRITON_TESTS]
        options = ["-x", "-q", "-k", select, "-p", "no:cacheprovider"]
        done = subprocess.run(
            [sys.executable, "-c", code, *options, *tests],
            capture_output=True,
            text=True,
            cwd=TESTS.parent,
            timeout=900,
        )
        assert done.returncode in (0, 1), done.stdout[-2000:] + done.stderr[-2000:]
        return done.returncode == 1
