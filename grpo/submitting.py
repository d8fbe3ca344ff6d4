"""`grpo submit`, `jobs`, `status`, `logs` and `stop`: a run as a job of a Ray cluster, through Ray's job server (HTTP).

The driver runs on the cluster's head, and goes on when the submitting side ends. Its exit code is ours: Ray knows it of
a job that ends by itself, and of one that is stopped it is read from the job's last line.
"""

from __future__ import annotations

import asyncio
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
from typing import Any, Literal
from urllib.parse import urlsplit

from grpo import __version__
from grpo.config import Config
from grpo.stopping import held
from grpo.types import DONE, NOT_FOLLOWED, OURS, UserError

CONNECT_S = 5.0
ANSWER_S = 60.0
"""How long a job server may take to answer."""
QUIET_S = 30.0
"""After this long without a word of the job its server is asked whether it is still there."""
RECONNECT_S = 60.0
"""How long a job server may be away while a job is followed."""
PENDING_S = 60.0
"""How long a job that has been stopped may take to begin."""
POLL_S = 0.5
TAKING_DOWN_S = 60
"""What a stopped run may take beyond `run.grace_s` before Ray kills it."""
PENDING = "PENDING"
"""Ray's word for a job that has not begun."""
TOKENS = "RAY_AUTH_TOKEN, RAY_AUTH_TOKEN_PATH or ~/.ray/auth_token, with RAY_AUTH_MODE=token"
LAST_LINE = "grpo: exit code "
Then = Literal["end", "follow", "follow, stop on signals"]
"""What the submitting side does once the job is handed over."""


def submit(
    config: Config, recipe: Path, asked: Mapping[str, str], *, address: str, env: Sequence[str], then: Then,
    driver_cpus: float = 0.0,
) -> int:  # fmt: skip
    """Pack, upload and start. Returns the job's exit code when it is followed to its end.

    `asked`: `resume` and `allow`, where they are given. `env`: NAME=VALUE, or NAME for this environment's value.
    `driver_cpus`: that a node must have for the driver; 0: it is on the head.
    """
    from grpo import packing  # noqa: PLC0415 - transformers takes seconds to import

    if not 0 <= driver_cpus < math.inf:
        raise UserError(f"--driver-cpus must be a number that is not negative, not {driver_cpus:g}")
    variables = parse_env(env)
    variables.setdefault("RAY_JOB_STOP_WAIT_TIME_S", str(int(config.run.grace_s) + TAKING_DOWN_S))
    signals_are_its, stopping = then == "follow, stop on signals", False
    job = f"grpo-{secrets.token_hex(8)}"  # named here: it is known also when the server's answer does not come
    with tempfile.TemporaryDirectory(prefix="grpo-submit-") as name:
        size = packing.pack(config, recipe, Path(name), asked.get("resume"))
        try:
            with held() if signals_are_its else nullcontext(), answers(address) as client:
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
                print(f"\ngrpo: interrupted as {job} was handed over. If it has begun it goes on. {hint(job, address)}")
                return NOT_FOLLOWED
    names = ", ".join(text.partition("=")[0] for text in env)
    print(f"submitted  {job}: {size / packing.MIB:.2f} MiB" + (f", with {names}" if names else ""), flush=True)
    if then == "end":
        return DONE
    return follow(job, address, known=True, stop_on_signal=signals_are_its and not stopping, stopping=stopping)


def refuse_unplaceable(client: Any, driver_cpus: float) -> None:
    """Ray would let a job wait without a word, and not let go of it when it is stopped.

    Raises UserError where no node has so many CPUs, taken or free.
    """
    if driver_cpus == 0:
        return
    found = client._do_request("GET", "/api/v0/nodes", params={"detail": "true", "limit": 10_000})
    found.raise_for_status()
    nodes = [  # of which several may have one address
        (node["node_ip"], node["resources_total"].get("CPU", 0.0))
        for node in found.json()["data"]["result"]["result"]
        if node["state"] == "ALIVE"
    ]
    most = max((cpus for _, cpus in nodes), default=0.0)
    if driver_cpus > most:
        have = ", ".join(f"{address} with {cpus:g}" for address, cpus in nodes)
        raise UserError(
            f"--driver-cpus {driver_cpus:g}: no node has as many CPUs; there is {have or 'no node'}; nearest: {most:g}"
        )


