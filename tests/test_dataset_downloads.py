"""Fetching MNIST and CIFAR: a real server on this machine hands out small archives, pages and half files."""

import gzip
import hashlib
import http.server
import io
import os
import pickle
import socket
import tarfile
import threading
from pathlib import Path

import numpy as np
import pytest

from advplug.builtin import dataset_downloads
from advplug.builtin.dataset_downloads import MNIST_FILES, datasets_folder, load_cifar, load_mnist
from advplug.errors import UsageError
from advplug.vision import import_torchvision

DATA = os.environ.get("ADVPLUG_DATA")


def md5(data: bytes) -> str:
    return hashlib.md5(data, usedforsecurity=False).hexdigest()


@pytest.fixture
def server(monkeypatch):
    """(address, files by path, paths asked for); a file of None is a connection that breaks half-way."""
    files: dict[str, bytes | None] = {}
    asked: list[str] = []

    class Handler(http.server.BaseHTTPRequestHandler):
        def do_GET(self):
            asked.append(self.path)
            if self.path not in files:
                self.send_error(404)
                return
            body = files[self.path]
            self.send_response(200)
            self.send_header("Content-Length", str(len(body or b"half of it") * (1 if body is not None else 2)))
            self.end_headers()
            self.wfile.write(body or b"half of it")

        def log_message(self, *_):
            pass

    monkeypatch.setenv("no_proxy", "127.0.0.1")
    monkeypatch.setenv("NO_PROXY", "127.0.0.1")
    running = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    thread = threading.Thread(target=running.serve_forever, kwargs={"poll_interval": 0.01})
    thread.start()
    yield f"http://127.0.0.1:{running.server_port}", files, asked
    running.shutdown()
    running.server_close()
    thread.join()


def tiny_cifar() -> tuple[bytes, dict[str, bytes]]:
    """An archive in the format of CIFAR-10, two training images and one test image, and its files."""
    pixels = np.arange(3 * 3072, dtype=np.int64).astype(np.uint8).reshape(3, 3072)
    parts = {
        "data_batch_1": {"data": pixels[:2], "labels": [3, 1]},
        "test_batch": {"data": pixels[2:], "labels": [2]},
        "batches.meta": {"label_names": ["a", "b", "c", "d"]},
    }
    files = {name: pickle.dumps(content) for name, content in parts.items()}
    packed = io.BytesIO()
    with tarfile.open(fileobj=packed, mode="w:gz") as tar:
        for name, content in files.items():
            member = tarfile.TarInfo(f"cifar-10-batches-py/{name}")
            member.size = len(content)
            tar.addfile(member, io.BytesIO(content))
    return packed.getvalue(), files


@pytest.fixture
def cifar(server, monkeypatch):
    """The server with a small CIFAR-10, of which torchvision knows address and checksums."""
    address, served, asked = server
    import_torchvision()
    from torchvision.datasets import CIFAR10

    archive, files = tiny_cifar()
    monkeypatch.setattr(CIFAR10, "url", f"{address}/cifar-10-python.tar.gz")
    monkeypatch.setattr(CIFAR10, "tgz_md5", md5(archive))
    monkeypatch.setattr(CIFAR10, "train_list", [["data_batch_1", md5(files["data_batch_1"])]])
    monkeypatch.setattr(CIFAR10, "test_list", [["test_batch", md5(files["test_batch"])]])
    monkeypatch.setattr(CIFAR10, "meta", {**CIFAR10.meta, "md5": md5(files["batches.meta"])})
    served["/cifar-10-python.tar.gz"] = archive
    return served, asked


def fails(load, *words: str) -> None:
    with pytest.raises(UsageError) as caught:
        load()
    message = str(caught.value)
    assert "\n" not in message
    for word in words:
        assert word in message, message


