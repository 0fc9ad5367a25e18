"""A model from the user's own Python code: found and hashed without running it, imported only to build it."""

from __future__ import annotations

import ast
import hashlib
import importlib
import importlib.util
import inspect
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from importlib.machinery import PathFinder
from pathlib import Path
from types import ModuleType
from typing import TYPE_CHECKING, Any

from advplug.contracts import DatasetInfo
from advplug.errors import UsageError, did_you_mean

if TYPE_CHECKING:
    from torch import nn


def source_digest(module: str) -> str:
    """A SHA-256 over the code that `import module` would run first, found without running any.

    The current folder comes before Python's own path. A package counts with all its Python files, and so do the
    modules beside it that it imports, and those that they import. Raises UsageError where there is no such module.
    """
    return _digest(_files(module))


def _digest(files: list[Path]) -> str:
    state = hashlib.sha256()
    for file in files:
        state.update(file.name.encode() + b"\0" + file.read_bytes())
    return state.hexdigest()


def _files(module: str) -> list[Path]:
    place: list[str] | None = [str(Path.cwd()), *sys.path]
    specs = []
    for depth in range(module.count(".") + 1):
        name = ".".join(module.split(".")[: depth + 1])
        spec = PathFinder.find_spec(name, place)
        if spec is None:
            near = did_you_mean(module, [p.stem for p in Path.cwd().glob("*.py")])
            raise UsageError(f"py:{module}: no module '{name}' in {Path.cwd()} or on Python's path{near}")
        place = list(spec.submodule_search_locations or [])
        specs.append(spec)
    top, last = specs[0], specs[-1]
    folders = [Path(folder) for folder in top.submodule_search_locations or []]
    files = [Path(spec.origin) for spec in (top, last) if spec.origin]
    if any(map(_installed, files)):
        # An installed package may be large, and goes with what it needs by the module alone.
        own = [file for folder in last.submodule_search_locations or [] for file in Path(folder).rglob("*.py")]
        return sorted(set(own) | _with_neighbours(files[-1:], None))
    files += [file for folder in folders for file in folder.rglob("*.py")]
    return sorted(_with_neighbours(files, folders[0].parent if folders else None))


def _installed(file: Path) -> bool:
    return bool({"site-packages", "dist-packages"} & set(file.parts))


def _with_neighbours(files: list[Path], base: Path | None) -> set[Path]:
    """The files and, of the modules that they import, those that lie in their own folders or in `base`, all the way
    down."""
    found = set(files)
    open_ends, looked = sorted(found), set[Path]()
    while open_ends:
        file = open_ends.pop()
        try:
            tree = ast.parse(file.read_bytes())
        except (SyntaxError, ValueError):  # importing it will say so
            continue
        for node in ast.walk(tree):
            names = [a.name for a in node.names] if isinstance(node, ast.Import | ast.ImportFrom) else []
            if isinstance(node, ast.ImportFrom):
                names = [node.module] if node.module else names
            for top in {name.partition(".")[0] for name in names}:
                near = []
                for package in {folder / top for folder in (file.parent, base) if folder is not None} - looked:
                    looked.add(package)
                    near += [package.with_suffix(".py"), *(package.rglob("*.py") if package.is_dir() else ())]
                fresh = {p for p in near if p.is_file()} - found
                found |= fresh
                open_ends += sorted(fresh)
    return found


_IMPORTED: dict[str, str] = {}
"""The digest under which a module of the user's was imported in this process."""


def _imported(name: str) -> Any:
    """The module, imported anew where its code, or that of what it imports, has changed since it was imported, here
    or by the user, or where another module of that name was. Installed packages stay as they are."""
    found = _files(name)
    if any(map(_installed, found)):
        return importlib.import_module(name)
    digest, files = _digest(found), set(map(str, found))
    top = name.partition(".")[0]
    held = {n: m for n, m in sys.modules.items() if n != "__main__" and n.partition(".")[0] != "advplug"}
    ours = {n: m for n, m in held.items() if getattr(m, "__file__", None) in files}
    file = getattr(held.get(top), "__file__", None)
    strange = file is not None and file not in files
    if strange or _IMPORTED.get(name, digest) != digest or any(map(_changed, ours.values())):
        for other in (*ours, *(n for n in held if strange and n.partition(".")[0] == top)):
            sys.modules.pop(other, None)
    _IMPORTED[name] = digest
    return importlib.import_module(name)