def parse_env(texts: Sequence[str]) -> dict[str, str]:
    """Raises UserError when a variable has no name, or no value."""
    variables = {}
    for text in texts:
        name, equals, value = text.partition("=")
        if not re.fullmatch(r"[A-Za-z_]\w*", name):
            raise UserError("--env takes NAME=VALUE, or NAME for the value it has here")
        if not equals and name not in os.environ:
            raise UserError(f"--env {name}: it is not set here; give {name}=VALUE")
        variables[name] = value if equals else os.environ[name]
    return variables


def entrypoint(recipe: str, asked: Mapping[str, str]) -> str:
    """The job's command line. Ray signals the shell, too, which has to live on to say how the run ended."""
    command = ["python", "-m", "grpo", "train", recipe, *(f"{name}={value}" for name, value in asked.items())]
    return f'trap : TERM; {shlex.join(command)}; code=$?; echo "{LAST_LINE}$code"; exit $code'


@contextmanager
def answers(address: str) -> Iterator[Any]:
    """A client of the job server at `address`; what goes wrong in the block is a sentence.

    Raises UserError.
    """
    refuse_unreachable(address)
    for name in ("RAY_ADDRESS", "RAY_API_SERVER_ADDRESS"):  # Ray would take them in the place of `address`
        os.environ.pop(name, None)
    if {"RAY_AUTH_TOKEN", "RAY_AUTH_TOKEN_PATH"} & {*os.environ}:
        os.environ.setdefault("RAY_AUTH_MODE", "token")  # as `ray start` does; before Ray is imported, which reads it
    logging.disable(logging.INFO)  # Ray says what it uploads and when a connection ends
    import aiohttp  # noqa: PLC0415
    import requests  # noqa: PLC0415
    from ray.exceptions import AuthenticationError  # noqa: PLC0415
    from ray.job_submission import JobSubmissionClient  # noqa: PLC0415 - ray takes seconds to import

    class Client(JobSubmissionClient):  # type: ignore[misc]
        """Waits for no answer without end."""

        def _do_request(self, *what: Any, **options: Any) -> Any:
            return super()._do_request(*what, timeout=ANSWER_S, **options)

    try:
        try:
            client = Client(address)
        except (requests.exceptions.InvalidHeader, UnicodeError) as error:  # whose words have the token in them
            raise UserError(
                f"--address {address}: the token has characters that no HTTP header may have; it is read from {TOKENS}"
            ) from error
        except (LookupError, TypeError, AttributeError, requests.exceptions.JSONDecodeError) as error:
            raise UserError(f"--address {address}: what answers there is no job server of Ray") from error
        yield client
    except BrokenPipeError:  # whoever reads what is printed has gone, not the server
        raise
    except AuthenticationError as error:
        reason = error.message.splitlines()[0].partition(". ")[0]
        raise UserError(f"--address {address}: {reason}; the token is read from {TOKENS}") from error
    except (ConnectionError, RuntimeError, requests.RequestException, aiohttp.ClientError) as error:
        raise UserError(f"--address {address}: {' '.join(str(error).split())[:300]}") from error


def refuse_unreachable(address: str) -> None:
    """Raises UserError where an address is none, or nothing answers there."""
    try:
        place = urlsplit(address)
        usual = {"http": 80, "https": 443}[place.scheme]
        host, port, by_name = place.hostname, place.port or usual, "@" in place.netloc
    except (KeyError, ValueError):
        host, by_name = None, "@" in address
    if by_name:
        raise UserError("--address takes no user and no password; a token says who you are")
    if host is None:
        raise UserError(f"--address {address} is not of the form http://HEAD:8265")
    try:
        socket.create_connection((host, port), timeout=CONNECT_S).close()
    except (OSError, UnicodeError) as error:  # a name that no host can have
        raise UserError(f"--address {address}: nothing answers there ({error})") from error


def refuse_odd_name(job: str) -> None:
    """A name is a part of an address, in which some would mean another.

    Raises UserError.
    """
    if not re.fullmatch(r"[A-Za-z0-9_-][A-Za-z0-9_.-]*", job):
        raise UserError(f"{job!r} is no job's name: letters, digits, '_', '-' and '.', as grpo submit prints it")


def hint(job: str, address: str) -> str:
    """What else can be done with a job."""
    return f"Follow it: grpo logs {job} --address {address}; stop it: grpo stop {job} --address {address}"


