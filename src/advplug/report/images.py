"""Images as the attack found and left them, with the difference made visible; PNG in the page itself."""

from __future__ import annotations

import base64
import io
from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np

from advplug.evidence import Array
from advplug.report.parts import Data, Grid, Section, Strip, attack_of, grouped, under, victim
from advplug.results import Cell
from advplug.stored.samples import Sample

BYTES = 2_200_000
"""All images of a page, as text; fewer are shown where they would take more."""
PROBED = 8
TILE = 72
"""CSS pixels of a side, or the image's own where it has more, up to twice that."""


def strip(images: Array) -> str:
    """Images uint8 (k, C, H, W) side by side, with a gap after each that shows the page, as a PNG in a data URI."""
    shown = _visible(images)
    width = shown.shape[-1] + gap(shown.shape[-1])
    padded = np.pad(shown, ((0, 0), (0, 0), (0, 0), (0, width - shown.shape[-1])))
    pixels = np.moveaxis(np.concatenate(list(padded), axis=2), 0, 2)
    clear = np.broadcast_to(np.arange(pixels.shape[1]) % width >= shown.shape[-1], pixels.shape[:2])
    return f"data:image/png;base64,{base64.b64encode(_png(pixels, clear)).decode()}"


def _png(pixels: Array, clear: Array) -> bytes:
    """uint8 (H, W, 1 or 3), exactly, nothing to be seen where `clear`; in the form that takes the fewest bytes.

    A channel of opacity would be a quarter of a file: a colour that is not used stands for what is clear.
    """
    from PIL import Image

    codes = pixels.astype(np.uint32) @ (256 ** np.arange(pixels.shape[2] - 1, -1, -1, dtype=np.uint32))
    used = np.unique(codes[~clear])
    held = io.BytesIO()
    if len(used) <= (15 if pixels.shape[2] == 1 else 255):
        places = np.where(clear, len(used), np.searchsorted(used, codes)).astype(np.uint8)
        made = Image.fromarray(places, "P")
        colours = [used >> 16, used >> 8 & 255, used & 255] if pixels.shape[2] == 3 else [used] * 3
        made.putpalette(np.stack([*colours], axis=1).astype(np.uint8).tobytes() + bytes(3))
        made.save(held, "PNG", transparency=len(used))
        return held.getvalue()
    free = np.flatnonzero(~np.isin(np.arange(len(used) + 1), used))[0]
    if pixels.shape[2] == 1 and free > 255:
        opaque = np.where(clear, 0, 255).astype(np.uint8)
        Image.fromarray(np.dstack((pixels, opaque)), "LA").save(held, "PNG")
        return held.getvalue()
    key = (int(free) >> 16, int(free) >> 8 & 255, int(free) & 255)[-pixels.shape[2] :]
    filled = np.ascontiguousarray(np.where(clear[..., None], np.array(key, dtype=np.uint8), pixels))
    shown = Image.fromarray(filled if len(key) == 3 else filled[..., 0])
    shown.save(held, "PNG", transparency=key if len(key) == 3 else key[0])
    return held.getvalue()


