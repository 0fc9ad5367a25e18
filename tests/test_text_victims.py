"""Victims whose columns are texts: similarities are lowered, measured and compared; galleries answer with images."""

from __future__ import annotations

from fractions import Fraction
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch.nn import functional

import advplug
import textmodels
from advplug import session
from advplug.attacks.engine import GradientAttack
from advplug.contracts import Ball, Batch, Minimise, Threat
from advplug.errors import UsageError
from advplug.gallery import with_texts
from advplug.results import RunResult
from advplug.rng import Stream
from advplug.victim import Columns, Victim
from textmodels import CLASSES, OWN, N, Toy, colours

BALL = Threat(Ball("linf", Fraction(1, 20)), Minimise())


@pytest.fixture(autouse=True)
def _texts(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(session, "registry", textmodels.known)


def run(model: str, attack: Any, defense: Any = (), dataset: str = "colours", **more: Any) -> RunResult:
    return advplug.evaluate(model, attack, defense, dataset=dataset, eps=more.pop("eps", "1/20"), **more)


def gallery() -> tuple[Toy, Batch, Columns]:
    module, split, columns = with_texts(Toy(CLASSES), colours().test, "retrieval", 3)
    return module, split.batch(np.arange(N)), columns  # type: ignore[return-value]


def test_a_gallery_has_a_class_an_image_and_joins_those_of_equal_captions() -> None:
    module, batch, columns = gallery()
    assert columns.classes == N - 1
    assert len(columns.texts) == OWN * (N - 1)
    assert batch.y.tolist() == [*range(N - 1), N - 2]
    logits = module(batch.x)
    grouped = columns.grouped(logits)
    assert grouped.shape == (N, N - 1)
    assert torch.equal(grouped, logits.view(N, N - 1, OWN).amax(2))
    own = logits.view(N, N - 1, OWN)[torch.arange(N), batch.y]
    assert torch.allclose(columns.similarity(logits / module.scale, batch.y), own.mean(1) / module.scale)


def test_texts_that_read_the_same_are_right_for_all_their_images() -> None:
    columns = Columns(torch.tensor([0, 0, 1, 1]), 1.0, 2, ("a", "b", "b", "c"))
    y = torch.tensor([0, 1])
    assert columns.own(y).tolist() == [[True, True, False, False], [False, False, True, True]]
    assert columns.right(y).tolist() == [[True, True, True, False], [False, True, True, True]]


def test_it_is_the_plain_loop_on_the_similarity() -> None:
    """The best iterate of steps along the gradient's sign, written out once more."""
    module, batch, columns = gallery()
    eps, steps = 0.05, 8
    made = textmodels.lower(steps, random_start=False)(
        Victim(module, columns.classes, columns=columns),
        batch,
        Threat(Ball("linf", 1 / 20), Minimise()),
        Stream(0, "t"),  # type: ignore[arg-type]
    )
    texts = module.columns.view(N - 1, OWN, -1)[batch.y]

    def cosine(x: torch.Tensor) -> torch.Tensor:
        features = functional.normalize(module.tower(x.flatten(1) - 0.33), dim=1)
        return (texts @ features[:, :, None]).squeeze(2).mean(1)

    at, best, low = batch.x.clone(), batch.x.clone(), cosine(batch.x).detach()
    for _ in range(steps):
        at.requires_grad_()
        (g,) = torch.autograd.grad(cosine(at).sum(), at)
        at = (batch.x + (at.detach() - eps / 4 * g.sign() - batch.x).clamp(-eps, eps)).clamp(0, 1)
        now = cosine(at).detach()
        best = torch.where((now < low)[:, None, None, None], at, best)
        low = torch.minimum(low, now)
    assert torch.allclose(cosine(made.x), low, atol=1e-5)
    assert torch.allclose(made.x, best, atol=1e-5)


def test_the_similarity_never_rises_with_steps_or_budget() -> None:
    def means(attacks: list[str], eps: list[str]) -> list[float]:
        result = run("toy-retrieval", attacks, eps=eps, audit="none")
        return [c.metrics["adversarial_similarity"].value for c in result.cells]  # type: ignore[union-attr]

    by_steps = means([f"lower:steps={k},random_start=no" for k in (1, 3, 10, 30)], ["1/20"])
    by_budget = means(["lower:steps=10"], ["0", "1/100", "1/20", "1/5"])
    for falling in (by_steps, by_budget):
        assert sorted(falling, reverse=True) == falling
        assert falling[0] > falling[-1] + 0.05


def test_cells_hold_similarities_and_no_robust_accuracy() -> None:
    result = run("toy-retrieval", "lower", "dimmed")
    base, defended = result.cells
    for cell in (base, defended):
        m = cell.metrics
        assert "a text was cut" in cell.notes
        assert cell.goal == "minimise:similarity"
        assert m["robust_accuracy"] is None
        assert m["attack_success_rate"] is None
        assert m["clean_accuracy"] is not None
        clean, low, drop = (m[k] for k in ("clean_similarity", "adversarial_similarity", "similarity_drop"))
        assert clean is not None
        assert low is not None
        assert drop is not None
        assert low.low is not None
        assert low.low < low.value < clean.value
        assert drop.value == pytest.approx(1 - low.value / clean.value)
        assert m["similarity_8bit"].value == pytest.approx(low.value, abs=0.05)  # type: ignore[union-attr]
    assert base.metrics["static_similarity"] is None
    m = defended.metrics
    parts = [m[f"{name}_similarity"].value for name in ("static", "bare", "adaptive")]  # type: ignore[union-attr]
    assert m["adversarial_similarity"].value <= min(parts) + 1e-6  # type: ignore[union-attr]


def test_every_image_is_attacked_also_those_that_are_not_found() -> None:
    module, batch, columns = gallery()
    victim = Victim(module, columns.classes, columns=columns)
    wrong = module(batch.x).argmax(1) // OWN != batch.y
    assert wrong.any(), "the toy finds every image, and nothing is tested"
    result = run("toy-retrieval", "lower", audit="none")
    cell = result.cells[0]
    assert cell.metrics["adversarial_similarity"].n == N  # type: ignore[union-attr]
    made = textmodels.lower()(victim, batch, BALL, Stream(0, "t"))
    assert ((made.x - batch.x).abs().amax((1, 2, 3)) > 0.01).all()


def test_rows_compare_with_the_undefended_model() -> None:
    base, defended = run("toy-retrieval", "lower", "dimmed").threats
    assert base.worst_case_accuracy is None
    assert base.verdict == defended.verdict == "upper bound"
    clean, low = base.clean_similarity, base.worst_case_similarity
    assert clean is not None
    assert low is not None
    assert defended.worst_case_similarity is not None
    gained = defended.worst_case_similarity.value - low.value
    assert defended.difference_to_baseline is not None
    assert defended.difference_to_baseline.value == pytest.approx(gained)
    assert defended.recovery == pytest.approx(gained / (clean.value - low.value))
    assert base.recovery is None


def test_classes_may_be_prompts_and_other_attacks_meet_them_as_ever() -> None:
    result = run("toy-clip", ["lower", "pgd", "lower:target=an image of something blue"], eps="1/5", audit="none")
    lowered, broken, toward = result.cells
    assert lowered.metrics["robust_accuracy"] is None
    assert broken.metrics["robust_accuracy"] is not None
    assert broken.metrics["clean_similarity"] is not None
    assert broken.metrics["adversarial_similarity"] is None
    assert toward.goal == "targeted:2"
    assert toward.metrics["attack_success_rate"].value > 0.5  # type: ignore[union-attr]


def test_a_target_may_be_a_caption_of_the_gallery() -> None:
    result = run("toy-retrieval", "lower:target=green thing 4.1", eps="1/2", audit="none")
    assert result.cells[0].goal == "targeted:green thing 4.1"
    assert result.cells[0].metrics["attack_success_rate"].value > 0.5  # type: ignore[union-attr]
    with pytest.raises(UsageError, match="target 'nowhere written' is none of the 46 captions"):
        run("toy-retrieval", "lower:target=nowhere written")


@pytest.mark.parametrize(
    ("model", "attack", "defense", "dataset", "told"),
    [
        ("cnn", "lower", (), "colours", "lower compares images with texts, cnn knows none; use a CLIP model"),
        ("toy-retrieval", "lower", "noise-vote", "colours", "no similarity can be read off it; use an attack on its"),
        ("toy-retrieval", "pgd", (), "digits", "toy-retrieval retrieves captions, digits has none; use captioned"),
        ("cnn", "pgd", (), "captions-only", "captions-only has captions and no classes, cnn answers with classes"),
        ("toy-clip", "lower:target=a purple one", (), "colours", "a class number or the name of one, got 'a purple"),
        ("toy-trained", "pgd", "advtrain", "colours", "toy-trained is trained in its own way; use adv-finetune"),
    ],
)
def test_what_makes_no_sense_is_refused(model: str, attack: str, defense: Any, dataset: str, told: str) -> None:
    try:
        reasons = [str(c.reason) for c in run(model, attack, defense, dataset, audit="none").cells]
    except UsageError as error:
        reasons = [str(error)]
    assert any(told in r for r in reasons), reasons


def test_a_source_may_train_its_own_way(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("ADVPLUG_CACHE", str(tmp_path))
    textmodels.OwnWay.fits.clear()
    for _ in range(2):
        result = run("toy-trained", "pgd", audit="none")
        assert result.cells[0].provenance["facts"] == {"toy-trained": {"fitted_on": N}}
    assert textmodels.OwnWay.fits == [N], "once, with the evaluated images at hand to be compared with"


def test_similarity_needs_texts() -> None:
    victim = Victim(Toy(CLASSES), 3)
    batch = Batch(torch.rand(2, 3, 6, 6), torch.tensor([0, 1]), torch.arange(2))
    with pytest.raises(UsageError, match="similarities are of images and texts"):
        GradientAttack(loss="similarity")(victim, batch, BALL, Stream(0, "t"))


# --- signs that a similarity should not be believed ------------------------------------------------------


def test_an_attack_without_effect_is_found_out(monkeypatch: pytest.MonkeyPatch) -> None:
    """One that returns the clean images does worse than a single step, and than itself with more of them."""

    def idle(self: GradientAttack, victim: Victim, batch: Batch, threat: Threat, rng: Stream) -> Any:
        from advplug.contracts import Crafted

        return Crafted(batch.x.clone()) if self.steps == 7 else original(self, victim, batch, threat, rng)

    original = GradientAttack.__call__
    monkeypatch.setattr(GradientAttack, "__call__", idle)
    (row,) = run("toy-retrieval", "lower:steps=7").threats
    assert row.verdict == "not trustworthy"
    assert {"one-step-beats-iterative", "not-converged"} <= {f.name for f in row.flags}


def test_few_steps_have_not_converged() -> None:
    (row,) = run("toy-retrieval", "lower:steps=2,random_start=no", eps="1/5").threats
    assert "not-converged" in {f.name for f in row.flags}
