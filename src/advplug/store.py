"""results.sqlite: finished cells with their per-image evidence, and the audits. One process writes."""

from __future__ import annotations

import contextlib
import errno
import json
import os
import sqlite3
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from filelock import FileLock, Timeout

from advplug.errors import AdvplugError, UsageError
from advplug.evidence import Evidence
from advplug.keys import digest
from advplug.results import (
    Cell,
    Certificate,
    Poisoning,
    RunResult,
    ThreatRow,
    cell_from_json,
    certificate_from_json,
    poisoning_from_json,
)
from advplug.stored.columns import holds
from advplug.stored.samples import PoisonSample, Sample

_TABLES = """
CREATE TABLE IF NOT EXISTS cell (
    key TEXT PRIMARY KEY, sweep TEXT NOT NULL, status TEXT NOT NULL, cell TEXT NOT NULL, evidence BLOB,
    finished TEXT NOT NULL DEFAULT (datetime('now')));
CREATE TABLE IF NOT EXISTS audit (
    key TEXT PRIMARY KEY, audit BLOB NOT NULL, finished TEXT NOT NULL DEFAULT (datetime('now')));
CREATE TABLE IF NOT EXISTS shown (
    kind TEXT NOT NULL, key TEXT NOT NULL, row TEXT NOT NULL, finished TEXT NOT NULL DEFAULT (datetime('now')),
    PRIMARY KEY (kind, key));
CREATE TABLE IF NOT EXISTS sample (key TEXT PRIMARY KEY, sample BLOB NOT NULL);
CREATE TABLE IF NOT EXISTS named (dataset TEXT PRIMARY KEY, classes TEXT NOT NULL);
CREATE TABLE IF NOT EXISTS told (key TEXT PRIMARY KEY, at TEXT NOT NULL);
CREATE TABLE IF NOT EXISTS meta (key TEXT PRIMARY KEY, value TEXT NOT NULL);
"""
_NOW = "strftime('%Y-%m-%d %H:%M:%f', 'now')"
_PUT = (
    f"INSERT INTO cell (key, sweep, status, cell, evidence, finished) VALUES (?, ?, ?, ?, ?, {_NOW}) "  # noqa: S608
    "ON CONFLICT (key) DO UPDATE SET status=excluded.status, cell=excluded.cell, "
    "evidence=excluded.evidence, finished=excluded.finished WHERE cell.status != 'ok' OR ?"
)
_CERTIFICATE, _POISONING = "certificate", "poisoning"
"""What stands in the place of a sweep's key in the row of a certificate, or of an attack on training data."""
THREAT = ("dataset", "model", "defense", "norm", "eps", "goal", "seed", "shape")
"""The columns that name a (victim, threat) group."""
LAYOUT = 1
"""Version of the tables; a folder of another version is refused, never rewritten."""


