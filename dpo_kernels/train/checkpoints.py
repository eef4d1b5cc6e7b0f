"""Checkpoints of a run: whole or not there, written beside the steps, the last k kept.

    checkpoints/
      step-40/            tensors as torch's distributed checkpoint (DCP) has them, state.json
      step-60.tmp/        being written, or left by a run that was killed: never read
      latest              the name of the newest whole one
      reference.safetensors   what the reference gave, which no trained weights can give again

A folder gets its name when everything in it is on the disk, so a name without `.tmp` is a whole
checkpoint. Tensors are copied to the host at once (`staging`) and written by a thread while steps
go on.

DCP keeps its index (`.metadata`) as a pickle. It is read only if it names DCP's own classes and
tensors alone; everything else is JSON.
"""

from __future__ import annotations

import contextlib
import errno
import inspect
import io
import json
import os
import pickle
import re
import shutil
import threading
import warnings
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from .config import UserError
from .optim import TrainingError
from .ranks import ALONE, Ranks, agreed
from .staging import Staging

FORMAT = 1  # of state.json and of the names of the tensors
_STATE, _INDEX, _LATEST = "state.json", ".metadata", "latest"
_PARTS = {"identity", "found", "metrics_rows", "progress", "optimizer", "schedule", "rng"}
_NAME = re.compile(r"step-(\d+)")


class Checkpoints:
    """The checkpoints of one run's folder."""

    def __init__(self, folder: Path, limit: int | None = None, ranks: Ranks = ALONE) -> None:
        self.folder, self.limit, self.ranks = folder, limit, ranks
        # Of its own: the thread that writes meets the other ranks' while steps go on.
        self._group = dist.new_group(backend="gloo") if ranks.many else None
        self._thread: threading.Thread | None = None
        self._error: BaseException | None = None
        self._under_way = 0
        self._staging = Staging()

    def save(self, step: int, tensors: Mapping[str, Tensor], values: Mapping[str, Any]) -> None:
        """Take the state as it is now and write it while the caller goes on.

        Waits for the save before it, if that is still being written, and raises its error.
        """
        self._wait()  # before staging: the thread reads the copies that are written over
        staged = self._staging.take(tensors)
        text = json.dumps({"format": FORMAT, **values}, indent=1)
        self._under_way = step
        # Not a daemon: an interpreter that ends waits for it.
        self._thread = threading.Thread(target=self._write, args=(step, staged, text))
        self._thread.start()

    def finish(self) -> None:
        """Wait for the save that is being written; `TrainingError` if it failed.

        The memory of the copies is given back: no save follows soon.
        """
        try:
            self._wait()
        finally:
            self._staging.drop()

    def _wait(self) -> None:
        if self._thread is not None:
            self._thread.join()
            self._thread = None
        error, self._error = self._error, None
        if error is None:
            return
        last = newest(self.folder)
        kept = f"the last good one is {last}" if last else "there is none from before"
        failed = TrainingError(
            f"the checkpoint of step {self._under_way} could not be written to {self.folder}: "
            f"{_rank_of(error)}{reason(error)}; {kept}"
        )
        raise agreed(failed) from error

    def _write(self, step: int, tensors: dict[str, Tensor], text: str) -> None:
        whole, part = self.folder / f"step-{step}", self.folder / f"step-{step}.tmp"
        try:
            self._first_does(lambda: self._begin(part))
            self._all_do(lambda: _see(part))
            if self.ranks.many:
                write_tensors(part, tensors, self._group)
            else:
                write_tensors(part, tensors)
            self._first_does(lambda: self._end(part, whole, text, step))
        except BaseException as error:  # told by the next save, or at the end
            if self.ranks.first:  # a full disk has room for the model then
                shutil.rmtree(part, ignore_errors=True)
            self._error = error

    def _begin(self, part: Path) -> None:
        shutil.rmtree(part, ignore_errors=True)
        part.mkdir(parents=True)

    def _end(self, part: Path, whole: Path, text: str, step: int) -> None:
        write_text(part / _STATE, text)
        if whole.exists():  # of a run that was resumed before it
            shutil.rmtree(whole)
        part.replace(whole)
        _sync(self.folder)
        write_text(self.folder / _LATEST, whole.name + "\n")
        self._prune(step)

    def _first_does(self, action: Callable[[], None]) -> None:
        self._all_do(action if self.ranks.first else lambda: None)

    def _all_do(self, action: Callable[[], None]) -> None:
        """An error on any rank is one on all, and names it."""
        if not self.ranks.many:
            action()
            return
        mine: Exception | None = None
        try:
            action()
        except Exception as error:
            mine = error
        told: list[Any] = [None] * self.ranks.world
        dist.all_gather_object(told, None if mine is None else reason(mine), group=self._group)
        for rank, text in enumerate(told):
            if text is not None:
                raise OnRank(rank, text) from mine

    def _prune(self, step: int) -> None:
        """Keep the newest `limit`; what a killed run left half-written goes as well."""
        for part in self.folder.glob("step-*.tmp"):
            shutil.rmtree(part, ignore_errors=True)
        if self.limit is None:
            return
        steps = sorted(steps_in(self.folder))
        for old in steps[: max(len(steps) - self.limit, 0)]:
            if old != step:
                shutil.rmtree(self.folder / f"step-{old}", ignore_errors=True)

    def absolute(self) -> Path:
        return self.folder.absolute()

    def drop_after(self, step: int) -> None:
        """Remove whole checkpoints of later steps: those of a run that was resumed before them."""
        for later in steps_in(self.folder):
            if later > step:
                shutil.rmtree(self.folder / f"step-{later}", ignore_errors=True)


