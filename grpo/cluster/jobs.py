"""`grpo submit`, `jobs`, `status`, `logs` and `stop`: a run as a job of a Ray cluster, through Ray's job server (HTTP).

The driver runs on the head of the cluster and continues when the submitting side ends. The exit code of the job becomes
ours. Ray reports it for a job that ends by itself; for a stopped job it is read from the last line of the job's log.
"""

from __future__ import annotations

import asyncio
import functools
import logging
import math
import os
import re
import secrets
import shlex
import socket
import tempfile
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext, suppress
from datetime import datetime
from pathlib import Path
from typing import TYPE_CHECKING, Literal
from urllib.parse import urlsplit

from grpo import __version__
from grpo.config import Config
from grpo.run.signals import signals_delayed
from grpo.suggest import one_line
from grpo.types import ExitCode, UserError

if TYPE_CHECKING:  # ray takes seconds to import
    from ray.job_submission import JobDetails, JobSubmissionClient

CONNECT_S = 5.0
ANSWER_S = 60.0
"""Timeout of an answer of the job server, in seconds."""
QUIET_S = 30.0
"""After this many seconds without output of the job, the server is queried whether the job still exists."""
RECONNECT_S = 60.0
"""Time that a job server may be unreachable while a job is followed, in seconds."""
PENDING_S = 60.0
"""Time that a stopped job may stay pending before `grpo stop` gives up, in seconds."""
POLL_S = 0.5
TAKING_DOWN_S = 60
"""Seconds beyond `run.grace_s` that a stopped run may take before Ray kills it."""
PENDING = "PENDING"
"""Ray's status of a job that has not started."""
TOKENS = "RAY_AUTH_TOKEN, RAY_AUTH_TOKEN_PATH or ~/.ray/auth_token, with RAY_AUTH_MODE=token"
LAST_LINE = "grpo: exit code "
Then = Literal["nothing", "end", "follow", "follow, stop on signals"]
"""Action of the submitting side after it has submitted the job; with "nothing", it submits none."""


def submit(
    config: Config, recipe: Path, asked: Mapping[str, str], *, address: str, env: Sequence[str], then: Then,
    driver_cpus: float = 0.0,
) -> int:  # fmt: skip
    """Pack, upload and start a job. Return the exit code: of the job if it is followed to its end.

    `asked`: the values of `resume` and `allow`, if given. `env`: NAME=VALUE, or NAME for the value in this environment.
    `driver_cpus`: CPUs to reserve on a node for the driver; 0: the driver runs on the head.
    """
    from grpo.cluster import upload  # noqa: PLC0415 - transformers takes seconds to import

    if not 0 <= driver_cpus < math.inf:
        raise UserError(f"--driver-cpus must be a number that is not negative, not {driver_cpus:g}")
    variables = parse_env(env)
    variables.setdefault("RAY_JOB_STOP_WAIT_TIME_S", str(int(config.run.grace_s) + TAKING_DOWN_S))
    signals_are_its, stopping = then == "follow, stop on signals", False
    job = f"grpo-{secrets.token_hex(8)}"  # named here, so that it is known even if the server does not answer
    with tempfile.TemporaryDirectory(prefix="grpo-submit-") as name:
        size = upload.pack(config, recipe, Path(name), asked.get("resume"))
        if then == "nothing":
            print(f"packed     {size / upload.MIB:.2f} MiB; nothing has been submitted")
            return ExitCode.DONE
        try:
            with signals_delayed() if signals_are_its else nullcontext(), answers(address) as client:
                refuse_unplaceable(client, driver_cpus)
                client.submit_job(
                    submission_id=job,
                    entrypoint=entrypoint(recipe.name, asked),
                    entrypoint_num_cpus=driver_cpus or None,
                    runtime_env={"working_dir": name, "env_vars": variables},
                    metadata={
                        "recipe": recipe.name,
                        "grpo": __version__,
                        "run": config.run.name or recipe.stem,
                    },
                )
        except KeyboardInterrupt:
            stopping = signals_are_its
            if not stopping:
                print(
                    f"\ngrpo: interrupted while submitting {job}. If it has begun, it continues. {hint(job, address)}"
                )
                return ExitCode.DETACHED
    names = ", ".join(text.partition("=")[0] for text in env)
    print(f"submitted  {job}: {size / upload.MIB:.2f} MiB" + (f", with {names}" if names else ""), flush=True)
    if then == "end":
        return ExitCode.DONE
    return follow(job, address, known=True, stop_on_signal=signals_are_its and not stopping, stopping=stopping)


