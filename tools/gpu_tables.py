"""Sentences and tables of the runs on GPUs, from `benchmarks/results/gpu-*.json`.

Only runs that were complete count, and of a device only the newest. Where there is none, every
function says so, or gives no rows. Times are milliseconds.
"""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from dpo_kernels.bench import results

Run = dict[str, Any]
DEFAULT = ("cuda", "triton")  # the first that was measured is what `backend=None` takes
SANITIZER = re.compile(r"^(memcheck|racecheck|initcheck) ")
# column -> a provider's names, the first that was timed
PEERS = {
    "torch eager": ("torch eager",),
    "TRL, scored rows": ("TRL chunked log-probs, scored rows",),
    "Liger DPO": ("Liger DPO without reference", "Liger DPO"),
    "cut-cross-entropy": ("cut-cross-entropy",),
}
HEADS = ("linear trained", "linear frozen", "linear reference")
CALLS = (
    "forward",
    "forward, half unscored",
    "statistics",
    "softcap",
    "KL",
    "backward in place",
    "KL backward",
)
CPU_HEAD = "cpu-linear-head.json"


def complete_runs(folder: Path) -> list[Run]:
    """The newest complete run of each device, with its file's name."""
    newest: dict[str, Run] = {}
    for path in sorted(folder.glob("gpu-*.json")):
        run = json.loads(path.read_text()) | {"file": path.name}
        if not run.get("complete") or run.get("rehearsal"):
            continue
        known = newest.get(run["device"])
        if known is None or run["date"] > known["date"]:
            newest[run["device"]] = run
    return sorted(newest.values(), key=lambda run: run["date"], reverse=True)


def state(folder: Path) -> str:
    """For the README's first screen: where the GPU kernels ran, and where not."""
    runs = complete_runs(folder)
    if not runs:
        return (
            "- GPU: this tree holds no complete run. Take the GPU kernels as unproven, on one GPU "
            "or several, NVIDIA or AMD."
        )
    lines = [
        f"- GPU: run on one {run['device']} by `make gpu-check`, {run['date'][:10]} "
        f"([results](benchmarks/results/{run['file']})): {_tests(run)}."
        for run in runs
    ]
    seen = " and ".join(run["device"] for run in runs)
    lines.append(f"- Not run: several GPUs, AMD, NVIDIA GPUs other than {seen}.")
    return "\n".join(lines)


def headline(folder: Path) -> str:
    """The README's table: DPO loss of a linear head, ours and the peers', on CPU and GPU."""
    lines = [
        "| time in ms | ours | " + " | ".join(PEERS) + " |",
        "|---|---|" + "---|" * len(PEERS),
    ]
    cpu = results.read(folder / CPU_HEAD)
    for row in _head_rows(cpu["rows"], ("cpu",)):
        lines.append(f"| CPU, {row}")
    runs = complete_runs(folder)[:1]  # the newest; docs/benchmarks.md has every device
    for run in runs:
        for row in _head_rows(_peers(run), (_default(run),)):
            lines.append(f"| {_short(run['device'])}, {row}")
    lines += ["", f"CPU: {cpu['device']}, {cpu['threads']} threads, {_size(cpu['rows'])}."]
    lines += [_sentence(run) for run in runs]
    return "\n".join(lines)


def page(folder: Path) -> str:
    """For docs/benchmarks.md: everything that was measured on GPUs, and where peers win."""
    runs = complete_runs(folder)
    if not runs:
        return "No complete run on a GPU is recorded. `make gpu-check` records one."
    return "\n\n".join(part for run in runs for part in _page(run))


def _page(run: Run) -> Iterator[str]:
    v = run["versions"]
    yield f"### {run['device']}"
    yield (
        f"{run['date'][:10]}, [{run['file']}](../benchmarks/results/{run['file']}): torch "
        f"{v['torch']}, CUDA {v['cuda']}, Triton {v['triton']}, driver {run['driver']}, commit "
        f"{run['commit'][:12]}; {_tests(run)}. {_targets(run)} The default backend is "
        f"`{_default(run)}`."
    )
    yield "Kernels, in percent of the bandwidth of a copy of as many bytes (default backend):"
    yield _kernels(run)
    yield "DPO loss of the linear head, in ms, and ours in percent of the bare products:"
    yield _heads(run)
    if head := run["figures"].get("head"):
        yield (
            "The linear head of Llama-3 (hidden size 4096, vocabulary 128256, 16 sequences of 1024 "
            "tokens, half scored) by memory budget; `reference` has no gradients:"
        )
        yield _budgets(head)
        yield from _head_notes(head)
    if steps := run["figures"].get("step"):
        yield "A whole training step (forward, loss, backward, AdamW), reference log-probs given:"
        yield _steps(steps)
    if rows := {n: r for n, r in run["figures"].get("profile", {}).items() if "us" in r}:
        yield (
            "What the hardware's counters say of each kernel (Nsight Compute, bf16): percent "
            "of DRAM's peak, of issue slots and of special functions, and what warps that cannot "
            "issue wait for, in warps an issue:"
        )
        yield _profile(rows)
    yield "Where peers win on this GPU:"
    yield peers_win(run)


