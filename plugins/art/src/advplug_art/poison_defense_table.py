"""Defenses of ART against poisons. Imports no torch and no ART."""

from __future__ import annotations

from advplug.contracts import DefenseCaps, Spec

_DATA = DefenseCaps(("data",), needs_data=True)

POISON_DEFENSES: list[Spec] = [
    Spec(
        "art.activation-clustering",
        "advplug_art.poison_defenses:activation_clustering",
        _DATA,
        "Leaves out one of two clusters of a class's features",
        "Chen et al. 2018, arXiv 1811.03728",
    ),
    Spec(
        "art.spectral-signatures",
        "advplug_art.poison_defenses:spectral_signatures",
        _DATA,
        "Leaves out the images of each class that lie furthest out",
        "Tran et al. 2018, arXiv 1811.00636",
    ),
    Spec(
        "art.neural-cleanse",
        "advplug_art.poison_defenses:neural_cleanse",
        DefenseCaps(("tune",), needs_data=True),
        "Finds the trigger of a backdoor again, and unlearns it or prunes the neurons that fire for it",
        "Wang et al. 2019, doi 10.1109/SP.2019.00031",
    ),
]
