"""Reference log-probs on disk, by content: what changes a value is in its name, nothing else is.

    folder/<identity>/identity.json      what the values are of
    folder/<identity>/<writer>.part      records, appended

The identity is a digest of the weights that are in force (an adapter that does nothing is none), of
the configuration that shapes the forward, and of the dtype in which it computes. A value is named
by a digest of its sequence's token ids and of which are scored; so tokenizer, chat template and
truncation are in it through the ids. Values are log-probs of tokens: loss, beta, learning rate,
`ld_alpha`, folder and order of the rows change nothing, and rows that are added cost themselves
alone.

A record is a batch, with one checksum, appended in one write. So a run that is killed loses the
batch at work and no other, and the next one goes on there with the same batches. A record that is
damaged or half-written, or a file that is another identity's, is found when the cache is opened and
when it is read: it counts as absent, and is said. Each writer has its own file, and all read all:
runs side by side share what each has done.
"""

from __future__ import annotations

import contextlib
import fcntl
import hashlib
import json
import os
import secrets
import struct
import time
import zlib
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor, nn

from ..data import TokenSequence
from ..data.bulk import cache_root
from .references import adapters_in_force
from .structure import base_model_of, unwrapped

FORMAT = "dpo-kernels reference log-probs 1"
_HEAD = struct.Struct("<4sIII")  # magic, rows, bytes of the rest, its checksum
_MAGIC = b"\xd0dk\x01"
_KEY = 16
_MOST = 1 << 31


def sequence_key(sequence: TokenSequence) -> bytes:
    """The name of a sequence's values: a digest of its ids and of which of them are scored."""
    found = hashlib.blake2b(digest_size=_KEY)
    found.update(np.asarray(sequence.ids, dtype="<i8").tobytes())
    spans = (sequence.first_scored, *(edge for span in sequence.unscored for edge in span))
    found.update(b"|" + np.asarray(spans, dtype="<i8").tobytes())
    return found.digest()


# --- what the values are of ---

# Of a configuration: what says where a model is from or how it is used, not what it computes.
_NOT_OF_THE_FORWARD = {
    "_name_or_path",
    "_commit_hash",
    "architectures",
    "bos_token_id",
    "eos_token_id",
    "pad_token_id",
    "transformers_version",
    "torch_dtype",
    "dtype",
    "use_cache",
    "output_hidden_states",
    "output_attentions",
    "output_router_logits",
    "return_dict",
    "id2label",
    "label2id",
    "problem_type",
    "_attn_implementation_autoset",
    "chunk_size_feed_forward",
}


def reference_identity(model: nn.Module, dtype: torch.dtype) -> dict[str, str]:
    """What decides the values that `model`, as it is now, gives: computed in `dtype`."""
    model = unwrapped(model)
    config = base_model_of(model).config.to_dict()
    kept = {k: v for k, v in config.items() if k not in _NOT_OF_THE_FORWARD}
    shaped = json.dumps(kept, sort_keys=True, default=str)
    return {
        "format": FORMAT,
        "weights": weights_digest(model),
        "config": hashlib.sha256(shaped.encode()).hexdigest(),
        "dtype": str(dtype).removeprefix("torch."),
    }


@torch.no_grad()
def weights_digest(model: nn.Module) -> str:
    """sha256 of the weights in force, by name. A LoRA adapter that adds nothing is left out."""
    adapters = getattr(model, "peft_config", {})
    found = hashlib.sha256()
    used: set[str] = set()
    for name, (weight, adapter) in sorted(weights_in_force(model).items()):
        if adapter is not None:
            used.add(adapter)
        found.update(f"{name} {weight.dtype} {list(weight.shape)}".encode())
        found.update(_bytes_of(weight))
    for adapter in sorted(used):
        options = adapters[adapter].to_dict()
        told = {k: options.get(k) for k in ("peft_type", "r", "lora_alpha", "use_rslora")}
        found.update(json.dumps(told, default=str, sort_keys=True).encode())
    return found.hexdigest()