def test_cifar_is_fetched_once(cifar, tmp_path, capfd):
    _, asked = cifar
    found = load_cifar("CIFAR10", tmp_path / "new", offline=False)
    assert found.train_x.shape == (2, 3, 32, 32)
    assert found.train_x[1, 0, 0, :3].tolist() == [0, 1, 2]  # 3072 is a multiple of 256
    assert (found.train_y.tolist(), found.test_y.tolist()) == ([3, 1], [2])
    assert capfd.readouterr() == ("", "")
    before = len(asked)
    load_cifar("CIFAR10", tmp_path / "new", offline=False)
    load_cifar("CIFAR10", tmp_path / "new", offline=True)
    assert len(asked) == before


def test_cifar_offline(cifar, tmp_path):
    served, asked = cifar
    fails(lambda: load_cifar("CIFAR10", tmp_path, offline=True), str(tmp_path), "--offline", "cifar-10-python.tar.gz")
    (tmp_path / "cifar-10-python.tar.gz").write_bytes(served["/cifar-10-python.tar.gz"])
    assert len(load_cifar("CIFAR10", tmp_path, offline=True).test_y) == 1
    batch = tmp_path / "cifar-10-batches-py" / "test_batch"
    batch.write_bytes(batch.read_bytes()[:100])
    (tmp_path / "cifar-10-python.tar.gz").unlink()
    fails(lambda: load_cifar("CIFAR10", tmp_path, offline=True), str(tmp_path), "--offline")
    assert asked == []


@pytest.mark.parametrize(
    ("body", "words"),
    [
        (b"<!DOCTYPE html><p>please log in", ["HTML page"]),
        (b"\x1f\x8b half an archive", ["truncated or not the official file"]),
        (None, ["truncated or not the official file"]),
        ("missing", ["404"]),
    ],
)
def test_downloads_that_fail(cifar, tmp_path, body, words):
    served, _ = cifar
    archive = served.pop("/cifar-10-python.tar.gz")
    if body != "missing":
        served["/cifar-10-python.tar.gz"] = body
    fails(lambda: load_cifar("CIFAR10", tmp_path, offline=False), "could not be fetched", str(tmp_path), *words)
    served["/cifar-10-python.tar.gz"] = archive
    assert len(load_cifar("CIFAR10", tmp_path, offline=False).train_y) == 2  # what is left of it does no harm


def test_a_server_that_is_not_there(cifar, tmp_path, monkeypatch):
    from torchvision.datasets import CIFAR10

    with socket.socket() as unused:
        unused.bind(("127.0.0.1", 0))
        port = unused.getsockname()[1]
        monkeypatch.setattr(CIFAR10, "url", f"http://127.0.0.1:{port}/x.tar.gz")
        fails(lambda: load_cifar("CIFAR10", tmp_path, offline=False), "could not be fetched", "refused", "put cifar")


def test_a_server_that_hangs(cifar, tmp_path, monkeypatch):
    from torchvision.datasets import CIFAR10

    monkeypatch.setattr(dataset_downloads, "TIMEOUT", 0.2)
    with socket.socket() as silent:
        silent.bind(("127.0.0.1", 0))
        silent.listen()
        monkeypatch.setattr(CIFAR10, "url", f"http://127.0.0.1:{silent.getsockname()[1]}/x.tar.gz")
        fails(lambda: load_cifar("CIFAR10", tmp_path, offline=False), "could not be fetched", "timed out")
    assert socket.getdefaulttimeout() is None


def test_a_folder_that_cannot_be_made(cifar, tmp_path):
    (tmp_path / "file").touch()
    fails(lambda: load_cifar("CIFAR10", tmp_path / "file" / "x", offline=False), "could not be fetched", "file")


# --- MNIST -----------------------------------------------------------------------------------------


def idx(array: np.ndarray) -> bytes:
    sizes = np.array(array.shape, ">i4").tobytes()
    return bytes([0, 0, 8, array.ndim]) + sizes + array.astype(np.uint8).tobytes()