def peers_win(run: Run) -> str:
    """Cases in which a peer's median is below ours, as a list; both errors against float64."""
    lines = []
    for case, group in results.by_case(_peers(run)).items():
        ours = _ours(group, (_default(run),))
        if ours is None:
            continue
        ahead = [r for r in group if not r["ours"] and 0 < r.get("seconds", 0) < ours["seconds"]]
        if ahead:
            ahead.sort(key=lambda r: r["seconds"])
            faster = ", ".join(f"{r['provider']} {_timed(r)}" for r in ahead)
            lines.append(f"- {results.shown(case)}: {faster}; ours {_timed(ours)}")
    for name, row in run["figures"].get("host", {}).items():
        if row["us"] > row["plain torch us"]:
            lines.append(
                f"- host time of a tiny batch {name}: plain torch {row['plain torch us']:.0f} us; "
                f"ours {row['us']:.0f} us"
            )
    for name, row in run["figures"].get("rows", {}).items():
        if name.startswith(_default(run)) and row["ms"] > row["plain torch ms"]:
            lines.append(
                f"- forward of {name.partition(' ')[2]} x 128256: plain torch "
                f"{row['plain torch ms']:.3g} ms; ours {row['ms']:.3g} ms"
            )
    for name, row in run["figures"].get("step", {}).items():
        if row.get("of plain torch", 0) > 1:
            lines.append(
                f"- a whole training step, {name}: {row['of plain torch']:.2f} times "
                "the time of plain torch"
            )
    return "\n".join(lines) or "- In no case of this run."


# ---- parts --------------------------------------------------------------------------------------


def _short(device: str) -> str:
    """`NVIDIA H100 80GB HBM3` -> `H100`."""
    return next((w for w in device.split() if re.fullmatch(r"[A-Z]+\d+\w*", w)), device)


def _tests(run: Run) -> str:
    counts = run["tests"]["counts"]
    said = ", ".join(f"{counts[w]} {w}" for w in ("passed", "failed", "skipped") if counts.get(w))
    parts = [f"tests: {said}"]
    ends = [s["outcome"].split(" after")[0] for n, s in run["steps"].items() if SANITIZER.match(n)]
    if ends:
        found = ", ".join(f"{ends.count(end)} {end}" for end in dict.fromkeys(sorted(ends)))
        parts.append(f"compute-sanitizer runs: {found}")
    cut = [
        name.removeprefix("figures ")
        for name, step in run["steps"].items()
        if name.startswith("figures ") and step["outcome"] != "passed"
    ]
    if cut:
        parts.append(f"figures cut short: {', '.join(cut)}")
    return "; ".join(parts)


def _targets(run: Run) -> str:
    judged = [r["met"] for rows in run["figures"].values() for r in rows.values() if "met" in r]
    return f"{sum(judged)} of {len(judged)} figures meet their target." if judged else ""


def _size(rows: list[dict[str, Any]]) -> str:
    """`1024 tokens in 2 pairs, 50% scored`, of the linear head's cases."""
    cases = [r["case"] for r in rows if r["suite"] in HEADS and not r.get("series")]
    return "; ".join(dict.fromkeys(re.sub(r"^.*?(\d+ tokens)", r"\1", case) for case in cases))


def _default(run: Run) -> str:
    names = " ".join(run["figures"].get("kernels", {}))
    return next((b for b in DEFAULT if f" {b} " in names), DEFAULT[0])


def _peers(run: Run) -> list[dict[str, Any]]:
    return list(run["figures"].get("peers", {}).values())


def _ours(group: list[dict[str, Any]], backends: tuple[str, ...]) -> dict[str, Any] | None:
    """Our row of a case as a user gets it by default."""
    names = [f"dpo-kernels {b}" for b in backends] + ["dpo-kernels"]
    return next((r for r in group if r["provider"] in names and r.get("seconds")), None)


def _ms(row: dict[str, Any] | None) -> str:
    """Three digits, without an exponent."""
    if row is None:
        return "-"
    ms = row["seconds"] * 1e3
    return f"{ms:.0f}" if ms >= 100 else f"{ms:.3g}"


