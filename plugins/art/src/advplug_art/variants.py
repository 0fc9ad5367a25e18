"""ART's attacks that need help: with arguments of their own, or a fault of ART's to be worked around.

Each function takes an estimator and keyword arguments, and returns something with `generate(x, y)`: images float32
(B, C, H, W), labels or targets one-hot (B, K), to images.
"""

from __future__ import annotations

import contextlib
import io
import math
from collections.abc import Callable
from fractions import Fraction
from typing import Any

import numpy as np
import torch
from torch import Tensor

from advplug.errors import UsageError
from advplug_art.estimators import Array, Handle, Reordered, classifier
from advplug_art.rows import UNLIMITED

Generate = Callable[[Array, Array], Array]


class Made:
    """What `generate` makes."""

    targeted = False  # read by ART's AutoAttack

    def __init__(self, generate: Generate) -> None:
        self.generate = generate


# --- ensembles and losses ----------------------------------------------------------------------------


def apgd(estimator: Any, **arguments: Any) -> Any:
    from art.attacks.evasion import AutoProjectedGradientDescent

    return AutoProjectedGradientDescent(estimator, **_with_loss(estimator, arguments))


def acg(estimator: Any, **arguments: Any) -> Any:
    from art.attacks.evasion import AutoConjugateGradient

    return _signed(AutoConjugateGradient(estimator, **_with_loss(estimator, arguments)))


def reacg(estimator: Any, **arguments: Any) -> Any:
    from art.attacks.evasion import RescalingAutoConjugateGradient

    return _signed(RescalingAutoConjugateGradient(estimator, **_with_loss(estimator, arguments)))


class _Signs:
    """In the place of ART's mask, which directions are multiplied with: leaves their signs."""

    __array_ufunc__ = None  # so that NumPy leaves the product to __rmul__

    def astype(self, _dtype: Any) -> _Signs:
        return self

    def __rmul__(self, direction: Array) -> Array:
        signs: Array = np.sign(direction)
        return signs


def _signed(attack: Any) -> Any:
    """In L-inf, ART computes the sign of the conjugate gradient and then steps along the gradient as it is."""
    if attack.norm != np.inf:
        return attack
    return Made(lambda x, y: attack.generate(x, y, mask=_Signs()))


def _with_loss(estimator: Any, arguments: dict[str, Any]) -> dict[str, Any]:
    """ART's name of the loss; its None is the estimator's own, cross-entropy."""
    if arguments["loss_type"] == "ce":
        return arguments | {"loss_type": None}
    if estimator.nb_classes < 3:
        raise UsageError("loss=dlr needs at least 3 classes; use loss=ce")
    return arguments | {"loss_type": "difference_logits_ratio"}


def autoattack(
    estimator: Any, norm: Any, eps: float, batch_size: int, steps: int, restarts: int, square_steps: int, p_init: float
) -> Any:
    """ART's four attacks, built here because ART would let them draw progress bars; Square asks the deployed system."""
    from art.attacks.evasion import AutoAttack, SquareAttack

    shared = {"norm": norm, "eps": eps, "batch_size": batch_size, "verbose": False}
    descent = shared | {"eps_step": 2 * eps, "max_iter": steps, "nb_random_init": restarts}
    deployed = classifier(estimator.model.deployed(), estimator.input_shape, estimator.nb_classes)
    attacks = [
        apgd(estimator, **descent, loss_type="ce"),
        apgd(estimator, **descent, loss_type="dlr"),
        deepfool(estimator, nb_grads=10, max_iter=steps, epsilon=1e-3, batch_size=batch_size, verbose=False),
        SquareAttack(deployed, max_iter=square_steps, p_init=p_init, nb_restarts=restarts, **shared),
    ]
    return AutoAttack(estimator, norm=norm, eps=eps, eps_step=2 * eps, attacks=attacks, batch_size=batch_size)


