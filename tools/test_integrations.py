"""Run tests/integrations against several releases of the frameworks, each in a venv of its own.

    python tools/test_integrations.py [NAME ...] [--list] [--record]

The venvs live in build/integrations/NAME and are made once. torch is pinned first, from
constraints.txt: left to itself pip takes the newest CUDA build. `--record` writes what ran, with
versions, to docs/integrations-tested.md.
"""

from __future__ import annotations

import argparse
import re
import subprocess
import sys
import time
import venv
from pathlib import Path

ROOT = Path(__file__).parent.parent
VENVS = ROOT / "build" / "integrations"
RECORD = ROOT / "docs" / "integrations-tested.md"

# name -> requirements besides torch and pytest: the ends of each supported range. What comes with
# --no-deps is read, not run: its own requirements (DeepSpeed, torchvision, ...) stay out.
MATRIX = {
    "trl-1.16": ["trl==1.16.0", "peft==0.21.2", "transformers==5.23.0", "lightning==2.6.6"],
    "trl-1.9": ["trl==1.9.0", "peft==0.21.2", "transformers==5.23.0"],
    "trl-1.0": ["trl==1.0.0", "peft==0.21.2", "transformers==5.23.0"],
    "trl-0.24": ["trl==0.24.0", "peft==0.17.1", "transformers==4.57.6"],
    "trl-0.18": ["trl==0.18.2", "peft==0.15.2", "transformers==4.53.3", "datasets<4"],
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
# What an environment runs, where that is not the whole folder.
ONLY = {"recipes": "test_recipes.py"}
SHOWN = (
    "torch",
    "trl",
    "transformers",
    "peft",
    "accelerate",
    "lightning",
    "llamafactory",
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
    alone = [w.split()[1] for w in MATRIX[name] if w.startswith("--no-deps")]
    rest = [w for w in MATRIX[name] if not w.startswith("--no-deps")]
    subprocess.run([*pip, torch[0], "pytest>=8", *rest], check=True)
    if alone:
        subprocess.run([*pip, "--no-deps", *alone], check=True)
    stamp.write_text(wanted)
    return python


def test(name: str) -> dict[str, str]:
    """Run the folder; the result as the table shows it. Its output goes to NAME.log."""
    python = prepare(name)
    log = VENVS / f"{name}.log"
    what = f"tests/integrations/{ONLY.get(name, '')}"
    start = time.monotonic()
    with log.open("w") as out:
        # From the source tree: `_C`, built for this Python, is there; the rest is Python.
        done = subprocess.run(
            [python, "-m", "pytest", "-q", "-W", "ignore", what, "-p", "no:cacheprovider"],
            cwd=ROOT,
            stdout=out,
            stderr=subprocess.STDOUT,
            env={
                "PYTHONPATH": str(ROOT),
                "PATH": f"{python.parent}:/usr/bin:/bin",
                "HF_HUB_OFFLINE": "1",
                "HOME": str(VENVS),
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
    known: dict[str, str] = {}
    if RECORD.exists():
        for line in RECORD.read_text().splitlines():
            if line.startswith("| `"):
                known[line.split("`")[1]] = line
    day = time.strftime("%Y-%m-%d")
    for r in rows:
        known[r["name"]] = (
            f"| `{r['name']}` | {r['versions']} | {r['passed']} | {r['failed']} | {r['skipped']} | "
            f"{day} |"
        )
    head = [
        "# Integrations: what was tested",
        "",
        "Written by `make test-integrations`; a skip names its reason in the log that it leaves.",
        "",
        "| environment | versions | passed | failed | skipped | on |",
        "|---|---|---|---|---|---|",
    ]
    lines = [known[name] for name in MATRIX if name in known]
    RECORD.write_text("\n".join([*head, *lines]) + "\n")


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
