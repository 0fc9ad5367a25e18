"""The cache of trained weights: content-addressed folders, written whole or not at all, verified on every load.

An artifact is a folder `ROOT/KEY` with `weights.safetensors` (tensors, structure, facts) and `meta.json`
(its SHA-256, size, label, date). It is written to a temporary folder beside it, flushed to disk and renamed.
"""

from __future__ import annotations

import datetime
import errno
import hashlib
import json
import logging
import os
import re
import shutil
import uuid
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from advplug import weights
from advplug.errors import CellFailure, UsageError

if TYPE_CHECKING:
    from filelock import BaseFileLock
    from torch import Tensor

    from advplug.contracts import Tuned

log = logging.getLogger("advplug")

_KEY = re.compile(r"[A-Za-z0-9][A-Za-z0-9_\-]*")
_TENSORS, _STRUCTURE, _TRUSTED = "tensors/", "structure/", "trusted"
_TEMPORARY, _SPOILED = ".part.", ".spoiled."
_LOCKS = ".locks"
_FILES = ("weights.safetensors", "meta.json")
"""In the order of their writing."""


@dataclass(frozen=True)
class Artifact:
    """A model as the cache keeps it: its state dict, what `Tune.rebuild` needs, and facts (JSON-ready).

    `trusted` is `Tuned.trusted`; `sha256` is that of the stored file.
    """

    tensors: Mapping[str, Tensor]
    structure: Mapping[str, Tensor] = field(default_factory=dict)
    facts: Mapping[str, Any] = field(default_factory=dict)
    sha256: str = ""
    trusted: Tensor | None = None

    @classmethod
    def of(cls, tuned: Tuned) -> Artifact:
        """Raises CellFailure where the model's state holds anything but tensors."""
        import torch

        state = tuned.model.state_dict()
        strange = [n for n, v in state.items() if not isinstance(v, torch.Tensor)]
        if strange:
            raise CellFailure(f"the model's state '{strange[0]}' is no tensor, so it cannot be stored")
        return cls(state, tuned.structure, tuned.facts, trusted=tuned.trusted)


@dataclass(frozen=True)
class Stored:
    """One entry of the cache; `made` is an ISO date with the time in UTC."""

    key: str
    label: str
    bytes: int
    made: str


class _SpoiledError(Exception):
    pass


def default_root() -> Path:
    """`$ADVPLUG_CACHE/artifacts`, or `artifacts` in the user's cache folder."""
    import platformdirs

    chosen = os.environ.get("ADVPLUG_CACHE")
    return (Path(chosen).expanduser() if chosen else platformdirs.user_cache_path("advplug")) / "artifacts"


