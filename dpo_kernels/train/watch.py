"""A thread of every rank that says it lives, and ends the rank when another one cannot go on.

    watch = Watch(rank, world, timeout)
    watch.at("forward and backward", 5)      # where the rank is
    watch.fault("rank 1, step 5: ...")       # True for the one that may say so

Ranks meet in collectives, and one that is missing there keeps the others waiting. So each writes a
beat into the store of the process group twice a second: where it is, and whether it waits for the
others. The first rank (and, where its beats end, the next) looks at all of them. A beat that has
stopped is a process that died or was stopped; beats that go on while no rank gets anywhere are a
rank that hangs: the one that waits for nobody. What was found is written once, the rank that wrote
it prints it, and all end.
"""

from __future__ import annotations

import contextlib
import json
import os
import socket
import sys
import threading
import time
from datetime import timedelta
from typing import Any

import torch.distributed as dist

BEAT = 0.5  # seconds between beats
DEAD = 30.0  # without a beat
GONE = 3.0  # without a beat, where a collective has failed as well
SETTLING = 8.0  # seconds that a failed collective waits for its cause
ENDED = 1  # exit code of a rank that another one has ended
_OURS = os.path.dirname(os.path.dirname(__file__)) + os.sep
# Files whose functions wait for other ranks.
_WAITING = (os.sep.join(("torch", "distributed", "")), os.sep.join(("torch", "cuda", "")))


