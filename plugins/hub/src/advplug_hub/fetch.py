"""Files of hubs: from a place where they were put by hand, from a cache, or fetched; each held to the lock file."""

from __future__ import annotations

import logging
import os
import shutil
import urllib.error
import urllib.request
import uuid
import zipfile
from collections.abc import Sequence
from pathlib import Path

from advplug import weights
from advplug.errors import UsageError
from advplug_hub import lock

log = logging.getLogger("advplug")

WAIT = 15
"""Seconds after which a hub counts as out of reach."""


def from_address(url: str, path: Path, name: str, offline: bool, sha256: str | None = None) -> Path:
    """The file of `url`, which is kept at `path`; fetched where it is missing and `offline` allows.

    Raises UsageError where it is not at hand, is no whole weights file, or is not the one that was recorded or is asked
    for by `sha256`.
    """
    if not path.exists():
        advice = _by_hand(path, url)
        if offline:
            raise UsageError(f"the weights of {name} are not at {path} and --offline forbids the download; {advice}")
        _download(url, path, name, advice, sha256)
    _demand_whole(path)
    lock.check(url, path, sha256)
    return path


def _download(url: str, path: Path, name: str, advice: str, sha256: str | None) -> None:
    """Whole or not at all; what is no weights file, or not the one that is wanted, is neither kept nor recorded."""
    part = path.with_name(f"{path.name}.{uuid.uuid4().hex[:8]}")
    log.info("fetching %s to %s", url, path)
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with urllib.request.urlopen(url, timeout=WAIT) as answer, part.open("wb") as file:  # noqa: S310
            shutil.copyfileobj(answer, file)
        _demand_all(answer.headers.get("Content-Length"), part)
        try:
            _demand_whole(part)
            lock.check(url, part, sha256)
        except UsageError as error:
            why = str(error)
            if not why.startswith(str(part)):
                raise
            why = why.removeprefix(f"{part} ")
            raise UsageError(f"what came from {url} for {name} {why}; {advice}") from error
        os.replace(part, path)
    except (OSError, ValueError) as error:  # no network, no space; ValueError: no address at all
        why = " ".join(str(error).split())
        raise UsageError(f"the weights of {name} cannot be fetched to {path} ({why}); {advice}") from error
    finally:
        part.unlink(missing_ok=True)


def _demand_all(announced: str | None, part: Path) -> None:
    """A connection that breaks off early looks like the end of the file."""
    got = part.stat().st_size
    if announced is not None and int(announced) != got:
        raise OSError(f"the connection broke off after {got:,} of {int(announced):,} bytes")


def _demand_whole(path: Path) -> None:
    """Raises UsageError for what is no weights file, or an archive or safetensors file without its end."""
    weights.find(path)
    with path.open("rb") as file:
        start = file.read(9)
    if start[8:] == b"{":
        weights.header(path)
    elif start.startswith(b"PK") and not zipfile.is_zipfile(path):
        raise UsageError(f"{path} is truncated; fetch it again")


def held(repository: str, names: Sequence[str], revision: str | None) -> Path | None:
    """The first of these files of a repository that lies in the folder for those put by hand, or in the hub's cache."""
    from huggingface_hub import try_to_load_from_cache

    for name in names:
        path = _place(repository, name, revision)
        if path.exists():
            return path
    for name in names:
        cached = try_to_load_from_cache(repository, name, revision=revision)
        if isinstance(cached, str) and Path(cached).exists():
            return Path(cached)
    return None


def from_hub(repository: str, names: Sequence[str], revision: str | None, name: str, offline: bool) -> Path:
    """One of these files of a repository on the Hugging Face hub, the first that there is; `name` is for messages.

    Raises UsageError as `from_address` does.
    """
    from huggingface_hub import hf_hub_download, hf_hub_url

    path = held(repository, names, revision)
    if path is not None:
        lock.check(hf_hub_url(repository, path.name, revision=revision), path)
        return path
    place = _place(repository, names[0], revision)
    advice = _by_hand(place, hf_hub_url(repository, names[0], revision=revision))
    what = f"{names[0]} of {name} is not at hand, neither in {place.parent} nor in {_cache()}"
    if offline or _told_offline():
        raise UsageError(f"{what}, and being offline forbids the download; {advice}")
    why = "there is no such file"
    for file in names:
        address = hf_hub_url(repository, file, revision=revision)
        try:
            # The hub's own client asks several times before it says that there is no network.
            _reachable(address)
            log.info("fetching %s of %s", file, repository)
            path = Path(hf_hub_download(repository, file, revision=revision))
        except (OSError, ValueError, RuntimeError) as error:  # ValueError: an endpoint that is no address
            why = " ".join(str(error).split())
            if isinstance(error, urllib.error.HTTPError) and error.code == 404:
                continue
            break
        lock.check(address, path)
        return path
    raise UsageError(f"{what}, and it cannot be fetched from the hub ({why}); {advice}")


def _place(repository: str, file: str, revision: str | None) -> Path:
    """Where a file of a repository may be put by hand."""
    return lock.folder() / f"{repository.replace('/', '--')}@{(revision or 'main').replace('/', '--')}" / file


def _cache() -> str:
    from huggingface_hub import constants

    return str(constants.HF_HUB_CACHE)


def _told_offline() -> bool:
    from huggingface_hub import constants

    return bool(constants.HF_HUB_OFFLINE)


def _reachable(address: str) -> None:
    from huggingface_hub.utils import build_hf_headers

    request = urllib.request.Request(address, headers=build_hf_headers(), method="HEAD")  # noqa: S310 - the hub's
    with urllib.request.urlopen(request, timeout=WAIT):  # noqa: S310
        pass


def _by_hand(path: Path, url: str) -> str:
    address = f'"{url}"' if "&" in url else url
    return f"fetch it elsewhere with 'curl -L --create-dirs -o {path} {address}'"
