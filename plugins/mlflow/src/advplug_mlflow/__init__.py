"""Runs in MLflow. Imported whenever plugins are listed: no MLflow here, which takes seconds to import."""

from __future__ import annotations

from advplug.contracts import Spec, TrackerCaps
from advplug.hooks import hookimpl


@hookimpl
def advplug_trackers() -> list[Spec]:
    """The one tracker."""
    summary = "keeps figures with intervals and verdicts, and the report, in MLflow"
    return [Spec("mlflow", "advplug_mlflow.tracker:mlflow", TrackerCaps(), summary)]
