"""`dpo-kernels run -- COMMAND`: what it hands on, what it patches, and what it says."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

import dpo_kernels
from dpo_kernels.cli import main
from dpo_kernels.integrations import at_start

ROOT = Path(dpo_kernels.__file__).parent.parent
HOOK = at_start.FOLDER / "sitecustomize.py"
UNKNOWN = "class DPOTrainer:\n    def __init__(self, model): ...\n    def step(self, batch): ...\n"


def python(code: str, path: list[Path], **variables: str) -> subprocess.CompletedProcess:
    """A Python as `run` starts it."""
    env = {k: v for k, v in os.environ.items() if k != "PYTHONPATH"}
    env["PYTHONPATH"] = os.pathsep.join(map(str, [at_start.FOLDER, *path]))
    return subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, env={**env, **variables}
    )


def fake_trl(folder: Path, source: str) -> Path:
    (folder / "trl" / "trainer").mkdir(parents=True)
    for package in (folder / "trl", folder / "trl" / "trainer"):
        (package / "__init__.py").write_text("")
    (folder / "trl" / "trainer" / "dpo_trainer.py").write_text(source)
    return folder


def test_a_command_gets_its_arguments_and_gives_its_exit_code(capfd):
    code = "import sys; print(sys.argv[1:]); sys.exit(7)"
    given = ["--max-length", "5", "--", "-x", "a b"]
    assert main(["run", "--share-prefix", "--", sys.executable, "-c", code, *given]) == 7
    out, error = capfd.readouterr()
    assert out.strip() == str(given)
    assert "nothing was fused: the command imported no DPO trainer" in error


def test_the_options_reach_the_processes_below(capfd):
    inner = "import os; print(os.environ['DPO_KERNELS_RUN'])"
    code = f"import subprocess, sys; subprocess.run([sys.executable, '-c', {inner!r}], check=True)"
    options = ["--share_prefix", "--on_bypass", "warn", "--memory_budget", "9", "--no_head_stats"]
    options += ["--no_check_first_step"]
    assert main(["run", *options, "--", sys.executable, "-c", code]) == 0
    told = json.loads(capfd.readouterr().out)
    assert told["share_prefix"] and not told["head_stats"] and told["check_reference"]
    assert not told["check_first_step"]
    assert told["on_bypass"] == "warn" and told["memory_budget"] == 9 and told["backend"] is None


@pytest.mark.parametrize(
    ("argv", "said", "expected"),
    [
        (["run"], "run needs a command behind --", 2),
        (["run", "python"], "unrecognized arguments: python", 2),
        (["run", "--", "no-such-program"], "no program 'no-such-program' on PATH", 127),
    ],
)
def test_mistakes_are_one_line(argv, said, expected, capsys):
    assert main(argv) == expected
    error = capsys.readouterr().err
    assert said in error and error.count("\n") == 1


def test_a_script_that_does_not_start_is_one_line(tmp_path, capsys):
    script = tmp_path / "train.sh"
    script.write_text("echo there is no line that names its shell\n")
    script.chmod(0o755)
    assert main(["run", "--", str(script)]) == 126
    error = capsys.readouterr().err
    assert f"{script} does not start" in error and error.count("\n") == 1


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT, signal.SIGUSR1, signal.SIGHUP])
def test_a_signal_goes_on_to_the_command(number, tmp_path):
    """Job managers send some of these to the process that they started alone."""
    started = tmp_path / "started"
    code = (
        "import signal, time; signal.signal(signal.SIGINT, signal.SIG_DFL)\n"
        f"open({str(started)!r}, 'w').close(); time.sleep(60)"
    )
    command = [sys.executable, "-m", "dpo_kernels", "run", "--", sys.executable, "-c", code]
    env = {**os.environ, "PYTHONPATH": str(ROOT)}
    before = signal.signal(number, signal.SIG_DFL)  # a shell's background job ignores SIGINT
    # A session of its own: no terminal's interrupt would reach the command by itself.
    child = subprocess.Popen(command, env=env, start_new_session=True)
    signal.signal(number, before)
    while not started.exists() and child.poll() is None:
        time.sleep(0.05)
    child.send_signal(number)
    assert child.wait(timeout=60) == 128 + number


def test_another_sitecustomize_runs_too(tmp_path):
    (tmp_path / "sitecustomize.py").write_text("import sys; sys.was_here = True")
    code = "import sys, sitecustomize; print(sys.was_here, sitecustomize.__file__, sys.path)"
    done = python(code, [tmp_path], DPO_KERNELS_RUN="{}")
    assert done.returncode == 0, done.stderr
    assert "True" in done.stdout and str(tmp_path) in done.stdout
    assert str(at_start.FOLDER) not in done.stdout


def test_it_loads_nothing_before_a_trainer_is_imported():
    code = "import sys; print({'torch', 'dpo_kernels', 'transformers'} & set(sys.modules))"
    assert python(code, [ROOT], DPO_KERNELS_RUN="{}").stdout.strip() == "set()"


def test_a_trainer_of_unknown_shape_is_told_when_it_is_imported(tmp_path):
    fake_trl(tmp_path, UNKNOWN)
    done = python("import trl.trainer.dpo_trainer", [tmp_path, ROOT], DPO_KERNELS_RUN="{}")
    assert done.returncode != 0 and "AttributeError" not in done.stderr
    last = done.stderr.strip().splitlines()[-1]
    assert "its DPOTrainer has no shape that is known here" in last and "Nothing was" in last


def test_without_the_option_nothing_is_patched(tmp_path):
    fake_trl(tmp_path, UNKNOWN)
    assert python("import trl.trainer.dpo_trainer", [tmp_path, ROOT]).returncode == 0


def test_a_python_without_the_package_is_told(tmp_path):
    fake_trl(tmp_path, UNKNOWN)
    lonely = "import sys; sys.modules['dpo_kernels'] = None; import trl.trainer.dpo_trainer"
    done = python(lonely, [tmp_path], DPO_KERNELS_RUN="{}")
    assert "cannot import dpo_kernels" in done.stderr and "install it where" in done.stderr


def test_the_hook_and_the_command_have_the_same_names():
    text = HOOK.read_text()
    assert f'OPTIONS = "{at_start.OPTIONS}"' in text