def _changed(module: ModuleType) -> bool:
    """Whether a module's file is not the one that Python compiled when it was last imported."""
    spec = module.__spec__
    if spec is None or spec.cached is None or spec.origin is None:
        return False
    try:
        head, facts = Path(spec.cached).read_bytes()[:16], Path(spec.origin).stat()
    except OSError:  # nothing was kept
        return False
    kept = tuple(int.from_bytes(head[at : at + 4], "little") for at in (4, 8, 12))
    return kept[0] == 0 and kept[1:] != (int(facts.st_mtime) & 0xFFFFFFFF, facts.st_size & 0xFFFFFFFF)


def build(source: str, info: DatasetInfo) -> nn.Module:
    """Calls `module:factory`, with classes, channels and size where it takes arguments of these names.

    Raises UsageError where the code cannot be imported, raises, or returns no nn.Module.
    """
    from torch import nn

    name, _, attribute = source.partition(":")
    with _current_folder():
        try:
            factory = _imported(name)
            for part in attribute.split("."):
                if not hasattr(factory, part):
                    near = did_you_mean(part, [n for n in dir(factory) if not n.startswith("_")])
                    raise UsageError(f"py:{source} cannot be built: '{name}' has no '{part}'{near}")
                factory = getattr(factory, part)
            net = factory(**_arguments(source, factory, info))
        except UsageError:
            raise
        except Exception as error:  # the user's code may raise anything
            raise UsageError(f"py:{source} cannot be built: {_told(error)}") from error
    if not isinstance(net, nn.Module):
        raise UsageError(f"py:{source} must return an nn.Module, got a {type(net).__name__}")
    return net


def probe(net: nn.Module, info: DatasetInfo, source: str) -> None:
    """Raises UsageError unless `net` turns two of the dataset's images into logits (2, classes)."""
    import torch

    def answer(channels: int, height: int, width: int) -> Any:
        with torch.no_grad():
            return net(torch.full((2, channels, height, width), 0.5))

    modes = [(m, m.training) for m in net.modules()]
    net.eval()
    try:
        logits = answer(info.channels, *info.size)
    except Exception as error:  # likewise
        shape = f"{info.channels} x {info.size[0]} x {info.size[1]}"
        raise UsageError(f"py:{source} does not take {shape} images: {_told(error)}{_takes(answer, info)}") from error
    finally:
        for module, mode in modes:
            module.training = mode
    if not isinstance(logits, torch.Tensor):
        raise UsageError(f"py:{source} must map images to one tensor of logits, got a {type(logits).__name__}")
    if tuple(logits.shape) != (2, len(info.classes)):
        raise UsageError(
            f"py:{source} gives outputs of shape {tuple(logits.shape)} for 2 images, "
            f"the dataset's {len(info.classes)} classes need (2, {len(info.classes)})"
        )


def _takes(answer: Callable[[int, int, int], Any], info: DatasetInfo) -> str:
    """`; it takes 1 x 8 x 8 ones`, with what to write; empty where no common shape is taken."""
    sizes = (info.size[0], 8, 16, 28, 32, 48, 64, 96, 128, 224)
    for channels in (info.channels, 4 - info.channels):  # grey and RGB
        for size in sizes:
            try:
                answer(channels, size, size)
            except Exception:  # noqa: S112 - what the user's code raises only says: not this shape
                continue
            how = f": write size={size} after the dataset's name, as in digits:size={size}"
            return f"; it takes {channels} x {size} x {size} ones{how * (channels == info.channels)}"
    return ""


def _arguments(source: str, factory: Any, info: DatasetInfo) -> dict[str, Any]:
    """What is filled in. Raises UsageError where the factory needs more than that."""
    known = {
        "classes": len(info.classes),
        "num_classes": len(info.classes),
        "channels": info.channels,
        "in_channels": info.channels,
        "size": info.size,
    }
    try:
        taken = inspect.signature(factory).parameters
    except (TypeError, ValueError):
        return {}
    needs = [
        n for n, p in taken.items()
        if p.default is p.empty and p.kind not in (p.VAR_POSITIONAL, p.VAR_KEYWORD) and n not in known
    ]  # fmt: skip
    if needs:
        raise UsageError(
            f"py:{source} needs '{needs[0]}', and only {', '.join(known)} are filled in; "
            "write a function beside it that calls it with what it needs, and name that"
        )
    return {n: v for n, v in known.items() if n in taken}


def _told(error: BaseException) -> str:
    return f"{type(error).__name__}: {' '.join(str(error).split())}"


@contextmanager
def _current_folder() -> Iterator[None]:
    """Puts the current folder first on Python's path, as running a script there would."""
    here = str(Path.cwd())
    sys.path.insert(0, here)
    importlib.invalidate_caches()
    try:
        yield
    finally:
        sys.path.remove(here)
