"""Checkpoint files: found, checked, looked into without torch, read without running any code in them.

Safetensors files and torch checkpoints (zip and the older format) are told apart by content, not by name.
"""

from __future__ import annotations

import functools
import hashlib
import json
import os
import pickle
import re
import struct
import zipfile
from collections import OrderedDict
from collections.abc import Collection, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, BinaryIO, TypeVar

from advplug.errors import UsageError, did_you_mean

if TYPE_CHECKING:
    from torch import Tensor, nn

Shape = tuple[int, ...]
T = TypeVar("T")
_HEADER_LIMIT = 100 << 20
_BUILTIN = ("builtins", "__builtin__")


def find(path: Path) -> Path:
    """`path`, if it is a file that could hold weights. Raises UsageError with a suggestion otherwise."""
    path = path.expanduser()
    try:
        if path.is_dir():
            raise UsageError(f"{path} is a folder; name the weights file in it")
        if not path.exists():
            near = [p.name for p in path.parent.iterdir()] if path.parent.is_dir() else []
            hint = did_you_mean(path.name, near) or (
                "" if path.parent.is_dir() else f"; there is no folder {path.parent}"
            )
            raise UsageError(f"there is no weights file {path}{hint}")
        with path.open("rb") as file:
            start = file.read(512)
    except OSError as error:
        raise UsageError(f"{path} cannot be read: {error.strerror or error}") from error
    if not start:
        raise UsageError(f"{path} is empty; fetch it again")
    if start.lstrip().startswith(b"<"):
        raise UsageError(
            f"{path} is an HTML or XML page, not weights: the download was answered by a web page; fetch it again"
        )
    if start.startswith(b"version https://git-lfs"):
        raise UsageError(f"{path} is a Git LFS pointer, not weights; run 'git lfs pull'")
    return path


def digest(path: Path) -> str:
    """The file's SHA-256."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def sha256(path: Path) -> str:
    """The file's SHA-256, remembered while size and time of change stay the same."""
    state = path.stat()
    return _remembered(path, state.st_size, state.st_mtime_ns)


@functools.lru_cache(maxsize=256)
def _remembered(path: Path, size: int, changed: int) -> str:
    return digest(path)


def shapes(path: Path, key: str | None = None, strip: str = "") -> dict[str, Shape]:
    """The shape of every tensor in a checkpoint; imports no torch and runs no code of the file.

    `key` names the entry that holds the tensors (`state_dict`), `strip` is taken off the front of the
    names. Raises UsageError for a file that is missing, truncated, no checkpoint, or holds code.
    """
    path = find(path)
    if _is_safetensors(path):
        found: Mapping[str, Any] = {n: tuple(v["shape"]) for n, v in header(path)[0].items()}
        _refuse_key(path, key)
    else:
        found = _entry(_Peek.at(path), path, key)
    named = {n: v.shape if isinstance(v, _Tensor) else v for n, v in found.items() if isinstance(v, _Tensor | tuple)}
    return _stripped(named, path, strip)


def load(path: Path, key: str | None = None, strip: str = "") -> dict[str, Tensor]:
    """The tensors of a checkpoint, on the CPU. Raises UsageError as `shapes` does."""
    import torch

    shapes(path, key, strip)
    path = path.expanduser()
    try:
        if _is_safetensors(path):
            from safetensors.torch import load_file

            return _stripped(load_file(path), path, strip)
        found = _entry(torch.load(path, map_location="cpu", weights_only=True), path, key)
    except UsageError:
        raise
    except pickle.UnpicklingError as error:
        named = re.search(r"(?:GLOBAL|global:?) ([\w.]+)", str(error))
        raise _holds_code(path, named.group(1) if named else "unknown content") from error
    except Exception as error:  # torch and safetensors raise many kinds for damaged files
        raise UsageError(f"{path} is damaged or truncated ({_first_line(error)}); fetch it again") from error
    tensors = {n: v.detach() for n, v in found.items() if isinstance(v, torch.Tensor)}
    return _stripped(tensors, path, strip)


