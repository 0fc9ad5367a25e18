"""The run folder: round trips, resume, locks, and failures to write."""

from __future__ import annotations

import errno
import sqlite3

import numpy as np
import pytest

from advplug.errors import UsageError
from advplug.estimate import Estimate
from advplug.evidence import Evidence
from advplug.results import Cell, Flag, Passes, Seconds
from advplug.store import Store, explained, finished


def cell(key="k", status="ok", **rest):
    return Cell(key, "digits", "cnn", "none", "pgd", "linf", "1/10", "untargeted", 0, status, **rest)


def evidence():
    bits = np.array([[True], [False]])
    return Evidence(np.arange(2), np.arange(2), bits, bits[:, 0], bits, rounded=~bits)


def full_cell():
    return cell(
        flags=(Flag("near-chance", "error", "why"),),
        metrics={"clean_accuracy": Estimate(0.5, 0.1, 0.9, 2), "static_robust_accuracy": None},
        passes=Passes(3, 4),
        seconds=Seconds(1.0, 2.0, 3.0, 4.0),
        notes=("a note",),
        provenance={"facts": {"parameters": 3}},
    )


def test_what_is_put_in_comes_out(tmp_path):
    with Store(tmp_path) as store:
        store.put("s", [(full_cell(), evidence())])
        assert store.cell("k") == full_cell()
        assert store.evidence("k").adaptive.tolist() == [[True], [False]]
        assert store.cell("other") is None
        assert store.evidence("other") is None
        store.put_audits({"a": b"bytes"})
        assert store.audit("a") == b"bytes"
        assert store.audit("b") is None
    with Store(tmp_path) as again:
        assert again.cell("k") == full_cell()
    assert finished(tmp_path, ["k", "other"]) == {"k": "ok"}
    assert finished(tmp_path / "nowhere", ["k"]) == {}


def test_failed_cells_are_retried_and_finished_ones_stay(tmp_path):
    with Store(tmp_path) as store:
        store.put("s", [(cell(status="failed", reason="why"), None)])
        store.put("s", [(full_cell(), evidence())])
        store.put("s", [(cell(status="failed", reason="again"), None)])
        assert store.cell("k") == full_cell()


def test_fresh_forgets(tmp_path):
    with Store(tmp_path) as store:
        store.put("s", [(full_cell(), evidence())])
        store.crafted.mkdir()
        (store.crafted / "s-1_10.npy").write_bytes(b"x")
    with Store(tmp_path, fresh=True) as store:
        assert store.cell("k") is None
        assert not list(store.crafted.iterdir())


def test_only_one_run_at_a_time(tmp_path):
    with Store(tmp_path), pytest.raises(UsageError, match="in use by another run; wait for it or choose another"):
        Store(tmp_path)
    Store(tmp_path).close()


def test_a_transaction_is_all_or_nothing(tmp_path):
    with Store(tmp_path) as store:
        with pytest.raises(ValueError, match="JSON"):
            store.put("s", [(cell("good"), None), (cell("bad", notes=(float("nan"),)), None)])
        assert store.cell("good") is None


def test_what_an_audit_found_is_kept_whole_or_not_at_all(tmp_path):
    """An audit that is there is not run again, so nothing of it may be missing."""
    with Store(tmp_path) as store:
        with pytest.raises(Exception, match="type"):
            store.put_audits({"quick:a": b"bytes", "batch:a": object()})
        assert store.audit("quick:a") is None


@pytest.mark.parametrize("content", [b"<html>not found</html>" * 50, b"SQLite format 3\0" + b"\xff" * 4000])
def test_a_file_that_is_no_store_is_left_alone(tmp_path, content):
    (tmp_path / "results.sqlite").write_bytes(content)
    with pytest.raises(UsageError, match="no results file or is damaged"):
        Store(tmp_path)
    assert (tmp_path / "results.sqlite").read_bytes() == content


def test_another_layout_is_refused(tmp_path):
    Store(tmp_path).close()
    with sqlite3.connect(tmp_path / "results.sqlite") as db:
        db.execute("UPDATE meta SET value='99' WHERE key='layout'")
    with pytest.raises(UsageError, match="another version"):
        Store(tmp_path)


def test_a_file_in_the_place_of_the_folder(tmp_path):
    (tmp_path / "out").write_text("x")
    with pytest.raises(UsageError, match="is a file, not a folder"):
        Store(tmp_path / "out")
    with pytest.raises(UsageError, match="is a file, not a folder"):
        Store(tmp_path / "out" / "below")


@pytest.mark.parametrize(
    ("code", "says"),
    [(errno.ENOSPC, "the disk is full; free some space"), (errno.EACCES, "no permission"), (errno.EROFS, "read-only")],
)
def test_failures_to_write_say_what_to_do(tmp_path, code, says):
    with pytest.raises(UsageError, match=says), explained(tmp_path):
        raise OSError(code, "no")


def test_a_full_disk_loses_no_finished_cell(tmp_path):
    """SQLite's own limit stands for the disk: the statement fails as it does when the disk is full."""
    with Store(tmp_path) as store:
        store.put("s", [(full_cell(), evidence())])
        pages = store._db.execute("PRAGMA page_count").fetchone()[0]
        store._db.execute(f"PRAGMA max_page_count={pages}")
        big = cell("big", notes=("x" * 100_000,))
        with pytest.raises(UsageError, match="the disk is full; free some space, then run the same command again"):
            store.put("s", [(big, None)])
    with Store(tmp_path) as store:
        assert store.cell("k") == full_cell()
        assert store.cell("big") is None