class Store:
    """One run folder. Only one process at a time may hold it; rows survive a kill at any moment."""

    def __init__(self, folder: Path, fresh: bool = False) -> None:
        """Opens or creates `folder`; `fresh` forgets what it holds. Raises UsageError where that is impossible."""
        self.folder = folder
        with explained(folder):
            folder.mkdir(parents=True, exist_ok=True)
            self._lock = FileLock(folder / ".lock")
            try:
                self._lock.acquire(timeout=0)
            except Timeout:
                raise UsageError(
                    f"{folder} is in use by another run; wait for it or choose another folder with -o"
                ) from None
            try:
                self._db = self._open(fresh)
            except BaseException:
                self._lock.release()
                raise

    def _open(self, fresh: bool) -> sqlite3.Connection:
        path = self.folder / "results.sqlite"
        if fresh:
            for name in ("results.sqlite", "results.sqlite-journal"):
                (self.folder / name).unlink(missing_ok=True)
            for crafted in (f for ending in ("npy", "partial") for f in self.crafted.glob(f"*-*_*.{ending}")):
                crafted.unlink()
        db = sqlite3.connect(path, isolation_level=None)
        try:
            db.execute("PRAGMA journal_mode=DELETE")
            db.execute("PRAGMA synchronous=FULL")
            db.executescript(_TABLES)
            row = db.execute("SELECT value FROM meta WHERE key='layout'").fetchone()
            if row is None:
                db.execute("INSERT OR IGNORE INTO meta VALUES ('layout', ?)", (str(LAYOUT),))
            elif int(row[0]) != LAYOUT:
                raise UsageError(f"{path} was written by another version of advplug; choose another folder with -o")
        except BaseException:
            db.close()
            raise
        return db

    @property
    def crafted(self) -> Path:
        """Where adversarial images are kept that other cells still need."""
        return self.folder / "crafted"

    def close(self) -> None:
        self._db.close()
        self._lock.release()

    def __enter__(self) -> Store:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    @contextlib.contextmanager
    def _transaction(self) -> Iterator[None]:
        with explained(self.folder):
            self._db.execute("BEGIN IMMEDIATE")
            try:
                yield
                self._db.execute("COMMIT")
            except BaseException:
                with contextlib.suppress(sqlite3.Error):
                    self._db.execute("ROLLBACK")
                raise

    def put(
        self,
        sweep: str,
        cells: Sequence[tuple[Cell, Evidence | None]],
        renew: bool = False,
        samples: Mapping[str, Sample] | None = None,
    ) -> None:
        """Writes cells at once; one that is `ok` already stays as it is, unless it is to be renewed.

        `samples` are images to look at, by the cell's key.
        """
        rows = [
            (c.key, sweep, c.status, json.dumps(asdict(c), allow_nan=False), e.to_bytes() if e else None)
            for c, e in cells
        ]
        with self._transaction():
            self._db.executemany(_PUT, [(*row, renew) for row in rows])
            seen = [(key, sample.to_bytes()) for key, sample in (samples or {}).items()]
            self._db.executemany("INSERT OR REPLACE INTO sample (key, sample) VALUES (?, ?)", seen)

    def put_classes(self, dataset: str, classes: Sequence[str]) -> None:
        """Writes how the classes of a dataset are called."""
        with self._transaction():
            self._db.execute("INSERT OR REPLACE INTO named VALUES (?, ?)", (dataset, json.dumps(list(classes))))

    def put_certificate(self, made: Certificate, proofs: bytes | None) -> None:
        """Writes a certificate at once; one that is `ok` already stays as it is."""
        self._put_row(_CERTIFICATE, made, proofs)

    def put_poisoning(self, made: Poisoning, evidence: bytes | None, sample: PoisonSample | None = None) -> None:
        """Writes what came of an attack on training data, likewise, with images to look at."""
        self._put_row(_POISONING, made, evidence, None if sample is None else sample.to_bytes())

    def _put_row(
        self, kind: str, made: Certificate | Poisoning, evidence: bytes | None, sample: bytes | None = None
    ) -> None:
        row = (made.key, kind, made.status, json.dumps(asdict(made), allow_nan=False), evidence)
        with self._transaction():
            self._db.execute(_PUT, (*row, False))
            if sample is not None:
                self._db.execute("INSERT OR REPLACE INTO sample (key, sample) VALUES (?, ?)", (made.key, sample))

    def cell(self, key: str) -> Cell | None:
        row = self._row("SELECT cell FROM cell WHERE key=?", key)
        return cell_from_json(json.loads(row[0])) if row else None

    def certificate(self, key: str) -> tuple[Certificate, bytes | None] | None:
        """The certificate of that key, and what was proven of each image."""
        row = self._row("SELECT cell, evidence FROM cell WHERE key=?", key)
        return (certificate_from_json(json.loads(row[0])), row[1]) if row else None

    def poisoning(self, key: str) -> tuple[Poisoning, bytes | None] | None:
        """What came of the attack on training data of that key, and what was observed."""
        row = self._row("SELECT cell, evidence FROM cell WHERE key=?", key)
        return (poisoning_from_json(json.loads(row[0])), row[1]) if row else None

    def evidence(self, key: str) -> Evidence | None:
        row = self._row("SELECT evidence FROM cell WHERE key=?", key)
        return Evidence.from_bytes(row[0]) if row and row[0] else None

    def observed(self, key: str, name: str) -> bool | None:
        """Whether a cell's evidence has that value; None where there is no evidence."""
        row = self._row("SELECT evidence FROM cell WHERE key=?", key)
        return holds(row[0], name) if row and row[0] else None

    def _row(self, query: str, key: str) -> Any:
        with explained(self.folder):
            return self._db.execute(query, (key,)).fetchone()

    def put_shown(self, result: RunResult) -> None:
        """Writes what a run's cells came to together, in place of what runs before it in this folder said of the
        same threats, certificates and attacks on training data."""
        rows: list[tuple[str, str, Any]] = []
        rows += [("threat", digest(_named(r)), r) for r in result.threats]
        rows += [(_CERTIFICATE, r.key, r) for r in result.certificates]
        rows += [(_POISONING, r.key, r) for r in result.poisonings]
        rows += [("run", digest({"command": result.run.command}), result.run)]
        values = [(kind, key, json.dumps(asdict(row), allow_nan=False)) for kind, key, row in rows]
        told = [(made.key,) for made in result.done]
        with self._transaction():
            self._db.executemany("INSERT OR REPLACE INTO shown (kind, key, row) VALUES (?, ?, ?)", values)
            # Of results of one name those count that the last run told of, whenever they were computed.
            self._db.executemany(f"INSERT OR REPLACE INTO told (key, at) VALUES (?, {_NOW})", told)  # noqa: S608

    def put_audits(self, audits: Mapping[str, bytes]) -> None:
        """Writes all of them or none: an audit counts as done, so what it found of the victim has to be there too."""
        with self._transaction():
            self._db.executemany("INSERT OR REPLACE INTO audit (key, audit) VALUES (?, ?)", audits.items())

    def audit(self, key: str) -> bytes | None:
        row = self._row("SELECT audit FROM audit WHERE key=?", key)
        return bytes(row[0]) if row else None


