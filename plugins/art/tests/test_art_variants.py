"""Closed forms, agreement with the core's own attacks, and the faults of ART that are worked around."""

from __future__ import annotations

import os
import subprocess
import sys
import warnings
from fractions import Fraction
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from advplug.contracts import Access, Ball, Batch, Crafted, Gradient, MinimumNorm, Threat, Untargeted, Wrap
from advplug.errors import CellFailure, UsageError
from advplug.perturbations import Patch, Unrestricted
from advplug.registry import registry
from advplug.rng import Stream
from advplug.testing.problems import LinearProblem, linear_problem
from advplug.testing.sources import bound
from advplug.victim import Victim
from advplug.wrapping import AsModule
from advplug_art import attacks, variants
from advplug_art.attack_table import ROWS
from advplug_art.estimators import Handle, classifier
from advplug_art.rows import Setting


def run(name: str, problem: LinearProblem, threat: Threat, victim: Victim | None = None, **params: Any) -> Crafted:
    entry = registry().get("attack", name)
    attack = entry.make(bound(entry, params))
    made: Crafted = attack(victim or problem.victim(), problem.copy(), threat, Stream(0, "attack"))
    return made


# --- agreement ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("norm", ["linf", "l2"])
def test_fgm_is_the_cores_fgsm(norm: str) -> None:
    problem = linear_problem(norm)
    ours = run("fgsm", problem, problem.threat()).x
    theirs = run("art.fgm", problem, problem.threat()).x
    torch.testing.assert_close(theirs, ours, rtol=0, atol=1e-7)


def test_bim_ends_where_the_cores_does() -> None:
    problem = linear_problem("linf")
    ours = run("ifgsm", problem, problem.threat(), keep_going="true").x
    theirs = run("art.bim", problem, problem.threat()).x
    torch.testing.assert_close(theirs, ours, rtol=0, atol=1e-6)


@pytest.mark.parametrize("candidates", [4, 10])
def test_deepfool_goes_just_beyond_the_boundary(candidates: int) -> None:
    problem = linear_problem("l2")
    made = run("art.deepfool", problem, Threat(MinimumNorm("l2", problem.eps)), candidates=str(candidates))
    size = (made.x - problem.batch.x).flatten(1).norm(dim=1)
    # Labels have one near class, so that the first linearisation is exact.
    torch.testing.assert_close(size, 1.02 * problem.radius.float(), rtol=1e-3, atol=0)
    assert (problem.victim().decide(made.x).label != problem.batch.y).all()


@pytest.mark.parametrize("name", ["art.acg", "art.reacg", "art.apgd"])
def test_adaptive_steps_reach_the_corner_of_the_ball(name: str) -> None:
    problem = linear_problem("linf")
    made = run(name, problem, problem.threat(), steps="20")
    near = (problem.batch.y + 1) % problem.classes
    weight = problem.module.weight.detach()
    best = problem.batch.x + float(problem.eps) * (weight[near] - weight[problem.batch.y]).sign().view_as(made.x)
    reachable = problem.radius < float(problem.eps)
    flipped = problem.victim().decide(made.x).label != problem.batch.y
    assert torch.equal(flipped, reachable)
    assert float((made.x - best)[reachable].abs().mean()) < 0.1 * float(problem.eps)


def test_the_loss_of_an_image_does_not_depend_on_the_others() -> None:
    problem = linear_problem("linf")
    module = AsModule(problem.victim(), Access.GRADIENT)
    art = classifier(Handle(module), tuple(problem.batch.x.shape[1:]), problem.classes)
    x, y = problem.batch.x.numpy(), attacks.labels(problem.batch, problem.classes, targeted=False)
    np.testing.assert_allclose(art.loss_gradient(x, y)[:2], art.loss_gradient(x[:2], y[:2]), rtol=1e-5)


# --- ART's arguments ---------------------------------------------------------------------------------


@pytest.mark.parametrize("name", [row.name for row in ROWS.values() if row.name != "brendel-bethge"])
def test_every_argument_is_known_to_its_maker(name: str) -> None:
    import inspect

    row = ROWS[name]
    if row.needs and not pytest.importorskip(row.needs):
        return
    entry = registry().get("attack", f"art.{name}")
    setting = Setting(bound(entry, {}), row.norms[0], 0.1, (3, 8, 8), 5, 16, "untargeted" not in row.goals)
    signature = inspect.signature(attacks.load(row.maker))
    signature.bind(None, **row.keywords(setting))


