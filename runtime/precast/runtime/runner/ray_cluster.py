"""The nodes of a Ray cluster, which answer batches side by side by Ray Data.

This process plans the batches and is the only one that writes. Ray computes anew what an actor or a node that is gone
had begun; what comes twice is written once.
"""

from __future__ import annotations

import json
import logging
import os
import re
import socket
import sys
import threading
from collections.abc import Generator, Iterator, Sequence
from contextlib import contextmanager
from importlib import import_module
from typing import Any

from ..errors import PrecastError, UsageError
from ..hosts.machine import installed_version, usable_cores
from ..terminal import first_line
from .batches import Answers, Portable, Prepared, Worker
from .jobs import as_request, error_of
from .ray_actor import BatchActor

__all__ = ["RayCluster"]

PATIENCE = 10.0
"""Seconds that a cluster has to take a connection."""
START_LIMIT = 120.0
"""Seconds that Ray has to join a cluster, or to start one."""
BLOCKS_PER_ACTOR = 8
"""What is handed to an actor at a time is an eighth of its share, or LARGEST batches, and lost at most with it."""
LARGEST = 16


class RayCluster:
    """Answers batches on the nodes of a Ray cluster: an Asker.

    Args:
        address: as of ray.init(): "auto" for the cluster that this machine is a node of, "local" for one on this
            machine alone, "host:port".
        cpus: how many CPUs, and threads, each actor has; there are as many actors as the nodes have room for.

    Raises:
        UsageError: cpus is no number of CPUs.
    """

    def __init__(self, address: str, cpus: int = 1) -> None:
        if not isinstance(cpus, int) or cpus < 1:
            raise UsageError(f"ray_cpus={cpus!r} must be a whole number from 1.")
        self._address, self._cpus = address, cpus

    def __call__(
        self, batches: Sequence[list[Prepared]], worker: Worker, fail_fast: bool
    ) -> Generator[Answers, None, None]:
        """See Asker. Raises UsageError where Ray or the cluster is not there, or no node has so many CPUs, PrecastError
        for what a node lacks."""
        asked = f"ray={self._address!r}"
        if not isinstance(worker, Portable):
            raise UsageError(
                f"{asked} makes the worker on other machines, and {type(worker).__name__} says nothing by which they "
                f"could. Leave it out, or give a GeneratingWorker or PredictingWorker."
            )
        job = json.dumps(worker.as_job(asked))
        if not batches:
            return
        with _connected(_import_ray(), self._address) as ray:
            places = self._count_places(ray)
            try:
                _check_nodes(ray)
                yield from _collect(self._answers(ray, job, batches, places, fail_fast), len(batches))
            except ray.exceptions.RayError as error:
                raise PrecastError(_describe(error)) from error

    def _count_places(self, ray: Any) -> int:
        """How many actors there is room for. Raises UsageError for none."""
        nodes = [int(node["Resources"].get("CPU", 0)) for node in ray.nodes() if node["Alive"]]
        if places := sum(cpus // self._cpus for cpus in nodes):
            return places
        raise UsageError(
            f"ray_cpus={self._cpus} are more than any node of {self._address} has: its {len(nodes)} have "
            f"{', '.join(map(str, nodes))}. Pass ray_cpus={max(1, *nodes)}."
        )

    def _answers(
        self, ray: Any, job: str, batches: Sequence[list[Prepared]], places: int, fail_fast: bool
    ) -> Iterator[tuple[int, dict[str, Any]]]:
        """The number of each batch that is done and what came of it; some twice, perhaps."""
        requests = [
            {"number": number, "request": json.dumps(as_request(batch, fail_fast))}
            for number, batch in enumerate(batches)
        ]
        actors = min(places, len(batches))
        blocks = min(len(batches), max(BLOCKS_PER_ACTOR * actors, len(batches) // LARGEST))
        found = ray.data.from_items(requests, override_num_blocks=blocks).map_batches(
            BatchActor, fn_constructor_args=(job, self._cpus), batch_size=1, num_cpus=self._cpus,
            compute=ray.data.ActorPoolStrategy(min_size=1, max_size=actors, initial_size=actors),
        )  # fmt: skip
        for block in found.iter_batches(batch_size=None, prefetch_batches=0):
            for number, answer in zip(block["number"], block["answer"], strict=True):
                yield int(number), json.loads(str(answer))


def _check_nodes(ray: Any) -> None:
    """Raise UsageError for a node without this version of precast: Ray Data would start its actors again for ever."""
    place = import_module("ray.util.scheduling_strategies").NodeAffinitySchedulingStrategy
    asked, ours = ray.remote(num_cpus=0, max_retries=0)(installed_version), installed_version("precast")
    told = {
        node["NodeManagerHostname"]: asked.options(scheduling_strategy=place(node["NodeID"], soft=False)).remote(
            "precast"
        )
        for node in ray.nodes()
        if node["Alive"] and node["Resources"].get("CPU")
    }
    for name, reference in told.items():
        try:
            found = ray.get(reference, timeout=START_LIMIT)
        except ray.exceptions.RayTaskError as error:
            found = f"missing ({_describe(error)})"
        if found != ours:
            raise UsageError(
                f"precast is {found} on the node {name}, and {ours} where the rows come from. Install one of them on "
                f"both: pip install precast=={ours}"
            )


def _collect(found: Iterator[tuple[int, dict[str, Any]]], count: int) -> Iterator[Answers]:
    """The answers of each of `count` batches once. Raises PrecastError for one that is an error, or is not there."""
    seen = set()
    for number, answer in found:
        if number in seen:
            continue
        if "error" in answer:
            raise error_of(answer["error"])
        seen.add(number)
        yield [(index, row) for index, row in answer["answers"]]
    if len(seen) < count:
        raise PrecastError(
            f"Ray ended with the answers of {len(seen)} batches of {count}. They are kept; resume=True goes on."
        )


def _import_ray() -> Any:
    # Ray reports who uses it, and warns of what Ray Data itself does, unless it is told not to.
    os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
    os.environ.setdefault("RAY_BACKEND_LOG_LEVEL", "fatal")
    try:
        ray = import_module("ray")
        import_module("ray.data")
    except ImportError as error:
        raise UsageError(f"ray is not installed ({first_line(error)}): pip install 'precast[ray]'") from None
    return ray


@contextmanager
def _connected(ray: Any, address: str) -> Iterator[Any]:
    """Ray, connected to the cluster; who is connected already stays so. Raises UsageError."""
    if ray.is_initialized():
        yield ray
        return
    _check_reachable(address)
    _connect(ray, address)
    try:
        ray.data.DataContext.get_current().enable_progress_bars = False
        logging.getLogger("ray.data").setLevel(logging.ERROR)
        yield ray
    finally:
        ray.shutdown()


def _connect(ray: Any, address: str) -> None:
    """Call ray.init(), which may try for ever, within a time limit. Raises UsageError."""
    own = {"num_cpus": usable_cores(), "include_dashboard": False} if address == "local" else {}
    failed: list[Exception] = []

    def connect() -> None:
        try:
            ray.init(address, log_to_driver=False, logging_level=logging.ERROR, **own)
        except Exception as error:
            # Ray raises what it likes, and what its gRPC does.
            failed.append(error)

    thread = threading.Thread(target=connect, daemon=True)
    with _no_words():
        if own:
            # Ray's processes die with the thread that starts them.
            connect()
        else:
            thread.start()
            thread.join(START_LIMIT)
    if thread.is_alive():
        reason = f"it did not answer within {START_LIMIT:g} seconds. An address on 127.0.0.1 is none of a cluster"
    elif failed:
        reason = _describe(failed[0])
    else:
        return
    raise UsageError(f"ray={address!r} is no cluster that this machine can use: {reason}")


@contextmanager
def _no_words() -> Iterator[None]:
    """Within this block what libraries write to standard error is lost: Ray tells of its log level, and of each try."""
    sys.stderr.flush()
    kept = os.dup(2)
    try:
        with open(os.devnull, "wb") as nowhere:
            os.dup2(nowhere.fileno(), 2)
        yield
    finally:
        os.dup2(kept, 2)
        os.close(kept)


def _check_reachable(address: str) -> None:
    """Raise UsageError where nobody takes a connection: Ray itself would try for minutes."""
    if address in ("auto", "local"):
        return
    if address.startswith("ray://"):
        raise UsageError(
            f"ray={address!r} is for Ray's client, through which Ray Data does not run. Let this machine be a node of "
            f"the cluster, `ray start --address HOST:PORT`, and pass ray='auto'."
        )
    match = re.fullmatch(r"(\[?[\w.:-]+?\]?):(\d+)", address)
    if match is None:
        raise UsageError(f"ray={address!r} is no address of a cluster: give 'auto', 'local' or 'HOST:PORT'.")
    try:
        socket.create_connection((match[1].strip("[]"), int(match[2])), PATIENCE).close()
    except (OSError, OverflowError) as error:
        raise UsageError(
            f"ray={address!r} cannot be reached within {PATIENCE:g} seconds: {error}. `ray start --head` on a machine "
            f"says the address of a new cluster."
        ) from error


def _describe(error: BaseException) -> str:
    """The last line of an error: Ray puts tracebacks of other machines before it."""
    return (str(error).strip() or type(error).__name__).splitlines()[-1].strip()