def _named(threat: ThreatRow) -> dict[str, Any]:
    """What names a threat; without a shape as in folders from before there were any."""
    return {column: value for column in THREAT if (value := getattr(threat, column)) != ""}


def finished(folder: Path, keys: Sequence[str]) -> dict[str, str]:
    """Status by key of the stored cells among `keys`, without locking or creating anything."""
    path = folder / "results.sqlite"
    if not path.is_file() or not path.stat().st_size:
        return {}
    with reading(folder) as db:
        rows = dict(_select(db, "cell", "SELECT key, status FROM cell"))
    return {k: rows[k] for k in keys if k in rows}


def no_run(folder: Path) -> UsageError:
    """What to say where `folder` is none that keeps a run: a file, such as a matrix, or a folder of runs."""
    wanted = "give the folder of a run, the one named with -o"
    if folder.is_file():
        like = f", or advplug-results/{folder.stem}" if folder.suffix in (".yaml", ".yml") else ""
        return UsageError(f"{folder} is a file; {wanted}{like}")
    below = sorted(path.parent for path in folder.glob("*/results.sqlite"))
    return UsageError(f"{folder} holds no results.sqlite; {wanted}" + (f"; {below[0]} is one" if below else ""))


@contextlib.contextmanager
def reading(folder: Path) -> Iterator[sqlite3.Connection]:
    """The stored tables, without locking or creating anything. Raises UsageError where `folder` is no run's."""
    path = folder / "results.sqlite"
    if not path.is_file():
        raise no_run(folder)
    # Not mode=ro: what a killed run left half written has to be rolled back before it can be read.
    uri = f"{path.absolute().as_uri()}?mode=rw"
    with explained(folder), contextlib.closing(sqlite3.connect(uri, uri=True)) as db:
        yield db


def _select(db: sqlite3.Connection, table: str, query: str, values: Sequence[str] = ()) -> list[Any]:
    """Rows; none where the table was never made."""
    made = db.execute("SELECT 1 FROM sqlite_master WHERE type='table' AND name=?", (table,)).fetchone()
    return db.execute(query, values).fetchall() if made else []


def shown(db: sqlite3.Connection, kind: str) -> dict[str, Any]:
    """What finished runs said of a `kind`, by key: threat, certificate, poisoning or run."""
    rows = _select(db, "shown", "SELECT key, row FROM shown WHERE kind=? ORDER BY rowid", (kind,))
    return {key: json.loads(row) for key, row in rows}


