"""ART's attacks on training data, one `Craft` each, with the faults of ART's that stand in their way worked around."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional

from advplug_art.attacks import load
from advplug_art.estimators import Array
from advplug_art.poisons import AT_ONCE, Case, Patch

_POISONING = "art.attacks.poisoning:"
_RATES = (0.1, 0.01, 0.001, 0.0001)
_MILESTONES = (0.4, 0.6, 0.8, 0.88)
"""ART's rates of gradient matching and where they begin, as shares of its 250 epochs."""


# --- features --------------------------------------------------------------------------------------


def feature_collision(case: Case, steps: int, lr: float, similarity: float, watermark: float) -> tuple[Array, Array]:
    """Shafahi et al. 2018: toward the target's features, held back by the distance to the image itself.

    ART's forward step writes into the iterate, so that steps it rejects were taken all the same, and its decayed
    learning rate goes on to the next image; here each image starts anew, and a rejected step is none.
    """
    attack = load(_POISONING + "FeatureCollisionAttack")(
        case.estimator(), case.goal, "", learning_rate=lr, max_iter=steps, similarity_coeff=similarity,
        watermark=watermark or None, verbose=False,
    )  # fmt: skip
    forward = attack.forward_step
    attack.forward_step = lambda poison: forward(poison.copy())
    rows, made = case.drawn(), []
    for row in rows:
        attack.learning_rate = lr
        made.append(attack.poison(case.x[row : row + 1])[0])
    return rows, np.concatenate(made)


def bullseye_polytope(case: Case, eps: float, steps: int, lr: float) -> tuple[Array, Array]:
    """Aghakhani et al. 2020: the mean of the poisons' features goes to the target's, at every layer.

    ART never looks at its target: it asks for the features of the images that it is to poison. Here it gets the
    target's, and features layer by layer, as its loss takes them.
    """
    estimator = case.estimator()
    with torch.no_grad():
        centre = [part[0] for part in case.features(torch.from_numpy(case.goal))]

    def activations(x: Any, **_asked: Any) -> list[Tensor]:
        # ART asks for the centre with an array in hand, for the poisons with a tensor.
        return centre if isinstance(x, np.ndarray) else case.features(x)

    estimator.get_activations = activations
    attack = load(_POISONING + "BullseyePolytopeAttackPyTorch")(
        estimator, case.goal, "", max_iter=steps, learning_rate=lr, epsilon=eps, verbose=False
    )
    rows = case.drawn()
    return rows, attack.poison(case.x[rows], case.hot(len(rows)))[0]


def hidden_trigger(case: Case, eps: float, steps: int, lr: float, mark: Patch) -> tuple[Array, Array]:
    """Saha et al. 2019: images of the target class toward the features of images with the trigger.

    ART wants as many images of the source class as poisons, and adds the trigger itself. Its steps are multiples of
    the gradient, which is large in one network and tiny in another: the first one is made to move the pixel that it
    moves most by `lr` times eps.
    """
    backdoor = load(_POISONING + "PoisoningAttackBackdoor")(mark.put_on_array)
    rows = case.drawn()
    shown = case.goal[np.arange(len(rows)) % len(case.goal)]
    length = lr * eps / max(_steepest(case, case.x[rows], shown), 1e-12)
    target, source = np.eye(case.classes, dtype=np.float32)[[case.wanted, (case.wanted + 1) % case.classes]]
    attack = load(_POISONING + "HiddenTriggerBackdoor")(
        case.estimator(), target, source, "", backdoor, eps=eps, learning_rate=length, stopping_threshold=0.0,
        max_iter=steps, poison_percent=1.0, verbose=False,
    )  # fmt: skip
    both = np.concatenate([case.x[rows], shown])
    labels = np.stack([target] * len(rows) + [source] * len(shown))
    made, places = attack.poison(both, labels)
    return rows[places], made


def _steepest(case: Case, images: Array, shown: Array) -> float:
    """The largest value of the gradient of the squared distances between the features of pairs of images."""
    x = torch.from_numpy(images).requires_grad_()
    with torch.enable_grad():
        gaps = [a - b.detach() for a, b in zip(case.features(x), case.features(torch.from_numpy(shown)), strict=True)]
        (found,) = torch.autograd.grad(torch.stack([gap.square().sum() for gap in gaps]).sum(), x)
    return float(found.abs().max())


def nearest_distance(case: Case, images: Array) -> float:
    """The mean distance of the images' features to those of the goal that are nearest."""
    made, goal = _features(case, images), _features(case, case.goal)
    return float(torch.cdist(made, goal).amin(1).mean())


def centre_distance(case: Case, images: Array) -> float:
    """The distance of the images' mean features to the goal's, as a share of the goal's size; mean over layers."""
    with torch.no_grad():
        made, goal = (case.features(torch.from_numpy(x)) for x in (images, case.goal))
    shares = [(a.mean(0) - b[0]).norm() / b[0].norm() for a, b in zip(made, goal, strict=True)]
    return float(torch.stack(shares).mean())


def _features(case: Case, images: Array) -> Tensor:
    with torch.no_grad():
        return torch.cat([torch.cat(case.features(part), 1) for part in torch.split(torch.from_numpy(images), AT_ONCE)])


# --- gradients -------------------------------------------------------------------------------------


