"""Run tests/integrations against several releases of the frameworks, each in a venv of its own.

    python tools/test_integrations.py [NAME ...] [--list] [--record]

The venvs live in build/integrations/NAME and are made once. torch is pinned first, from
constraints.txt: left to itself pip takes the newest CUDA build. An environment of a client also
runs that client's own training command, as it is and below `dpo-kernels run`, and compares losses,
memory and time. `--record` writes what ran, with versions, to docs/integrations-tested.md.
"""

from __future__ import annotations

import argparse
import json
import re
import subprocess
import sys
import tempfile
import time
import venv
from pathlib import Path

ROOT = Path(__file__).parent.parent
VENVS = ROOT / "build" / "integrations"
RECORD = ROOT / "docs" / "integrations-tested.md"

# name -> requirements besides torch and pytest: the ends of each supported range, and TRL on both
# sides of its changes of shape. What comes with --no-deps is read, not run: its own requirements
# (DeepSpeed, torchvision, ...) stay out. --without is taken out again: PyPI has it for CUDA alone,
# and beside a CPU build of torch it does not load; --empty puts an empty module in such a place.
MATRIX = {
    "trl-1.16": ["trl==1.16.0", "peft==0.21.2", "transformers==5.23.0", "lightning==2.6.6"],
    "trl-1.9": ["trl==1.9.0", "peft==0.21.2", "transformers==5.23.0"],
    "trl-1.0": ["trl==1.0.0", "peft==0.21.2", "transformers==5.23.0"],
    "trl-0.29": ["trl==0.29.1", "peft==0.18.1", "transformers==4.57.6"],
    "trl-0.25": ["trl==0.25.1", "peft==0.18.1", "transformers==4.57.6"],
    "trl-0.24": ["trl==0.24.0", "peft==0.17.1", "transformers==4.57.6"],
    "trl-0.18": ["trl==0.18.2", "peft==0.15.2", "transformers==4.53.3", "datasets<4"],
    "llamafactory": [
        "llamafactory==0.9.5",
        "--without torchvision",
        "--without torchaudio",
        "--empty torchaudio",
    ],
    "ms-swift": ["ms-swift==4.6.0", "trl==0.29.1"],
    "axolotl": ["axolotl==0.19.0"],
    "recipes": [
        "trl==0.24.0",
        "transformers==4.57.6",
        "peft==0.18.1",
        "accelerate==1.11.0",
        "datasets<=4.0.0",
        "omegaconf",
        "einops",
        "matplotlib",
        "pydantic",
        "scipy",
        "pandas",
        "tyro<0.9",
        "--no-deps llamafactory==0.9.5",
        "--no-deps openrlhf==0.11.2",
        "--no-deps torchtune==0.6.1",
    ],
    "lightning-2.4": ["lightning==2.4.0", "transformers==4.51.3", "accelerate==1.6.0"],
}
# What an environment runs, where that is not the whole folder. Of the pages a client's own alone:
# it changes TRL and transformers when it is imported, or has a pair of them that does not train.
COMMANDS, RECIPE = "test_client_commands.py", "test_recipes.py::test_recipe"
ONLY = {
    "recipes": ["test_recipes.py"],
    "llamafactory": [COMMANDS, f"{RECIPE}[LLaMA-Factory-0]", "test_llamafactory.py"],
    "ms-swift": [COMMANDS, f"{RECIPE}[ms-swift-0]", "test_swift.py"],
    "axolotl": [COMMANDS, f"{RECIPE}[axolotl-0]"],
}
# Whose own training command an environment runs.
CLIENTS = {"llamafactory": "llamafactory", "ms-swift": "swift", "axolotl": "axolotl"}
CLIENTS |= {"trl-1.16": "trl"}
SHOWN = (
    "torch",
    "trl",
    "transformers",
    "peft",
    "accelerate",
    "lightning",
    "llamafactory",
    "ms-swift",
    "axolotl",
    "openrlhf",
    "torchtune",
)


def prepare(name: str) -> Path:
    """The venv's Python, its packages installed."""
    folder = VENVS / name
    python, stamp = folder / "bin" / "python", folder / ".ready"
    wanted = "\n".join(MATRIX[name])
    if stamp.exists() and stamp.read_text() == wanted:
        return python
    venv.create(folder, with_pip=True, clear=True)
    torch = re.search(r"^torch==\S+", (ROOT / "constraints.txt").read_text(), re.MULTILINE)
    assert torch is not None, "constraints.txt pins torch"
    pip = [str(python), "-m", "pip", "--disable-pip-version-check", "install", "-q"]
    subprocess.run([*pip, torch[0]], check=True)
    marked: dict[str, list[str]] = {"--no-deps": [], "--without": [], "--empty": []}
    for word in MATRIX[name]:
        if word.startswith("--"):
            marked[word.split()[0]].append(word.split()[1])
    rest = [w for w in MATRIX[name] if not w.startswith("--")]
    subprocess.run([*pip, torch[0], "pytest>=8", "pyyaml", "matplotlib", *rest], check=True)
    if marked["--no-deps"]:
        subprocess.run([*pip, "--no-deps", *marked["--no-deps"]], check=True)
    if marked["--without"]:
        subprocess.run([*pip[:-2], "uninstall", "-q", "-y", *marked["--without"]], check=True)
    for module in marked["--empty"]:
        (next(folder.glob("lib/python*/site-packages")) / f"{module}.py").touch()
    stamp.write_text(wanted)
    return python