def fill(model: nn.Module, state: Mapping[str, Tensor], path: Path, ignore: Collection[str] = ()) -> None:
    """Copies `state` into `model`. Raises UsageError where names or shapes differ, saying how many.

    Names that begin with one of `ignore` are left out; missing `num_batches_tracked` counters are not
    missed, since evaluation does not use them.
    """
    wanted = model.state_dict()
    given = {n: v for n, v in state.items() if not n.startswith(tuple(ignore))} if ignore else dict(state)
    missing = [n for n in wanted if n not in given and not n.endswith("num_batches_tracked")]
    unexpected = [n for n in given if n not in wanted]
    if missing or unexpected:
        raise UsageError(
            f"{path} does not fit the model: {_some(missing, 'missing')}, {_some(unexpected, 'unexpected')}"
            f" of {len(wanted)} tensors{strip_hint(given, wanted)}"
        )
    wrong = [n for n, v in given.items() if v.shape != wanted[n].shape]
    if wrong:
        n = wrong[0]
        raise UsageError(
            f"{path} does not fit the model: {len(wrong)} of {len(wanted)} tensors have another shape, "
            f"{n} is {_by(tuple(given[n].shape))} in the file and {_by(tuple(wanted[n].shape))} in the model"
        )
    model.load_state_dict(given, strict=False)


def strip_hint(given: Collection[str], wanted: Collection[str]) -> str:
    """`; write strip=module.` where taking that off the front makes the names fit better."""
    best, score = "", sum(n in wanted for n in given)
    for prefix in {n[: i + 1] for n in given for i, c in enumerate(n) if c == "."}:
        fitting = sum(n.removeprefix(prefix) in wanted for n in given)
        if fitting > score:
            best, score = prefix, fitting
    return f"; write strip={best}" if best else "; is it of another architecture?"


def header(path: Path) -> tuple[dict[str, Any], dict[str, str]]:
    """A safetensors file's entries (dtype, shape, data_offsets) and its metadata, checked against its length."""
    try:
        with path.open("rb") as file:
            (length,) = struct.unpack("<Q", file.read(8))
            if length > _HEADER_LIMIT:
                raise ValueError("header too long")
            entries: dict[str, Any] = json.loads(file.read(length))
        metadata = entries.pop("__metadata__", {})
        end = 8 + length + max((e["data_offsets"][1] for e in entries.values()), default=0)
    except (OSError, ValueError, KeyError, TypeError, AttributeError, struct.error) as error:
        raise UsageError(f"{path} is no readable safetensors file ({_first_line(error)}); fetch it again") from error
    if path.stat().st_size != end:
        raise UsageError(f"{path} is truncated: {path.stat().st_size} bytes instead of {end}; fetch it again")
    return entries, metadata


def _is_safetensors(path: Path) -> bool:
    with path.open("rb") as file:
        return file.read(9)[8:] == b"{"


def _refuse_key(path: Path, key: str | None) -> None:
    if key is not None:
        raise UsageError(f"{path} is a safetensors file, which has no entries such as '{key}'; leave key= out")


def _entry(content: Any, path: Path, key: str | None) -> Mapping[str, Any]:
    """The mapping of names to tensors in what a torch checkpoint holds."""
    if key is not None:
        if not isinstance(content, Mapping) or key not in content:
            listing = f"; it has {', '.join(map(str, list(content)[:8]))}" if isinstance(content, Mapping) else ""
            raise UsageError(f"{path} has no entry '{key}'{listing}")
        content = content[key]
    if not isinstance(content, Mapping):
        raise UsageError(f"{path} holds no named tensors (a whole model, a list?); save model.state_dict() instead")
    if not any(_is_tensor(v) for v in content.values()):
        inner = [n for n, v in content.items() if isinstance(v, Mapping) and any(map(_is_tensor, v.values()))]
        hint = f"write key={inner[0]}" if inner else f"it has {', '.join(map(str, list(content)[:8])) or 'nothing'}"
        raise UsageError(f"{path} holds no tensors at its top level; {hint}")
    return {str(n): v for n, v in content.items()}


def _is_tensor(value: Any) -> bool:
    return isinstance(value, _Tensor) or type(value).__module__.startswith("torch")


def _stripped(named: Mapping[str, T], path: Path, strip: str) -> dict[str, T]:
    if not strip:
        return dict(named)
    if not any(n.startswith(strip) for n in named):
        first = next(iter(named), "nothing")
        raise UsageError(f"{path}: no name begins with '{strip}', the first is '{first}'; change or leave out strip=")
    return {n.removeprefix(strip): v for n, v in named.items()}