@pytest.fixture
def mnist(server, monkeypatch):
    """The server with a small MNIST; the payloads by name."""
    address, served, asked = server
    import_torchvision()
    from torchvision.datasets import MNIST

    arrays = [
        np.arange(3 * 784).reshape(3, 28, 28) % 251,
        np.array([5, 0, 4]),
        np.full((2, 28, 28), 9),
        np.array([7, 2]),
    ]
    payloads = dict(zip(MNIST_FILES, map(idx, arrays), strict=True))
    packed = {f"{name}.gz": gzip.compress(content) for name, content in payloads.items()}
    monkeypatch.setattr(MNIST, "mirrors", [f"{address}/"])
    monkeypatch.setattr(MNIST, "resources", [(name, md5(content)) for name, content in packed.items()])
    for name, content in payloads.items():
        monkeypatch.setitem(MNIST_FILES, name, md5(content))
    served |= {f"/{name}": content for name, content in packed.items()}
    return served, asked, payloads


def test_mnist_is_fetched_once(mnist, tmp_path, capfd):
    _, asked, _ = mnist
    found = load_mnist(tmp_path, offline=False)
    assert (found.train_x.shape, found.test_x.shape) == ((3, 1, 28, 28), (2, 1, 28, 28))
    assert found.train_x.reshape(-1)[250:253].tolist() == [250, 0, 1]
    assert (found.train_y.tolist(), found.test_y.tolist()) == ([5, 0, 4], [7, 2])
    assert capfd.readouterr() == ("", "")
    before = len(asked)
    load_mnist(tmp_path, offline=True)
    assert len(asked) == before


@pytest.mark.parametrize("inside", ["MNIST/raw", "raw", "."])
def test_mnist_unpacked_files_are_enough(mnist, tmp_path, inside):
    _, asked, payloads = mnist
    (tmp_path / inside).mkdir(parents=True, exist_ok=True)
    for name, content in payloads.items():
        (tmp_path / inside / name).write_bytes(content)
    assert load_mnist(tmp_path, offline=True).test_y.tolist() == [7, 2]
    assert asked == []


def test_mnist_that_is_missing_or_damaged(mnist, tmp_path):
    served, asked, payloads = mnist
    fails(lambda: load_mnist(tmp_path, offline=True), str(tmp_path), "--offline", "MNIST/raw")
    assert asked == []
    whole = served["/train-images-idx3-ubyte.gz"]
    served["/train-images-idx3-ubyte.gz"] = b"<html>"
    fails(lambda: load_mnist(tmp_path, offline=False), "could not be fetched", "HTML page")
    for name in payloads:
        (tmp_path / f"{name}.gz").write_bytes(served[f"/{name}.gz"])
    broken = tmp_path / "train-images-idx3-ubyte.gz"
    for content, word in (
        (b"<html>", "HTML page"),
        (whole[: len(whole) // 2], "cannot be unpacked"),
        (gzip.compress(payloads["train-images-idx3-ubyte"][:-1]), "checksum"),
    ):
        broken.write_bytes(content)
        fails(lambda: load_mnist(tmp_path, offline=True), str(broken), word)


def test_where_downloads_are_kept(monkeypatch, tmp_path):
    monkeypatch.setenv("ADVPLUG_CACHE", str(tmp_path))
    assert datasets_folder() == tmp_path / "datasets"
    monkeypatch.delenv("ADVPLUG_CACHE")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "xdg"))
    assert datasets_folder() == tmp_path / "xdg" / "advplug" / "datasets"
    assert isinstance(datasets_folder(), Path)


@pytest.mark.skipif(not DATA, reason="ADVPLUG_DATA is not set: the real datasets are not at hand")
def test_torchvision_reads_the_same_mnist(tmp_path):
    """Our reader against torchvision's, on the real test files."""
    import_torchvision()
    from torchvision.datasets.mnist import read_image_file, read_label_file

    raw = Path(str(DATA)) / "mnist" / "MNIST" / "raw"
    found = load_mnist(Path(str(DATA)) / "mnist", offline=True)
    for name in ("t10k-images-idx3-ubyte", "t10k-labels-idx1-ubyte"):
        (tmp_path / name).write_bytes(gzip.decompress((raw / f"{name}.gz").read_bytes()))
    images, labels = (
        read_image_file(tmp_path / "t10k-images-idx3-ubyte"),
        read_label_file(tmp_path / "t10k-labels-idx1-ubyte"),
    )
    assert np.array_equal(found.test_x[:, 0], images.numpy())
    assert np.array_equal(found.test_y, labels.numpy())
