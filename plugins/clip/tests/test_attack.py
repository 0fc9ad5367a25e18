"""caption-pgd, and retrieval with and without it: counted by hand, and on a model whose similarities are known."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch

import advplug
import textmodels
from advplug import session
from advplug.artifacts import Artifacts
from advplug.build import Builder
from advplug.contracts import Strength
from advplug.estimate import rate
from advplug.evidence import Array, Evidence
from advplug.parse import parse_reference
from advplug.plans import VictimPlan, bind
from advplug.progress import Silent
from advplug.registry import registry
from advplug.testing import check_attack
from advplug_clip.attack_specs import caption_pgd
from advplug_clip.retrieval import CUTS, VALUES, furthest, image_ranks, recalls, retrieval, text_ranks
from cli_tools import run


def test_its_effort_says_what_a_failure_proves() -> None:
    entry = registry().get("attack", "caption-pgd")
    usual = {p.name: p.default for p in entry.params()}

    def strength(**given: int) -> Strength:
        return entry.spec.caps_of({**usual, **given}).strength  # type: ignore[union-attr]

    assert (usual["steps"], strength()) == (20, Strength.ITERATIVE)
    assert strength(steps=50, restarts=3) is Strength.STRONG
    assert strength(steps=49, restarts=3) is strength(steps=50, restarts=2) is Strength.ITERATIVE
    assert (caption_pgd().fraction, caption_pgd().alpha) == (0.25, None), "2/255 at 8/255"


def test_it_conforms() -> None:
    assert all(r.ok is not False for r in check_attack("caption-pgd", steps=5))


# --- ranks ---------------------------------------------------------------------------------------------


def by_sorting(cosine: Array, right: Array) -> list[int]:
    """For each row the place of the first right column in descending order."""
    return [int(np.flatnonzero(r[np.argsort(-c, kind="stable")])[0]) for c, r in zip(cosine, right, strict=True)]


@pytest.mark.parametrize("value", [0.25, float("nan")])
def test_a_tower_that_answers_every_image_alike_finds_nothing(value: float) -> None:
    right = np.kron(np.eye(40, dtype=bool), np.ones((1, 3), dtype=bool))
    flat = np.full(right.shape, value)
    assert (text_ranks(flat, right) == 3 * 39).all()
    assert (image_ranks(flat, flat, right) == 39).all()
    assert [r.value for r in recalls(image_ranks(flat, flat, right)) if r] == [0, 0, 0]


def test_ranks_are_places_in_the_sorted_gallery() -> None:
    draws = np.random.default_rng(0)
    cosine, right = draws.random((30, 50)), draws.random((30, 50)) < 0.1
    right[np.arange(30), np.arange(30)] = True
    right[0, 30:] = True
    right[1:, 30:] |= draws.random((29, 20)) < 0.1
    assert text_ranks(cosine, right).tolist() == by_sorting(cosine, right)
    assert image_ranks(cosine, cosine, right).tolist() == by_sorting(cosine.T, right.T)


def test_recall_is_1_where_each_is_its_own_nearest_and_k_of_n_by_chance() -> None:
    own = np.eye(200, dtype=bool)
    perfect = [r.value for r in recalls(text_ranks(own.astype(float), own)) if r]
    assert perfect == [1.0, 1.0, 1.0]
    draws = np.random.default_rng(1)
    chance = np.mean(
        [[r.value for r in recalls(text_ranks(draws.random((200, 200)), own)) if r] for _ in range(100)], 0
    )
    assert np.allclose(chance, [k / 200 for k in CUTS], atol=0.005)


def test_only_the_image_asked_for_may_be_attacked() -> None:
    """Three images with a caption each; the attack costs every image 0.5 of everything."""
    clean = np.array([[0.9, 0.1, 0.1], [0.1, 0.8, 0.1], [0.1, 0.1, 0.3]])
    right = np.eye(3, dtype=bool)
    attacked = clean - 0.5
    assert image_ranks(attacked, attacked, right).tolist() == [0, 0, 0], "in a gallery where all sank, nothing changes"
    assert image_ranks(attacked, clean, right).tolist() == [0, 0, 2]


def test_texts_of_equal_wording_are_right_for_each_other() -> None:
    clean = np.array([[0.5, 0.6, 0.6], [0.1, 0.6, 0.6]])
    right = np.array([[True, True, True], [False, True, True]])
    assert text_ranks(clean, right).tolist() == [0, 0]


def evidence(**columns: Array) -> Evidence:
    n = 3
    truth = np.ones((n, 1), dtype=bool)
    own = np.eye(n, dtype=bool)
    base = {"own": own, "right": own, "cosine": np.eye(n), "cosine_adaptive": np.eye(n)}
    return Evidence(np.arange(n), np.arange(n), truth, truth[:, 0], ~truth, **{**base, **columns})


def test_each_image_counts_where_it_was_pushed_furthest() -> None:
    adaptive, static = np.eye(3), np.eye(3)
    adaptive[0] = [0.2, 0.9, 0.0]
    static[1] = [0.7, 0.1, 0.0]
    found = furthest(evidence(cosine_adaptive=adaptive, cosine_static=static))
    assert found.tolist() == [[0.2, 0.9, 0.0], [0.7, 0.1, 0.0], [0.0, 0.0, 1.0]]
    values = retrieval()(evidence(cosine_adaptive=adaptive, cosine_static=static))
    assert values["text_recall_at_1"] == rate(3, 3)
    assert values["text_recall_attacked_at_1"] == rate(1, 3)


def test_where_there_is_no_gallery_there_is_no_retrieval() -> None:
    none = retrieval()(Evidence(np.arange(2), np.arange(2), np.ones((2, 1)), np.ones(2), np.ones((2, 1))))
    assert none == dict.fromkeys(VALUES)


# --- the whole path ------------------------------------------------------------------------------------


@pytest.fixture
def _texts(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(session, "registry", textmodels.known)


@pytest.mark.usefixtures("_texts")
def test_similarity_and_retrieval_fall_together(tmp_path: Path) -> None:
    ran = run("eval", "-m", "toy-retrieval", "--dataset", "colours", "-a", "caption-pgd", "-e", "8/255", "-e", "1/10",
              "-d", "jpeg:quality=75", "-o", tmp_path, "--audit", "none")  # fmt: skip
    assert ran.code == 0, ran.err
    for heading in (
        "clean cosine",
        "under attack [95 %]",
        "text R@1 %",
        "text R@1 under attack %",
        "image R@1 %",
        "image R@1, gallery attacked %",
        "recovery %",
    ):
        assert heading in ran.out
    assert run("report", tmp_path, "-o", tmp_path / "page.html").code == 0
    page = (tmp_path / "page.html").read_text()
    assert "recovery %" in page
    assert "static recovery %" in page
    cells = advplug.evaluate("toy-retrieval", "caption-pgd", dataset="colours", eps="1/10", audit="none").cells
    m = {k: v.value for k, v in cells[0].metrics.items() if v is not None}
    assert m["text_recall_at_1"] == m["clean_accuracy"] > m["text_recall_attacked_at_1"]
    assert m["image_recall_at_1"] > m["image_recall_attacked_own_at_1"]
    assert m["similarity_drop"] > 0.2


@pytest.mark.usefixtures("_texts")
def test_a_thorough_one_can_be_trusted() -> None:
    (row,) = advplug.evaluate(
        "toy-retrieval", "caption-pgd:steps=100,restarts=3", dataset="colours", eps="8/255"
    ).threats
    assert (row.verdict, [f.name for f in row.flags]) == ("trusted", [])


@pytest.mark.slow
@pytest.mark.timeout(1200)
def test_random_noise_hardly_moves_similarities() -> None:
    """Less than 0.01 at 8/255, where caption-pgd takes more than half (docs/clip.md)."""
    known = registry()
    dataset, model = (
        bind(known, kind, parse_reference(name))
        for kind, name in (("dataset", "digit-scenes"), ("model", "clip-tiny:task=retrieval"))
    )
    built = Builder(Artifacts(), "cpu", True, Silent()).build(VictimPlan(dataset, model, (), 0), 100)
    victim, batch = built.victim, next(built.split.batches(100))
    assert victim.columns is not None
    draws = torch.rand(batch.x.shape, generator=torch.Generator().manual_seed(0)) - 0.5
    found = {}
    with torch.no_grad():
        for name, noise in (("none", 0 * draws), ("signs", draws.sign()), ("uniform", 2 * draws)):
            x = (batch.x + 8 / 255 * noise).clamp(0, 1)
            found[name] = float(victim.columns.similarity(victim.cosines(x), batch.y).mean())
    print("\n" + ", ".join(f"{name} {value:.4f}" for name, value in found.items()))
    assert abs(found["signs"] - found["none"]) < 0.01
    assert abs(found["uniform"] - found["none"]) < 0.01