def _rank_of(error: BaseException) -> str:
    """Which rank's write failed, where DCP says so."""
    failures = getattr(error, "failures", {})
    return f"rank {min(failures)}: " if failures and dist.is_initialized() else ""


class OnRank(OSError):
    """What went wrong on a rank, as all are told."""

    def __init__(self, rank: int, text: str) -> None:
        super().__init__(f"rank {rank}: {text}")
        self.text = f"rank {rank}: {text}"


def _see(folder: Path) -> None:
    """The folder that the first rank made is here, and can be written into."""
    if not folder.is_dir():
        raise FileNotFoundError(
            f"{folder} is not there: output_dir must be on a file system that all ranks share"
        )
    probe = folder / f".{os.getpid()}"
    probe.write_bytes(b"")
    probe.unlink()


# --- finding one ---


def steps_in(folder: Path) -> list[int]:
    """Steps of the whole checkpoints in a run's `checkpoints` folder."""
    found = (_NAME.fullmatch(p.name) for p in folder.glob("step-*"))
    return [int(m[1]) for m in found if m and _is_whole(folder / m[0])]


def newest(folder: Path) -> Path | None:
    """The checkpoint that `latest` names, or the last whole one where it names none."""
    with contextlib.suppress(OSError, UnicodeDecodeError):
        named = (folder / _LATEST).read_text(encoding="utf-8").strip()
        if _NAME.fullmatch(named) and _is_whole(folder / named):
            return folder / named
    steps = steps_in(folder)
    return folder / f"step-{max(steps)}" if steps else None


def find(path: Path) -> Path:
    """The checkpoint that a user means: itself, the newest of a run's folder or `checkpoints`."""
    name = f"resume_from_checkpoint: {path}"
    if not path.is_dir():
        raise UserError(f"{name} {'is a file' if path.exists() else 'does not exist'}")
    if path.name.endswith(".tmp"):
        raise UserError(f"{name} was not written to its end; give the folder without .tmp")
    if _is_whole(path):
        return path
    found = newest(path / "checkpoints") or newest(path)
    if found is None:
        raise UserError(f"{name} holds no checkpoint (step-N with {_STATE} and {_INDEX})")
    return found


def run_of(checkpoint: Path) -> Path:
    """The folder of the run that wrote a checkpoint."""
    return checkpoint.absolute().parent.parent


