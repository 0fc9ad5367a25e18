"""A session of Ray: on a cluster that runs, or on one that is started here; and what its machines can compute."""

from __future__ import annotations

import logging
import os
import socket
import sys
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import ray

from advplug.errors import UsageError
from advplug.executors import Placement


@contextmanager
def session(address: str | None) -> Iterator[None]:
    """Connects to the cluster at `address`, or to one that is started here and ends with the session.

    One that the caller has opened with `ray.init` is used and left open. Raises UsageError where there is no cluster.
    """
    own = not ray.is_initialized()
    if not own and address is not None:
        raise UsageError("this process is connected to Ray already; leave the address out")
    with _quiet():
        try:
            if own:
                _connect(address)
            yield
        finally:
            if own:
                ray.shutdown()


@contextmanager
def _quiet() -> Iterator[None]:
    """Ray tells of dead workers on standard output, which belongs to results; the executor tells it itself."""
    module, switch, variable = sys.modules["ray._private.worker"], "_worker_logs_enabled", "RAY_IGNORE_UNHANDLED_ERRORS"
    shown, ignored = getattr(module, switch, True), os.environ.get(variable)
    setattr(module, switch, False)
    os.environ[variable] = "1"
    try:
        yield
    finally:
        setattr(module, switch, shown)
        if ignored is None:
            del os.environ[variable]


def _connect(address: str | None) -> None:
    """Raises UsageError."""
    os.environ["RAY_USAGE_STATS_ENABLED"] = "0"
    # Cells without a GPU are told so; hiding the GPUs from them would only draw a warning.
    os.environ.setdefault("RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO", "0")
    options: dict[str, Any] = {"log_to_driver": False, "logging_level": logging.ERROR}
    if address is None:
        usable = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
        fewer = {"num_cpus": usable} if usable != os.cpu_count() else {}
        try:
            # Its ports are open to the network, and run the code of whoever has the token that Ray makes.
            ray.init(address="local", include_dashboard=False, **fewer, **options)
        except Exception as error:  # Ray raises no type of its own here
            raise UsageError(f"Ray cannot be started here: {' '.join(str(error).split())}") from error
        return
    _demand_answer(address)
    try:
        ray.init(address=address, **options)
    except ConnectionError as error:
        raise UsageError(
            f"no Ray cluster is found at {address}; start one with 'ray start --head', or leave --address out"
        ) from error
    except (ValueError, RuntimeError, ray.exceptions.RayError) as error:  # no address; another version; no token
        raise UsageError(f"cannot connect to Ray at {address}: {' '.join(str(error).split())}") from error


def _demand_answer(address: str) -> None:
    """Raises UsageError at once where nothing listens; Ray would try for a minute."""
    host, colon, port = address.rpartition(":")
    if not colon or not port.isdecimal():
        return
    try:
        socket.create_connection((host, int(port)), timeout=10).close()
    except OSError as error:
        raise UsageError(f"nothing answers at {address} ({error.strerror or error}); is Ray running there?") from error


def slots(nodes: Sequence[Mapping[str, Any]], cpus: int, gpus: float) -> int:
    """How many cells these machines compute at a time."""
    total = 0
    for node in nodes:
        if node["Alive"]:
            has = node["Resources"]
            fit = int(has.get("CPU", 0) // cpus)
            total += min(fit, int(has.get("GPU", 0) / gpus + 1e-9)) if gpus else fit
    return total


def demand_slots(nodes: Sequence[Mapping[str, Any]], cpus: int, gpus: float) -> int:
    """The same. Raises UsageError where it is none, since Ray would wait for ever."""
    found = slots(nodes, cpus, gpus)
    if found:
        return found
    there = [node["Resources"] for node in nodes if node["Alive"]]
    most = {name: max((has.get(name, 0) for has in there), default=0) for name in ("CPU", "GPU")}
    if gpus and not most["GPU"]:
        raise UsageError("no machine of this Ray cluster has a GPU; leave --gpus-per-cell and --device cuda out")
    if most["CPU"] < cpus:
        raise UsageError(
            f"a cell asks for {cpus} CPUs, and no machine of this Ray cluster offers more than {most['CPU']:g}; "
            "lower --cpus-per-cell"
        )
    raise UsageError(f"no machine of this Ray cluster offers {cpus} CPUs and {gpus:g} GPUs together")


def gpus_per_cell(placement: Placement, device: str, nodes: Sequence[Mapping[str, Any]]) -> float:
    """The share of a GPU that a cell takes: as asked, otherwise a whole one where the device means one."""
    if placement.gpus_per_cell is not None:
        return placement.gpus_per_cell
    there = any(node["Alive"] and node["Resources"].get("GPU", 0) >= 1 for node in nodes)
    return 1.0 if device == "cuda" or (device == "auto" and there) else 0.0