def _timed(row: dict[str, Any]) -> str:
    error = "" if row["error"] is None else f" (error {row['error']:.0e})"
    return f"{_ms(row)} ms{error}"


def _head_rows(rows: list[dict[str, Any]], backends: tuple[str, ...]) -> Iterator[str]:
    """A line of the linear head's table for each case, after the device."""
    heads = [r for r in rows if r["suite"] in HEADS and not r.get("series")]
    for group in results.by_case(heads).values():
        if ours := _ours(group, backends):
            theirs = [_ms(_first(group, names)) for names in PEERS.values()]
            what = f"{ours['model']} {ours['dtype']}, {ours['suite'].removeprefix('linear ')}"
            yield f"{what} | {_ms(ours)} | {' | '.join(theirs)} |"


def _first(group: list[dict[str, Any]], names: tuple[str, ...]) -> dict[str, Any] | None:
    timed = {r["provider"]: r for r in group if r.get("seconds")}
    return next((timed[name] for name in names if name in timed), None)


def _heads(run: Run) -> str:
    lines = [
        f"| case | ours | of the products | {' | '.join(PEERS)} |",
        "|---|---|---|" + "---|" * len(PEERS),
    ]
    for case, group in results.by_case(r for r in _peers(run) if r["suite"] in HEADS).items():
        if ours := _ours(group, (_default(run),)):
            floor = f"{100 * ours['floor'] / ours['seconds']:.0f} %" if ours["floor"] else "-"
            theirs = [_ms(_first(group, names)) for names in PEERS.values()]
            lines.append(f"| {case} | {_ms(ours)} | {floor} | {' | '.join(theirs)} |")
    return "\n".join(lines)


def _budgets(head: dict[str, dict[str, float]]) -> str:
    lines = ["| | ms | times the bare products | peak MiB |", "|---|---|---|---|"]
    for name, r in head.items():
        if "of the products" in r:
            peak = f"{r['MiB']:.0f}" if "MiB" in r else "-"
            lines.append(f"| {name} | {r['ms']:.1f} | {r['of the products']:.2f} | {peak} |")
    return "\n".join(lines)


def _head_notes(head: dict[str, dict[str, Any]]) -> Iterator[str]:
    """Where the head's time goes, and what logits in bf16 would save."""
    kinds = {n.partition(",")[0]: r for n, r in head.items() if "launches" in r}
    if kinds:
        columns = [c for c in next(iter(kinds.values())) if c != "launches"]
        lines = [f"| default budget, ms | {' | '.join(columns)} | launches |"]
        lines.append("|---|---|" + "---|" * len(columns))
        lines += [
            f"| {name} | {' | '.join(f'{r[c]:.2f}' for c in columns)} | {r['launches']} |"
            for name, r in kinds.items()
        ]
        yield "Where that time goes, by kind of kernel (torch's profiler):"
        yield "\n".join(lines)
    rounded = {n.partition(",")[0]: r for n, r in head.items() if "percent saved" in r}
    if rounded:
        saved = ", ".join(f"{n} {r['percent saved']:.1f} %" for n, r in rounded.items())
        yield (
            "Logits that the product rounds to bf16 would save so much of its products and row "
            f"kernels: {saved}. An option would have to save 10 %."
        )


def _profile(rows: dict[str, dict[str, Any]]) -> str:
    lines = [
        "| kernel | us | instructions an element | DRAM | issue | special | warps wait for |",
        "|---|---|---|---|---|---|---|",
    ]
    for name, r in rows.items():
        percents = [
            r[f"percent of {w}"] for w in ("DRAM's peak", "issue slots", "special functions")
        ]
        cells = [f"{r['us']:.0f}", f"{r['instructions an element']:.1f}"]
        cells += [f"{p:.0f} %" for p in percents] + [r["warps wait for"].replace("_", " ")]
        lines.append(f"| {name} | {' | '.join(cells)} |")
    return "\n".join(lines)


def _kernels(run: Run) -> str:
    """Models down, calls across; the KL is Triton's whatever the default is."""
    percent: dict[str, dict[str, float]] = {}
    for name, row in run["figures"].get("kernels", {}).items():
        if found := re.match(r"(.+ \d+ x \d+) (cuda|triton) (.+)$", name):
            shape, backend, call = found.groups()
            if backend == _default(run) or call.startswith("KL"):
                percent.setdefault(shape, {})[call] = row["percent of copy"]
    lines = [f"| bf16 logits | {' | '.join(CALLS)} |", "|---|" + "---|" * len(CALLS)]
    for shape, row in percent.items():
        cells = [f"{row[c]:.0f} %" if c in row else "-" for c in CALLS]
        lines.append(f"| {shape} | {' | '.join(cells)} |")
    return "\n".join(lines)


