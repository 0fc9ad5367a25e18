"""Models of open_clip: built by name, their weights fetched by tag or read from a file without running code."""

from __future__ import annotations

import logging
import urllib.error
import urllib.request
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from advplug import weights
from advplug.errors import UsageError
from advplug.vision import import_torchvision
from advplug_clip.scorer import ClipScorer, Groups, Memory, Pixels, frozen_texts
from advplug_clip.tokens import Tokens, bundled

log = logging.getLogger("advplug")

FILES = ("open_clip_model.safetensors", "open_clip_pytorch_model.bin")
"""What a repository of weights on the hub holds, the better one first."""
WAIT = 15
"""Seconds after which the hub counts as out of reach."""


@dataclass(frozen=True)
class Asked:
    """An architecture with the weights of a tag, or of a file, of which `like` names a tag trained alike."""

    architecture: str
    tag: str | None = None
    file: Path | None = None
    key: str | None = None
    strip: str = ""
    like: str | None = None


def scorer(asked: Asked, groups: Groups, memory: Memory, offline: bool = False) -> ClipScorer:
    """The named architecture with weights of a tag or from a file; without either, from the global generator.

    Raises UsageError where the weights are not at hand and cannot or may not be fetched, where they do not fit, and
    where the architecture needs a tokenizer that is not at hand.
    """
    architecture, tag = asked.architecture, asked.tag
    settings = _settings(architecture, tag or asked.like)
    path = fetch(architecture, tag, settings, offline) if tag else asked.file
    tokens = _tokens(architecture, offline)
    # Its weights are drawn even where others replace them: a moment, beside reading a file.
    clip = _built(architecture, quick_gelu=bool((tag or asked.like) and settings.get("quick_gelu")))
    if path is not None:
        _fill(clip, path, asked.key, asked.strip)
    if memory.checkpointing:
        _checkpoint(clip, architecture)
    size = clip.visual.image_size
    height, width = size if isinstance(size, tuple | list) else (size, size)
    pixels = Pixels(
        (int(height), int(width)), tuple(settings["mean"]), tuple(settings["std"]), settings["interpolation"]
    )
    made = ClipScorer(frozen_texts(clip), tokens, groups, pixels, memory)
    if asked.file is not None and asked.like is None:
        made.assumed = _assumed(architecture, pixels)
    return made


def _assumed(architecture: str, pixels: Pixels) -> str:
    """What a file of weights does not say, and what is taken for it."""
    from open_clip import get_model_config

    quick = (get_model_config(architecture) or {}).get("quick_gelu")
    mean = ", ".join(f"{value:.3g}" for value in pixels.mean)
    return (
        f"the file does not say how its weights were trained: {'QuickGELU' if quick else 'GELU'} and pixels about "
        f"({mean}) are assumed; like=TAG names published weights of {architecture} that were trained alike"
    )


def fetch(architecture: str, tag: str, settings: Mapping[str, Any], offline: bool) -> Path:
    """The weights file of a tag: from the hub's cache, a file put in its place by hand, or the hub."""
    from huggingface_hub import hf_hub_download, hf_hub_url, try_to_load_from_cache

    repository, _, named = settings["hf_hub"].rpartition("/")
    choices = (named,) if named else FILES
    by_hand = Path(torch.hub.get_dir()) / "checkpoints" / "open_clip" / f"{architecture}@{tag}"
    held = [try_to_load_from_cache(repository, name) for name in choices]
    for found in (by_hand, *(Path(h) for h in held if isinstance(h, str))):
        if found.exists():
            return found
    name = f"open_clip:{architecture}@{tag}"
    address = hf_hub_url(repository, choices[0])
    advice = f"fetch them elsewhere with 'curl -L --create-dirs -o {by_hand} {address}'"
    if offline:
        raise UsageError(f"the weights of {name} are not at hand and --offline forbids the download; {advice}")
    why = "it has no such file"
    for choice in choices:
        try:
            # The hub's own client asks six times before it says that there is no network.
            _reachable(hf_hub_url(repository, choice))
            log.info("fetching %s of %s", choice, repository)
            return Path(hf_hub_download(repository, choice))
        except (OSError, ValueError, RuntimeError) as error:  # ValueError: an endpoint that is no address
            why = " ".join(str(error).split())
            if not (isinstance(error, urllib.error.HTTPError) and error.code == 404):
                break
    raise UsageError(f"the weights of {name} cannot be fetched from the hub ({why}); {advice}")