def deepfool(estimator: Any, nb_grads: int, **arguments: Any) -> Any:
    """With fewer candidates than classes, ART pools those of all images and takes their positions for classes: each
    image is handed over by itself, with the candidates in front."""
    from art.attacks.evasion import DeepFool

    if nb_grads >= estimator.nb_classes:
        return DeepFool(estimator, nb_grads=nb_grads, **arguments)

    def one(x: Array) -> Array:
        order = torch.from_numpy((-estimator.predict(x)).argsort(1)[0])
        handle = Reordered(estimator.model.module, order)
        sorted_classes = classifier(handle, estimator.input_shape, estimator.nb_classes)
        made: Array = DeepFool(sorted_classes, nb_grads=nb_grads, **arguments).generate(x)
        return made

    return Made(lambda x, y: np.concatenate([one(x[i : i + 1]) for i in range(len(x))]))


def universal(estimator: Any, **arguments: Any) -> Any:
    from art.attacks.evasion import UniversalPerturbation

    attack = UniversalPerturbation(estimator, attacker="deepfool", **arguments)
    inner = deepfool(estimator, nb_grads=10, max_iter=50, epsilon=0.02, batch_size=1, verbose=False)
    attack._get_attack = lambda name, params: inner
    return attack


def jsma(estimator: Any, targeted: bool, **arguments: Any) -> Made:
    """ART's saliency maps know targets only; untargeted, the target is the best-scoring wrong class."""
    from art.attacks.evasion import SaliencyMapMethod

    attack = SaliencyMapMethod(estimator, **arguments)

    def generate(x: Array, y: Array) -> Array:
        if not targeted:
            scores = np.where(y > 0, -np.inf, estimator.predict(x, batch_size=attack.batch_size))
            y = np.eye(estimator.nb_classes, dtype=np.float32)[scores.argmax(1)]
        made: Array = attack.generate(x, y)
        return made

    return Made(generate)


def targeted_universal(estimator: Any, targeted: bool, **arguments: Any) -> Any:
    from art.attacks.evasion import TargetedUniversalPerturbation

    if not targeted:
        raise UsageError("art.targeted-universal needs a target; art.universal has none")
    return TargetedUniversalPerturbation(estimator, **arguments)


# --- attacks that start from a misclassified image ---------------------------------------------------

STARTS = 100
"""Random images that are tried."""


def boundary(estimator: Any, **arguments: Any) -> Made:
    from art.attacks.evasion import BoundaryAttack

    return _started(BoundaryAttack(estimator, **arguments))


def hopskipjump(estimator: Any, **arguments: Any) -> Made:
    from art.attacks.evasion import HopSkipJump

    return _started(HopSkipJump(estimator, **arguments))


def brendel_bethge(estimator: Any, **arguments: Any) -> Made:
    from art.attacks.evasion import BrendelBethgeAttack

    attack = _started(BrendelBethgeAttack(estimator, **arguments))

    def generate(x: Array, y: Array) -> Array:
        with contextlib.redirect_stderr(io.StringIO()):  # its progress bar cannot be switched off
            return attack.generate(x, y)

    return Made(generate)


def _started(attack: Any) -> Made:
    """For one image: begins where `random_start` ends. ART's own starts are drawn from a generator without a seed."""

    def generate(x: Array, y: Array) -> Array:
        start = random_start(attack.estimator, x, y)
        if start is None:
            return x
        made: Array = attack.generate(x, y, x_adv_init=start)
        return made

    return Made(generate)


