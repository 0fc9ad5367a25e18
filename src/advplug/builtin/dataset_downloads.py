"""MNIST and CIFAR: torchvision fetches and checks them once, into a folder that later runs only read."""

from __future__ import annotations

import contextlib
import gzip
import hashlib
import http.client
import io
import os
import socket
import sys
import urllib.error
import zlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from advplug.errors import UsageError

Array = np.ndarray[Any, Any]
TIMEOUT = 30.0
"""Seconds without an answer after which a download is given up."""
MNIST_FILES = {
    "train-images-idx3-ubyte": "6bbc9ace898e44ae57da46a324031adb",
    "train-labels-idx1-ubyte": "a25bea736e30d166cdddb491f175f624",
    "t10k-images-idx3-ubyte": "2646ac647ad5339dbf082846283269ea",
    "t10k-labels-idx1-ubyte": "27ae3e4e09519cfbb04c329615203637",
}
"""md5 of each official file, unpacked."""


class Arrays(NamedTuple):
    """Images uint8 (N, C, H, W) and labels int64 (N,) of both splits."""

    train_x: Array
    train_y: Array
    test_x: Array
    test_y: Array


def datasets_folder() -> Path:
    """Where downloads are kept: `datasets` in ADVPLUG_CACHE, or in the user's cache folder."""
    import platformdirs

    chosen = os.environ.get("ADVPLUG_CACHE")
    return (Path(chosen).expanduser() if chosen else platformdirs.user_cache_path("advplug")) / "datasets"


def load_mnist(root: Path | None, offline: bool) -> Arrays:
    """MNIST from the official files under `root`, packed (.gz) or not, which may be read-only.

    Downloads what is missing unless `offline`. Raises UsageError where that fails or a file is damaged.
    """
    folder = root or datasets_folder()
    raw = _mnist_raw(folder)
    if raw is None:
        how = f"put the four MNIST files (*-ubyte.gz) into '{folder / 'MNIST' / 'raw'}'"
        _fetch("MNIST", folder, offline, how, train=True)
        raw = _mnist_raw(folder)
        if raw is None:
            raise UsageError(
                f"mnist was fetched to '{folder}', but its files are not there; remove the folder and try again"
            )
    train_x, train_y, test_x, test_y = (_read_idx(raw, name) for name in MNIST_FILES)
    return Arrays(train_x[:, None], train_y.astype(np.int64), test_x[:, None], test_y.astype(np.int64))


def _mnist_raw(folder: Path) -> Path | None:
    for raw in (folder / "MNIST" / "raw", folder / "raw", folder):
        if all((raw / name).exists() or (raw / f"{name}.gz").exists() for name in MNIST_FILES):
            return raw
    return None


def _read_idx(raw: Path, name: str) -> Array:
    """One idx file: magic (0, 0, 8 for uint8, dimensions), sizes as big-endian int32, then the bytes."""
    packed = raw / f"{name}.gz"
    path = packed if packed.exists() else raw / name
    try:
        data = path.read_bytes()
        data = gzip.decompress(data) if path is packed else data
    except (OSError, EOFError, zlib.error) as error:
        raise _damaged(path, f"it cannot be unpacked: {error}") from error
    if hashlib.md5(data, usedforsecurity=False).hexdigest() != MNIST_FILES[name]:
        raise _damaged(path, "its checksum is not the official one")
    dimensions = data[3]
    shape = tuple(int(v) for v in np.frombuffer(data, ">i4", dimensions, 4))
    return np.frombuffer(data, np.uint8, offset=4 + 4 * dimensions).reshape(shape)


def _damaged(path: Path, why: str) -> UsageError:
    page = _html(path)
    return UsageError(
        f"'{path}' is {'an HTML page' if page else f'damaged ({why})'}; remove it, and run again to fetch it"
    )


def load_cifar(kind: str, root: Path | None, offline: bool) -> Arrays:
    """`kind` is CIFAR10 or CIFAR100. Downloads what is missing unless `offline`.

    torchvision compares every file with its official md5 before it unpickles it. Raises UsageError.
    """
    folder = root or datasets_folder()
    found = _open(kind, folder)
    if found is None:
        how = f"put {_loader(kind).filename} from {_loader(kind).url} into '{folder}'"
        _fetch(kind, folder, offline, how)
        found = _open(kind, folder)
        if found is None:
            raise UsageError(
                f"{kind.lower()} was fetched to '{folder}' but cannot be read; remove it there and try again"
            )
    train, test = found
    return Arrays(*_arrays(train), *_arrays(test))


def _arrays(data: Any) -> tuple[Array, Array]:
    return data.data.transpose(0, 3, 1, 2), np.array(data.targets, np.int64)


def _loader(kind: str) -> Any:
    from advplug.vision import import_torchvision

    import_torchvision()
    import torchvision.datasets

    return getattr(torchvision.datasets, kind)


def _open(kind: str, folder: Path) -> tuple[Any, Any] | None:
    """Both splits as torchvision opens them, or None where they are missing or fail their checksums."""
    try:
        return _loader(kind)(folder, train=True), _loader(kind)(folder, train=False)
    except RuntimeError:
        return None
    except OSError as error:
        raise UsageError(f"{kind.lower()} in '{folder}' cannot be read: {error}") from error


def _fetch(kind: str, folder: Path, offline: bool, how: str, **options: Any) -> None:
    """Downloads (or only unpacks, where the archive is there) under a lock, so that runs can share a folder."""
    from filelock import FileLock

    loader, name = _loader(kind), kind.lower()
    if offline and not _archive_there(loader, folder):
        raise UsageError(f"{name} is not in '{folder}' and --offline forbids to fetch it; run once without, or {how}")
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with FileLock(folder / f".{name}.lock"), _patience(), _quiet():
            loader(folder, download=True, **options)
    except (RuntimeError, OSError, http.client.HTTPException, EOFError, zlib.error) as error:
        if isinstance(error, urllib.error.HTTPError):
            error.close()  # it holds the connection
        page = next((p for p in _candidates(loader, folder) if _html(p)), None)
        why = "the server sent an HTML page instead of the file" if page else " ".join(str(error).split())
        if "not found or corrupted" in why.lower():
            why = "what arrived is truncated or not the official file"
        raise UsageError(f"{name} could not be fetched to '{folder}' ({why}); try again later, or {how}") from error


def _archive_there(loader: Any, folder: Path) -> bool:
    from torchvision.datasets.utils import check_integrity

    archive = getattr(loader, "filename", None)
    return archive is not None and bool(check_integrity(folder / archive, loader.tgz_md5))


def _candidates(loader: Any, folder: Path) -> Iterator[Path]:
    archive = getattr(loader, "filename", None)
    if archive is not None:
        yield folder / archive
    for name in MNIST_FILES if archive is None else ():
        yield folder / "MNIST" / "raw" / f"{name}.gz"


def _html(path: Path) -> bool:
    try:
        with path.open("rb") as file:
            return file.read(512).lstrip()[:1] == b"<"
    except OSError:
        return False


@contextlib.contextmanager
def _patience() -> Iterator[None]:
    """torchvision's downloads have no timeout of their own and would wait for ever."""
    before = socket.getdefaulttimeout()
    socket.setdefaulttimeout(TIMEOUT)
    try:
        yield
    finally:
        socket.setdefaulttimeout(before)


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """No progress bar where nobody watches."""
    if sys.stderr.isatty():
        yield
    else:
        with contextlib.redirect_stderr(io.StringIO()):
            yield