def _is_whole(folder: Path) -> bool:
    return (folder / _STATE).is_file() and (folder / _INDEX).is_file()


# --- reading one ---


def read_values(checkpoint: Path, version: str) -> dict[str, Any]:
    """What state.json holds; `UserError` if it cannot be read, or a newer release wrote it."""
    what = f"resume_from_checkpoint: {checkpoint}"
    try:
        values = json.loads((checkpoint / _STATE).read_text(encoding="utf-8"))
        theirs, kind = str(values["version"]), int(values["format"])
        if kind <= FORMAT and (missing := _PARTS - values.keys()):
            raise KeyError(", ".join(sorted(missing)))
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise UserError(f"{what}: {_STATE} cannot be read: {reason(error)}") from None
    if kind > FORMAT or _release(theirs) > _release(version):
        raise UserError(
            f"{what} was written by dpo-kernels {theirs} (format {kind}), which is newer than "
            f"this {version} (format {FORMAT}); install that release to go on"
        )
    return values


def _release(version: str) -> tuple[int, ...]:
    return tuple(int(n) for n in re.findall(r"\d+", version)[:3])


def read_tensors(
    checkpoint: Path, like: Callable[[str, tuple[int, ...]], Tensor | None] | None = None
) -> dict[str, Tensor]:
    """Every tensor of a checkpoint, on the host; in shards where `like` (name, size) gives one."""
    try:
        index = _read_index(checkpoint / _INDEX).state_dict_metadata
        tensors = {}
        for name, entry in index.items():
            size, dtype = tuple(entry.size), entry.properties.dtype
            shards = like(name, size) if like is not None else None
            if shards is None:
                tensors[name] = torch.empty(size, dtype=dtype)
            else:
                tensors[name] = torch.empty_like(shards, dtype=dtype)
        with _quiet():
            _dcp().load(tensors, checkpoint_id=str(checkpoint), **_alone(_dcp().load))
    except UserError:
        raise
    except KeyboardInterrupt:
        raise
    except BaseException as error:  # DCP's own is no Exception; a torn file may raise any
        raise UserError(
            f"resume_from_checkpoint: {checkpoint} cannot be read: {reason(error)}; an earlier "
            "step-N of the run may be given by its folder"
        ) from None
    return tensors


_ALLOWED = {
    ("torch", "Size"),
    ("collections", "OrderedDict"),
    ("pathlib", "PosixPath"),
    ("pathlib._local", "PosixPath"),  # Python 3.13
    ("torch.serialization", "_get_layout"),
    ("torch._utils", "_get_layout"),
    ("torch.distributed.checkpoint.filesystem", "_StorageInfo"),
    ("torch.distributed.checkpoint.filesystem", "_StoragePrefix"),
}
_ALLOWED_NAMES = {
    "torch.distributed.checkpoint.metadata": {
        "Metadata",
        "MetadataIndex",
        "TensorStorageMetadata",
        "TensorProperties",
        "ChunkStorageMetadata",
        "StorageMeta",
        "_MEM_FORMAT_ENCODING",
    }
}


class _IndexReader(pickle.Unpickler):
    """Reads DCP's index and nothing else that a pickle can say."""

    def find_class(self, module: str, name: str) -> Any:
        dtype = module == "torch" and isinstance(getattr(torch, name, None), torch.dtype)
        if dtype or (module, name) in _ALLOWED or name in _ALLOWED_NAMES.get(module, ()):
            return super().find_class(module, name)
        raise pickle.UnpicklingError(f"its index names {module}.{name}; nothing of it was run")


def _read_index(file: Path) -> Any:
    return _IndexReader(io.BytesIO(file.read_bytes())).load()


# --- writing ---


def write_tensors(folder: Path, tensors: dict[str, Tensor], group: Any = None) -> None:
    """DCP's files of these tensors (on the host), of this process or of those of `group`."""
    options = _alone(_dcp().save) if group is None else {"process_group": group}
    with _quiet():
        _dcp().save(tensors, checkpoint_id=str(folder), **options)


