"""Randomised smoothing: bounds to the digit, certificates that never exceed the true radius, their cell kind."""

from __future__ import annotations

import math
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

import advplug
from advplug import contracts, session, work
from advplug.build import Built, _training_recipe
from advplug.builtin.smoothing import smoothing
from advplug.certify import prove
from advplug.contracts import Objective, Wrap
from advplug.data import ArrayImages, Split
from advplug.decisions import Batching
from advplug.defenses.noise import noise_loss, noisy
from advplug.defenses.smoothing import ABSTAINS, certify, is_sure, lower_bound, radius, sample
from advplug.parse import parse_reference
from advplug.plans import bind
from advplug.registry import Source, load, registry
from advplug.rng import Stream
from advplug.victim import Victim
from cli_tools import CNN, QUICK, TINY, evaluate, run, stored
from linear import Affine, problem

ALPHA = 0.001


def wrap(**params: Any) -> Wrap:
    found = smoothing(train=False, **params)[-1]
    assert isinstance(found, Wrap)
    return found


# --- the statistics ---------------------------------------------------------------------------------


@pytest.mark.parametrize(("n", "reach"), [(100, 1.5005), (1000, 2.4633), (10_000, 3.1986), (100_000, 3.8115)])
def test_the_radius_where_all_votes_agree(n: int, reach: float) -> None:
    found = radius(n, n, ALPHA, 1.0)
    assert found == pytest.approx(reach, abs=5e-5)
    # The bound of all-agree is in closed form: p ** n = alpha.
    assert lower_bound(n, n, ALPHA) == pytest.approx(ALPHA ** (1 / n), rel=1e-12)
    assert radius(n, n, ALPHA, 0.25) == pytest.approx(0.25 * reach, abs=2e-5)


@pytest.mark.parametrize(("n", "least"), [(100, 66), (1000, 550)])
def test_the_fewest_votes_that_certify(n: int, least: int) -> None:
    assert radius(least, n, ALPHA, 1.0) is not None
    assert radius(least - 1, n, ALPHA, 1.0) is None


@pytest.mark.parametrize(("n", "least"), [(20, 18), (100, 67), (1000, 553)])
def test_the_fewest_votes_that_answer(n: int, least: int) -> None:
    assert is_sure(least, n - least, ALPHA)
    assert not is_sure(least - 1, n - least + 1, ALPHA)


def test_the_lower_bound_is_the_share_that_explains_the_votes_with_probability_alpha() -> None:
    from scipy.stats import binom

    for k, n in ((1, 10), (37, 100), (580, 1000)):
        assert binom.sf(k - 1, n, lower_bound(k, n, ALPHA)) == pytest.approx(ALPHA, rel=1e-9)
    assert lower_bound(0, 10, ALPHA) == 0.0
    assert not is_sure(0, 0, ALPHA)


# --- certificates of a linear victim, whose smoothed version is known -------------------------------


def line(margin: float, sigma: float) -> tuple[Affine, Tensor]:
    """A two-class model and an image at L2 distance `margin` of its boundary."""
    weight = torch.zeros(2, 12, dtype=torch.float64)
    weight[0, :3], weight[1, :3] = 2.0, -2.0
    image = torch.full((3, 2, 2), 0.5, dtype=torch.float64)
    length = float((weight[0] - weight[1]).norm())
    return Affine(weight, torch.tensor([margin * length - 0.5 * 12.0, 0.0], dtype=torch.float64)), image


@pytest.mark.parametrize("margin", [0.05, 0.2, 0.5])
def test_the_votes_are_binomial_with_the_closed_form_probability(margin: float) -> None:
    sigma, n = 0.25, 20_000
    module, image = line(margin, sigma)
    won = sample(module, image, sigma, n, torch.Generator().manual_seed(0), 512)
    p = 0.5 * (1 + math.erf(margin / sigma / math.sqrt(2)))
    assert int(won.sum()) == n
    assert abs(int(won[0]) - n * p) < 4 * math.sqrt(n * p * (1 - p))


