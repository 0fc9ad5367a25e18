"""Writes a finished run to a tracking store of MLflow: a file, a folder or a server."""

from __future__ import annotations

import logging
import os
import time
import warnings
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from itertools import islice
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any
from urllib.parse import urlsplit

from advplug.contracts import Param, Tracker
from advplug.errors import UsageError
from advplug_mlflow.entries import Entry, parts, whole

if TYPE_CHECKING:
    from advplug.results import RunResult

PATIENCE = {"MLFLOW_HTTP_REQUEST_MAX_RETRIES": "2", "MLFLOW_HTTP_REQUEST_TIMEOUT": "30"}
"""A server that does not answer is given up after a minute or two; MLflow's own defaults wait for several."""
MOST = 100
"""Parameters and tags in one request, by MLflow's limit; of metrics there may be 1000."""


def mlflow(
    experiment: Annotated[str, Param("name of the experiment; made where there is none", positional=True)] = "advplug",
    uri: Annotated[
        str | None,
        Param(
            "where runs are kept: sqlite:///FILE or a server's address; none: MLFLOW_TRACKING_URI, or mlflow.db here"
        ),
    ] = None,
    run: Annotated[str | None, Param("name of the run; none: the time")] = None,
) -> Tracker:
    """A run of MLflow with the report, and inside it one for each threat, certificate and attack on training data.

    Raises UsageError for an address that MLflow does not know.
    """
    os.environ.setdefault("MLFLOW_DISABLE_TELEMETRY", "true")
    with _quiet():
        from mlflow.exceptions import MlflowException
        from mlflow.tracking import MlflowClient

        try:
            client = MlflowClient(uri)
        except MlflowException as error:
            raise UsageError(f"MLflow cannot use {uri or 'its default store'}: {error}") from error
    if urlsplit(client.tracking_uri).password is not None:
        # Commands are kept with results, and addresses are shown.
        raise UsageError("an address with a password in it would be kept with the results; set "
                         "MLFLOW_TRACKING_USERNAME and MLFLOW_TRACKING_PASSWORD in the environment")  # fmt: skip

    def track(result: RunResult, files: Mapping[str, Path]) -> str:
        with _quiet():
            return _kept(client, experiment, run, result, files)

    return track


def _kept(client: Any, experiment: str, run: str | None, result: RunResult, files: Mapping[str, Path]) -> str:
    found = client.get_experiment_by_name(experiment)
    home = found.experiment_id if found else client.create_experiment(experiment)
    begun = int(1000 * (time.time() - result.run.seconds))
    head = whole(result)
    outer = _begin(client, home, head, begun, run or time.strftime("%Y-%m-%d %H:%M:%S"))
    try:
        _log(client, outer, head)
        for file in files.values():
            client.log_artifact(outer, str(file))
        for part in parts(result):
            inner = _begin(client, home, part, begun, part.name, outer)
            _log(client, inner, part)
            client.set_terminated(inner)
    except BaseException:
        client.set_terminated(outer, "FAILED")
        raise
    client.set_terminated(outer)
    return f"run {outer} of experiment '{experiment}' in {client.tracking_uri}"


def _begin(client: Any, home: str, entry: Entry, begun: int, name: str, outer: str | None = None) -> str:
    """A new run's identity; inside `outer`, where that is given."""
    inside = {"mlflow.parentRunId": outer} if outer else {}
    made = client.create_run(
        home, start_time=begun, tags={**inside, **dict([*entry.tags.items()][:MOST])}, run_name=name
    )
    return str(made.info.run_id)


def _log(client: Any, identity: str, entry: Entry) -> None:
    """Parameters, metrics and the tags that did not fit into the beginning."""
    from mlflow.entities import Metric, Param, RunTag

    now = int(1000 * time.time())
    for some in _chunks(entry.params.items(), MOST):
        client.log_batch(identity, params=[Param(*item) for item in some])
    for figures in _chunks(entry.metrics.items(), 10 * MOST):
        client.log_batch(identity, metrics=[Metric(name, value, now, 0) for name, value in figures])
    for rest in _chunks([*entry.tags.items()][MOST:], MOST):
        client.log_batch(identity, tags=[RunTag(*item) for item in rest])


def _chunks(items: Iterable[tuple[str, Any]], size: int) -> Iterator[list[tuple[str, Any]]]:
    rest = iter(items)
    while chunk := list(islice(rest, size)):
        yield chunk


@contextmanager
def _quiet() -> Iterator[None]:
    """Without MLflow's chatter and deprecations of its libraries, and with our patience where the user states none."""
    loggers = {name: logging.getLogger(name) for name in ("mlflow", "alembic")}
    levels = {name: logger.level for name, logger in loggers.items()}
    missing = {name: value for name, value in PATIENCE.items() if name not in os.environ}
    os.environ.update(missing)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            for logger in loggers.values():
                logger.setLevel(logging.ERROR)
            yield
    finally:
        for name in missing:
            os.environ.pop(name, None)
        for name, logger in loggers.items():
            logger.setLevel(levels[name])
