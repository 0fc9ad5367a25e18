"""Files of hubs: fetched whole or not at all, held to the lock file, and what is said where they cannot be had."""

from __future__ import annotations

import pickle
import shlex
import shutil
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from hub_tools import HTML, Site, lock_of, safetensors, serving, sha256

from advplug.errors import UsageError
from advplug_hub import fetch, lock

WEIGHTS = safetensors({"a": torch.arange(12.0).view(3, 4)})
OTHER = safetensors({"a": torch.zeros(3, 4)})
NOWHERE = "http://127.0.0.1:9/w.pt"  # the port of discard, which nothing listens on


@pytest.fixture
def site() -> Iterator[Site]:
    with serving() as made:
        made.files["/w.pt"] = WEIGHTS
        yield made


@pytest.fixture(autouse=True)
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("ADVPLUG_CACHE", str(tmp_path / "cache"))
    monkeypatch.delenv("ADVPLUG_LOCK", raising=False)
    return tmp_path / "cache"


def fetched(site: Site, path: Path, offline: bool = False, sha256: str | None = None) -> Path:
    return fetch.from_address(f"{site.address}/w.pt", path, "test:net", offline, sha256)


def test_a_file_is_fetched_once_and_recorded_with_address_size_and_sha256(site: Site, cache: Path) -> None:
    path = cache / "hub" / "w.pt"
    assert fetched(site, path) == path
    assert fetched(site, path, offline=True) == path
    assert site.asked == ["GET /w.pt"]
    assert path.read_bytes() == WEIGHTS
    assert {p.name for p in path.parent.iterdir()} == {".locks", "lock.json", "w.pt"}
    held = lock_of(cache / "hub" / "lock.json")
    (entry,) = held["files"].values()
    assert held["lock"] == 1
    assert list(held["files"]) == [f"{site.address}/w.pt"]
    assert entry["sha256"] == sha256(WEIGHTS)
    assert entry["bytes"] == len(WEIGHTS)