def test_no_certificate_exceeds_the_true_radius_and_most_come_near_it() -> None:
    p = problem(classes=2, n=48, shape=(3, 4, 4))
    truth = p.distance("l2")
    sigma = 4 * float(truth.median())
    shares = []
    for image, y, true in zip(p.batch.x, p.batch.y, truth.tolist(), strict=True):
        rng = torch.Generator().manual_seed(int(1e6 * true))
        label, reach = certify(p.module, image, sigma, (100, 2000), ALPHA, rng, 256)
        assert label in (int(y), ABSTAINS)
        assert reach <= true
        shares.append(reach / true)
    assert np.median(shares) > 0.6


def test_certificates_do_not_depend_on_the_size_of_a_pass() -> None:
    p = problem(classes=3, n=6)
    found = [
        [
            certify(p.module, x, 0.05, (100, 330), ALPHA, torch.Generator().manual_seed(i), size)
            for i, x in enumerate(p.batch.x)
        ]
        for size in (1, 77, 256)
    ]
    assert found[0] == found[1] == found[2]


def test_a_model_that_answers_nothing_finite_is_not_certified() -> None:
    class Broken(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            return torch.full((len(x), 3), torch.nan)

    found = certify(Broken(), torch.zeros(1, 4, 4), 0.25, (20, 100), ALPHA, torch.Generator(), 64)
    assert found == (ABSTAINS, 0.0)
    victim = Victim(Broken(), 3, (wrap(votes=20),))
    decided = victim.decide(torch.zeros(2, 1, 4, 4))
    assert decided.label.tolist() == [-1, -1]
    assert not decided.accepted.any()


# --- the deployed system ----------------------------------------------------------------------------


def test_noise_is_not_clamped() -> None:
    x = torch.zeros(4, 1, 8, 8)
    made = noisy(x, 0.5, torch.Generator().manual_seed(0))
    assert made.min() < -0.5
    assert float(made.std()) == pytest.approx(0.5, rel=0.1)


def test_it_abstains_where_the_votes_are_close_and_answers_where_they_are_not() -> None:
    sigma = 0.25
    module, image = line(0.02, sigma)
    near = Victim(module, 2, (wrap(sigma=sigma),)).decide(image.expand(20, -1, -1, -1))
    assert near.accepted.sum() <= 2
    module, image = line(0.5, sigma)
    far = Victim(module, 2, (wrap(sigma=sigma),)).decide(image.expand(20, -1, -1, -1))
    assert far.accepted.all()
    assert (far.label == 0).all()


def built(victim: Victim, x: Tensor, y: Tensor) -> Built:
    split = Split(ArrayImages(x.float().numpy()), y.numpy(), np.arange(len(y)) + 7)
    return Built(victim, split, 0, "")


def test_proofs_draw_noise_of_their_own_and_count_their_passes() -> None:
    p = problem(classes=2, n=12)
    module = Affine(p.module.weight.detach().float(), p.module.bias.detach().float())
    victim = Victim(module, 2, (wrap(sigma=0.02, n0=50, n=250),), stream=Stream(3, "victim"))
    x, y = p.batch.x, p.batch.y
    first = prove(built(victim, x, y), Batching(64))
    assert first.passes == 300 * len(y)
    assert victim.passes.forward == first.passes
    victim.decide(x.float())  # what was decided or attacked before changes nothing
    again = prove(built(victim, x, y), Batching(9))
    assert np.array_equal(first.proofs.radius, again.proofs.radius)
    few = prove(
        built(victim, x, y).__class__(victim, built(victim, x, y).split.subset(np.array([3, 5])), 0, ""), Batching(64)
    )
    assert np.array_equal(few.proofs.radius, first.proofs.radius[[3, 5]])
    other = prove(built(replace(victim, stream=Stream(4, "victim")), x, y), Batching(64))
    assert not np.array_equal(first.proofs.radius, other.proofs.radius)
    assert (first.proofs.radius <= p.distance("l2").numpy() + 1e-6).all()


def test_training_adds_noise_of_sigma_drawn_from_the_stream() -> None:
    seen: list[Tensor] = []

    class Spy(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            seen.append(x)
            return torch.zeros(len(x), 3, requires_grad=True)

    x, y = torch.full((16, 1, 8, 8), 0.5), torch.zeros(16, dtype=torch.long)
    loss = noise_loss(Spy(), x, y, 0.3, Stream(0, "a"))
    noise_loss(Spy(), x, y, 0.3, Stream(0, "a"))
    noise_loss(Spy(), x, y, 0.3, Stream(0, "b"))
    assert float(loss.detach()) == pytest.approx(math.log(3))
    assert torch.equal(seen[0], seen[1])
    assert not torch.equal(seen[0], seen[2])
    assert float((seen[0] - x).std()) == pytest.approx(0.3, rel=0.1)
    objective, _ = smoothing(sigma=0.3)
    assert isinstance(objective, Objective)
    assert torch.equal(objective.loss(Spy(), x, y, Stream(0, "a")), loss)


def test_only_what_training_depends_on_makes_another_training() -> None:
    def trained(text: str) -> object:
        bound = bind(registry(), "defense", parse_reference(text))
        return _training_recipe(bound, bound.make()[0])

    assert trained("smoothing:votes=17,n=50,draws=4") == trained("smoothing")
    assert trained("smoothing:sigma=0.5") != trained("smoothing")


# --- the cell kind ----------------------------------------------------------------------------------

CHEAP = "smoothing:sigma=0.25,votes=20,n0=20,n=100,draws=4"
PGD = ("-a", "pgd:steps=2", "-n", "10", *QUICK)


@pytest.fixture
def here(tmp_path: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)


@pytest.mark.usefixtures("here")
def test_certificates_are_planned_proven_reported_and_resumed(monkeypatch: pytest.MonkeyPatch) -> None:
    import jsonschema

    asked = ("-m", CNN, "-d", CHEAP, *PGD, "-e", "l2:0.1", "-e", "8/255")
    planned = run("eval", "--dataset", TINY, "-o", "out", *asked, "--dry-run", "--json").json
    (due,) = planned["certificates"]
    assert (due["norm"], due["radii"], due["images"], due["state"]) == ("l2", ["1/10"], 10, "to do")

    result = evaluate(*asked)
    jsonschema.validate(result, run("schema").json)
    (made,) = result["certificates"]
    assert made["key"] == due["key"]
    assert made["status"] == "ok"
    assert made["passes"] == {"forward": 10 * 120, "backward": 0, "model": 10 * 120}
    assert made["failure_probability"] == 0.001
    assert made["abstention_rate"]["n"] == made["clean_accuracy"]["n"] == 10
    assert made["provenance"]["images"]["n"] == 10
    (at,) = made["certified_accuracy"]
    threats = {(t["defense"], t["norm"]): t for t in result["threats"]}
    assert at["radius"] == "1/10"
    assert at["worst_case_accuracy"] == threats[CHEAP, "l2"]["worst_case_accuracy"]
    assert at["certified_accuracy"]["value"] <= made["clean_accuracy"]["value"]
    assert "it covers changes in l2, none in linf" in made["notes"]
    assert {c["draws"] for c in result["cells"] if c["defense"] == "none"} == {1}
    defended = [c for c in result["cells"] if c["defense"] != "none"]
    assert {c["draws"] for c in defended} == {4}
    assert all(c["metrics"]["robust_accuracy"]["spread"] is not None for c in defended)

    # Proven once: another radius is read off what is stored, and the same command changes nothing.
    before = stored("out")[made["key"]]
    monkeypatch.setattr(work, "prove", lambda *_: pytest.fail("proven again"))
    again = evaluate(*asked, "-e", "l2:0.2")
    assert [a["radius"] for a in again["certificates"][0]["certified_accuracy"]] == ["1/10", "1/5"]
    assert stored("out")[made["key"]] == before
    shown = run("eval", "--dataset", TINY, "-o", "out", *asked).out
    assert "Certificates (dataset" in shown
    assert "1,200 passes of an image through the model" in shown
    assert "4 decisions of each image" in shown
    planned = run("eval", "--dataset", TINY, "-o", "out", *asked, "--dry-run", "--json").json
    assert planned["certificates"][0]["state"] == "done"
    compared = run("compare", "out", "out", "--json")
    assert compared.code == 0, compared.err


@pytest.mark.usefixtures("here")
def test_other_norms_get_no_certificate_and_a_failed_one_is_tried_again(monkeypatch: pytest.MonkeyPatch) -> None:
    asked = ("-m", CNN, "-d", CHEAP, *PGD, "--no-baseline")
    real, failure = work.prove, work.CellFailure("no luck")

    def unlucky(*_: Any) -> Any:
        raise failure

    monkeypatch.setattr(work, "prove", unlucky)
    ran = run("eval", "--dataset", TINY, "-o", "out", *asked, "--json")
    assert ran.code == 3
    assert "1 of 2 cells failed: no luck" in ran.err
    assert [(c["status"], c["reason"]) for c in ran.json["certificates"]] == [("failed", "no luck")]
    monkeypatch.setattr(work, "prove", real)
    (made,) = evaluate(*asked)["certificates"]
    assert made["norm"] == "l2"
    assert [a["radius"] for a in made["certified_accuracy"]] == ["1/8", "1/4", "3/8", "1/2"]
    assert [a["worst_case_accuracy"] for a in made["certified_accuracy"]] == [None] * 4
    (refused,) = evaluate(*asked, "-e", "1/100")["certificates"]
    assert (refused["status"], refused["reason"]) == (
        "refused",
        "it covers changes in l2, none in linf; add budgets, like -e l2:0.5",
    )


@pytest.mark.usefixtures("here")
def test_what_cannot_be_certified_is_refused_with_what_works() -> None:
    module, x, y = two_classes(8)
    defenses = ["smoothing", "smoothing:train=no,votes=11,n0=2,n=5,draws=2"]
    result = advplug.evaluate(module, "fgsm", defenses, dataset=(x, y), audit="none", classes=2)
    first, second = result.certificates
    assert first.status == "refused"
    assert str(first.reason).endswith("use a model by name without weights, or smoothing:train=no")
    assert second.status == "ok"
    stack = run("eval", "--dataset", TINY, "-m", CNN, "-d", "smoothing+dropout", *PGD, "--no-baseline", "-o", "b")
    assert stack.code == 2
    assert "smoothing certifies only what is inside it, and dropout is not; write smoothing last" in stack.err


@pytest.mark.usefixtures("here")
def test_a_transfer_matrix_certifies_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(work, "prove", lambda *_: pytest.fail("proven"))
    models = ("-m", CNN, "-m", f"{CNN}+{CHEAP}")
    ran = run("transfer", "--dataset", TINY, *models, "--attack", "pgd:steps=2", "-n", "6", "-o", "t", "--json")
    assert ran.code == 0, ran.err
    assert ran.json["certificates"] == []


def test_a_module_of_the_users_own_is_smoothed_and_certified() -> None:
    module, x, y = two_classes(24)
    result = advplug.evaluate(
        module,
        "pgd:steps=3",
        "smoothing:sigma=0.1,train=no,votes=30,n0=20,n=200,draws=4",
        dataset=(x, y),
        eps="l2:0.1",
        audit="none",
        classes=2,
    )
    (made,) = result.certificates
    truth = distance(module, x)
    (at,) = made.certified_accuracy
    assert at.certified_accuracy is not None
    assert at.worst_case_accuracy is not None
    assert at.certified_accuracy.value <= float((truth >= 0.1).double().mean())
    # An image that the attack brings to within 0.03 of the boundary is decided by few of 30 votes.
    assert float((truth >= 0.13).double().mean()) <= at.worst_case_accuracy.value + 1e-9
    assert made.average_radius is not None
    assert 0 < made.average_radius <= float(truth.mean())
    assert not [f for t in result.threats for f in t.flags if f.name == "below-certified"]


# --- a certificate that is wrong, and its repaired twin ----------------------------------------------


def two_classes(n: int) -> tuple[Affine, Tensor, Tensor]:
    """A float32 linear model that is right on all images, at L2 distances of 0.05 to 0.4."""
    draws = torch.Generator().manual_seed(1)
    normal = torch.randn(48, generator=draws)
    normal /= normal.norm()
    y = torch.arange(n) % 2
    side = torch.where(y == 0, 1.0, -1.0) * torch.linspace(0.05, 0.4, n)
    x = 0.5 + 0.05 * torch.randn(n, 48, generator=draws)
    x = x + (side - (x - 0.5) @ normal)[:, None] * normal
    weight = 5 * torch.stack([normal, -normal])
    return Affine(weight, -weight.sum(1) / 2), x.clamp(0, 1).view(n, 3, 4, 4), y


def distance(module: Affine, x: Tensor) -> Tensor:
    logits = module(x).detach()
    return (logits[:, 0] - logits[:, 1]).abs() / (module.weight[0] - module.weight[1]).detach().norm()


class Plugin:
    @staticmethod
    @advplug.hookimpl
    def advplug_defenses():
        caps = contracts.DefenseCaps(("wrap",), certifies="l2")
        return [contracts.Spec(n, f"{__name__}:{n}", caps, n) for n in ("boasting", "honest")]


class _Point:
    @staticmethod
    def load() -> type:
        return Plugin


def _claims(factor: float):
    def certify(inner, image, rng, size):
        module, _, _ = two_classes(2)
        label = int(inner(image[None]).argmax())
        return contracts.Certified(label, factor * float(distance(module, image[None])))

    return (contracts.Wrap(lambda f, x, rng: f(x), certifier=contracts.Certifier("l2", certify)),)


def boasting():
    return _claims(2.0)


def honest():
    return _claims(0.999)


@pytest.mark.parametrize(("defense", "flagged"), [("boasting", True), ("honest", False)])
def test_attacks_below_a_certificate_are_an_error(defense: str, flagged: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    known = load([(Source("proud", "proud", "1"), _Point)])
    assert not known.broken
    monkeypatch.setattr(session, "registry", lambda: known)
    module, x, y = two_classes(40)
    result = advplug.evaluate(
        module,
        ["pgd:steps=20", "pgd:steps=20,eps=l2:0.2"],
        defense,
        dataset=(x, y),
        eps="8/255",
        audit="none",
        classes=2,
    )
    flags = {t.norm: {f.name for f in t.flags} for t in result.threats if t.defense == defense}
    assert ("below-certified" in flags["l2"]) is flagged
    assert "below-certified" not in flags["linf"]
    row = next(t for t in result.threats if t.defense == defense and t.norm == "l2")
    assert (row.verdict == "not trustworthy") is flagged
    (made,) = result.certificates
    (at,) = made.certified_accuracy
    assert at.certified_accuracy is not None
    assert at.worst_case_accuracy is not None
    assert (at.certified_accuracy.value > at.worst_case_accuracy.value) is flagged
    assert made.failure_probability == 0.0


def test_wrong_proofs_count_only_beyond_what_chance_explains() -> None:
    from advplug.evidence import Evidence
    from advplug.health import Finding, Group
    from advplug.health.proofs import below_certified

    def state(wrong: int, error: float, abstained: int = 0) -> str:
        n = 500
        rows = np.arange(n)[:, None]
        clean = np.broadcast_to(rows >= abstained, (n, 10)).copy()
        success = np.broadcast_to((rows >= abstained) & (rows < abstained + wrong), (n, 10)).copy()
        evidence = Evidence(np.arange(n), np.zeros(n), clean, clean.any(1), success, rejected=~clean)
        finding = Finding("pgd", contracts.Strength.STRONG, True, evidence)
        return below_certified(Group([finding], certified=np.ones(n, dtype=bool), proof_error=error)).state

    assert [state(k, 0.001) for k in (0, 3, 4, 50)] == ["passed", "passed", "tripped", "tripped"]
    assert [state(k, 0.0) for k in (0, 1)] == ["passed", "tripped"]
    assert state(0, 0.001, abstained=100) == "passed"
    assert below_certified(Group([])).state == "inapplicable"