class Artifacts:
    """The artifacts under `root`. Any number of processes may share it."""

    def __init__(self, root: Path | None = None) -> None:
        self.root = root or default_root()

    def get_or_make(self, key: str, make: Callable[[], Artifact], label: str = "") -> Artifact:
        """The artifact of that key, made and stored first if it is not there.

        While one process makes it, others that want the same key wait and then load it. A stored file
        that does not match its SHA-256 is set aside and made again. Raises UsageError where the folder
        cannot be written, before anything is made if that can be seen.
        """
        if not _KEY.fullmatch(key):
            raise ValueError(f"'{key}' is no key: letters, digits, '-' and '_' only")
        found = self._find(key)
        if found is not None:
            return found
        with self._explained():
            lock = self._lock(key)
            lock.acquire()
        try:
            found = self._find(key, locked=True)  # another process may have made it meanwhile
            if found is not None:
                return found
            with self._explained():
                self._sweep(key)
            made = make()
            with self._explained():
                return self._store(key, made, label)
        finally:
            lock.release()

    def _find(self, key: str, locked: bool = False) -> Artifact | None:
        """The artifact of that key, or None; the holder of the key's lock sets a spoiled one aside."""
        folder = self.root / key
        try:
            return _read(folder)
        except FileNotFoundError:
            if not folder.is_dir():
                return None
            reason = "a file is missing"
        except _SpoiledError as error:
            reason = str(error)
        except OSError as error:
            raise self._unusable(error) from error
        if locked:
            with self._explained():
                aside = self._aside(key, _SPOILED)
                os.replace(folder, aside)
            log.warning("cached weights %s are spoiled (%s): kept as %s and made again", key, reason, aside.name)
        return None

    def _aside(self, key: str, kind: str) -> Path:
        """A new folder beside the artifacts, with the permissions that the user's umask gives."""
        folder = self.root / f"{key}{kind}{uuid.uuid4().hex[:8]}"
        folder.mkdir()
        return folder

    def packed(self, key: str) -> dict[str, bytes] | None:
        """The files of an artifact by name, for another machine's cache; None where it is not there or is spoiled."""
        folder = self.root / key
        if self._find(key) is None:
            return None
        with self._explained():
            return {name: (folder / name).read_bytes() for name in _FILES}

    def add(self, key: str, files: Mapping[str, bytes]) -> bool:
        """Stores what `packed` gave unless it is there; False where it was. They are verified when they are loaded."""
        with self._explained():
            lock = self._lock(key)
            with lock:
                if (self.root / key).is_dir():
                    return False
                self._place(key, files)
                return True

    def has(self, key: str) -> bool:
        """Whether an artifact of that key is there, spoiled or not."""
        return (self.root / key).is_dir()

    def ls(self) -> list[Stored]:
        """Everything stored, oldest first; what cannot be read is left out."""
        entries = []
        for folder in sorted(self.root.glob("*")) if self.root.is_dir() else ():
            with suppress(OSError, _SpoiledError):
                if _KEY.fullmatch(folder.name):
                    meta = _meta(folder)
                    entries.append(Stored(folder.name, meta["label"], meta["bytes"], meta["made"]))
        return sorted(entries, key=lambda e: e.made)

    def clear(self) -> int:
        """Deletes everything, spoiled and temporary folders too; what is being made just now stays.

        Returns how many artifacts were deleted.
        """
        count = 0
        with self._explained():
            for folder in sorted(self.root.glob("*")) if self.root.is_dir() else ():
                key, _, rest = folder.name.partition(".")
                if not _KEY.fullmatch(key) or not folder.is_dir():
                    continue
                with self._held(key) as free:
                    if free:
                        # Renamed first, so that no reader meets half of it.
                        trash = folder if rest else self._aside(key, _SPOILED)
                        if not rest:
                            os.replace(folder, trash)
                        shutil.rmtree(trash)
                        count += not rest
        return count

    def _store(self, key: str, made: Artifact, label: str) -> Artifact:
        data = _pack(made, label)
        sha256 = hashlib.sha256(data).hexdigest()
        now = datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds")
        meta = {"label": label, "bytes": len(data), "sha256": sha256, "made": now}
        self._place(key, dict(zip(_FILES, (data, json.dumps(meta).encode()), strict=True)))
        return replace(made, sha256=sha256)

    def _place(self, key: str, files: Mapping[str, bytes]) -> None:
        """Writes an artifact's files, whole or not at all; called by the holder of the key's lock."""
        part = self._aside(key, _TEMPORARY)
        try:
            for name in _FILES:
                _write(part / name, files[name])
            _flush(part)
            os.rename(part, self.root / key)
        except BaseException:
            shutil.rmtree(part, ignore_errors=True)
            raise
        _flush(self.root)

    def _sweep(self, key: str) -> None:
        """Removes what killed processes left; called by the holder of the key's lock."""
        for part in self.root.glob(f"*{_TEMPORARY}*"):
            owner = part.name.partition(".")[0]
            if owner == key:
                shutil.rmtree(part, ignore_errors=True)
                continue
            with self._held(owner) as free:
                if free:  # nobody holds the lock under which it was written
                    shutil.rmtree(part, ignore_errors=True)

    def _lock(self, key: str) -> BaseFileLock:
        from filelock import FileLock

        folder = self.root / _LOCKS
        folder.mkdir(parents=True, exist_ok=True)
        return FileLock(folder / f"{key}.lock", is_singleton=False)

    @contextmanager
    def _held(self, key: str) -> Iterator[bool]:
        """Whether the lock of `key` was free; if so, it is held inside."""
        from filelock import Timeout

        lock = self._lock(key)
        try:
            lock.acquire(blocking=False)
        except Timeout:
            yield False
            return
        try:
            yield True
        finally:
            lock.release()

    @contextmanager
    def _explained(self) -> Iterator[None]:
        try:
            yield
        except OSError as error:
            raise self._unusable(error) from error

    def _unusable(self, error: OSError) -> UsageError:
        full = error.errno in (errno.ENOSPC, errno.EDQUOT)
        why = "no space is left" if full else error.strerror or str(error)
        todo = "free some" if full else "mend that"
        return UsageError(
            f"the weight cache {self.root} cannot be used: {why}; {todo}, or set ADVPLUG_CACHE to another folder"
        )


def _pack(artifact: Artifact, label: str) -> bytes:
    from safetensors.torch import save

    packed = {_TENSORS + n: v for n, v in artifact.tensors.items()}
    packed |= {_STRUCTURE + n: v for n, v in artifact.structure.items()}
    packed |= {} if artifact.trusted is None else {_TRUSTED: artifact.trusted}
    # Clones: safetensors takes no views and no tensors that share memory.
    plain = {n: v.detach().cpu().clone().contiguous() for n, v in packed.items()}
    facts = json.dumps({"facts": dict(artifact.facts), "label": label})
    data: bytes = save(plain, metadata={"advplug": facts})
    return data


def _read(folder: Path) -> Artifact:
    from safetensors.torch import load_file

    meta = _meta(folder)
    path = folder / "weights.safetensors"
    if path.stat().st_size != meta["bytes"] or weights.digest(path) != meta["sha256"]:
        raise _SpoiledError("the file is not the one that was stored")
    facts = json.loads(weights.header(path)[1]["advplug"])["facts"]
    packed = load_file(path)
    tensors = {n.removeprefix(_TENSORS): v for n, v in packed.items() if n.startswith(_TENSORS)}
    structure = {n.removeprefix(_STRUCTURE): v for n, v in packed.items() if n.startswith(_STRUCTURE)}
    return Artifact(tensors, structure, facts, meta["sha256"], packed.get(_TRUSTED))


def _meta(folder: Path) -> dict[str, Any]:
    text = (folder / "meta.json").read_bytes()
    try:
        meta = json.loads(text)
        if not isinstance(meta, dict) or not {"label", "bytes", "sha256", "made"} <= meta.keys():
            raise ValueError
    except ValueError as error:
        raise _SpoiledError("its description cannot be read") from error
    return meta


def _write(path: Path, data: bytes) -> None:
    with path.open("wb") as file:
        file.write(data)
        file.flush()
        os.fsync(file.fileno())


def _flush(folder: Path) -> None:
    """Makes the folder's entries durable."""
    handle = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)