def test_steps_are_shares_of_eps() -> None:
    def keywords(name: str, **params: str) -> dict[str, Any]:
        values = bound(registry().get("attack", f"art.{name}"), params)
        return ROWS[name].keywords(Setting(values, "linf", 0.04, (3, 8, 8), 5, 16, False))

    assert keywords("pgd")["eps_step"] == pytest.approx(0.04 * 2.5 / 20)
    assert keywords("pgd", alpha="2/255")["eps_step"] == pytest.approx(2 / 255)
    assert keywords("mim")["eps_step"] == pytest.approx(0.04 / 10)
    assert keywords("apgd")["eps_step"] == pytest.approx(0.08)
    assert keywords("pgd")["num_random_init"] == 1


# --- faults that are worked around -------------------------------------------------------------------


def test_windows_are_those_of_art() -> None:
    from art.attacks.evasion import Wasserstein

    x = np.random.default_rng(0).random((2, 3, 5, 4))
    np.testing.assert_array_equal(variants.windows(x, 3, 1), Wasserstein._unfold(x, 3, 1))


def test_cosines_are_orthonormal_and_low() -> None:
    basis = variants.cosines(3, 8, 6)
    assert basis.shape == (48, 9)
    np.testing.assert_allclose(basis.T @ basis, np.eye(9), atol=1e-6)
    np.testing.assert_allclose(basis[:, 0], 48**-0.5, rtol=1e-6)
    assert variants.cosines(10, 4, 4).shape == (16, 16)


def test_geoda_leaves_no_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    problem = linear_problem("l2")
    run("art.geoda", problem, Threat(MinimumNorm("l2", problem.eps)), queries="50")
    assert not list(tmp_path.iterdir())


def test_guides_are_of_another_class_or_of_the_target() -> None:
    answers = np.array([0, 0, 1, 2])
    assert variants.find_guides(answers, np.array([0, 0, 1, 2]), targeted=False).tolist() == [2, 2, 3, 0]
    assert variants.find_guides(answers, np.array([2, 1, 0, 3]), targeted=True).tolist() == [3, 2, 0, -1]


