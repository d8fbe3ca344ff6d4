"""Ray session of a run: join the cluster that the recipe or RAY_ADDRESS names, or start and stop a private Ray.

A private Ray has its own temporary folder, its own token and ports that the system chose, so that runs on one machine
do not interfere. Resources are checked before they are requested: Ray would wait for missing ones silently.
"""

from __future__ import annotations

import functools
import os
import re
import secrets
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path

import ray
import torch
from ray._private import ray_constants, services
from ray.job_config import JobConfig
from ray.util.metrics import Gauge

from grpo import sockets
from grpo.cluster import sweeper
from grpo.cluster.cuda import check_machine
from grpo.cluster.placement import THIS_MACHINE, Node, check_fit, emptied, lacking_room, nodes_of_cluster
from grpo.config import Config, refuse_own_ray
from grpo.machine import usable_cpus, usable_memory_gib
from grpo.run.signals import handlers_kept
from grpo.suggest import one_line
from grpo.types import UserError

LOOPBACK = "127.0.0.1"
BREAKPOINT = "PYTHONBREAKPOINT"
"""Ray makes breakpoint() call its own debugger, also in this process after the session."""
LOOK_S = 1.0
"""Seconds between two checks of a run that waits for room."""
STILL_S = 600.0
"""Seconds between two messages of a waiting run, if nothing has changed."""
CONNECT_S = 5.0
"""Seconds that a Ray cluster may take to accept a connection."""


def check_memory(config: Config) -> None:
    """Raise UserError when the KV caches of a run on this machine's CPUs exceed its memory."""
    total = usable_memory_gib()
    each, count = config.sampler.kv_cache_gib, config.cluster.samplers
    if each is not None and not config.on_gpu and each * count > total:
        raise UserError(
            f"sampler.kv_cache_gib={each:g} for {count} samplers is {each * count:g} GiB; this machine has "
            f"{total:.1f} GiB of memory"
        )


def cluster_address(config: Config) -> str | None:
    """Return the address of the cluster to join, or None for a private Ray."""
    return config.cluster.address or os.environ.get("RAY_ADDRESS") or None


def local_node(config: Config) -> Node:
    """Return the resources that a private Ray will offer, as a node."""
    cpus: float = config.cluster.cpus if config.cluster.cpus is not None else usable_cpus()
    gpus: float = config.cluster.gpus if config.cluster.gpus is not None else torch.cuda.device_count()
    return Node(name=THIS_MACHINE, cpus=cpus, gpus=gpus, free_cpus=cpus, free_gpus=gpus)


def named(config: Config) -> str:
    """Return the option or environment variable that names the cluster to join, with its value."""
    address = cluster_address(config)
    return f"cluster.address={address}" if config.cluster.address else f"the environment variable RAY_ADDRESS={address}"


def refuse_silent(config: Config, address: str) -> None:
    """Raise UserError when `address` is a host and port where nothing answers.

    Ray itself would wait for minutes. A single connection attempt shows it at once.
    """
    host, colon, port = address.rpartition("://")[2].rpartition(":")
    if not colon:  # "auto", which Ray looks up in a file of this machine
        return
    try:
        socket.create_connection((host.strip("[]"), int(port)), timeout=CONNECT_S).close()
    except (OSError, ValueError, OverflowError) as error:
        private = "" if config.cluster.address else "; without it, a run starts a private Ray"
        raise UserError(f"{named(config)}: nothing answers there ({error}){private}") from error


class RayJob(JobConfig):  # type: ignore[misc]
    """Job configuration that keeps the driver's working directory out of the actors' `sys.path`.

    Ray would put it first, where a `torch.py` in it would shadow torch.
    """

    def _runtime_env_has_working_dir(self) -> bool:
        return True


def write_to_stderr(text: str) -> None:
    """Write a line to standard error."""
    sys.stderr.write(f"{text}\n")
    sys.stderr.flush()


@contextmanager
def session(
    config: Config, log_dir: Path | None, *, patience_s: float = 0.0, say: Callable[[str], None] = write_to_stderr
) -> Iterator[str]:
    """Run the block in a Ray session with enough resources for the run. Yield the address of its dashboard; "" if none.

    Args:
        log_dir: None only checks the resources (`grpo check`). A private Ray is not started then: its offer is known.
        patience_s: Seconds to wait for resources that a run has just released to a cluster.
        say: Called with what a run with `cluster.queue` waits for.
    """
    address = cluster_address(config)
    if ray.is_initialized():
        raise UserError("Ray is already running in this process: call ray.shutdown() first")
    if address is None:
        if config.cluster.queue:
            raise UserError(
                "cluster.queue=true waits for room on a running cluster: set cluster.address, or leave it out"
            )
        if config.on_gpu and config.cluster.gpus is None:
            check_machine(torch.cuda.device_count())
        node = local_node(config)
        check_fit(config, [node], THIS_MACHINE)
        check_memory(config)
        folder = sockets.socket_folder(sockets.RAY)
        if log_dir is None:
            yield ""
            return
        with _loopback_only(), _out_of_the_process_group(), _private_ray(node, folder):
            yield ""
        return
    refuse_own_ray(config)
    refuse_silent(config, address)
    try:
        # Ray's own SIGTERM handler would end a waiting run silently
        with handlers_kept(), _restored(BREAKPOINT):
            context = ray.init(address=address, job_config=RayJob(), log_to_driver=False, logging_level="ERROR")
    except (ConnectionError, ValueError, RuntimeError, ray.exceptions.RayError) as error:
        raise UserError(f"{named(config)}: {one_line(error)}") from error
    try:
        place = f"the cluster at {address}"
        if log_dir is None and config.cluster.queue:
            check_fit(config, emptied(nodes_of_cluster()), place)
        else:
            wait_for_room(config, place, patience_s, say)
        yield f"http://{context.dashboard_url}" if context.dashboard_url else ""
    finally:
        ray.shutdown()


