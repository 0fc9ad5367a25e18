"""The conformance kit for plugin authors: a test calls `check_attack("mine")`, and learns what the contract asks.

    from advplug.testing import check_attack

    def test_it():
        check_attack("sign-noise", scale=0.5)

Each `check_*` function takes the registered name and the parameters to use, returns one `Result` a check
and raises AssertionError that names every breach. `advplug plugin check NAME` runs all of them over a plugin.
"""

from __future__ import annotations

from typing import Any

from advplug.testing.report import Result, demand

__all__ = [
    "Result",
    "check_attack",
    "check_dataset",
    "check_defense",
    "check_metric",
    "check_model",
    "check_plugin",
    "check_tracker",
]


def check_attack(name: str, /, **params: Any) -> list[Result]:
    """An evasion attack, on linear victims whose exact robust radius is known, in every norm it declares.

    No image may flip within its exact radius; gradient attacks that iterate have to flip every image at
    1.25 times the radius; images stay in the ball and in [0, 1]; the same seed gives the same images; eps = 0
    gives the input; nothing of the victim or of the process is left changed. Raises AssertionError.
    """
    from advplug.testing.attacks import attack_results

    return demand(f"attack '{name}'", attack_results(name, params))


def check_defense(name: str, /, *, on: str = "cnn", clean_drop: float = 0.1, **params: Any) -> list[Result]:
    """A defense: each of its stages, and that it declares truly how gradients and randomness pass it.

    Tunes are tried on the model `on`; a wrap may cost at most `clean_drop` of the clean accuracy of a linear
    classifier of handwritten digits. Raises AssertionError.
    """
    from advplug.testing.defenses import defense_results

    return demand(f"defense '{name}'", defense_results(name, params, on, clean_drop))


def check_model(name: str, /, *, on: str = "digits", **params: Any) -> list[Result]:
    """A model, built for the dataset `on`: logits, gradients, reproducible, restorable. Raises AssertionError."""
    from advplug.testing.sources import model_results

    return demand(f"model '{name}'", model_results(name, params, on))


def check_dataset(name: str, /, **params: Any) -> list[Result]:
    """A dataset: its facts agree with its pixels, and both are the same each time. Raises AssertionError."""
    from advplug.testing.sources import dataset_results

    return demand(f"dataset '{name}'", dataset_results(name, params))


def check_metric(name: str, **params: Any) -> list[Result]:
    """A metric, on evidence of several kinds: the declared values, in any order of images. Raises AssertionError."""
    from advplug.testing.metrics import metric_results

    return demand(f"metric '{name}'", metric_results(name, params))


def check_tracker(name: str, /, **params: Any) -> list[Result]:
    """A tracker, on results of every kind: it takes them, changes nothing, and says where they are in one line.

    What it keeps stays where `params` have it kept, so let these name a place for tests. Raises AssertionError.
    """
    from advplug.testing.trackers import tracker_results

    return demand(f"tracker '{name}'", tracker_results(name, params))


def check_plugin(name: str) -> list[Result]:
    """Everything that the plugin of this entry-point or distribution name registers, with default parameters.

    `ok` is None for what could not be checked, with the reason. Raises UsageError if no such plugin is installed.
    """
    from advplug.testing.plugins import plugin_results

    return plugin_results(name)
