"""Prompt templates: which sentences a class is put into, and how several of them make one column."""

from __future__ import annotations

import pytest
import torch
from torch.nn import functional

from advplug.errors import UsageError
from advplug_clip import models, prompts, tiny
from advplug_clip.captions import DIGITS, PROMPTS
from advplug_clip.scorer import ClipScorer


def test_digits_are_named_as_in_the_captions() -> None:
    made = prompts.prompts(None, DIGITS)
    assert len(made) == 10
    assert made[7] == tuple(p.format("seven") for p in PROMPTS)
    assert "a picture of an eight" in made[8]
    assert "a picture of a one" in made[1]
    assert made == prompts.prompts("digits", DIGITS)
    assert prompts.prompts(None, "0123456789")[7][3] == "the digit 7"


def test_other_classes_get_the_simple_sentence_with_spaces_for_underscores() -> None:
    assert prompts.prompts(None, ["aquarium_fish", "bear"]) == (
        ("a photo of a aquarium fish.",),
        ("a photo of a bear.",),
    )


def test_openai_has_the_eighty_templates() -> None:
    (made,) = prompts.prompts("openai", ["pickup_truck"])
    assert len(made) == len(set(made)) == 80
    assert {"a bad photo of a pickup truck.", "itap of a pickup truck.", "a tattoo of the pickup truck."} <= set(made)


def test_class_captions_are_several_and_among_them_are_the_default_prompts() -> None:
    made = prompts.class_captions(["pickup_truck", "bear"])
    assert made[0][0] == "a photo of a pickup truck."
    assert len(set(made[0])) == len(prompts.NAMING)
    assert all("bear" in text for text in made[1])
    assert prompts.class_captions(DIGITS) == prompts.prompts(None, DIGITS)


def test_a_text_of_ones_own() -> None:
    assert prompts.prompts("{}, {curly}", ["cat"]) == (("cat, {curly}",),)


@pytest.mark.parametrize(
    ("templates", "says"),
    [
        ("digit", "did you mean 'digits'?"),
        ("a cat", "has no {} for the class; write digits, simple, openai or a sentence such as 'a photo of a {}'"),
        ("{} and {}", "has {} more than once"),
    ],
)
def test_bad_templates(templates: str, says: str) -> None:
    with pytest.raises(UsageError) as error:
        prompts.check(templates)
    assert says in str(error.value)


def test_several_prompts_of_a_class_make_one_column() -> None:
    """Radford et al. 2021, section 3.1.4: the mean of unit features, scaled to unit length."""
    groups = prompts.prompts("digits", DIGITS[:3])
    torch.manual_seed(0)
    scorer = tiny.scorer("transformer", groups, 20, 64).eval()
    with torch.no_grad():
        for column, sentences in zip(scorer.columns, groups, strict=True):
            unit = functional.normalize(scorer.clip.encode_text(scorer.tokens(sentences)), dim=-1)
            torch.testing.assert_close(column, functional.normalize(unit.mean(0), dim=0))
    assert isinstance(scorer, ClipScorer)
    assert scorer.notes == ()


def test_classes_of_cifar100_are_named_without_underscores() -> None:
    from advplug.builtin.datasets import cifar100

    groups = models.open_clip("ViT-B-32@openai", templates="openai").texts.groups(cifar100().info())
    assert len(groups) == 100
    assert {len(own) for own in groups} == {80}
    assert any("a photo of the large pickup truck." in own for own in groups)
    assert not any("_" in text for own in groups for text in own)