def weights_in_force(model: nn.Module) -> dict[str, tuple[Tensor, str | None]]:
    """Weights and buffers that decide what `model` gives now, and the adapter that each is of.

    By the name that they have without PEFT around the model.
    """
    adapters = getattr(model, "peft_config", {})
    active = adapters_in_force(model) if adapters and not _switched_off(model) else []
    state = {**dict(model.named_parameters()), **dict(model.named_buffers())}
    found: dict[str, tuple[Tensor, str | None]] = {}
    for name, weight in state.items():
        adapter = next((a for a in adapters if f".{a}." in f"{name}."), None)
        if adapter is None or (adapter in active and not _adds_nothing(name, state)):
            found[_plain_name(name)] = (weight, adapter)
    return found


def _plain_name(name: str) -> str:
    """The name that a weight has without PEFT around the model."""
    return name.removeprefix("base_model.model.").replace(".base_layer.", ".")


def _adds_nothing(name: str, state: dict[str, Tensor]) -> bool:
    for a, b in (("lora_A", "lora_B"), ("lora_embedding_A", "lora_embedding_B")):
        other = name.replace(f".{a}.", f".{b}.")
        if f".{b}." in other and other in state:
            return not bool(state[other].any())
    return False


def _switched_off(model: nn.Module) -> bool:
    """Whether PEFT's layers are told to leave their adapters out."""
    layers = [m for m in model.modules() if hasattr(m, "disable_adapters")]
    flags = [m.disable_adapters for m in layers if isinstance(m.disable_adapters, bool)]
    return bool(flags) and all(flags)


def _bytes_of(weight: Tensor) -> memoryview:
    full = getattr(weight, "full_tensor", None)
    weight = full() if full is not None else weight
    flat: Any = weight.detach().contiguous().cpu().reshape(-1).view(torch.uint8).numpy()
    return memoryview(flat)


def sequences_of(
    input_ids: Tensor, attention_mask: Tensor | None, labels: Tensor
) -> list[TokenSequence]:
    """The rows of a padded batch [rows, T] as sequences; labels of -100 are not scored."""
    found = []
    keep = torch.ones_like(input_ids) if attention_mask is None else attention_mask
    for ids, real, label in zip(input_ids.cpu(), keep.cpu().bool(), labels.cpu(), strict=True):
        kept, scored = tuple(ids[real].tolist()), (label[real] != -100).tolist()
        start = scored.index(True) if True in scored else len(kept)
        gaps, at = [], start
        for t in range(start, len(kept) + 1):
            if t == len(kept) or scored[t]:
                if at < t:
                    gaps.append((at, t))
                at = t + 1
        found.append(TokenSequence(kept, start, "", tuple(gaps)))
    return found


# --- the records ---


class _Place(NamedTuple):
    file: int  # which of `_files`
    start: int  # of its record
    at: int  # of its values, in values from the record's first
    length: int


@dataclass
class _Part:
    """A file of records, open for reading; `read` is where the next record would begin."""

    path: Path
    handle: Any
    read: int = 0
    foreign: bool = False


@dataclass
class CacheCounts:
    """What was found in a cache and done with it."""

    found: int = 0
    computed: int = 0
    damaged: int = 0
    foreign: int = 0