def random_start(estimator: Any, x: Array, y: Array) -> Array | None:
    """The first of STARTS random images (1, C, H, W) that is not answered with the label; None if all are.

    Noise comes in blocks of 1, 2, 4, ... pixels in turn: fine noise looks alike to many models.
    """
    _, channels, height, width = x.shape
    scales = 1 + math.ceil(math.log2(max(height, width)))
    for trial in range(STARTS):
        block = 2 ** (trial % scales)
        coarse = np.random.uniform(0, 1, (1, channels, -(-height // block), -(-width // block)))
        tried = np.kron(coarse, np.ones((1, 1, block, block)))[:, :, :height, :width].astype(np.float32)
        if estimator.predict(tried).argmax(1)[0] != y.argmax(1)[0]:
            return tried
    return None


def geoda(estimator: Any, **arguments: Any) -> Made:
    """ART's steps in a loop of our own: its `generate` needs `np.mat` and square images, and leaves a file behind."""
    from art.attacks.evasion import GeoDA

    attack = GeoDA(estimator, **arguments)
    attack.clip_min, attack.clip_max = 0.0, 1.0
    attack.sub_basis = cosines(attack.sub_dim, *estimator.input_shape[1:])

    def generate(x: Array, y: Array) -> Array:
        start = attack._find_random_adversarial(x, y)
        edge = attack._binary_search(x, y, start, tol=attack.bin_search_tol)
        normal = np.zeros_like(x)
        for count in attack.q_opt_iter[: attack.iterate]:
            estimate, _ = attack._black_grad_batch(edge, count, attack.batch_size, y)
            normal += estimate
            edge = attack._go_to_boundary(x, y, normal)
            edge = attack._binary_search(x, y, edge, tol=attack.bin_search_tol)
        made: Array = np.clip(edge, 0, 1)
        return made

    return Made(generate)


def cosines(count: int, height: int, width: int) -> Array:
    """The `count` lowest frequencies a side of the two-dimensional cosine transform, orthonormal columns:
    float32 (height * width, at most count^2)."""

    def one(size: int) -> Array:
        k, i = np.arange(min(count, size)), np.arange(size)[:, None]
        wave: Array = np.cos((2 * i + 1) * k * np.pi / (2 * size)) * np.sqrt(2 / size)
        wave[:, 0] /= np.sqrt(2)
        return wave

    made: Array = np.kron(one(height), one(width)).astype(np.float32)
    return made


# --- other sets --------------------------------------------------------------------------------------


def shadow(estimator: Any, targeted: bool, **arguments: Any) -> Made:
    """ART takes labels for targets, so that untargeted attacks must not give any."""
    from art.attacks.evasion import ShadowAttack

    attack = ShadowAttack(estimator, targeted=targeted, **arguments)
    return Made(lambda x, y: attack.generate(x, y if targeted else None))


def wasserstein(estimator: Any, eps: float, eps_step: float, kernel_size: int, **arguments: Any) -> Made:
    """With ART's slow patch extraction replaced, and images without any mass left alone."""
    from art.attacks.evasion import Wasserstein

    if kernel_size % 2 == 0:
        raise UsageError(f"art.wasserstein: kernel_size must be odd, got {kernel_size}")
    attack = Wasserstein(estimator, eps=eps, eps_step=min(eps, eps_step), kernel_size=kernel_size, **arguments)
    attack._unfold = windows

    def generate(x: Array, y: Array) -> Array:
        made: Array = attack.generate(x, y) if x.sum() > 0 else x
        return made

    return Made(generate)


def windows(x: Array, kernel_size: int, padding: int) -> Array:
    """All square windows of zero-padded images (B, C, H, W): (B, C * kernel_size^2, windows), as ART's `_unfold`."""
    padded = np.pad(x, ((0, 0), (0, 0), (padding, padding), (padding, padding)))
    seen = np.lib.stride_tricks.sliding_window_view(padded, (kernel_size, kernel_size), axis=(2, 3))
    batch, channels = x.shape[:2]
    return seen.transpose(0, 1, 4, 5, 2, 3).reshape(batch, channels * kernel_size**2, -1)


def composite(estimator: Any, **arguments: Any) -> Any:
    from art.attacks.evasion import CompositeAdversarialAttackPyTorch

    return CompositeAdversarialAttackPyTorch(estimator, **arguments)


def adversarial_patch(estimator: Any, eps: float, place: str, **arguments: Any) -> Made:
    """Trained and pasted at one place, pixel by pixel; ART's own overlay resizes the patch to the image and back."""
    from art.attacks.evasion import AdversarialPatchPyTorch

    channels, height, width = estimator.input_shape
    side = math.ceil(Fraction(eps).limit_denominator(10**6) * min(height, width))
    corners = {
        "centre": ((height - side) // 2, (width - side) // 2),
        "corner": (0, 0),
        "random": (np.random.randint(height - side + 1), np.random.randint(width - side + 1)),
    }
    top, left = corners[place]
    attack = AdversarialPatchPyTorch(
        estimator, patch_shape=(channels, side, side), patch_location=(top, left), patch_type="square",
        rotation_max=0.0, **arguments,
    )  # fmt: skip

    def overlay(images: Tensor, patch: Tensor, scale: float | None = None, mask: Tensor | None = None) -> Tensor:
        around = (left, width - side - left, top, height - side - top)
        inside = torch.nn.functional.pad(torch.ones_like(patch), around)
        pasted = torch.nn.functional.pad(patch, around)
        return torch.where(inside > 0, pasted.to(images.dtype), images)

    attack._random_overlay = overlay

    def generate(x: Array, y: Array) -> Array:
        patch, _ = attack.generate(x, y)
        made = x.copy()
        made[:, :, top : top + side, left : left + side] = patch
        return made

    return Made(generate)


def feature_adversaries(estimator: Any, eps: float, layer: str, targeted: bool, **arguments: Any) -> Made:
    """Guides are images of the same batch: of the target class, or of any other class; without one nothing is done."""
    from art.attacks.evasion import FeatureAdversariesPyTorch

    handle: Handle = estimator.model

    def activations(x: Tensor, _layer: Any, _batch_size: int, framework: bool = False) -> Tensor:
        # ART would leave its hook on the user's model.
        return handle.features(x, layer)

    estimator.get_activations = activations
    attack = FeatureAdversariesPyTorch(estimator, delta=eps, **arguments)

    def generate(x: Array, y: Array) -> Array:
        guides = find_guides(estimator.predict(x, batch_size=attack.batch_size).argmax(1), y.argmax(1), targeted)
        rows = np.flatnonzero(guides >= 0)
        made = x.copy()
        if len(rows):
            made[rows] = attack.generate(x[rows], x[guides[rows]])
        return made

    return Made(generate)


def find_guides(answers: Array, wanted: Array, targeted: bool) -> Array:
    """For each image the position of the next one (in a circle) that is answered with its target, or with anything
    but its label; -1 if there is none."""
    count = len(answers)
    guides = np.full(count, -1)
    for i in range(count):
        for j in ((i + step) % count for step in range(1, count)):
            if (answers[j] == wanted[i]) == targeted:
                guides[i] = j
                break
    return guides


def laser(estimator: Any, iterations: int, width: float) -> Made:
    """Beams begin anew until the queries are spent. ART's choice of a direction needs `np.asfarray`."""
    from art.attacks.evasion.laser_attack.laser_attack import LaserBeamAttack

    rows, columns, _ = estimator.input_shape
    widest = (780.0, math.pi, float(max(rows, columns)), max(1.0, width * min(rows, columns)))
    attack = LaserBeamAttack(
        estimator, iterations, max_laser_beam=widest, min_laser_beam=(380.0, 0.0, 1.0, 1.0),
        random_initializations=UNLIMITED,
    )  # fmt: skip
    pairs = [[i, j] for i in range(4) for j in range(i, 4)]
    masks = np.array([[float(k in pair) for k in range(4)] for pair in pairs])
    attack._laser_generator._random_direction = lambda: masks[np.random.choice(len(masks))]
    return Made(lambda x, y: attack.generate(x, y.argmax(1)))
