"""What the columns of an image-text model stand for: class prompts, or the captions of the images it is judged on."""

from __future__ import annotations

from dataclasses import replace
from typing import cast

import numpy as np
import torch
from torch import nn

from advplug.contracts import TextScorer
from advplug.data import Split
from advplug.errors import CellFailure, UsageError
from advplug.judging import RETRIEVAL
from advplug.victim import Columns


def with_texts(module: nn.Module, split: Split, task: str, classes: int) -> tuple[nn.Module, Split, Columns]:
    """The module with the columns of its task, the images labelled accordingly, and what the columns are.

    For retrieval the captions of all of `split` are the columns. Images of the same captions make one class; a class
    is an image, then, whose captions are to be found. Raises UsageError for an image without captions, CellFailure
    where the module has other columns.
    """
    scorer = cast(TextScorer, module)
    device = next(module.parameters()).device
    if task != RETRIEVAL:
        _demand_columns(module, split, classes)
        return module, split, Columns(torch.arange(classes, device=device), scorer.scale, classes)
    if split.captions is None or not all(split.captions):
        bare = "images" if split.captions is None else f"image {next(i for i, c in enumerate(split.captions) if not c)}"
        raise UsageError(f"{bare} without captions cannot be retrieved by them; use data in which every image has one")
    numbers: dict[tuple[str, ...], int] = {}
    labels = np.array([numbers.setdefault(own, len(numbers)) for own in split.captions], dtype=np.int64)
    texts = tuple(text for own in numbers for text in own)
    group = torch.tensor([i for i, own in enumerate(numbers) for _ in own], device=device)
    shown = scorer.with_gallery(texts).to(device).eval()
    _demand_columns(shown, split, len(texts))
    return shown, replace(split, labels=labels), Columns(group, scorer.scale, len(numbers), texts)


def _demand_columns(module: nn.Module, split: Split, columns: int) -> None:
    """One image passes, so that texts are read now and what is to be said of them is known."""
    with torch.no_grad():
        made = module(split.batch(np.arange(1), next(module.parameters()).device).x).shape[1]
    if made != columns:
        raise CellFailure(f"the model answers with {made} columns for {columns} texts")