def test_spatial_shifts_go_up_and_down() -> None:
    # ART takes the channels for the height of images (C, H, W) and then never shifts them up or down.
    class Brightest(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            rows = x.mean((1, 3))
            return torch.stack([rows[:, :5].amax(1), rows[:, 5:].amax(1), 0 * rows[:, 0]], 1)

    x = torch.zeros(1, 1, 10, 10)
    x[:, :, 4] = 1
    batch = Batch(x, torch.tensor([0]), torch.tensor([0]))
    victim = Victim(Brightest(), 3)
    entry = registry().get("attack", "art.spatial")
    made = entry.make(bound(entry, {"max_rotation": "0", "num_rotations": "1", "max_translation": "10"}))(
        victim, batch, Threat(Unrestricted()), Stream(0, "attack")
    )
    assert victim.decide(made.x).label.item() == 1


def test_a_patch_is_one_square_at_its_place() -> None:
    problem = linear_problem("linf")
    made = run("art.adversarial-patch", problem, Threat(Patch(Fraction(1, 3))), steps="5", place="corner")
    changed = (made.x != problem.batch.x).any(1).any(0)
    assert changed[:3, :3].any()
    assert not changed[3:].any()
    assert not changed[:, 3:].any()


def test_threshold_stays_in_a_ball_finer_than_its_grid() -> None:
    problem = linear_problem("linf")
    one = problem.copy(torch.arange(1))

    class Touchy(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            change = (x - one.x).abs().flatten(1).sum(1)
            return torch.stack([torch.full_like(change, 0.01), change, 0 * change], 1)

    ball = Ball("linf", Fraction(3, 1000))
    entry = registry().get("attack", "art.threshold")
    attack = entry.make(bound(entry, {"queries": "500"}))
    made = attack(Victim(Touchy(), 3), one, Threat(ball), Stream(0, "attack"))
    assert ball.check(one.x, made.x).all()
    assert (made.x != one.x).any()


def test_starts_depend_on_the_seed_alone() -> None:
    class Never:
        def predict(self, x: Any) -> Any:
            return np.array([[1.0, 0.0]])

    x, y = np.zeros((1, 1, 4, 4), np.float32), np.array([[1.0, 0.0]])
    assert variants.random_start(Never(), x, y) is None
    starts = []
    for _ in range(2):
        with Stream(3, "start").as_global():
            starts.append(variants.random_start(Never(), x, y[:, ::-1]))
    np.testing.assert_array_equal(starts[0], starts[1])


# --- the user's model and process --------------------------------------------------------------------


def test_no_hook_stays_and_layers_are_named() -> None:
    problem = linear_problem("linf")
    net = nn.Sequential(nn.Flatten(), nn.Linear(192, 8), nn.ReLU(), nn.Linear(8, 5)).eval()
    victim = Victim(net, 5)
    run("art.feature-adversaries", problem, problem.threat(), victim, layer="1", steps="2")
    assert not any(m._forward_hooks for m in net.modules())
    with pytest.raises(UsageError, match=r"no layer 'head'; it has 0, 1, 2, 3"):
        run("art.feature-adversaries", problem, problem.threat(), victim, layer="head", steps="2")


def test_the_model_may_warn_and_art_may_not() -> None:
    problem = linear_problem("linf")

    class Warns(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            warnings.warn("mine", UserWarning, stacklevel=1)
            return problem.module(x)

    with pytest.warns(UserWarning, match="mine"):
        run("art.fgm", problem, problem.threat(), Victim(Warns(), problem.classes))


def test_a_wrap_is_attacked_through_its_stand_in() -> None:
    problem = linear_problem("linf")

    def rounded(inner: Any, x: Tensor, rng: Any) -> Tensor:
        answer: Tensor = inner((x * 255).round() / 255)
        return answer

    wrap = Wrap(rounded, Gradient.BPDA, (lambda inner, x, rng: inner(x),))
    victim = Victim(problem.module, problem.classes, (wrap,))
    made = run("art.bim", problem, problem.threat(), victim)
    assert (victim.decide(made.x).label != problem.batch.y).any()
    assert victim.passes.backward > 0


def test_what_is_missing_is_said(monkeypatch: pytest.MonkeyPatch) -> None:
    problem = linear_problem("l2")
    monkeypatch.setattr(attacks, "find_spec", lambda name: None)
    with pytest.raises(CellFailure, match=r"needs the package numba: pip install 'advplug-art\[brendel-bethge\]'"):
        run("art.brendel-bethge", problem, Threat(MinimumNorm("l2", problem.eps)))
    two = linear_problem("linf", classes=2)
    with pytest.raises(UsageError, match="loss=dlr needs at least 3 classes"):
        run("art.apgd", two, two.threat(), loss="dlr")
    with pytest.raises(UsageError, match="has none"):
        run("art.targeted-universal", problem, Threat(Ball("l2", problem.eps), Untargeted()))
    with pytest.raises(UsageError, match="kernel_size must be odd"):
        run("art.wasserstein", problem, Threat(Unrestricted()), kernel_size="4")


def test_the_readme_names_every_attack() -> None:
    text = (Path(__file__).parent.parent / "README.md").read_text()
    rows = {line.split("`")[1]: line for line in text.splitlines() if line.startswith("| `art.")}
    assert {f"art.{name}" for name in ROWS} <= set(rows)
    for name, row in ROWS.items():
        assert f"| {', '.join(row.norms)} | {row.access} |" in rows[f"art.{name}"]


def test_listing_imports_neither_torch_nor_art() -> None:
    code = "import sys, advplug_art; advplug_art.advplug_attacks(); assert not {'torch', 'art'} & set(sys.modules)"
    subprocess.run([sys.executable, "-c", code], check=True)


@pytest.mark.slow
def test_the_command_line(tmp_path: Path) -> None:
    code = "import sys; from advplug.cli import main; sys.exit(main())"
    command = [sys.executable, "-c", code, "eval", "-m", "cnn", "-a", "art.pgd", "-a", "art.hopskipjump:queries=200",
               "--dataset", "digits", "-n", "16", "--audit", "none", "--json", "-o", str(tmp_path / "run")]  # fmt: skip
    environment = os.environ | {"ADVPLUG_CACHE": str(tmp_path)}
    done = subprocess.run(command, capture_output=True, text=True, check=False, env=environment)
    assert done.returncode == 0, done.stderr
    assert done.stdout.startswith("{")