def _some(names: list[str], what: str) -> str:
    return f"{len(names)} {what}" + (f" (such as {names[0]})" if names else "")


def _by(shape: Shape) -> str:
    return " x ".join(map(str, shape)) or "a single number"


def _first_line(error: BaseException) -> str:
    text = str(error).strip()
    return text.splitlines()[0].rstrip(". ") if text else type(error).__name__


def _holds_code(path: Path, what: str) -> UsageError:
    return UsageError(
        f"{path} holds Python objects that only run code can restore ({what}); nothing was run, since weights are "
        "read with weights_only=True. If you trust it, convert it where it came from: "
        "safetensors.torch.save_file(model.state_dict(), 'weights.safetensors')"
    )


# --- looking into a pickle without running it ------------------------------------------------------


@dataclass
class _Tensor:
    """Stands for a tensor in a checkpoint."""

    shape: Shape


class _Inert:
    """Stands for anything else that a pickle names: made from whatever arguments, it does nothing."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        pass

    def __call__(self, *args: Any, **kwargs: Any) -> _Inert:
        return self

    def _ignore(self, *args: Any) -> None:
        pass

    __setstate__ = __setitem__ = append = extend = add = _ignore


def _tensor(storage: Any, offset: int, size: Shape, *rest: Any) -> _Tensor:
    return _Tensor(tuple(size))


def _parameter(data: Any, *rest: Any) -> Any:
    return data


class _Peek(pickle.Unpickler):
    """Reads a checkpoint's structure. Every name in it resolves to an inert stand-in, so nothing can run."""

    _KNOWN: Mapping[tuple[str, str], Any] = {
        ("collections", "OrderedDict"): OrderedDict,
        ("collections", "Counter"): _Inert,
        ("_codecs", "encode"): _Inert,
        **{(module, name): _Inert for module in _BUILTIN for name in ("set", "bytearray", "complex")},
        ("torch._utils", "_rebuild_tensor"): _tensor,
        ("torch._utils", "_rebuild_tensor_v2"): _tensor,
        ("torch._utils", "_rebuild_parameter"): _parameter,
    }

    def __init__(self, file: BinaryIO, path: Path) -> None:
        super().__init__(file)
        self._path = path

    def find_class(self, module: str, name: str) -> Any:
        if (module, name) in self._KNOWN:
            return self._KNOWN[module, name]
        if module.partition(".")[0] == "torch":  # whether torch takes it, it says itself when it loads the file
            return _Inert
        raise _holds_code(self._path, f"{module}.{name}")

    def persistent_load(self, pid: Any) -> Any:
        return _Inert()

    @classmethod
    def at(cls, path: Path) -> Any:
        """What the torch checkpoint at `path` holds, with stand-ins for its tensors."""
        try:
            with path.open("rb") as file:
                if file.read(2) != b"PK":
                    return cls._older(file, path)
            with zipfile.ZipFile(path) as archive:
                names = archive.namelist()
                if any(n.endswith("/constants.pkl") for n in names):
                    raise UsageError(f"{path} is a TorchScript archive, not weights; save model.state_dict() instead")
                inside = next((n for n in names if n.endswith("data.pkl") and n.count(os.sep) <= 1), None)
                if inside is None:
                    raise UsageError(f"{path} is an archive without weights; name a .safetensors or .pt file")
                with archive.open(inside) as stream:
                    return cls(stream, path).load()  # type: ignore[arg-type]
        except UsageError:
            raise
        except zipfile.BadZipFile as error:
            raise UsageError(f"{path} is truncated or damaged ({_first_line(error)}); fetch it again") from error
        except Exception as error:  # a damaged pickle may end in any exception
            raise UsageError(
                f"{path} is no checkpoint that can be read ({_first_line(error)}); safetensors and torch.save files can"
            ) from error

    @classmethod
    def _older(cls, file: BinaryIO, path: Path) -> Any:
        """Before torch 1.6 a checkpoint was a magic number, a version, system facts and the object, pickled in turn."""
        file.seek(0)
        first = cls(file, path).load()
        if not isinstance(first, int):
            raise UsageError(f"{path} is a pickle, but no torch checkpoint; save it with torch.save or as safetensors")
        cls(file, path).load()
        cls(file, path).load()
        return cls(file, path).load()
