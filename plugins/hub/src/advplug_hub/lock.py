"""The lock file: what each fetched file was when it was first used. Imports no torch.

A JSON object: `lock` is its version, `files` maps an address to `bytes`, `sha256` and `recorded` (UTC). It lies in the
cache, or where ADVPLUG_LOCK says, so that it can be kept with a project.
"""

from __future__ import annotations

import datetime
import hashlib
import json
import os
import uuid
from pathlib import Path
from typing import Any

from advplug import weights
from advplug.artifacts import default_root
from advplug.errors import UsageError

VERSION = 1


def folder() -> Path:
    """Where files of hubs are kept: `hub` beside the trained weights."""
    return default_root().parent / "hub"


def lock_path() -> Path:
    """`$ADVPLUG_LOCK`, or `lock.json` in the folder."""
    chosen = os.environ.get("ADVPLUG_LOCK")
    return Path(chosen).expanduser() if chosen else folder() / "lock.json"


def check(address: str, file: Path, sha256: str | None = None) -> str:
    """The SHA-256 of `file`, recorded as that of `address` if nothing is yet.

    Raises UsageError where another was recorded or is asked for by `sha256`, and where the lock file cannot be read or
    written.
    """
    from filelock import FileLock

    demand(file, sha256)
    lock = lock_path()
    try:
        guards = folder() / ".locks"
        guards.mkdir(parents=True, exist_ok=True)
        with FileLock(guards / f"{hashlib.sha256(str(lock.absolute()).encode()).hexdigest()[:16]}.lock"):
            files = _read(lock)
            digest, size = weights.sha256(file), file.stat().st_size
            known = files.get(address)
            if known is None:
                now = datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds")
                files[address] = {"bytes": size, "sha256": digest, "recorded": now}
                _write(lock, files)
    except OSError as error:
        raise UsageError(f"the lock file {lock} cannot be used: {error.strerror or error}; mend that, or name another "
                         "with ADVPLUG_LOCK") from error  # fmt: skip
    if known is not None and known["sha256"] != digest:
        raise UsageError(
            f"{file} is not the file that {lock} recorded on {known['recorded'][:10]} for {address}: its SHA-256 is "
            f"{digest[:16]}... ({size:,} bytes) instead of {known['sha256'][:16]}... ({known['bytes']:,} bytes); "
            "delete and fetch it again, or take the entry out of the lock file if the change is meant, and run with "
            "--fresh, since results of the earlier file are not told apart from those of this one"
        )
    return digest


def demand(file: Path, sha256: str | None) -> None:
    """Raises UsageError where `file` has another SHA-256 than the one that is asked for."""
    if sha256 is not None and weights.sha256(file) != sha256:
        raise UsageError(
            f"{file} has the SHA-256 {weights.sha256(file)}, not {sha256} as asked for; it is another file, or it was "
            "damaged or changed on its way"
        )


def _read(lock: Path) -> dict[str, Any]:
    if not lock.exists():
        return {}
    try:
        held = json.loads(lock.read_bytes())
        files = held["files"]
        if held["lock"] != VERSION or any(not {"bytes", "sha256", "recorded"} <= f.keys() for f in files.values()):
            raise ValueError
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise UsageError(f"{lock} is no lock file of version {VERSION}; mend or delete it") from error
    made: dict[str, Any] = files
    return made


def _write(lock: Path, files: dict[str, Any]) -> None:
    lock.parent.mkdir(parents=True, exist_ok=True)
    part = lock.with_name(f"{lock.name}.{uuid.uuid4().hex[:8]}")
    part.write_text(json.dumps({"lock": VERSION, "files": dict(sorted(files.items()))}, indent=2) + "\n", "utf-8")
    os.replace(part, lock)