def refuse_unplaceable(client: JobSubmissionClient, driver_cpus: float) -> None:
    """Refuse a driver that fits on no node: Ray would let the job wait silently, and could not stop it.

    Raises UserError if no node has this many CPUs, used or free.
    """
    if driver_cpus == 0:
        return
    found = client._do_request("GET", "/api/v0/nodes", params={"detail": "true", "limit": 10_000})
    found.raise_for_status()
    nodes = [  # several nodes may have the same address
        (node["node_ip"], node["resources_total"].get("CPU", 0.0))
        for node in found.json()["data"]["result"]["result"]
        if node["state"] == "ALIVE"
    ]
    most = max((cpus for _, cpus in nodes), default=0.0)
    if driver_cpus > most:
        have = ", ".join(f"{address} with {cpus:g}" for address, cpus in nodes)
        raise UserError(
            f"--driver-cpus {driver_cpus:g}: no node has so many CPUs; there is {have or 'no node'}; nearest: {most:g}"
        )


def parse_env(texts: Sequence[str]) -> dict[str, str]:
    """Return the variables of `--env` with their values.

    Raises UserError if a variable has no valid name, or no value.
    """
    variables = {}
    for text in texts:
        name, equals, value = text.partition("=")
        if not re.fullmatch(r"[A-Za-z_]\w*", name):
            raise UserError("--env takes NAME=VALUE, or NAME for its local value")
        if not equals and name not in os.environ:
            raise UserError(f"--env {name}: it is not set on this machine; give {name}=VALUE")
        variables[name] = value if equals else os.environ[name]
    return variables


def entrypoint(recipe: str, asked: Mapping[str, str]) -> str:
    """Return the command line of the job. Ray also signals the shell, which must survive to report the exit code."""
    command = ["python", "-m", "grpo", "train", recipe, *(f"{name}={value}" for name, value in asked.items())]
    return f'trap : TERM; {shlex.join(command)}; code=$?; echo "{LAST_LINE}$code"; exit $code'


@contextmanager
def answers(address: str) -> Iterator[JobSubmissionClient]:
    """Yield a client of the job server at `address`.

    Raises UserError for errors of the connection, of the server and of authentication, also within the block.
    """
    refuse_unreachable(address)
    for name in ("RAY_ADDRESS", "RAY_API_SERVER_ADDRESS"):  # Ray would use them instead of `address`
        os.environ.pop(name, None)
    if {"RAY_AUTH_TOKEN", "RAY_AUTH_TOKEN_PATH"} & {*os.environ}:
        os.environ.setdefault("RAY_AUTH_MODE", "token")  # as `ray start` does; before Ray is imported, which reads it
    logging.disable(logging.INFO)  # Ray logs uploads and closed connections
    import aiohttp  # noqa: PLC0415
    import requests  # noqa: PLC0415
    from ray.exceptions import AuthenticationError  # noqa: PLC0415
    from ray.job_submission import JobSubmissionClient  # noqa: PLC0415

    class Client(JobSubmissionClient):  # type: ignore[misc]
        """A client with a timeout for every request."""

        _do_request = functools.partialmethod(JobSubmissionClient._do_request, timeout=ANSWER_S)

    try:
        try:
            client = Client(address)
        except (requests.exceptions.InvalidHeader, UnicodeError) as error:  # its message contains the token
            raise UserError(
                f"--address {address}: the token has characters that an HTTP header must not contain; it is read from "
                f"{TOKENS}"
            ) from error
        except (LookupError, TypeError, AttributeError, requests.exceptions.JSONDecodeError) as error:
            raise UserError(f"--address {address}: the server there is not a job server of Ray") from error
        yield client
    except BrokenPipeError:  # the reader of our stdout is gone, not the server
        raise
    except AuthenticationError as error:
        reason = error.message.splitlines()[0].partition(". ")[0]
        raise UserError(f"--address {address}: {reason}; the token is read from {TOKENS}") from error
    except (ConnectionError, RuntimeError, requests.RequestException, aiohttp.ClientError) as error:
        raise UserError(f"--address {address}: {one_line(error)}") from error