def test_the_lock_file_may_lie_with_a_project(site: Site, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("ADVPLUG_LOCK", str(tmp_path / "project" / "models.lock"))
    fetched(site, tmp_path / "one.pt")
    site.files["/w.pt"] = OTHER  # somebody else's cache is empty, and the file behind the address has changed
    with pytest.raises(UsageError, match=r"is not the file that \S+models\.lock recorded on .* take the entry out"):
        fetched(site, tmp_path / "two.pt")
    assert not (tmp_path / "two.pt").exists()
    assert lock_of(tmp_path / "project" / "models.lock")["files"][f"{site.address}/w.pt"]["sha256"] == sha256(WEIGHTS)


def test_a_cached_file_that_was_changed_is_refused(site: Site, cache: Path) -> None:
    path = fetched(site, cache / "w.pt")
    path.write_bytes(OTHER)
    with pytest.raises(UsageError, match=rf"{path} is not the file .*: its SHA-256 is {sha256(OTHER)[:16]}"):
        fetched(site, path)
    assert path.read_bytes() == OTHER  # nothing is deleted behind the user's back


def test_offline_without_the_file_names_the_place_and_how_to_fetch(site: Site, cache: Path) -> None:
    path = cache / "hub" / "w.pt"
    with pytest.raises(UsageError) as caught:
        fetched(site, path, offline=True)
    assert str(path) in str(caught.value)
    assert "--offline forbids" in str(caught.value)
    assert site.asked == []
    assert not path.parent.exists()


@pytest.mark.skipif(shutil.which("curl") is None, reason="curl, which the message names, is not installed")
def test_out_of_reach_is_one_line_with_a_command_that_puts_the_file_there(site: Site, cache: Path) -> None:
    path = cache / "hub" / "w.pt"
    with pytest.raises(UsageError) as caught:
        fetch.from_address(NOWHERE, path, "test:net", offline=False)
    message = str(caught.value)
    assert message.startswith(f"the weights of test:net cannot be fetched to {path} (")
    assert "refused" in message
    assert "\n" not in message
    command = message.partition("with '")[2].rstrip("'")
    assert NOWHERE in command
    subprocess.run(shlex.split(command.replace(NOWHERE, f"{site.address}/w.pt")), check=True, capture_output=True)
    assert fetched(site, path, offline=True).read_bytes() == WEIGHTS


@pytest.mark.parametrize(
    ("content", "words"),
    [
        (HTML, "is an HTML or XML page, not weights"),
        (b"", "is empty"),
        (WEIGHTS[:-5], "is truncated"),
        (b"version https://git-lfs.github.com/spec/v1\n", "is a Git LFS pointer"),
    ],
)
def test_what_is_no_whole_weights_file_is_neither_kept_nor_recorded(
    site: Site, cache: Path, content: bytes, words: str
) -> None:
    site.files["/w.pt"] = content
    path = cache / "hub" / "w.pt"
    with pytest.raises(UsageError, match=rf"^what came from {site.address}/w.pt for test:net {words}"):
        fetched(site, path)
    assert not list(path.parent.glob("*.pt*"))
    assert not (cache / "hub" / "lock.json").exists()
    site.files["/w.pt"] = WEIGHTS
    assert fetched(site, path).read_bytes() == WEIGHTS


def test_a_truncated_archive_is_seen_before_it_is_recorded(site: Site, cache: Path, tmp_path: Path) -> None:
    torch.save({"a": torch.zeros(100)}, tmp_path / "made.pt")
    site.files["/w.pt"] = (tmp_path / "made.pt").read_bytes()[:-30]
    with pytest.raises(UsageError, match="is truncated; fetch it again"):
        fetched(site, cache / "hub" / "w.pt")
    assert not (cache / "hub" / "lock.json").exists()


def test_a_connection_that_breaks_off_leaves_nothing(site: Site, cache: Path) -> None:
    # The older format of torch.save has no end that could be missed.
    content = pickle.dumps(0x1950A86A20F9469CFC6C) + bytes(100)
    site.files["/w.pt"], site.short = content, 60
    with pytest.raises(UsageError, match=f"broke off after {len(content) - 60} of {len(content)} bytes"):
        fetched(site, cache / "hub" / "w.pt")
    assert not list((cache / "hub").glob("w.pt*"))
    assert not (cache / "hub" / "lock.json").exists()


def test_a_sha256_that_is_asked_for_decides(site: Site, cache: Path) -> None:
    with pytest.raises(UsageError, match=f"has the SHA-256 {sha256(WEIGHTS)}, not {sha256(OTHER)} as asked for"):
        fetched(site, cache / "hub" / "w.pt", sha256=sha256(OTHER))
    assert not list((cache / "hub").glob("*"))
    path = fetched(site, cache / "hub" / "w.pt", sha256=sha256(WEIGHTS))
    with pytest.raises(UsageError, match="as asked for"):
        fetched(site, path, sha256=sha256(OTHER))


def test_a_missing_page_and_no_address_at_all(site: Site, cache: Path) -> None:
    with pytest.raises(UsageError, match=r"cannot be fetched to .* \(HTTP Error 404: Not Found\)"):
        fetch.from_address(f"{site.address}/none.pt", cache / "w.pt", "test:net", offline=False)
    with pytest.raises(UsageError, match=r"cannot be fetched to .*unknown url type"):
        fetch.from_address("somewhere", cache / "w.pt", "test:net", offline=False)


@pytest.mark.parametrize("text", ["{", "[]", '{"lock": 2, "files": {}}', '{"lock": 1, "files": {"a": {"bytes": 1}}}'])
def test_a_lock_file_that_is_none_is_not_written_over(text: str, cache: Path, tmp_path: Path) -> None:
    (cache / "hub").mkdir(parents=True)
    (cache / "hub" / "lock.json").write_text(text)
    (tmp_path / "w.pt").write_bytes(WEIGHTS)
    with pytest.raises(UsageError, match=r"lock\.json is no lock file of version 1; mend or delete it"):
        lock.check("http://somewhere/w.pt", tmp_path / "w.pt")
    assert (cache / "hub" / "lock.json").read_text() == text


def test_a_lock_file_that_cannot_be_written_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "file").write_text("no folder")
    (tmp_path / "w.pt").write_bytes(WEIGHTS)
    monkeypatch.setenv("ADVPLUG_LOCK", str(tmp_path / "file" / "lock.json"))
    with pytest.raises(UsageError, match=r"the lock file \S+lock\.json cannot be used: .*ADVPLUG_LOCK"):
        lock.check("http://somewhere/w.pt", tmp_path / "w.pt")
