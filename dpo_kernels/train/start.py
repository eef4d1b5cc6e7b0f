"""What can be found out before anything is loaded or written: processes, device, model, folder."""

from __future__ import annotations

import contextlib
import os
import shutil
from collections.abc import Callable
from datetime import datetime
from pathlib import Path
from typing import Any

import torch

from ..data import Limits
from .checkpoints import run_of
from .config import DPOTrainConfig, UserError
from .console import Console

# What a run writes into its folder.
RUN_FILES = (
    "config.yaml",
    "metrics.jsonl",
    "sft_metrics.jsonl",
    "left_out.jsonl",
    "surprising_pairs.jsonl",
    "training.png",
    "report.html",
    "model",
    "checkpoints",
    "tensorboard",
    "wandb",
    "summary.json",
)


def refuse_many_processes(command: str = "this command") -> None:
    """Launchers that start several processes say so in the environment."""
    for name in ("WORLD_SIZE", "OMPI_COMM_WORLD_SIZE", "PMI_SIZE"):
        if os.environ.get(name, "1") not in ("", "1"):
            raise UserError(
                f"one process only: a launcher started {os.environ[name]} ({name}), and {command} "
                "runs in one"
            )


def check_launcher() -> None:
    """`UserError` for processes that a launcher started without torchrun's variables."""
    for name in ("OMPI_COMM_WORLD_SIZE", "PMI_SIZE"):
        if os.environ.get(name, "1") not in ("", "1") and "WORLD_SIZE" not in os.environ:
            raise UserError(
                f"a launcher started {os.environ[name]} processes ({name}) which do not know each "
                "other: let it start torchrun, once a node"
            )
    if os.environ.get("WORLD_SIZE", "1") not in ("", "1"):
        missing = [n for n in ("RANK", "MASTER_ADDR", "MASTER_PORT") if n not in os.environ]
        if missing:
            raise UserError(
                f"one process only: WORLD_SIZE={os.environ['WORLD_SIZE']} without "
                f"{', '.join(missing)}; start several processes by torchrun --nproc-per-node N "
                "-m dpo_kernels train ..."
            )


def quiet_bars(console: Console) -> None:
    """A log file needs no bars of loading and saving."""
    if not console.is_terminal:
        from transformers.utils import logging

        logging.disable_progress_bar()


def check_device(name: str) -> None:
    """The option `device` names a device that works here."""
    if name == "auto":
        return
    try:
        device = torch.device(name)
        if device.type == "meta":
            raise RuntimeError("it holds no values")
        torch.empty(1, device=device)
    except Exception as error:  # each build of torch has an error of its own for this
        first = (str(error).strip().splitlines() or [type(error).__name__])[0]
        raise UserError(f"device: {name!r} cannot be used here: {first}") from None


def find_model(name: str, option: str = "model_name_or_path") -> str:
    """`name`, or the folder of the cache that holds it where the hub cannot be reached.

    transformers asks the hub again and again before it gives up, for each file; one question
    tells as much.
    """
    path = Path(name).expanduser()
    if path.exists() or path.suffix == ".gguf":
        return str(path)
    if name.startswith(("/", ".", "~")) or name.count("/") > 1:  # no name of the hub
        raise UserError(f"{option}: {name} cannot be loaded: there is no such folder")
    from huggingface_hub import constants, snapshot_download
    from huggingface_hub.utils import get_session

    why = "HF_HUB_OFFLINE is set"
    if not constants.HF_HUB_OFFLINE:
        try:
            get_session().head(constants.ENDPOINT, timeout=10)
            return name
        except Exception as error:  # requests' or httpx's, by the hub's version
            why = (str(error).strip().splitlines() or [type(error).__name__])[0]
    try:
        return snapshot_download(name, local_files_only=True)
    except Exception:
        raise UserError(
            f"{option}: {name} cannot be loaded: there is no such folder here, it is not "
            f"in the cache ({constants.HF_HUB_CACHE}), and {constants.ENDPOINT} cannot be reached "
            f"({why})"
        ) from None


def model_limits(name: str, gguf_file: str | None, say: Callable[[str], None]) -> Limits:
    """What the model can be fed, from its configuration alone."""
    from transformers import AutoConfig

    path = Path(name)
    source = {"gguf_file": gguf_file} if gguf_file else {}
    if path.suffix == ".gguf" and not gguf_file:
        name, source = str(path.parent), {"gguf_file": path.name}
    try:
        return Limits.of(AutoConfig.from_pretrained(name, **source))
    except Exception as error:  # a folder of a tokenizer alone, or code that is not to be run
        first = (str(error).strip().splitlines() or [type(error).__name__])[0]
        say(f"token ids and positions are not checked: no configuration of a model ({first})")
        return Limits()


class RunFolder:
    """The folder of a run: checked at the start, made when there is something to write."""

    def __init__(self, config: DPOTrainConfig, resumed: Path | None = None) -> None:
        """`resumed`: the checkpoint to go on from, whose run's folder is this one or another."""
        self.path = Path(
            config.output_dir
            or (resumed and run_of(resumed))
            or f"runs/{datetime.now():%Y%m%d-%H%M%S}"
        )
        config.output_dir = str(self.path)
        self._made: list[Path] = []
        self.opened = False
        self.follows = False  # another process makes it and takes it back
        self.resumed = resumed is not None and run_of(resumed) == self.path.absolute()
        # One that was to go on and has no checkpoint yet begins again in its own folder.
        again = config.resume_from_checkpoint == "true" and (self.path / "config.yaml").is_file()
        try:
            there = self.path.exists()
        except (OSError, ValueError) as error:  # a name that is too long, or is none
            raise UserError(f"output_dir: {self.path}: {error}") from None
        if there and not self.path.is_dir():
            raise UserError(f"output_dir: {self.path} is a file")
        free = config.overwrite_output_dir or self.resumed or again
        if self.path.is_dir() and any(self.path.iterdir()) and not free:
            raise UserError(
                f"output_dir: {self.path} is not empty; choose another or pass "
                "--overwrite_output_dir"
            )
        parent = next(p for p in (self.path, *self.path.absolute().parents) if p.exists())
        if not parent.is_dir() or not os.access(parent, os.W_OK | os.X_OK):
            raise UserError(f"output_dir: {parent} is no folder that can be written to")

    def open(self, say: Callable[[str], None]) -> None:
        """Make the folder; the files of an earlier run go, what no run wrote stays."""
        if self.resumed or self.follows:
            return
        whole = self.path.absolute()
        self._made = [p for p in (whole, *whole.parents) if not p.exists()]
        try:
            self.path.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise UserError(f"output_dir: {self.path} cannot be made: {error.strerror}") from None
        self.opened = True
        self._remove_files()
        rest = sorted(p.name for p in self.path.iterdir())
        if rest:
            say(f"{self.path} also holds files that no run wrote; they stay: {', '.join(rest)}")

    def drop(self) -> None:
        """Take everything back that `open` and the run made: a start that failed leaves nothing."""
        if not self.opened:
            return
        self._remove_files()
        for folder in self._made:
            with contextlib.suppress(OSError):  # not empty: somebody else's by now
                folder.rmdir()
        self.opened = False

    def _remove_files(self) -> None:
        for name in RUN_FILES:
            path: Any = self.path / name
            if path.is_dir() and not path.is_symlink():
                shutil.rmtree(path)
            else:
                path.unlink(missing_ok=True)