def refuse_unreachable(address: str) -> None:
    """Raise UserError if `address` is invalid, or if nothing answers there."""
    try:
        place = urlsplit(address)
        usual = {"http": 80, "https": 443}[place.scheme]
        host, port, by_name = place.hostname, place.port or usual, "@" in place.netloc
    except (KeyError, ValueError):
        host, by_name = None, "@" in address
    if by_name:
        raise UserError("--address must not contain a user or password; use a token")
    if host is None:
        raise UserError(f"--address {address} is not of the form http://HEAD:8265")
    try:
        socket.create_connection((host, port), timeout=CONNECT_S).close()
    except (OSError, UnicodeError) as error:  # UnicodeError: a name that no host can have
        raise UserError(f"--address {address}: nothing answers there ({error})") from error


def refuse_odd_name(job: str) -> None:
    """Raise UserError for an invalid job name: it becomes part of a URL, where special characters could change the
    request."""
    if not re.fullmatch(r"[A-Za-z0-9_-][A-Za-z0-9_.-]*", job):
        raise UserError(f"{job!r} is not a job name, which has letters, digits, '_', '-' and '.'; see grpo jobs")


def hint(job: str, address: str) -> str:
    """Return the commands that follow and stop a job."""
    return f"Follow it: grpo logs {job} --address {address}; stop it: grpo stop {job} --address {address}"


def follow(job: str, address: str, *, known: bool = False, stop_on_signal: bool = False, stopping: bool = False) -> int:
    """Print the output of a job until it ends. Return its exit code, or DETACHED after Ctrl-C, or INTERNAL if the
    server stays unreachable.

    `known`: the job is known to exist, so reconnect if the server does not answer. `stop_on_signal`: the first signal
    stops the job, which is then followed to its end. `stopping`: that signal has already arrived.
    """
    shown, lost = 0, None
    while True:
        try:
            try:
                seen = 0
                with answers(address) as client:
                    client.get_job_info(job)  # fails with a clear message if the job does not exist
                    known = True
                    if stopping:
                        client.stop_job(job)
                        stopping = False
                        print("grpo: asked the job to finish its step, save and end", flush=True)
                    for text in printed(client, job):
                        print(text[max(0, shown - seen) :], end="", flush=True)
                        seen += len(text)
                        shown, lost = max(shown, seen), None
                    return wait(client, job)
            except UserError as error:
                if not known:
                    raise
                lost = lost or time.monotonic()
                if time.monotonic() - lost > RECONNECT_S:
                    print(f"grpo: {error}; the job may still be running. {hint(job, address)}")
                    return ExitCode.INTERNAL
                time.sleep(POLL_S)
        except KeyboardInterrupt:
            if not stop_on_signal:
                print(f"\ngrpo: no longer following the job, which continues. {hint(job, address)}")
                return ExitCode.DETACHED
            stop_on_signal, stopping = False, True


def printed(client: JobSubmissionClient, job: str) -> Iterator[str]:
    """Yield the output of a job from its beginning until it ends. Report once if the job is still pending."""
    stream, said = client.tail_job_logs(job), False

    async def following() -> str | None:
        return await anext(stream, None)

    with asyncio.Runner() as runner:
        while True:
            coming = runner.get_loop().create_task(following())
            while not runner.run(asyncio.wait({coming}, timeout=QUIET_S))[0]:
                details = client.get_job_info(job)
                if details.status == PENDING and not said:
                    said = True
                    print(f"grpo: {details.message}", flush=True)
            if (text := coming.result()) is None:
                return
            yield text


def wait(client: JobSubmissionClient, job: str) -> int:
    """Wait until a job has ended and return its exit code. If it has none, print the reason and return INTERNAL."""
    while not (details := client.get_job_info(job)).status.is_terminal():
        time.sleep(POLL_S)
    code = exit_code(client, job, details)
    if code is None:
        print(f"grpo: the job has no exit code: {details.status}: {details.message}")
    return ExitCode.INTERNAL if code is None else code