def _steps(steps: dict[str, dict[str, float]]) -> str:
    lines = ["| | ms | tokens/s | peak MiB |", "|---|---|---|---|"]
    lines += [
        f"| {name} | {r['ms']:.0f} | {r['tokens/s']:.0f} | {r['peak MiB']:.0f} |"
        for name, r in steps.items()
    ]
    return "\n".join(lines)


def _sentence(run: Run) -> str:
    """The README's sentences on the size of its cases, the kernels and the whole step."""
    said, name = [f"{_short(run['device'])}: {_size(_peers(run))}."], f" {_default(run)} "
    shapes = [n.partition(name)[0] for n in run["figures"].get("kernels", {}) if name in n]
    shape = next((s for s in shapes if s.startswith("Llama-3")), next(iter(shapes), ""))
    kernels = {
        call: run["figures"].get("kernels", {}).get(f"{shape}{name}{call}")
        for call in ("forward", "backward in place")
    }
    if all(kernels.values()):
        found = ", ".join(f"{c} {r['percent of copy']:.0f} %" for c, r in kernels.items() if r)
        said.append(f"Of a copy's bandwidth: {found} ({shape}, bf16).")
    steps = run["figures"].get("step", {})
    if {"plain torch", "linear"} <= set(steps):
        ours, plain = steps["linear"], steps["plain torch"]
        said.append(
            f"Training step of a 1B Llama: {ours['tokens/s']:.0f} tokens/s, peak "
            f"{ours['peak MiB']:.0f} MiB; plain torch {plain['tokens/s']:.0f} and "
            f"{plain['peak MiB']:.0f}."
        )
    return " ".join(said)


# ---- predicted and measured ---------------------------------------------------------------------

# kernel of tests/proof/sass.json -> the figure of a run on Llama-3's vocabulary
MEASURED = {
    "forward bf16": "forward",
    "forward stats bf16": "statistics",
    "forward softcap bf16": "softcap",
    "forward fp32": "forward, fp32",
    "backward bf16": "backward in place",
    "backward softcap bf16": "backward in place, softcap",
    "backward fp32": "backward in place, fp32",
    "backward fp32 to bf16": "backward, fp32 to bf16",
    "kl forward bf16": "KL",
    "kl backward bf16": "KL backward",
}


def speed(folder: Path, root: Path) -> str:
    """What the model of the machine code predicts, beside what a run of these sources measured."""
    predicted = json.loads((root / "tests/proof/sass.json").read_text())["kernels"]
    runs = complete_runs(folder)
    devices = {
        name: next((run for run in runs if name in run["device"]), None)
        for name in ("H100", "H200")
    }
    lines = [
        "| kernel | instructions | issue / copy | H100 predicted | measured | H200 predicted "
        "| measured |",
        "|---|---|---|---|---|---|---|",
    ]
    errors: dict[str, list[float]] = {name: [] for name in devices}
    for name, row in predicted.items():
        backend, _, kernel = name.partition(" ")
        if kernel not in MEASURED:
            continue
        cells = [name, str(row["instructions"]), f"{row['issue H100']:.2f}"]
        for device, run in devices.items():
            guess = row[f"percent {device}"]
            found = measured(run, backend, kernel, root)
            cells += [f"{guess} %", "-" if found is None else f"{found:.0f} %"]
            if found is not None:
                errors[device].append(guess - found)
        lines.append(f"| {' | '.join(cells)} |")
    told = [
        f"{name} {sum(map(abs, e)) / len(e):.0f} points in the mean, {max(map(abs, e)):.0f} at most"
        for name, e in errors.items()
        if e
    ]
    said = "; ".join(told) if told else "no complete run of these sources"
    return "\n".join([*lines, "", f"The model's error: {said}."])


def measured(run: Run | None, backend: str, kernel: str, root: Path) -> float | None:
    """Percent of the copy bandwidth in a run, if its kernel's sources are those of this tree."""
    if run is None:
        return None
    family = "token_kl" if "kl" in kernel else "token_logps"
    if backend == "cuda" and "backward" in kernel:
        family += "_backward"
    sources = run["kernels"].get(f"{backend}/{family}", {}).get("sources", {})
    for name, digest in sources.items():
        places = (root / "csrc" / name, root / "dpo_kernels/backends" / name)
        now = next((p for p in places if p.is_file()), None)
        if now is None or hashlib.sha256(now.read_bytes()).hexdigest() != digest:
            return None
    figures = run["figures"].get("kernels", {})
    row = figures.get(f"Llama-3 4096 x 128256 {backend} {MEASURED[kernel]}")
    return None if row is None or not sources else row["percent of copy"]
