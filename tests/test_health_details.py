"""What each check says and what it leaves alone, on hand-made evidence."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest

from advplug.contracts import Strength
from advplug.estimate import Estimate
from advplug.health import CHECKS, Group, Outcome, examine, verdict
from advplug.health.facts import broken, inversion
from test_health import FAULTS, N, audit, bits, black_box, finding, group

PASSED, UNCHECKED, INAPPLICABLE = Outcome("passed"), Outcome("unchecked"), Outcome("inapplicable")

SAYS = {
    "zero-gradients": "attack had no gradient to follow on 50 of 100 attacked images: masked gradients",
    "nonfinite-gradients": "attack met NaN or infinite gradients on 1 of 100 images",
    "gradient-mismatch": "the gradient differs from finite differences of the logits on 4 of 32 images",
    "saturated-logits": "cross-entropy is exactly 0 on 11 % of the images and the margin loss beats the attacks: 10 of "
    "64 images against 0 (p = 0.00098)",
    "randomised-without-eot": "the same images get logits that lie 0.00011 apart, and nothing is declared random",
    "perturbation-violation": "attack: 1 images lay outside the budget, by up to 0.1; they were projected back",
    "lost-in-rounding": "attack: 16.0 points of its success vanish in 8 bits",
    "silent-success": "attack came across 2 successes that it did not return",
    "static-beats-adaptive": "static attack beats the adaptive attacks: 30 of 100 images against 0 (p = 9.3e-10)",
    "black-box-beats-white-box": "attack beats the gradient attacks: 7 of 100 images against 0 (p = 0.0078)",
    "near-chance": "clean accuracy 20.0 % (at least 13.3 %) is near chance; always answering the largest class gives "
    "10.0 %, and at least 28.0 % are asked for",
    "batch-dependent": "an image's logits depend on the rest of its batch: accuracy is not a property of it",
    "probabilities": "the model answers with probabilities, on which losses have hardly a gradient",
    "undeclared-normalisation": "the model is right more often on standardised pixels than on pixels in [0, 1]: 7 of "
    "64 images against 0 (p = 0.0078)",
    "one-step-beats-iterative": "one gradient step beats the iterative attacks: 30 of 64 images against 0 "
    "(p = 9.3e-10)",
    "noise-beats-attack": "random noise beats the attacks: 30 of 64 images against 0 (p = 9.3e-10)",
    "rises-with-budget": "half the budget breaks more than the full one: 15 of 64 images against 0 (p = 3.1e-05)",
    "unbounded-attack-fails": "8 of 64 images withstand changes up to 0.5, where at most 7 can",
    "not-converged": "40 steps break 3 of 14 images that are left, about 4.7 points of the accuracy",
    "defense-adds-nothing": "no difference to the undefended model is shown: +1.0 points [+0.0, +2.0]",
    "below-certified": "1 of 1 images that are proven right at this budget are broken; 0 wrong proofs are expected",
}


@pytest.mark.parametrize("name", CHECKS)
def test_what_is_said_of_a_fault(name):
    flags, _ = examine(FAULTS[name])
    assert [(f.name, f.level, f.detail) for f in flags] == [(name, CHECKS[name].level, SAYS[name])]


def run(name, of):
    return CHECKS[name].run(of)


def drawn(*counts, draws=2):
    """(N, draws) bits: the first counts[0] images in the first draw, and so on."""
    return np.stack([bits(count) for count in counts], axis=1) if len(counts) == draws else None


def long(n, **change):
    """A finding on `n` images instead of N, all right, none broken."""
    none = np.zeros(n, dtype=bool)
    facts = {"index": np.arange(n), "y": np.arange(n) % 10, "clean": ~none[:, None], "attacked": ~none,
             "adaptive": none[:, None], "rounded": None, "steps": np.full(n, 20), "any_iterate": none,
             "zero_gradient": none.astype(int), "nonfinite": none.astype(int)}  # fmt: skip
    return finding(**(facts | change))


# --- the comparison that most checks make ---


def test_an_inversion_is_significant_and_of_two_images_at_least():
    assert inversion(bits(7), bits(0), "x") == Outcome("tripped", "x: 7 of 100 images against 0 (p = 0.0078)")
    assert inversion(bits(6), bits(0), "x") == PASSED
    assert inversion(bits(40), bits(30), "x").detail == "x: 10 of 100 images against 0 (p = 0.00098)"
    weak, strong = bits(30) & ~bits(10), bits(10)
    assert inversion(weak, strong, "x") == PASSED, "20 against 10 happens by chance in one of twenty"
    assert inversion(bits(50) & ~bits(10), bits(10), "x").detail == "x: 40 of 100 images against 10 (p = 1.2e-05)"


def test_broken_is_by_majority_of_the_draws_and_by_any_attack():
    half, most = finding(adaptive=drawn(60, 30)), finding(adaptive=np.stack([bits(60), bits(60), bits(20)], 1))
    rows = np.arange(N)
    assert broken([half], rows).sum() == 30, "one of two is no majority"
    assert broken([most], rows).sum() == 60
    assert broken([half, finding(broken=40)], rows).sum() == 40
    assert broken([most], rows, slice(2, 3)).sum() == 20
    assert not broken([most], rows, slice(3, None)).any(), "by no draw nothing is broken"
    assert broken([half], np.array([59, 29, 3])).tolist() == [False, True, True]


# --- one attack: gradients and images ---


def test_gradients_are_asked_of_attacks_that_follow_them():
    for name in ("zero-gradients", "nonfinite-gradients"):
        assert run(name, group(black_box(10))) == INAPPLICABLE
        assert run(name, group(finding(zero_gradient=None, nonfinite=None))) == UNCHECKED
        assert run(name, group(finding(zero_gradient=None, nonfinite=None), finding())) == PASSED
    for name in ("gradient-mismatch", "saturated-logits", "rises-with-budget"):
        assert run(name, group(black_box(10), audit=None if name != "gradient-mismatch" else audit())) == INAPPLICABLE
        assert run(name, group(audit=None)) == UNCHECKED
    assert run("saturated-logits", group(black_box(10))) == INAPPLICABLE
    assert run("gradient-mismatch", group(audit=audit(mismatch=np.zeros(0)))) == UNCHECKED


def stuck(count, zero=10, n=300, **change):
    """The last `count` of the images have no gradient in `zero` of 20 steps."""
    return group(long(n, zero_gradient=np.where(np.arange(n) >= n - count, zero, 0), **change))


def test_vanishing_gradients_count_on_a_hundredth_of_the_images_left_in_half_of_the_steps():
    name = "zero-gradients"
    assert run(name, stuck(3)).detail.startswith("attack had no gradient to follow on 3 of 300 attacked images")
    assert run(name, stuck(2)) == PASSED
    assert run(name, stuck(300, zero=9)) == PASSED
    assert run(name, stuck(1, n=30)).state == "tripped", "one is enough of few"
    assert run(name, stuck(300, adaptive=np.ones((300, 1), dtype=bool))) == PASSED, "what is broken needs none"
    assert run(name, stuck(300, attacked=np.zeros(300, dtype=bool))) == PASSED
    assert run(name, stuck(300, zero=0, steps=np.zeros(300, dtype=int))) == PASSED
    mostly = np.arange(300)[:, None] < 290
    assert run(name, stuck(10, adaptive=mostly)).state == "tripped", "on the few that are left"
    lucky = np.broadcast_to(np.arange(2) == 0, (300, 2))
    assert run(name, stuck(3, adaptive=lucky)).state == "tripped", "broken in one of two draws is left"
    assert run(name, group(finding(), *stuck(3).findings)).state == "tripped", "of any attack"
    nothing = {"minimised": 1, "attacked": np.ones(300, dtype=bool), "adaptive": np.ones((300, 1), dtype=bool)}
    assert run(name, stuck(3, **nothing)).state == "tripped", "similarities have no success that ends the search"


def test_any_attack_is_looked_at():
    worse = finding(nonfinite=bits(3).astype(int), violations=2, worst_violation=0.25, any_iterate=bits(60),
                    rounded=bits(20)[:, None])  # fmt: skip
    for name, said in {
        "nonfinite-gradients": "attack met NaN or infinite gradients on 3 of 100 images",
        "perturbation-violation": "attack: 2 images lay outside the budget, by up to 0.25; they were projected back",
        "silent-success": "attack came across 10 successes that it did not return",
        "lost-in-rounding": "attack: 30.0 points of its success vanish in 8 bits",
    }.items():
        assert run(name, group(finding(), replace(worse, attack="attack"))).detail == said
        assert run(name, Group([])) == (UNCHECKED if name == "perturbation-violation" else INAPPLICABLE)


def test_successes_that_were_not_returned():
    name = "silent-success"
    assert run(name, group(long(300, any_iterate=np.arange(300) < 3))).state == "tripped"
    assert run(name, group(long(300, any_iterate=np.arange(300) < 2))) == PASSED, "under a hundredth"
    assert run(name, group(long(300, any_iterate=np.arange(300) < 9, attacked=np.arange(300) >= 8))) == PASSED
    assert run(name, group(finding(any_iterate=None))) == UNCHECKED
    assert run(name, group(black_box(10))) == INAPPLICABLE
    assert run(name, group(finding(any_iterate=bits(90), minimised=1))) == INAPPLICABLE
    twice = {"clean": np.ones((N, 2), dtype=bool), "adaptive": drawn(50, 50)}
    assert run(name, group(finding(any_iterate=bits(90), **twice))) == INAPPLICABLE, "by luck"


def test_rounding_may_lose_a_little_and_one_image():
    name = "lost-in-rounding"
    few = {"adaptive": np.ones((6, 1), dtype=bool)}
    assert run(name, group(long(6, rounded=np.arange(6)[:, None] >= 1, **few))) == PASSED, "a sixth, but one image"
    assert run(name, group(long(6, rounded=np.arange(6)[:, None] >= 2, **few))).state == "tripped"
    assert run(name, group(finding(rounded=bits(0)[:, None], found=np.zeros(N)))) == INAPPLICABLE
    assert run(name, group(finding(rounded=None))) == INAPPLICABLE


# --- other attacks on the same images ---


def test_transfer_is_held_against_all_adaptive_attacks_together():
    name = "static-beats-adaptive"

    def origins(**success):
        return finding(**{key: value[:, None] for key, value in success.items()})

    assert run(name, group(origins(static=bits(80)))) == INAPPLICABLE, "undefended"
    assert run(name, group(defended=True)) == UNCHECKED
    bare = run(name, group(origins(static=bits(50), bare=bits(80)), defended=True))
    assert bare.detail == "bare attack beats the adaptive attacks: 30 of 100 images against 0 (p = 9.3e-10)"
    assert run(name, group(origins(bare=bits(56)), defended=True)) == PASSED
    both = (origins(static=bits(80)), finding(broken=80, static=bits(0)[:, None]))
    assert run(name, group(*both, defended=True)) == PASSED
    assert run(name, group(origins(static=bits(3)), origins(static=bits(80)), defended=True)).state == "tripped"
    lucky = finding(adaptive=drawn(50, 50), clean=np.ones((N, 2), dtype=bool), static=drawn(100, 0))
    assert run(name, group(lucky, defended=True)) == PASSED, "one of two draws is no success"


def test_black_box_attacks_are_held_against_gradients():
    name = "black-box-beats-white-box"
    assert run(name, group(finding(strength=Strength.FLOOR))) == INAPPLICABLE
    noise = replace(black_box(90), strength=Strength.FLOOR)
    assert run(name, group(finding(), noise)) == UNCHECKED, "noise has a check of its own"
    assert run(name, group(finding(), replace(black_box(90), gradient=True))) == UNCHECKED
    for searches in ((1000, 9), (9, 1000)):
        both = [black_box(10, queries=count) for count in searches]
        assert run(name, group(finding(), *both)) == PASSED, "one of them asked enough"
    transfer = finding(broken=50, strength=Strength.ITERATIVE, gradient=False, queries=None)
    assert run(name, group(finding(), transfer)) == PASSED
    assert run(name, group(finding(broken=50, attacked=bits(50)))) == PASSED, "nothing is left for a search"
    assert run(name, group(audit=audit(black_box=bits(57, 64)))).detail == (
        "random search with 1000 questions beats the gradient attacks: 7 of 64 images against 0 (p = 0.0078)"
    )
    assert run(name, group(finding(broken=45), finding(broken=55), audit=audit(black_box=bits(60, 64)))) == PASSED


def test_what_is_left_to_the_search_of_a_cascade_is_a_share():
    name = "black-box-beats-white-box"

    def cascade(n, late, **change):
        won = np.arange(n) < late
        facts = {"adaptive": won[:, None], "black_box": won, "queries": np.where(won, 5000, 0)}
        return long(n, **(facts | change))

    assert run(name, group(cascade(100, 2))).detail == (
        "random search breaks 2 of 100 images that no gradient of attack broke"
    )
    assert run(name, group(cascade(400, 2))) == PASSED, "at least 0.14 % of the images"
    assert run(name, group(cascade(400, 3))).state == "tripped"
    assert run(name, group(cascade(400, 2, attacked=np.arange(400) < 100))).detail.startswith(
        "random search breaks 2 of 100 images"
    )
    assert run(name, group(cascade(N, 9), finding(broken=9))) == PASSED, "other gradients broke them"
    asked, hardly = cascade(N, 1), cascade(N, 1, queries=np.full(N, 9))
    assert run(name, group(asked, hardly)) == run(name, group(hardly, asked)) == PASSED
    assert run(name, group(hardly)) == UNCHECKED
    assert run(name, group(cascade(N, 1), replace(cascade(N, 9), attack="b"))).detail.endswith("of b broke")


def test_one_step_is_looked_up_among_the_attacks_where_no_audit_tried_it():
    name = "one-step-beats-iterative"
    step = finding(broken=57, strength=Strength.ONE_STEP)
    said = "one gradient step beats the iterative attacks: 7 of 100 images against 0 (p = 0.0078)"
    for without in (None, audit(one_step=None)):
        assert run(name, group(finding(), step, audit=without)).detail == said
        assert run(name, group(finding(), finding(broken=56, strength=Strength.ONE_STEP), audit=without)) == PASSED
        assert run(name, group(finding(), replace(step, gradient=False), audit=without)) == UNCHECKED
        assert run(name, group(audit=without)) == UNCHECKED
    assert run(name, group(step)) == UNCHECKED
    assert run(name, group(black_box(9))) == INAPPLICABLE


def test_noise_is_held_against_attacks_and_not_against_noise():
    name, floor = "noise-beats-attack", finding(broken=90, strength=Strength.FLOOR)
    assert run(name, group(floor)) == INAPPLICABLE
    found = group(finding(broken=10), floor, audit=audit(noise=bits(17, 64)))
    assert run(name, found).detail == "random noise beats the attacks: 7 of 64 images against 0 (p = 0.0078)"
    assert run(name, group(audit=None)) == UNCHECKED
    assert run(name, group(finding(broken=10, strength=Strength.ONE_STEP), audit=audit(noise=bits(17, 64)))) == Outcome(
        "tripped", "random noise beats the attacks: 7 of 64 images against 0 (p = 0.0078)"
    )


def test_cold_runs_and_unbounded_ones():
    assert run("rises-with-budget", group(audit=audit(cold_half=None))) == UNCHECKED
    assert run("rises-with-budget", group(audit=audit(cold_full=None))) == UNCHECKED
    name = "unbounded-attack-fails"
    assert run(name, group(audit=None)) == UNCHECKED
    assert run(name, group(black_box(10), audit=None)) == INAPPLICABLE
    assert run(name, Group([], audit())) == INAPPLICABLE
    assert run(name, group(audit=None, targeted=True)) == INAPPLICABLE
    two = finding(y=np.arange(N) % 2)
    assert run(name, group(two, audit=audit(unbounded=bits(32, 64)))) == PASSED, "all of a class may withstand"
    assert run(name, group(two, audit=audit(unbounded=bits(31, 64)))).detail == (
        "33 of 64 images withstand changes up to 0.5, where at most 32 can"
    )


def test_more_steps_count_on_the_images_that_were_probed():
    name = "not-converged"
    rest = ~bits(50, 64)
    three = audit(longer=bits(53, 64) & rest)
    assert run(name, group(audit=three)).detail == SAYS[name]
    assert run(name, group(audit=replace(three, probed=bits(52, 64) & rest))).detail == (
        "40 steps break 2 of 2 images that are left, about 21.9 points of the accuracy"
    )
    assert run(name, group(audit=replace(three, longer=bits(51, 64) & rest, probed=bits(51, 64) & rest))) == PASSED
    for gone in ("probed", "longer"):
        assert run(name, group(audit=replace(three, **{gone: None}))) == UNCHECKED
    assert run(name, group(audit=None)) == UNCHECKED
    assert run(name, group(black_box(10))) == INAPPLICABLE


def test_more_steps_of_a_randomised_victim_are_held_against_other_draws():
    """What is picked for being unbroken is broken more often when it is asked again, without more steps, too."""
    name, twice = "not-converged", {"clean": np.ones((N, 2), dtype=bool)}

    def longer(first, second, by):
        left = ~bits(first, 64)
        seen = audit(probed=left, longer=bits(by, 64) & left)
        return run(name, group(finding(adaptive=drawn(first, second), **twice), audit=seen))

    assert longer(50, 50, 53).state == "tripped"
    assert longer(50, 53, 53) == PASSED, "the same again"
    assert longer(50, 56, 53) == PASSED
    assert longer(50, 53, 56).detail.startswith("40 steps break 3 of 14 images")
    assert longer(64, 50, 64) == PASSED, "nothing is left"


# --- the victim ---


def test_chance_is_the_share_of_the_largest_class_and_a_fifth_of_the_rest():
    name = "near-chance"
    assert run(name, Group([])) == UNCHECKED
    mostly = {"y": np.where(np.arange(N) < 60, 0, np.arange(N) % 10)}
    assert run(name, group(finding(clean=bits(70)[:, None], **mostly))).detail == (
        "clean accuracy 70.0 % (at least 60.4 %) is near chance; always answering the largest class gives 64.0 %, "
        "and at least 71.2 % are asked for"
    )
    # 64 % and a fifth of the rest are 71.2 %.
    assert run(name, group(finding(clean=bits(79)[:, None], **mostly))).state == "tripped"
    assert run(name, group(finding(clean=bits(81)[:, None], **mostly))) == PASSED
    half = np.stack([bits(100), bits(62)], 1)
    assert run(name, group(finding(clean=half, **mostly))) == PASSED, "81 of 100 over two draws"


def test_randomised_victims_are_averaged_over_by_their_attacks():
    name, random = "randomised-without-eot", audit(stochastic=True, spread=None)
    assert run(name, group(audit=random)).detail == (
        "attack follows the gradient of a single draw of a randomised victim"
    )
    assert run(name, group(audit=replace(random, draws=2))) == PASSED
    assert run(name, group(replace(finding(), draws=2), audit=random)) == PASSED
    assert run(name, group(replace(finding(), draws=2), finding(), audit=random)).state == "tripped"
    assert run(name, group(audit=replace(random, attacked_spread=1e-4))) == PASSED, "what draws is out of sight"
    assert run(name, group(audit=replace(random, attacked_spread=1.1e-4))).state == "tripped"
    assert run(name, group(audit=None)) == UNCHECKED
    assert run(name, group(audit=audit(spread=None))) == UNCHECKED


def test_saturation_is_a_tenth_of_the_images():
    name, sure = "saturated-logits", {"margin": bits(60, 64)}
    assert run(name, group(audit=audit(saturated=bits(6, 64), **sure))) == PASSED
    assert run(name, group(audit=audit(saturated=bits(7, 64), margin=None))) == UNCHECKED
    assert run(name, group(audit=audit(saturated=bits(1, 10), **sure))).state == "tripped", "a tenth is one"
    assert run(name, group(audit=audit(saturated=np.zeros(0, dtype=bool), **sure))) == PASSED


def test_what_a_defense_adds():
    name = "defense-adds-nothing"

    def of(value, low, high, **change):
        return run(name, group(defended=True, difference=Estimate(value, low, high, N), **change))

    assert run(name, group(defended=True)) == UNCHECKED
    assert of(0.5, None, 0.6) == of(0.5, 0.4, None) == UNCHECKED
    assert of(0.1, 0.001, 0.2) == PASSED
    assert of(-0.1, -0.2, 0.0).detail == "no difference to the undefended model is shown: -10.0 points [-20.0, +0.0]"
    assert of(-0.1, -0.2, -0.01).detail == "the defense lowers robust accuracy: -10.0 points [-20.0, -1.0]"
    assert run(name, group(difference=Estimate(-0.1, -0.2, -0.01, N))) == INAPPLICABLE


def test_proofs_are_held_against_every_origin():
    name, every = "below-certified", np.ones(N, dtype=bool)
    for origin in ("adaptive", "static", "bare"):
        success = {"adaptive": bits(0)[:, None], origin: bits(3)[:, None]}
        found = run(name, group(finding(**success), certified=every, proof_error=0.001))
        assert found.detail == (
            "3 of 100 images that are proven right at this budget are broken; 0.1 wrong proofs are expected"
        )
    # Of 100 proofs that are wrong once in a hundred, 4 are with probability 0.018, and 5 with 0.003.
    for wrong, state in ((4, "passed"), (5, "tripped")):
        assert run(name, group(finding(broken=wrong), certified=every, proof_error=0.01)).state == state
    assert run(name, Group([], certified=every)) == UNCHECKED
    assert run(name, group(certified=bits(0))) == PASSED, "no proof, nothing to break"
    assert run(name, group(finding(broken=50, attacked=~bits(50)), certified=bits(50))) == PASSED
    wrong = finding(broken=0, clean=~bits(10)[:, None], attacked=~bits(10))
    assert run(name, group(wrong, certified=every)).detail == (
        "certified accuracy is above what attacks leave: 10 of 100 images against 0 (p = 0.00098)"
    )
    silent = replace(wrong, evidence=replace(wrong.evidence, rejected=bits(10)[:, None]))
    assert run(name, group(silent, certified=every)) == PASSED, "what is not answered is no wrong answer"
    often = np.stack([bits(10), bits(0)], 1)
    assert run(name, group(replace(silent, evidence=replace(silent.evidence, rejected=often)), certified=every)) == (
        PASSED
    ), "nor is what is not answered in half of the draws"


# --- the verdict ---


def test_a_verdict_needs_all_of_it():
    sound = group()
    flags, unchecked = examine(sound)
    assert verdict(sound, flags, unchecked) == "trusted"
    assert verdict(replace(sound, complete=False), flags, unchecked) == "upper bound"
    assert verdict(sound, flags, (*unchecked, "near-chance")) == "upper bound"
    assert verdict(group(finding(), black_box(10)), flags, unchecked) == "trusted", "one strong attack is enough"
    warned, _ = examine(FAULTS["not-converged"])
    wrong, _ = examine(FAULTS["near-chance"])
    assert verdict(sound, (*warned, *wrong), ()) == "not trustworthy"


def test_of_one_attack_only_its_own_checks_are_made():
    """What needs the whole group is left to it."""
    everything = group(finding(violations=1), finding(broken=0), audit=None, batch_dependent=True)
    flags, unchecked = examine(everything, cell=True)
    assert ([f.name for f in flags], unchecked) == (["perturbation-violation"], ())
    assert "batch-dependent" in {f.name for f in examine(everything)[0]}
    bare = group(finding(zero_gradient=None, nonfinite=None, any_iterate=None), audit=None)
    assert set(examine(bare, cell=True)[1]) == {"zero-gradients", "nonfinite-gradients", "silent-success"}