def gap(side: int) -> int:
    """Pixels between images of that width."""
    return max(1, side // 32)


def _visible(images: Array) -> Array:
    """Of other than 1 or 3 channels the first is shown."""
    return images if images.shape[1] in (1, 3) else images[:, :1]


def amplified(before: Array, after: Array) -> tuple[Array, int]:
    """The absolute difference of images uint8 (k, C, H, W), times the whole number that takes the largest to 255 at
    most, and that number."""
    apart = np.abs(after.astype(int) - before.astype(int))
    factor = 255 // int(apart.max()) if apart.any() else 1
    return (apart * factor).astype(np.uint8), factor


@dataclass(frozen=True)
class _Made:
    """The images of one cell, ready for the page."""

    cell: Cell
    sample: Sample
    adversarial: str
    apart: str
    factor: int

    @property
    def size(self) -> int:
        """Characters of the page."""
        return len(self.adversarial) + len(self.apart)

    @property
    def changes(self) -> bool:
        return not np.array_equal(self.sample.adversarial, self.sample.clean)


def images(data: Data) -> Section | None:
    """A grid a victim: clean images, and for each cell the adversarial ones and the difference."""
    cells = [c for c in data.done if len(data.samples.get(c.key, ()))]
    if not cells:
        return None
    made, lead = _fitting(cells, data.samples)
    grids: list[Grid] = []
    for found in grouped(made, lambda m: (m.cell.dataset, m.cell.model, m.cell.defense, m.cell.goal, m.cell.seed,
                                          m.sample.index.tobytes())).values():  # fmt: skip
        grids.append(_grid(found, data.classes.get(found[0].cell.dataset, ()), first=not grids))
    return Section("images", "Images", lead, grids=tuple(grids))


_LEAD = (
    "The first images of each cell, whatever became of them: as they were, as the attack left them, rounded to 8 bits, "
    "and the absolute difference of the two, times the factor that is given with it. Answers are to the images before "
    "rounding; those in bold changed. Along several budgets an image that a smaller one broke stays as it was.",
)


def _fitting(cells: list[Cell], samples: Mapping[str, Sample]) -> tuple[list[_Made], tuple[str, ...]]:
    """As many images of each cell as the page can hold; then as many cells."""
    most = max(len(samples[c.key]) for c in cells)
    # A few cells tell how large all would be, so that they are seldom made twice.
    probed = cells[:: -(-len(cells) // PROBED)]
    guess = _bytes([_made(c, samples[c.key], most) for c in probed]) * len(cells) / len(probed)
    amount = most if guess <= BYTES else max(1, int(most * BYTES / guess))
    made = [_made(c, samples[c.key], amount) for c in cells]
    while amount > 1 and (total := _bytes(made)) > BYTES:
        amount = max(1, min(amount - 1, int(amount * BYTES / total)))
        made = [_made(c, samples[c.key], amount) for c in cells]
    lead: tuple[str, ...] = _LEAD
    if amount < most:
        lead += (f"Of {most} images kept of a cell {amount} are shown, so that the page stays small.",)
    while len(made) > 1 and _bytes(made) > BYTES:
        made.pop()
    if len(made) < len(cells):
        lead += (f"{len(cells) - len(made)} of {len(cells)} cells are left out for the same reason.",)
    return made, lead


def _bytes(made: list[_Made]) -> int:
    return sum(m.size for m in made)


def _made(cell: Cell, whole: Sample, amount: int) -> _Made:
    sample = _first(whole, amount)
    apart, factor = amplified(sample.clean, sample.adversarial)
    return _Made(cell, sample, strip(sample.adversarial), strip(apart), factor)


def _first(s: Sample, k: int) -> Sample:
    texts = None if s.texts is None else s.texts[:, :k]
    return Sample(
        s.index[:k], s.y[:k], s.clean[:k], s.adversarial[:k], s.before[:k], s.after[:k], s.attacked[:k], texts
    )


def _grid(found: list[_Made], classes: tuple[str, ...], first: bool) -> Grid:
    head, cell = found[0].sample, found[0].cell
    true, before, _ = _names(head, classes)
    strips = [Strip("clean", _alt("Clean images", before), strip(head.clean), tuple(before), tuple(
        b != t for b, t in zip(before, true, strict=True)))]  # fmt: skip
    for m in found:
        _, was, now = _names(m.sample, classes)
        what = f"{attack_of(m.cell)}, {m.cell.norm} {m.cell.eps}"
        changed = tuple(a != b for a, b in zip(was, now, strict=True))
        strips.append(Strip(what, _alt(f"Adversarial images of {what}", now), m.adversarial, tuple(now), changed))
        told = f"difference × {m.factor}" if m.changes else "no difference in 8 bits"
        strips.append(Strip(told, f"Absolute {told} of {what}", m.apart))
    small = tuple(f"no. {i}" for i in head.index.tolist())
    title = f"{victim(cell)}: {under(cell)}"
    return Grid(title, f"{len(head)} images", tuple(true), tuple(strips), tile(head.clean.shape[-1]), first, small)


def tile(side: int) -> int:
    """CSS pixels from an image to the next."""
    scale = max(1, TILE // side) if side < TILE else min(side, 2 * TILE) / side
    return round(scale * (side + gap(side)))


def _alt(what: str, answers: list[str]) -> str:
    return f"{what}; answers: {', '.join(answers)}"


def _names(s: Sample, classes: tuple[str, ...]) -> tuple[list[str], list[str], list[str]]:
    """What the images show, and what was answered before and after."""
    if s.texts is not None:
        true, before, after = ([str(t) or "(no answer)" for t in row] for row in s.texts)
        return true, before, after
    return called(s.y, classes), called(s.before, classes), called(s.after, classes)


def called(labels: Array, classes: tuple[str, ...]) -> list[str]:
    """The names of classes, as far as they have some."""
    return ["(no answer)" if c < 0 else classes[c] if c < len(classes) else str(c) for c in labels.tolist()]