def follow(job: str, address: str, *, known: bool = False, stop_on_signal: bool = False, stopping: bool = False) -> int:
    """Print what the job prints until it ends; returns its exit code, or NOT_FOLLOWED after Ctrl-C.

    `known`: that there is such a job, so that a server that does not answer may come back. `stop_on_signal`: the first
    signal is the job's, and it is followed to its end. `stopping`: it has come before.
    """
    shown, lost = 0, None
    while True:
        try:
            try:
                seen = 0
                with answers(address) as client:
                    client.get_job_info(job)  # says it well where there is no such job
                    known = True
                    if stopping:
                        client.stop_job(job)
                        stopping = False
                        print("grpo: the job is asked to finish its step, save and end", flush=True)
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
                    print(f"grpo: {error}; the job may go on. {hint(job, address)}")
                    return OURS
                time.sleep(POLL_S)
        except KeyboardInterrupt:
            if not stop_on_signal:
                print(f"\ngrpo: not followed any more; the job goes on. {hint(job, address)}")
                return NOT_FOLLOWED
            stop_on_signal, stopping = False, True


def printed(client: Any, job: str) -> Iterator[str]:
    """What the job prints, from its beginning, until it ends. Where it waits to begin, that is said."""
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


def wait(client: Any, job: str) -> int:
    """The exit code of a job, once it has ended; of a job that has none, why."""
    while not (details := client.get_job_info(job)).status.is_terminal():
        time.sleep(POLL_S)
    code = exit_code(client, job, details)
    if code is None:
        print(f"grpo: the job has no exit code: {details.status}: {details.message}")
    return OURS if code is None else code


def exit_code(client: Any, job: str, details: Any) -> int | None:
    """Of a job that has ended; None where its command was not started, or was killed."""
    if details.driver_exit_code is not None:
        return int(details.driver_exit_code)
    last = re.search(rf"^{LAST_LINE}(\d+)\n*\Z", client.get_job_logs(job), re.MULTILINE)
    return int(last[1]) if last else None


def still_pending(client: Any, job: str) -> str:
    """Ray's words on a job that has not begun within PENDING_S, else nothing. What Ray stops is its first process,
    which such a job has not."""
    deadline = time.monotonic() + PENDING_S
    while (details := client.get_job_info(job)).status == PENDING:
        if time.monotonic() > deadline:
            return str(details.message)
        time.sleep(POLL_S)
    return ""


def local_time(milliseconds: int | None) -> str:
    """Return a time of Ray's in the local time zone; "" where there is none."""
    return datetime.fromtimestamp(milliseconds / 1000).isoformat(" ", "seconds") if milliseconds else ""


def jobs(address: str) -> int:
    """Print the runs that were submitted to a cluster, the newest first: `grpo jobs`."""
    rows = [["job", "status", "run", "recipe", "started", "ended", "exit"]]
    with answers(address) as client:
        found = [details for details in client.list_jobs() if details.submission_id]
        ours = [details for details in found if "grpo" in (details.metadata or {})]
        for details in sorted(ours, key=lambda details: details.start_time or 0, reverse=True):
            code = None
            if details.status.is_terminal():
                with suppress(RuntimeError):  # its log has gone with its node
                    code = exit_code(client, details.submission_id, details)
            known = [details.metadata.get(name, "") for name in ("run", "recipe")]
            times = [local_time(details.start_time), local_time(details.end_time)]
            ended = "" if code is None else str(code)
            rows.append([details.submission_id, str(details.status), *known, *times, ended])
    if len(rows) == 1:
        print(f"no run has been submitted to {address}")
        return DONE
    widths = [max(len(row[i]) for row in rows) for i in range(len(rows[0]))]
    for row in rows:
        print("  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip())
    return DONE


def status(job: str, address: str) -> int:
    """`grpo status`."""
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
    return DONE


def stop(job: str, address: str) -> int:
    """`grpo stop`: SIGTERM to the driver, and wait until it has saved and ended. Ray kills it after the time that the
    job was given for that."""
    with answers(address) as client:
        if client.get_job_info(job).status.is_terminal():
            print(f"grpo: {job} has ended before")
        else:
            client.stop_job(job)
            print(f"grpo: {job} is asked to finish its step, save and end", flush=True)
            try:
                if pending := still_pending(client, job):
                    print(
                        f"grpo: it has not begun: {pending} It ends as soon as it begins, or when Ray gives it up "
                        "(15 minutes after its submission, unless RAY_JOB_START_TIMEOUT_SECONDS of the head differs)"
                    )
                    return OURS
                wait(client, job)
            except KeyboardInterrupt:
                print(f"\ngrpo: not waited for any more; the job ends all the same. {hint(job, address)}")
                return NOT_FOLLOWED
    return status(job, address)