class Watch:
    """The beats of this rank, and those of the others as they were seen here."""

    def __init__(self, rank: int, world: int, timeout: float) -> None:
        self.rank, self.world, self.timeout = rank, world, timeout
        self.part, self.stage = "the start", ""
        self.step: int | None = None
        self._moved = time.monotonic()
        self._main = threading.get_ident()
        self._beats: dict[int, tuple[str, float]] = {}  # the latest of a rank, and when it came
        self._ending, self._wake = threading.Event(), threading.Event()
        self._count = 0
        self._lock = threading.Lock()
        self.store, self._job = _stores()
        self._thread = threading.Thread(target=self._run, daemon=True)
        self._thread.start()

    def at(self, part: str, step: int | None = None) -> None:
        """Where this rank is from here on."""
        told = part != self.part or step is not None
        self.part, self._moved = part, time.monotonic()
        if step is not None:
            self.step = step
        if told:
            self._wake.set()

    def within(self, stage: str) -> None:
        """A stage of a run of several begins, whose steps are its own."""
        self.stage, self.step = stage, None
        self.at("its start")

    @property
    def place(self) -> str:
        return _place(self.rank, {"stage": self.stage, "step": self.step})

    def close(self) -> None:
        """The run has ended here, in one way or another."""
        self._ending.set()
        self._wake.set()
        self._thread.join(5)

    def begin(self) -> None:
        """Note that the run's folder is this job's, for processes that are started again."""
        self._job.set("begun", "1")

    def has_begun(self) -> bool:
        """Whether an earlier attempt of this job came so far."""
        return bool(self._job.check(["begun"]))

    # --- faults ---

    def fault(self, text: str) -> bool:
        """Tell all what ends the run; whether this rank was the first to say so."""
        with contextlib.suppress(Exception):
            said = self.store.compare_set("fault", "", text).decode()
            return said == text
        return True  # the store is gone, and with it whoever kept it

    def said(self) -> str | None:
        """The fault that some rank has told."""
        try:
            return self.store.get("fault").decode() if self.store.check(["fault"]) else None
        except Exception:
            return None

    def cause(self, seconds: float = SETTLING) -> str | None:
        """Why a collective failed here: what a rank has said, or whose beats have stopped.

        None where a rank has said it already; "" if nothing shows for so many seconds.
        """
        began = time.monotonic()
        while time.monotonic() - began < seconds:
            if self.said() is not None:
                return None
            with self._lock:
                self._look()
            silent = self._silent(GONE)
            if silent:
                return self._died(silent)
            time.sleep(BEAT / 2)
        return ""

    # --- the thread ---

    def _run(self) -> None:
        lost, looked = 0, 0.0
        while True:
            self._wake.wait(BEAT)  # or a new place of this rank
            self._wake.clear()
            if self._ending.is_set():
                return
            try:
                self._beat()
                if time.monotonic() - looked < BEAT / 2:
                    continue
                looked = time.monotonic()
                text = self.said()
                if text is not None:
                    self._end(None)
                with self._lock:
                    self._look()
                found = self._found() if self._looks() else None
                if found is not None:
                    self._end(found if self.fault(found) else None)
                lost = 0
            except Exception:
                lost += 1
                if lost * BEAT > GONE and not self._ending.is_set():
                    self._end(
                        f"rank {self.rank}: the store of the process group does not answer any "
                        "more: the process that kept it has ended"
                    )

    def _beat(self) -> None:
        self._count += 1
        waits, where = self._stack()
        beat = {
            "n": self._count,
            "part": self.part,
            "stage": self.stage,
            "step": self.step,
            "since": time.monotonic() - self._moved,
            "waits": waits,
            "where": where,
            "host": socket.gethostname(),
            "pid": os.getpid(),
        }
        self.store.set(f"beat/{self.rank}", json.dumps(beat))

    def _stack(self) -> tuple[bool, str]:
        """Whether this rank waits for others, and the line of the program where it is."""
        frame: Any = sys._current_frames().get(self._main)
        waits, where = False, "?"
        innermost = frame
        # Down to the first frame of this package: below it is who started it, torchrun for one.
        while frame is not None and not frame.f_code.co_filename.startswith(_OURS):
            waits = waits or any(part in frame.f_code.co_filename for part in _WAITING)
            frame = frame.f_back
        if innermost is not None:
            code = innermost.f_code
            where = f"{code.co_name} ({os.path.basename(code.co_filename)}:{innermost.f_lineno})"
        return waits, where

    def _looks(self) -> bool:
        """Whether this rank looks after the others: the first whose beats go on."""
        return all(rank in self._silent(DEAD) for rank in range(self.rank))

    def _look(self) -> None:
        now = time.monotonic()
        for rank in range(self.world) if self._count % 4 == 0 or self.world <= 16 else ():
            if rank == self.rank or not self.store.check([f"beat/{rank}"]):
                continue
            beat = self.store.get(f"beat/{rank}").decode()
            if self._beats.get(rank, ("", 0.0))[0] != beat:
                self._beats[rank] = (beat, now)

    def _silent(self, seconds: float) -> list[int]:
        now = time.monotonic()
        return [rank for rank, (_, when) in self._beats.items() if now - when > seconds]

    def _of(self, rank: int) -> dict[str, Any]:
        return json.loads(self._beats[rank][0])

    def _found(self) -> str | None:
        silent = self._silent(DEAD)
        if silent:
            return self._died(silent)
        beats = {rank: self._of(rank) for rank in self._beats}
        if len(beats) + 1 < self.world:
            return None  # not all have begun
        waits, where = self._stack()
        mine = {"part": self.part, "stage": self.stage, "step": self.step, "where": where}
        beats[self.rank] = {**mine, "waits": waits, "since": time.monotonic() - self._moved}
        if any(beat["since"] < self.timeout for beat in beats.values()):
            return None
        busy = {rank: beat for rank, beat in beats.items() if not beat["waits"]}
        if len(busy) == self.world:
            return None  # slow, and nobody waits for anybody
        if busy:
            rank, beat = next(iter(sorted(busy.items())))
            return (
                f"{_place(rank, beat)}: hangs in {beat['where']} ({beat['part']}); the others have "
                f"waited for {self.timeout:.0f} s (ddp_timeout)"
            )
        told = "; ".join(f"rank {r} in {b['part']}: {b['where']}" for r, b in sorted(beats.items()))
        return f"the ranks wait for each other since {self.timeout:.0f} s (ddp_timeout): {told}"

    def _died(self, silent: list[int]) -> str:
        rank = min(silent)
        beat = self._of(rank)
        return (
            f"{_place(rank, beat)}: died or was stopped without a word in {beat['part']} (process "
            f"{beat['pid']} on {beat['host']}): killed, for want of memory or by hand, or its "
            "machine is gone"
        )

    def _end(self, text: str | None) -> None:
        """End this process; the main thread may wait for ever in a collective."""
        if self._ending.wait(1.0 if text is None else 0.0):
            return  # it has come to its end by itself
        if text is not None:
            print(f"dpo-kernels: training stopped: {text}", file=sys.stderr, flush=True)
        sys.stdout.flush()
        os._exit(ENDED)


def _place(rank: int, beat: dict[str, Any]) -> str:
    step = None if beat["step"] is None else f"step {beat['step']}"
    return ", ".join(part for part in (f"rank {rank}", beat["stage"], step) if part)


_joined = 0


def _stores() -> tuple[Any, Any]:
    """The store of this attempt and that of the whole job, which outlives it under torchrun.

    A connection of their own to that of the process group: one that waits blocks it.
    """
    global _joined
    _joined += 1
    store = dist.TCPStore(
        os.environ["MASTER_ADDR"],
        int(os.environ["MASTER_PORT"]),
        is_master=False,
        timeout=timedelta(seconds=10),
    )
    attempt = os.environ.get("TORCHELASTIC_RESTART_COUNT", "0")
    job = dist.PrefixStore(f"dpo_kernels/job/{_joined}", store)
    return dist.PrefixStore(f"dpo_kernels/{attempt}/{_joined}", store), job


def is_secondary(error: BaseException) -> bool:
    """Whether a collective failed because another rank is not there any more."""
    if isinstance(error, dist.DistBackendError | dist.DistNetworkError | dist.DistStoreError):
        return True
    text = str(error)
    words = ("Connection closed by peer", "Connection reset by peer", "Timed out waiting")
    return isinstance(error, RuntimeError) and any(word in text for word in words)