def samples(db: sqlite3.Connection, kind: str = "cell") -> Iterator[tuple[str, bytes]]:
    """Images to look at, by the key of the cell or poisoning."""
    where, named = _of_kind(kind)
    query = f"SELECT key, sample FROM sample WHERE key IN (SELECT key FROM cell WHERE {where}) ORDER BY rowid"  # noqa: S608
    yield from _select(db, "sample", query, named)


def classes(db: sqlite3.Connection) -> dict[str, tuple[str, ...]]:
    """The names of the classes by dataset."""
    return {name: tuple(json.loads(made)) for name, made in _select(db, "named", "SELECT dataset, classes FROM named")}


def cells(db: sqlite3.Connection, kind: str = "cell") -> list[Any]:
    """All stored cells, certificates or poisonings as JSON, in the order of their writing."""
    where, named = _of_kind(kind)
    rows = _select(db, "cell", f"SELECT cell FROM cell WHERE {where} ORDER BY rowid", named)  # noqa: S608
    return [json.loads(cell) for (cell,) in rows]


def evidences(db: sqlite3.Connection, kind: str = "cell") -> dict[str, bytes]:
    """What was observed, by key, where something was."""
    where, named = _of_kind(kind)
    query = f"SELECT key, evidence FROM cell WHERE {where} AND evidence IS NOT NULL"  # noqa: S608
    return dict(_select(db, "cell", query, named))


def latest(db: sqlite3.Connection, kind: str = "cell") -> list[tuple[int, Any]]:
    """All stored cells, certificates or poisonings as JSON, each with its place in the order of writing; at the end
    those that were told of last."""
    where, named = _of_kind(kind)
    query = f"SELECT rowid, key, cell, finished FROM cell WHERE {where} ORDER BY rowid"  # noqa: S608
    rows = _select(db, "cell", query, named)
    at = dict(_select(db, "told", "SELECT key, at FROM told"))
    rows.sort(key=lambda row: max(row[3], at.get(row[1], "")))
    return [(place, json.loads(cell)) for place, _, cell, _ in rows]


def _of_kind(kind: str) -> tuple[str, tuple[str, ...]]:
    """Which rows of the table of cells are cells, certificates or poisonings, as a condition with its values."""
    return ("sweep NOT IN (?, ?)", (_CERTIFICATE, _POISONING)) if kind == "cell" else ("sweep=?", (kind,))


_REASONS = {
    errno.ENOSPC: "the disk is full; free some space, then run the same command again to go on",
    errno.EDQUOT: "the disk quota is used up; free some space, then run the same command again to go on",
    errno.EACCES: "no permission to write there; choose another folder with -o",
    errno.EPERM: "no permission to write there; choose another folder with -o",
    errno.EROFS: "it is on a read-only file system; choose another folder with -o",
    errno.ENOTDIR: "it is a file, not a folder; choose another folder with -o",
    errno.EEXIST: "it is a file, not a folder; choose another folder with -o",
}


@contextlib.contextmanager
def explained(folder: Path) -> Iterator[None]:
    """Turns failures to write below `folder` into one clear line."""
    try:
        yield
    except AdvplugError:
        raise
    except OSError as error:
        reason = _REASONS.get(error.errno or 0, os.strerror(error.errno) if error.errno else str(error))
        raise UsageError(f"cannot write to {folder}: {reason}") from error
    except sqlite3.DatabaseError as error:
        raise UsageError(f"cannot use {folder}/results.sqlite: {_sqlite_reason(error)}") from error


def _sqlite_reason(error: sqlite3.DatabaseError) -> str:
    text: Any = str(error)
    if "full" in text:
        return _REASONS[errno.ENOSPC]
    if "not a database" in text or "malformed" in text:
        return "it is no results file or is damaged; move it away, or start anew with --fresh"
    if "disk I/O" in text:
        return "the disk reports an error, or a limit on file sizes is reached; mend that and run the command again"
    if "readonly" in text or "unable to open" in text:
        return _REASONS[errno.EACCES]
    return str(text)