def write_text(file: Path, text: str) -> None:
    """Write a file whole, or leave it as it was."""
    part = file.with_name(file.name + ".tmp")
    with part.open("w", encoding="utf-8") as stream:
        stream.write(text)
        stream.flush()
        os.fsync(stream.fileno())
    os.replace(part, file)
    _sync(file.parent)


def _sync(folder: Path) -> None:
    """A name is on the disk when its folder is."""
    with contextlib.suppress(OSError):
        handle = os.open(folder, os.O_RDONLY)
        try:
            os.fsync(handle)
        finally:
            os.close(handle)


def _dcp() -> Any:
    import torch.distributed.checkpoint as dcp

    return dcp


def _alone(function: Any) -> dict[str, Any]:
    """Releases before torch 2.9 find out by themselves that there is one process."""
    return {"no_dist": True} if "no_dist" in inspect.signature(function).parameters else {}


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", module=r"torch\.distributed")
        yield


# --- errors of a disk ---

_DISK = {
    errno.ENOSPC: "the disk is full",
    errno.EDQUOT: "the quota is used up",
    errno.EROFS: "the disk can only be read",
    errno.EFBIG: "a file may not be so large",
    errno.EIO: "the disk fails",
}


def reason(error: BaseException) -> str:
    """An error in a line; those of a disk in words."""
    if isinstance(error, OnRank):
        return error.text
    for cause in _chain(error):
        number = getattr(cause, "errno", None)
        if number in _DISK:
            return f"{_DISK[number]} ({os.strerror(number)})"
        for code in _DISK:  # what libraries make of it
            if os.strerror(code) in str(cause):
                return f"{_DISK[code]} ({os.strerror(code)})"
    wrapped = list(getattr(error, "failures", {}).values())  # of DCP's CheckpointException
    if wrapped:
        return reason(wrapped[0][0])
    first = (str(error).strip().splitlines() or [""])[0]
    if "inline_container" in first:  # torch's writer of files says where, not why
        return f"the disk took a part of a file alone ({first})"
    return f"{type(error).__name__}: {first}" if first else type(error).__name__


def of_the_disk(error: BaseException) -> bool:
    """Whether the disk, not the program, is to blame."""
    return any(words in reason(error) for words in _DISK.values())


def _chain(error: BaseException | None) -> Iterator[BaseException]:
    """An error, what it was raised from, and what DCP wrapped in it."""
    while error is not None:
        yield error
        for wrapped in getattr(error, "failures", {}).values():  # of a CheckpointException
            yield from _chain(wrapped[0])
        error = error.__cause__ or error.__context__


def check_space(folder: Path, bytes_each: int, kept: int | None, model_bytes: int) -> str:
    """Whether checkpoints fit on the disk, before anything is trained.

    `UserError` if not even two (the last good one and the next) and the model do; a warning if all
    that will be kept do not; "" otherwise. `kept`: how many there will be at most.
    """
    there = next(p for p in (folder, *folder.absolute().parents) if p.exists())
    free = shutil.disk_usage(there).free
    least = 2 * bytes_each + model_bytes
    if free < least:
        raise UserError(
            f"output_dir: {folder} has {_gib(free)} free, and a run of this model needs "
            f"{_gib(least)}: two checkpoints of {_gib(bytes_each)} and the model "
            f"({_gib(model_bytes)}). Free some, or go without checkpoints (--save_steps 0)"
        )
    wanted = ((kept or 1) + 1) * bytes_each + model_bytes
    if free < wanted:
        return (
            f"warning: {kept} checkpoints of {_gib(bytes_each)} will not fit into the {_gib(free)} "
            f"free in {folder}; --save_total_limit keeps fewer"
        )
    return ""


def _gib(n: int) -> str:
    return f"{n / 2**30:.2f} GiB" if n >= 2**30 else f"{n / 2**20:.2f} MiB"