class ReferenceCache:
    """Log-probs of the tokens of sequences, of one identity. Close it, or use it as a context."""

    def __init__(
        self,
        folder: str | os.PathLike[str],
        identity: dict[str, str],
        say: Callable[[str], None] = lambda text: None,
    ) -> None:
        text = json.dumps(identity, sort_keys=True)
        self.key = hashlib.sha256(text.encode()).hexdigest()
        self.path = Path(folder).expanduser() / self.key[:32]
        self.counts = CacheCounts()
        self._kind = np.dtype("<f8" if identity.get("dtype") == "float64" else "<f4")
        self._say, self._said = say, set[str]()
        self._files: list[_Part] = []
        self._places: dict[bytes, _Place] = {}
        self._own: Any = None
        self.path.mkdir(parents=True, exist_ok=True)
        told = self.path / "identity.json"
        if not told.exists():
            part = told.with_suffix(f".{os.getpid()}.new")
            part.write_text(json.dumps(identity, indent=2, sort_keys=True) + "\n")
            os.replace(part, told)
        self.refresh()

    def __enter__(self) -> ReferenceCache:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        for part in self._files:
            part.handle.close()
        self._files.clear()
        if self._own is not None:
            self._own.close()
            self._own = None

    def __contains__(self, key: bytes) -> bool:
        return key in self._places

    def __len__(self) -> int:
        return len(self._places)

    def refresh(self) -> None:
        """Take in what has been written since, by this run or others."""
        known = {part.path for part in self._files}
        new = len(self._files)
        for path in sorted(self.path.glob("*.part")):
            if path not in known:
                with contextlib.suppress(OSError):  # gone again
                    self._files.append(_Part(path, path.open("rb")))
        for number in range(len(self._files)):
            self._scan(number)
        for part in self._files[new:]:
            self._look_at_end(part)

    def get(self, keys: Sequence[bytes]) -> list[Tensor] | None:
        """The values of these sequences, [scored tokens] each; None if one is absent or damaged."""
        values = []
        records: dict[tuple[int, int], np.ndarray | None] = {}
        for key in keys:
            place = self._places.get(key)
            if place is None:
                return None
            where = (place.file, place.start)
            if where not in records:
                records[where] = self._values(*where)
            record = records[where]
            if record is None:
                self._forget(*where)
                return None
            values.append(torch.from_numpy(record[place.at : place.at + place.length].copy()))
        return values

    def put(self, keys: Sequence[bytes], values: Sequence[Tensor]) -> None:
        """Append the values of a batch, as one record."""
        arrays = [v.detach().cpu().numpy().astype(self._kind).reshape(-1) for v in values]
        counts = np.asarray([len(a) for a in arrays], dtype="<u4")
        rest = b"".join([*keys, counts.tobytes(), *(a.tobytes() for a in arrays)])
        head = _HEAD.pack(_MAGIC, len(keys), len(rest), _checksum(len(keys), rest))
        own = self._writer()
        own.write(head + rest)
        self.counts.computed += len(keys)

    @contextlib.contextmanager
    def pass_from_the_front(self) -> Iterator[bool]:
        """Whether this run starts at the first batch: of two at once the other starts at the last,
        so that they meet, and each does half."""
        with (self.path / "pass.lock").open("a") as lock:
            try:
                fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
                first = True
            except OSError:
                first = False
            yield first

    # --- parts ---

    def _writer(self) -> Any:
        if self._own is None:
            name = f"{time.time_ns():x}-{os.getpid()}-{secrets.token_hex(4)}.part"
            self._own = (self.path / name).open("ab", buffering=0)
            fcntl.flock(self._own, fcntl.LOCK_EX)  # as long as it is written to
            self._own.write(self._title())
        return self._own

    def _title(self) -> bytes:
        return f"{FORMAT}\n{self.key}\n{self._kind.str}\n".encode()

    def _scan(self, number: int) -> None:
        part = self._files[number]
        if part.foreign:
            return
        size = os.fstat(part.handle.fileno()).st_size
        title = self._title()
        if part.read == 0:
            if size < len(title):
                return  # being written, or cut off: nothing is lost
            if os.pread(part.handle.fileno(), len(title), 0) != title:
                part.foreign = True
                self.counts.foreign += 1
                self._tell(f"{part.path} is not of this reference, or damaged; it is not used")
                return
            part.read = len(title)
        while part.read + _HEAD.size <= size:
            step = self._record(number, part, size)
            if step is None:
                return
            part.read += step

    def _look_at_end(self, part: _Part) -> None:
        """Say so where a file ends within a record and nobody is writing it any more."""
        if part.foreign or part.read == 0 or part.read == os.fstat(part.handle.fileno()).st_size:
            return
        with contextlib.suppress(OSError):  # its writer is at work
            fcntl.flock(part.handle, fcntl.LOCK_SH | fcntl.LOCK_NB)
            fcntl.flock(part.handle, fcntl.LOCK_UN)
            self.counts.damaged += 1
            self._tell(f"{part.path} ends within a record; its rows are scored again")

    def _record(self, number: int, part: _Part, size: int) -> int | None:
        """Index the record at `part.read`; its length, or None where it is not whole yet."""
        fd = part.handle.fileno()
        magic, rows, length, checksum = _HEAD.unpack(os.pread(fd, _HEAD.size, part.read))
        sound = magic == _MAGIC and rows * (_KEY + 4) <= length < _MOST
        if sound and part.read + _HEAD.size + length > size:
            later = self._next(part, size)
            if later is None:
                return None  # half-written: at the end of a file nothing else can be
            return self._skip(part, later)
        rest = os.pread(fd, length, part.read + _HEAD.size) if sound else b""
        if not sound or _checksum(rows, rest) != checksum:
            later = self._next(part, size)
            return self._skip(part, size if later is None else later)
        counts = np.frombuffer(rest, "<u4", rows, rows * _KEY)
        at = 0
        for i, count in enumerate(counts.tolist()):
            key = rest[i * _KEY : (i + 1) * _KEY]
            self._places.setdefault(key, _Place(number, part.read, at, count))
            at += count
        return _HEAD.size + length

    def _skip(self, part: _Part, to: int) -> int:
        self.counts.damaged += 1
        self._tell(f"{part.path}: a damaged record at byte {part.read}; its rows are scored again")
        return to - part.read

    def _next(self, part: _Part, size: int) -> int | None:
        """Where a later record begins, behind a damaged one."""
        at = part.read + 1
        while at < size:
            block = os.pread(part.handle.fileno(), 1 << 20, at)
            found = block.find(_MAGIC)
            while found >= 0:
                start = at + found
                head = os.pread(part.handle.fileno(), _HEAD.size, start)
                if len(head) == _HEAD.size:
                    _, rows, length, checksum = _HEAD.unpack(head)
                    if length < size - start:
                        rest = os.pread(part.handle.fileno(), length, start + _HEAD.size)
                        if _checksum(rows, rest) == checksum:
                            return start
                found = block.find(_MAGIC, found + 1)
            if len(block) < 1 << 20:
                return None
            at += len(block) - len(_MAGIC) + 1
        return None

    def _values(self, number: int, start: int) -> np.ndarray | None:
        fd = self._files[number].handle.fileno()
        head = os.pread(fd, _HEAD.size, start)
        if len(head) < _HEAD.size:
            return None
        magic, rows, length, checksum = _HEAD.unpack(head)
        rest = os.pread(fd, length, start + _HEAD.size) if magic == _MAGIC else b""
        if magic != _MAGIC or _checksum(rows, rest) != checksum:
            return None
        return np.frombuffer(rest, self._kind, offset=rows * (_KEY + 4))

    def _forget(self, number: int, start: int) -> None:
        """A record that was whole when it was indexed and is not any more."""
        self.counts.damaged += 1
        self._tell(f"{self._files[number].path}: a damaged record at byte {start}")
        gone = [k for k, p in self._places.items() if (p.file, p.start) == (number, start)]
        for key in gone:
            del self._places[key]

    def _tell(self, text: str) -> None:
        if text not in self._said:
            self._said.add(text)
            self._say(f"reference cache: {text}")


def _checksum(rows: int, rest: bytes) -> int:
    return zlib.crc32(rest, zlib.crc32(struct.pack("<I", rows)))


def default_folder() -> Path:
    """Where log-probs are kept if no folder is named: in the user's cache."""
    return cache_root() / "reference"