def test(name: str) -> dict[str, str]:
    """Run the folder; the result as the table shows it. Its output goes to NAME.log."""
    python = prepare(name)
    log = VENVS / f"{name}.log"
    what = [f"tests/integrations/{file}" for file in ONLY.get(name, [""])]
    measured = VENVS / f"{name}.commands"
    measured.unlink(missing_ok=True)
    start = time.monotonic()
    with log.open("w") as out:
        # From the source tree: `_C`, built for this Python, is there; the rest is Python.
        done = subprocess.run(
            [python, "-m", "pytest", "-q", "-W", "ignore", *what, "-p", "no:cacheprovider"],
            cwd=ROOT,
            stdout=out,
            stderr=subprocess.STDOUT,
            env={
                "PYTHONPATH": str(ROOT),
                "PATH": f"{python.parent}:/usr/bin:/bin",
                "HF_HUB_OFFLINE": "1",
                "HOME": str(VENVS),
                "TMPDIR": tempfile.gettempdir(),
                "OMP_NUM_THREADS": "1",
                "CLIENTS": CLIENTS.get(name, ""),
                "CLIENT_RECORD": str(measured),
            },
        )
    lines = log.read_text().strip().splitlines()
    print(f"{name}: {lines[-1] if lines else 'no output'} ({log})", flush=True)
    code = (
        "import importlib.metadata as m, sys\nfor p in sys.argv[1:]:\n"
        "  try: print(p, m.version(p))\n  except m.PackageNotFoundError: pass"
    )
    found = subprocess.run([python, "-c", code, *SHOWN], capture_output=True, text=True).stdout
    counts = {k: v for v, k in re.findall(r"(\d+) (passed|failed|skipped|error)", lines[-1])}
    return {
        "name": name,
        "versions": ", ".join(found.split("\n")[:-1]),
        **{k: counts.get(k, "0") for k in ("passed", "failed", "skipped")},
        "seconds": f"{time.monotonic() - start:.0f}",
        "ok": "yes" if done.returncode == 0 else "NO",
    }


def record(rows: list[dict[str, str]]) -> None:
    """Rows by name over those recorded earlier."""
    tests: dict[str, str] = {}
    commands: dict[str, list[str]] = {}
    if RECORD.exists():
        for line in RECORD.read_text().splitlines():
            if line.startswith("| `"):
                tests[line.split("`")[1]] = line
            elif line.startswith("| ") and " `" in line:
                commands.setdefault(line.split("`")[1], []).append(line)
    day = time.strftime("%Y-%m-%d")
    for r in rows:
        tests[r["name"]] = (
            f"| `{r['name']}` | {r['versions']} | {r['passed']} | {r['failed']} | {r['skipped']} | "
            f"{day} |"
        )
        measured = VENVS / f"{r['name']}.commands"
        if measured.exists():
            found = [json.loads(line) for line in measured.read_text().splitlines()]
            commands[r["name"]] = [_command_row(r["name"], row, day) for row in found]
    head = [
        "# Integrations: what was tested",
        "",
        "Written by `make test-integrations`; a skip names its reason in the log that it leaves.",
        "",
        "| environment | versions | passed | failed | skipped | on |",
        "|---|---|---|---|---|---|",
    ]
    lines = [*head, *(tests[name] for name in MATRIX if name in tests)]
    if commands:
        lines += [
            "",
            "## Training commands",
            "",
            "Each client's own command, as it is and below `dpo-kernels run`: a Llama of two "
            "layers with 32,000 tokens, 60 pairs, one thread of a CPU, both in one run. The loss's "
            "difference is the largest of all steps; a bf16 run is held to twice the distance of "
            "the plain bf16 run from the plain fp32 one. Memory is the peak of training over what "
            "the process held before it; the ratios are plain to fused. CPU time is that of all "
            "threads of the process while it trains, time the clock's; on a shared machine the "
            "clock says little.",
            "",
            "| command | environment | steps | fused calls | trunk | difference of the loss | "
            "memory | CPU time | time | on |",
            "|---|---|---|---|---|---|---|---|---|---|",
            *(line for name in MATRIX for line in commands.get(name, [])),
        ]
    RECORD.write_text("\n".join(lines) + "\n")


def _command_row(name: str, row: dict, day: str) -> str:
    plain, fused = row["megabytes"]
    return (
        f"| {row['case']} | `{name}` | {row['steps']} | {row['calls']} | {row['trunk']} | "
        f"{row['difference']:.1e} | {plain:.0f} to {fused:.0f} MiB, {row['memory']:.1f}x | "
        f"{row['cpu']:.1f}x | {row['time']:.1f}x | {day} |"
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("names", nargs="*", help="environments to run; all if none")
    parser.add_argument("--list", action="store_true")
    parser.add_argument("--record", action="store_true")
    options = parser.parse_args()
    if options.list:
        print("\n".join(f"{name}: {', '.join(what)}" for name, what in MATRIX.items()))
        return
    unknown = set(options.names) - set(MATRIX)
    if unknown:
        parser.error(f"no environment {', '.join(unknown)}; expected some of {', '.join(MATRIX)}")
    rows = [test(name) for name in options.names or MATRIX]
    if options.record:
        record(rows)
    sys.exit(any(row["ok"] != "yes" for row in rows))


if __name__ == "__main__":
    main()
