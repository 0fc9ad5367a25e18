"""The settings of the three defenses, and those that were published and measured. Imports no torch."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass, fields, replace
from typing import Any

from advplug.errors import UsageError

LONGER = 4 / 3
"""Filtered epochs by epochs of plain training: only a part of the pairs is trained on together in each."""
LARGE = 100_000
"""Pairs from which on the published settings are used; the smallest set that SafeCLIP was published for has 118,287."""


@dataclass(frozen=True)
class Views:
    """How random views are drawn: `words` is the share of a caption's words that change, the others are of
    `looks.Look`."""

    crop: float
    flip: bool
    jitter: float
    colour: float
    hue: float
    grey: float
    blur: float
    words: float

    def changed(self, given: Mapping[str, Any]) -> Views:
        """With those of the values in `given` that are a view's and not None."""
        mine = {f.name for f in fields(self)}
        return replace(self, **{n: v for n, v in given.items() if n in mine and v is not None})


PUBLISHED = Views(crop=0.08, flip=True, jitter=0.8, colour=0.5, hue=0.1, grey=0.2, blur=2.0, words=0.1)
"""SafeCLIP's code: random crops as torchvision draws them, colour jitter, grey, blur, mirrored images."""
GENTLE = Views(crop=0.75, flip=False, jitter=1.0, colour=0.3, hue=0.0, grey=0.0, blur=0.0, words=0.1)
"""For captions that name places and colours, which must still be true of a view."""


@dataclass(frozen=True)
class Settings:
    """How SafeCLIP trains.

    `unimodal` epochs on everything that compare views of one modality, `multimodal` ones on everything with the
    contrastive loss, `epochs` filtered ones (None: LONGER times as many as the model's own training has).
    Peak rates `lr`, and `slow_lr` of the multimodal epochs, are None for the model's, `batch_size` likewise. `rise` is
    the number of updates over which a rate rises, a tenth of a phase's at most; `beta2` is AdamW's second beta.

    Safe is a pair whose posterior in a `mixture` (free or anchored) is at least `threshold`; a share `floor` of the
    pairs at least, `growth` more in each further epoch, `cap` at most. `refit`: the mixture chooses in every epoch, not
    only in the first. A score is the mean over `looks` views of a pair; 0: of the pair as it is.

    `batches` have `views` views of each pair in contrastive updates. `bank` is the size of the pools that neighbours
    are found in, 0 for none.
    """

    unimodal: int
    multimodal: int
    epochs: int | None
    batch_size: int | None
    lr: float | None
    slow_lr: float | None
    decay: float
    beta2: float
    rise: int
    mixture: str
    threshold: float
    floor: float
    growth: float
    cap: float
    refit: bool
    looks: int
    views: int
    bank: int
    drawn: Views

    def changed(self, given: Mapping[str, Any]) -> Settings:
        """With the values in `given` that are not None. Raises UsageError where the result contradicts itself."""
        mine = {f.name for f in fields(self)}
        own = {n: v for n, v in given.items() if n in mine and v is not None}
        made = replace(self, **own, drawn=self.drawn.changed(given))
        if made.floor > made.cap:
            told = f"floor={made.floor:g} is above cap={made.cap:g}"
            raise UsageError(f"safeclip: {told}; lower the floor, or raise the cap")
        return made

    def told(self) -> dict[str, Any]:
        """JSON-ready."""
        flat: dict[str, Any] = asdict(self)
        drawn: dict[str, Any] = flat.pop("drawn")
        return flat | drawn


PRESETS: Mapping[str, Settings] = {
    "published": Settings(
        unimodal=5, multimodal=1, epochs=26, batch_size=128, lr=5e-4, slow_lr=5e-6, decay=0.1, beta2=0.999,
        rise=10_000, mixture="free", threshold=0.9, floor=0.15, growth=0.01, cap=0.85, refit=False, looks=1,
        views=2, bank=0, drawn=PUBLISHED,
    ),
    "small": Settings(
        unimodal=3, multimodal=2, epochs=None, batch_size=64, lr=1e-3, slow_lr=5e-4, decay=0.1, beta2=0.98,
        rise=50, mixture="anchored", threshold=0.8, floor=0.45, growth=0.03, cap=0.9, refit=True, looks=2,
        views=1, bank=0, drawn=GENTLE,
    ),
}  # fmt: skip
"""SafeCLIP's code (Yang et al. 2024, arXiv 2310.05862), with a floor that it does not have, a rise over a tenth of a
phase at most, and a rate that stays up in the first two phases, where its falls; and what suits a few thousand pairs,
by trials on digit-scenes with scenes and seeds that no reported figure uses."""


def preset_for(given: str | None, pairs: int) -> tuple[str, str]:
    """The preset for so many pairs, and a sentence that says why."""
    if given is not None:
        return given, f"preset={given} was asked for"
    name = "small" if pairs < LARGE else "published"
    return name, f"preset={name}, since there are {pairs:,} pairs and large data have {LARGE:,}"


def check(preset: str | None, given: Mapping[str, Any]) -> None:
    """Raises UsageError where parameters contradict each other in whichever preset it will be."""
    refusals = []
    for name in (preset,) if preset else PRESETS:
        try:
            PRESETS[name].changed(given)
        except UsageError as refusal:
            refusals.append(refusal)
    if len(refusals) == (1 if preset else len(PRESETS)):
        raise refusals[0]