def gradient_matching(case: Case, eps: float, steps: int, restarts: int) -> tuple[Array, Array]:
    """Geiping et al. 2020: the gradient that trains on the poisons points where training on the goal's would."""
    attack = load(_POISONING + "GradientMatchingAttack")(
        case.estimator(), _just(case), epsilon=eps, max_trials=restarts, max_epochs=steps,
        learning_rate_schedule=_schedule(steps), verbose=0,
    )  # fmt: skip
    attack._poison__pytorch = lambda x, y: _descend(attack, x, y)
    wanted = np.full(len(case.goal), case.wanted)
    made, _ = attack.poison(case.goal, wanted, case.x, np.full(len(case.x), case.wanted))
    # ART does not say which images it chose.
    rows = np.flatnonzero((made != case.x).any(axis=(1, 2, 3)))
    return rows, made[rows]


def sleeper_agent(
    case: Case, eps: float, steps: int, restarts: int, selection: str, mark: Patch
) -> tuple[Array, Array]:
    """Souri et al. 2021: gradient matching for images with a trigger.

    ART adds the trigger itself, to images that have it already. It takes a classifier with standardised input only;
    networks here standardise inside, so this one's mean is 0 and its deviation 1.
    """
    standard = load("art.preprocessing.standardisation_mean_std.pytorch:StandardisationMeanStdPyTorch")
    attack = load(_POISONING + "SleeperAgentAttack")(
        case.estimator(preprocessing=standard(0.0, 1.0, device_type="cpu")), _just(case), mark.pattern.numpy(),
        np.arange(len(case.x)), epsilon=eps, max_trials=restarts, max_epochs=steps,
        learning_rate_schedule=_schedule(steps), verbose=0, patching_strategy="fixed", selection_strategy=selection,
        class_target=case.wanted,
    )  # fmt: skip
    attack._poison__pytorch = lambda x, y: _descend(attack, x, y)
    shown = case.goal[:AT_ONCE]
    made, _ = attack.poison(shown, case.hot(len(shown)), case.x, case.hot(len(case.x)), case.x, case.hot(len(case.x)))
    rows = np.sort(attack.get_poison_indices())
    return rows, made[rows]


def _just(case: Case) -> float:
    """The share of the images that ART cuts down to the count wanted."""
    return min(1.0, (case.count + 0.5) / len(case.x))


def _schedule(steps: int) -> tuple[list[float], list[int]]:
    return list(_RATES), [int(share * steps) for share in _MILESTONES]


def _descend(attack: Any, x: Array, y: Array) -> tuple[Array, float]:
    """ART's descent in batches, poisons and mean loss out; ART starts a process for each pass over the images."""
    weight = attack.backdoor_model.noise_embedding.embedding_layer.weight
    images, labels = (torch.from_numpy(np.asarray(part)).to(weight.device) for part in (x, y))
    parts = torch.split(torch.arange(len(x), device=weight.device), attack.batch_size)

    def forward(rows: Tensor) -> tuple[Tensor, Tensor]:
        loss, made = attack.backdoor_model(images[rows], rows, labels[rows], attack.grad_ws_norm)
        return loss, made

    for _ in range(attack.max_epochs):
        for rows in parts:
            (weight.grad,) = torch.autograd.grad(forward(rows)[0], weight)
            weight.grad.sign_()
            attack.optimizer.step()
        attack.lr_schedule.step()
    made = [tuple(t.detach().cpu() for t in forward(rows)) for rows in parts]
    return torch.cat([images for _, images in made]).numpy(), float(np.mean([float(loss) for loss, _ in made]))


def gradient_cosine(case: Case, images: Array) -> float:
    """The cosine of the loss's gradients by the weights: of these images and of the goal, both as the wanted class."""
    a, b = (_weight_gradient(case, x[:AT_ONCE]) for x in (images, case.goal))
    return float(functional.cosine_similarity(a, b, dim=0))


def _weight_gradient(case: Case, images: Array) -> Tensor:
    with torch.enable_grad():
        logits = case.network(torch.from_numpy(images))
        loss = functional.cross_entropy(logits, torch.full((len(images),), case.wanted))
        found = torch.autograd.grad(loss, list(case.network.parameters()))
    return torch.cat([part.flatten() for part in found])


# --- labels ----------------------------------------------------------------------------------------


def clean_label_backdoor(
    case: Case, eps: float, step: float, steps: int, restarts: int, mark: Patch
) -> tuple[Array, Array]:
    """Turner et al. 2018: images of the target class are made hard to recognise; the trigger comes after rounding.

    ART would draw images with replacement, and take the model's answers for their labels; here its attack gets both.
    """
    backdoor = load(_POISONING + "PoisoningAttackBackdoor")(mark.put_on_array)
    attack = load(_POISONING + "PoisoningAttackCleanLabelBackdoor")(
        backdoor, case.estimator(), case.hot(1)[0], eps=eps, eps_step=step * eps, max_iter=steps,
        num_random_init=restarts,
    ).attack  # fmt: skip
    attack.set_params(verbose=False)
    rows = case.drawn()
    return rows, attack.generate(case.x[rows], case.hot(len(rows)))


def label_probability(case: Case, images: Array) -> float:
    """The mean probability that the network gives the wanted class."""
    with torch.no_grad():
        parts = [
            case.network(part).softmax(1)[:, case.wanted] for part in torch.split(torch.from_numpy(images), AT_ONCE)
        ]
    return float(torch.cat(parts).mean())