def _reachable(address: str) -> None:
    from huggingface_hub.utils import build_hf_headers

    request = urllib.request.Request(address, headers=build_hf_headers(), method="HEAD")  # noqa: S310 - the hub's
    with urllib.request.urlopen(request, timeout=WAIT):  # noqa: S310
        pass


def _settings(architecture: str, tag: str | None) -> dict[str, Any]:
    """How pixels are prepared, and where weights are: of the tag, else as for the first weights of the architecture."""
    import_torchvision()
    from open_clip import OPENAI_DATASET_MEAN, OPENAI_DATASET_STD, list_pretrained_tags_by_model
    from open_clip.pretrained import get_pretrained_cfg

    tag = tag or next(iter(list_pretrained_tags_by_model(architecture)), None)
    if tag is None:
        return {"mean": OPENAI_DATASET_MEAN, "std": OPENAI_DATASET_STD, "interpolation": "bicubic"}
    return dict(get_pretrained_cfg(architecture, tag))


def _built(architecture: str, quick_gelu: bool) -> Any:
    from open_clip import create_model

    try:
        with _without_root_handler():
            return create_model(architecture, pretrained_text=False, force_quick_gelu=quick_gelu)
    except (ImportError, OSError, RuntimeError) as error:
        why = " ".join(str(error).split())
        raise UsageError(f"open_clip:{architecture} cannot be built ({why}); install what it asks for") from error


def _tokens(architecture: str, offline: bool) -> Tokens:
    from open_clip import SimpleTokenizer, get_model_config, get_tokenizer

    text = get_model_config(architecture)["text_cfg"]
    length = int(text.get("context_length", 77))
    name = text.get("hf_tokenizer_name")
    if not name and not text.get("tokenizer_kwargs"):
        return bundled(length)
    if name and offline:
        raise UsageError(
            f"open_clip:{architecture} reads texts with {name}'s tokenizer, which comes from the hub; leave --offline "
            "out, or use an architecture with CLIP's own tokenizer, such as ViT-B-32"
        )
    try:
        with _without_root_handler():
            tokenizer = get_tokenizer(architecture)
    except (ImportError, OSError, ValueError) as error:
        why = " ".join(str(error).split())
        raise UsageError(
            f"open_clip:{architecture} reads texts with {name}'s tokenizer, which is not at hand ({why}); it needs the "
            "package transformers and the hub, or use an architecture with CLIP's own tokenizer, such as ViT-B-32"
        ) from error
    own = tokenizer if isinstance(tokenizer, SimpleTokenizer) else None
    return Tokens(lambda texts, n: tokenizer(texts, context_length=n), length, own and own.encode)


def _fill(clip: Any, path: Path, key: str | None, strip: str) -> None:
    from open_clip.convert import convert_state_dict

    state: dict[str, Tensor] = convert_state_dict(clip, weights.load(path, key, strip))
    own = clip.state_dict()
    for name in ("logit_scale", "logit_bias"):  # a number in some files, a list of one in others
        if name in state and name in own and state[name].numel() == own[name].numel() == 1:
            state[name] = state[name].reshape(own[name].shape)
    # Position numbers that older releases of transformers stored.
    weights.fill(clip, state, path, ignore=("text.transformer.embeddings.position_ids",))


def _checkpoint(clip: Any, architecture: str) -> None:
    from open_clip.modified_resnet import ModifiedResNet

    advice = "leave checkpointing out and set micro_batch"
    if isinstance(clip.visual, ModifiedResNet):
        raise UsageError(f"{architecture}'s image tower has no blocks to checkpoint; {advice}")
    try:
        clip.visual.set_grad_checkpointing(True)
    except Exception as error:  # timm's towers raise what they like
        raise UsageError(f"{architecture}'s image tower cannot be checkpointed ({error}); {advice}") from error


@contextmanager
def _without_root_handler() -> Iterator[None]:
    """open_clip logs by functions that set up logging for the whole process unless somebody has; nothing stays."""
    root, handler = logging.getLogger(), logging.NullHandler()
    root.addHandler(handler)
    try:
        yield
    finally:
        root.removeHandler(handler)
