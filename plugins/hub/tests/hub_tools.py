"""A hub of the tests' own on 127.0.0.1, and caches in folders of their own."""

from __future__ import annotations

import contextlib
import hashlib
import http.server
import json
import threading
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from safetensors.torch import save
from torch import Tensor

HTML = b"<!DOCTYPE html><html><body>Google Drive - virus scan warning</body></html>"
COMMIT = "0123456789abcdef0123456789abcdef01234567"


@dataclass
class Site:
    """Files by path, what was asked for, and of how many bytes the connection then breaks off."""

    address: str = ""
    files: dict[str, bytes] = field(default_factory=dict)
    asked: list[str] = field(default_factory=list)
    short: int = 0


@contextlib.contextmanager
def serving() -> Iterator[Site]:
    """A site that answers as the Hugging Face hub does: with ETag and commit."""
    site = Site()

    class Handler(http.server.BaseHTTPRequestHandler):
        def _head(self) -> bytes | None:
            site.asked.append(f"{self.command} {self.path}")
            content = site.files.get(self.path)
            self.send_response(404 if content is None else 200)
            if content is not None:
                self.send_header("ETag", f'"{hashlib.sha256(content).hexdigest()}"')
                self.send_header("X-Repo-Commit", COMMIT)
            else:
                self.send_header("X-Error-Code", "EntryNotFound")
            self.send_header("Content-Length", str(len(content or b"")))
            self.end_headers()
            return content

        def do_HEAD(self) -> None:
            self._head()

        def do_GET(self) -> None:
            content = self._head()
            self.wfile.write((content or b"")[: len(content or b"") - site.short])

        def log_message(self, *arguments: Any) -> None:
            pass

    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    site.address = f"http://127.0.0.1:{server.server_port}"
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01})
    thread.start()
    try:
        yield site
    finally:
        server.shutdown()
        thread.join()
        server.server_close()


def sha256(content: bytes) -> str:
    return hashlib.sha256(content).hexdigest()


def lock_of(path: Path) -> dict[str, Any]:
    held: dict[str, Any] = json.loads(path.read_text())
    return held


def safetensors(state: dict[str, Tensor]) -> bytes:
    content: bytes = save({name: tensor.contiguous().clone() for name, tensor in state.items()})
    return content
