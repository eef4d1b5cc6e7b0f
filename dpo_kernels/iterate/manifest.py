"""What a round has done: a file that is replaced whole after each stage.

A stage is finished when the manifest says so, and then its files have the hashes that stand there;
it is never done again. A file that has changed since is an error that names it.
"""

from __future__ import annotations

import contextlib
import fcntl
import json
import os
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from ..train.config_files import UserError
from ..train.ranks import ALONE, Ranks
from .local_models import weights_digest
from .records import file_digest

LOCK = "lock"


@contextlib.contextmanager
def locked(folder: Path) -> Iterator[None]:
    """The folder for this process alone; the lock goes with the process, however it ends."""
    with (folder / LOCK).open("a") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError:
            raise UserError(f"output_dir: another process is at work in {folder}") from None
        yield


def write_json(path: Path, value: Any) -> None:
    """Whole or not at all."""
    part = path.with_name(path.name + ".writing")
    with part.open("w", encoding="utf-8") as file:
        json.dump(value, file, indent=2, ensure_ascii=False)
        file.write("\n")
        file.flush()
        os.fsync(file.fileno())
    part.replace(path)


def read_json(path: Path) -> dict[str, Any]:
    return json.loads(path.read_text(encoding="utf-8"))


class Manifest:
    """The stages of one round, in its folder; of many ranks the first one reads and writes it."""

    def __init__(
        self, folder: Path, facts: Callable[[], dict[str, Any]], ranks: Ranks = ALONE
    ) -> None:
        """`facts` describe the round; they are those of its first start."""
        self.folder, self.path, self.ranks = folder, folder / "manifest.json", ranks
        self.content: dict[str, Any] = ranks.first_does(lambda: self._open(facts))

    def _open(self, facts: Callable[[], dict[str, Any]]) -> dict[str, Any]:
        self.folder.mkdir(parents=True, exist_ok=True)
        if self.path.exists():
            return read_json(self.path)
        content = {**facts(), "stages": {}}
        write_json(self.path, content)
        return content

    def __getitem__(self, name: str) -> Any:
        return self.content.get(name)

    def note(self, **facts: Any) -> None:
        self.content.update(facts)
        self.ranks.first_does(lambda: write_json(self.path, self.content))

    def stage(self, name: str, make: Callable[[], dict[str, Any]], *files: str) -> dict[str, Any]:
        """What the stage `name` gave: from the manifest if it is finished, else by `make`.

        Of many ranks all do it, and have what the first one's gave.
        """
        stages = self.content["stages"]
        if name in stages:
            self.ranks.first_does(lambda: self._check(name))
            return stages[name]
        began = time.perf_counter()
        found = make()

        def finish() -> dict[str, Any]:
            stages[name] = {
                **found,
                "seconds": round(time.perf_counter() - began, 3),
                "files": {file: self._hash(file) for file in files},
            }
            write_json(self.path, self.content)
            return stages[name]

        stages[name] = self.ranks.first_does(finish)
        return stages[name]

    def _check(self, name: str) -> None:
        """The files of a finished stage are those that it wrote."""
        for file, known in self.content["stages"][name]["files"].items():
            if self._hash(file) != known:
                raise UserError(
                    f"{self.folder / file} is not what the finished stage {name!r} wrote; "
                    "put it back, or start a new output_dir"
                )

    def _hash(self, file: str) -> str | None:
        path = self.folder / file
        if path.is_dir():
            return weights_digest(path)
        return file_digest(path) if path.exists() else None