def exit_code(client: JobSubmissionClient, job: str, details: JobDetails) -> int | None:
    """Return the exit code of a job that has ended; None if its command was not started, or was killed."""
    if details.driver_exit_code is not None:
        return int(details.driver_exit_code)
    last = re.search(rf"^{LAST_LINE}(\d+)\n*\Z", client.get_job_logs(job), re.MULTILINE)
    return int(last[1]) if last else None


def still_pending(client: JobSubmissionClient, job: str) -> str:
    """Return Ray's message if the job is still pending after PENDING_S, else an empty string.

    Ray stops a job through its first process, and a pending job has none yet.
    """
    deadline = time.monotonic() + PENDING_S
    while (details := client.get_job_info(job)).status == PENDING:
        if time.monotonic() > deadline:
            return str(details.message)
        time.sleep(POLL_S)
    return ""


def local_time(milliseconds: int | None) -> str:
    """Format a timestamp of Ray in the local time zone; "" if there is none."""
    return datetime.fromtimestamp(milliseconds / 1000).isoformat(" ", "seconds") if milliseconds else ""


def jobs(address: str) -> int:
    """Run `grpo jobs`: print the runs that were submitted to a cluster, newest first."""
    rows = [["job", "status", "run", "recipe", "started", "ended", "exit"]]
    with answers(address) as client:
        found = [details for details in client.list_jobs() if details.submission_id]
        ours = [details for details in found if "grpo" in (details.metadata or {})]
        for details in sorted(ours, key=lambda details: details.start_time or 0, reverse=True):
            code = None
            if details.status.is_terminal():
                with suppress(RuntimeError):  # its log was lost with its node
                    code = exit_code(client, details.submission_id, details)
            known = [details.metadata.get(name, "") for name in ("run", "recipe")]
            times = [local_time(details.start_time), local_time(details.end_time)]
            ended = "" if code is None else str(code)
            rows.append([details.submission_id, str(details.status), *known, *times, ended])
    if len(rows) == 1:
        print(f"no run has been submitted to {address}")
        return ExitCode.DONE
    from grpo.run.compare import table  # noqa: PLC0415 - pyarrow takes time to import

    print("\n".join(table(rows)))
    return ExitCode.DONE


def status(job: str, address: str) -> int:
    """Run `grpo status`: print the state of a job."""
    with answers(address) as client:
        details = client.get_job_info(job)
        code = exit_code(client, job, details) if details.status.is_terminal() else None
    lines = {
        "job": job,
        "run": (details.metadata or {}).get("run"),
        "recipe": (details.metadata or {}).get("recipe"),
        "status": str(details.status),
        "started": local_time(details.start_time),
        "ended": local_time(details.end_time),
        "exit code": code,
        "message": (details.message or "").partition("\n")[0],
    }
    print("\n".join(f"{name:10} {value}" for name, value in lines.items() if value not in (None, "")))
    return ExitCode.DONE


def stop(job: str, address: str) -> int:
    """Run `grpo stop`: send SIGTERM to the driver, and wait until it has saved and ended.

    Ray kills the driver after the time limit that the job was submitted with (`run.grace_s` + TAKING_DOWN_S).
    """
    with answers(address) as client:
        if client.get_job_info(job).status.is_terminal():
            print(f"grpo: {job} had already ended")
        else:
            client.stop_job(job)
            print(f"grpo: asked {job} to finish its step, save and end", flush=True)
            try:
                if pending := still_pending(client, job):
                    print(
                        f"grpo: it has not begun: {pending} It ends as soon as it begins, or when Ray gives up on it "
                        "(15 minutes after its submission, unless RAY_JOB_START_TIMEOUT_SECONDS of the head differs)"
                    )
                    return ExitCode.INTERNAL
                wait(client, job)
            except KeyboardInterrupt:
                print(f"\ngrpo: no longer waiting; the job will still end. {hint(job, address)}")
                return ExitCode.DETACHED
    return status(job, address)
