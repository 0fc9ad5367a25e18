"""What the parts of advplug say to each other: frozen values and small protocols.

Torch appears in annotations only, so that plugins can be listed without importing it.
Images are float32 tensors (B, C, H, W) in [0, 1]; labels are int64 (B,); budgets are in pixel units.
"""

from advplug.contracts.attacks import (
    Batch,
    Crafted,
    Decision,
    EvasionAttack,
    Trace,
)
from advplug.contracts.defenses import (
    Calibrated,
    Certified,
    Certifier,
    Defense,
    Fit,
    Gradient,
    Objective,
    Sift,
    Sifted,
    Stage,
    TrainingData,
    Tune,
    Tuned,
    Wrap,
)
from advplug.contracts.poisons import (
    PoisonAttack,
    Poisoned,
    Targets,
    Trigger,
)
from advplug.contracts.sources import (
    DatasetInfo,
    DatasetSource,
    ModelSource,
    Schedule,
    TextScorer,
)
from advplug.contracts.specs import (
    AttackCaps,
    Caps,
    DatasetCaps,
    DefenseCaps,
    Metric,
    MetricCaps,
    ModelCaps,
    PoisonCaps,
    Spec,
    TrackerCaps,
)
from advplug.contracts.threats import (
    Access,
    Goal,
    Minimise,
    Norm,
    Strength,
    Targeted,
    Threat,
    Untargeted,
)
from advplug.contracts.trackers import (
    Tracker,
)
from advplug.params import (
    Param,
    ParamSpec,
)
from advplug.parse import (
    Reference,
    Stack,
    VictimRef,
)
from advplug.perturbations import (
    Ball,
    MinimumNorm,
    Perturbation,
)

__all__ = [
    "Access",
    "AttackCaps",
    "Ball",
    "Batch",
    "Calibrated",
    "Caps",
    "Certified",
    "Certifier",
    "Crafted",
    "DatasetCaps",
    "DatasetInfo",
    "DatasetSource",
    "Decision",
    "Defense",
    "DefenseCaps",
    "EvasionAttack",
    "Fit",
    "Goal",
    "Gradient",
    "Metric",
    "MetricCaps",
    "Minimise",
    "MinimumNorm",
    "ModelCaps",
    "ModelSource",
    "Norm",
    "Objective",
    "Param",
    "ParamSpec",
    "Perturbation",
    "PoisonAttack",
    "PoisonCaps",
    "Poisoned",
    "Reference",
    "Schedule",
    "Sift",
    "Sifted",
    "Spec",
    "Stack",
    "Stage",
    "Strength",
    "Targeted",
    "Targets",
    "TextScorer",
    "Threat",
    "Trace",
    "Tracker",
    "TrackerCaps",
    "TrainingData",
    "Trigger",
    "Tune",
    "Tuned",
    "Untargeted",
    "VictimRef",
    "Wrap",
]