def wait_for_room(config: Config, place: str, patience_s: float, say: Callable[[str], None]) -> None:
    """Wait up to `patience_s` until the cluster has room for every engine.

    A run with `cluster.queue` waits without a limit for resources that others use, and reports what it waits for.

    Raises UserError when there is no room in time.
    """
    started = time.monotonic()
    said, said_at = "", started
    while lacking := lacking_room(config, nodes := nodes_of_cluster(), place):
        now = time.monotonic()
        queue = config.cluster.queue and not lacking_room(config, emptied(nodes), place)
        if not queue and now - started >= patience_s:
            check_fit(config, nodes, place)
        if queue and (lacking != said or now - said_at >= STILL_S):
            say(f"waiting for room: {lacking}")
            said, said_at = lacking, now
        time.sleep(LOOK_S)
    if said:
        say(f"there is room, after {time.monotonic() - started:.0f} s")


def exporter(run: str) -> Callable[[int, Mapping[str, float]], None]:
    """Return a function that sets gauges, which the metrics agent of this Ray node exports.

    Their names are ray_grpo_<name>, with the tag `run`.
    """
    gauges: dict[str, Gauge] = {}

    def to_prometheus(step: int, metrics: Mapping[str, float]) -> None:
        for name, value in (*metrics.items(), ("step", step)):
            if name not in gauges:
                gauges[name] = Gauge(f"grpo_{re.sub(r'[^a-zA-Z0-9_]', '_', name)}", name, ("run",))
                gauges[name].set_default_tags({"run": run})
            gauges[name].set(float(value))

    return to_prometheus


@functools.cache
def _token() -> str:
    """Return the token of this process. Ray reads it once and keeps it, even for later sessions."""
    return secrets.token_hex(32)


@contextmanager
def _restored(*names: str) -> Iterator[None]:
    """Restore these environment variables at the end of the block."""
    before = {name: os.environ.get(name) for name in names}
    try:
        yield
    finally:
        for name, value in before.items():
            if value is None:
                os.environ.pop(name, None)
            else:
                os.environ[name] = value


@contextmanager
def _environment(variables: Mapping[str, str]) -> Iterator[None]:
    """Set environment variables in the block."""
    with _restored(*variables):
        os.environ.update(variables)
        yield


@contextmanager
def _loopback_only() -> Iterator[None]:
    """Make everything that Ray starts in the block listen on the loopback interface only.

    Ray does so by default only on other operating systems. It has no option for it: it replaces a given loopback
    address with the machine's own.
    """
    before = ray_constants.ENABLE_RAY_CLUSTER
    with _environment({ray_constants.ENABLE_RAY_CLUSTERS_ENV_VAR: "0"}):
        ray_constants.ENABLE_RAY_CLUSTER = False
        try:
            yield
        finally:
            ray_constants.ENABLE_RAY_CLUSTER = before


@contextmanager
def _out_of_the_process_group() -> Iterator[None]:
    """Start Ray's processes in a separate session, outside the job's process group.

    A signal to the group, as `timeout` and terminals send it, is meant for the driver, which needs its engines to
    finish the step.
    """
    before = services.ConsolePopen
    services.ConsolePopen = functools.partial(before, start_new_session=True)
    try:
        yield
    finally:
        services.ConsolePopen = before


@contextmanager
def _private_ray(node: Node, above: str) -> Iterator[None]:
    """Run the block with a private Ray, whose folder is created in `above` (see `grpo.sockets`)."""
    folder = Path(tempfile.mkdtemp(prefix="grpo-ray-", dir=above))
    sweeping = subprocess.Popen(
        [sys.executable, "-P", sweeper.__file__, str(folder)],
        stdin=subprocess.PIPE,
        env={name: value for name, value in os.environ.items() if name != sweeper.MARK},
        start_new_session=True,
    )
    try:
        with _environment({"RAY_AUTH_TOKEN": _token()}):
            # MARK is inherited by everything that Ray starts
            with _environment({sweeper.MARK: str(folder)}), _restored(BREAKPOINT):
                ray.init(
                    address="local",
                    job_config=RayJob(),
                    num_cpus=int(node.cpus),
                    num_gpus=int(node.gpus),
                    include_dashboard=False,
                    log_to_driver=False,
                    logging_level="ERROR",
                    object_store_memory=1 << 30,
                    _temp_dir=str(folder / "r"),  # Ray opens this folder to all users; its parent stays private
                    _node_ip_address=LOOPBACK,
                    _system_config={
                        "task_events_report_interval_ms": 0,  # otherwise Ray keeps the last 100,000 calls
                        "prestart_worker_first_driver": False,  # actors have another environment than these workers
                    },
                )
            if ray.util.get_node_ip_address() != LOOPBACK:
                raise RuntimeError(
                    f"the private Ray listens on {ray.util.get_node_ip_address()}, not on {LOOPBACK} alone"
                )
            yield
    finally:
        ray.shutdown()
        assert sweeping.stdin is not None
        sweeping.stdin.close()
        sweeping.wait(timeout=30)
