"""What travels with a submitted run, and what is refused before anything does."""

from __future__ import annotations

import asyncio
import contextlib
import os
import re
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import AsyncIterator, Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import yaml

from grpo import config as config_module
from grpo.cluster import jobs, upload
from grpo.cluster.jobs import answers, entrypoint, exit_code, parse_env
from grpo.commands.cli import main
from grpo.types import ExitCode, UserError

ROOT = Path(__file__).resolve().parents[2]


@pytest.fixture
def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The working directory that is submitted from."""
    folder = tmp_path / "here"
    folder.mkdir()
    monkeypatch.chdir(folder)
    return folder


def written(folder: Path, **sections: dict[str, Any]) -> Path:
    """A recipe of which everything but the reward lies on shared storage."""
    recipe: dict[str, Any] = {
        "model": {"path": "/shared/model"},
        "data": {"train": "/shared/train.jsonl"},
        "algorithm": {"prompts_per_step": 8, "group_size": 4},
        "rewards": [{"file": "reward.py"}],
        "run": {"steps": 2, "dir": "/shared/runs"},
    }
    for section, values in sections.items():
        recipe[section] = {**recipe[section], **values} if isinstance(values, dict) else values
    path = folder / "mine.yaml"
    path.write_text(yaml.safe_dump(recipe))
    (folder / "reward.py").write_text("def reward(completion, row):\n    return 1.0\n")
    return path


def packed(recipe: Path, target: Path, *overrides: str, resume: str | None = None) -> set[str]:
    """The files that travel beside the package, by their place in the job."""
    target.mkdir()
    upload.pack(config_module.load(recipe, overrides), recipe, target, resume)
    return {
        str(p.relative_to(target)) for p in target.rglob("*") if p.is_file() and p.parts[len(target.parts)] != "grpo"
    }


def test_the_recipe_its_reward_and_the_package_travel_and_nothing_else(here: Path, tmp_path: Path) -> None:
    recipe = written(here)
    (here / "notes.py").write_text("")
    with (here / "big.bin").open("wb") as file:
        file.truncate(10 * 2**30)
    assert packed(recipe, tmp_path / "job", "run.seed=7") == {"mine.yaml", "reward.py"}
    loaded = config_module.load(tmp_path / "job" / "mine.yaml")
    assert loaded == config_module.load(recipe, ["run.seed=7"])
    package = {str(p.relative_to(ROOT)) for s in ("py", "typed", "yaml") for p in (ROOT / "grpo").rglob(f"*.{s}")}
    assert {str(p.relative_to(tmp_path / "job")) for p in (tmp_path / "job" / "grpo").rglob("*.*")} == package


def test_modules_that_a_reward_imports_travel_with_it(here: Path, tmp_path: Path) -> None:
    beside = tmp_path / "elsewhere"
    (beside / "helpers" / "deep").mkdir(parents=True)
    for name, source in {
        "elsewhere/graded.py": "import json, time, helpers.deep.b, shared_words\ndef graded(a, b):\n    import late\n",
        "elsewhere/late.py": "",
        "elsewhere/unused.py": "",
        "elsewhere/helpers/deep/b.py": "from .c import x\nfrom far import x\n",
        "elsewhere/c.py": "",
        "elsewhere/helpers/deep/c.py": "",
        "here/shared_words.py": "import late\n",
        "here/far.py": "",
        "here/json.py": "",
        "here/time.py": "",
        "here/yaml.py": "",
    }.items():
        (tmp_path / name).write_text(source)
    recipe = written(here, rewards=[{"file": str(beside / "graded.py")}, {"file": "reward.py"}])  # type: ignore[arg-type]
    assert packed(recipe, tmp_path / "job") == {
        "mine.yaml", "reward.py", "shared_words.py", "far.py", "rewards/0/graded.py", "rewards/0/late.py",
        "rewards/0/helpers/deep/b.py", "rewards/0/helpers/deep/c.py",
    }  # fmt: skip
    rewards = config_module.load(tmp_path / "job" / "mine.yaml").rewards
    assert [reward.file for reward in rewards] == ["rewards/0/graded.py", "reward.py"]


def test_a_reward_beside_the_recipe_keeps_its_path(here: Path, tmp_path: Path) -> None:
    (tmp_path / "recipes").mkdir()
    recipe = written(tmp_path / "recipes")
    assert packed(recipe, tmp_path / "job") == {"mine.yaml", "reward.py"}
    assert (tmp_path / "job" / "reward.py").read_bytes() == (tmp_path / "recipes" / "reward.py").read_bytes()


def test_a_built_in_reward_keeps_its_name_and_travels_in_the_package(here: Path, tmp_path: Path) -> None:
    """test_wheel finds it in the job by this name."""
    by_path = str(ROOT / "reward_fns" / "format.py")
    recipe = written(here, rewards=[{"file": "gsm8k"}, {"file": by_path}])  # type: ignore[arg-type]
    assert packed(recipe, tmp_path / "job") == {"mine.yaml", "rewards/1/format.py"}
    there = tmp_path / "job" / "grpo" / "reward_fns"
    assert [path.name for path in there.iterdir()] == ["gsm8k.py"]
    assert (there / "gsm8k.py").read_bytes() == (ROOT / "reward_fns" / "gsm8k.py").read_bytes()
    rewards = config_module.load(tmp_path / "job" / "mine.yaml").rewards
    assert [reward.file for reward in rewards] == ["gsm8k", "rewards/1/format.py"]


def test_what_lies_beside_a_reward_s_link_is_what_lies_beside_the_file(here: Path, tmp_path: Path) -> None:
    """As where the worker looks for it."""
    (tmp_path / "real").mkdir()
    (tmp_path / "real" / "graded.py").write_text("import helper\ndef graded(a, b):\n    return 1.0\n")
    (tmp_path / "real" / "helper.py").write_text("")
    (here / "graded.py").symlink_to(tmp_path / "real" / "graded.py")
    recipe = written(here, rewards=[{"file": "graded.py"}])  # type: ignore[arg-type]
    assert packed(recipe, tmp_path / "job") == {"mine.yaml", "graded.py", "helper.py"}


def test_a_recipe_s_name_is_free_in_the_job(here: Path, tmp_path: Path) -> None:
    recipe = written(here).rename(here / "grpo")
    with pytest.raises(UserError, match=r"grpo: another file of the upload is called grpo; give the recipe another"):
        packed(recipe, tmp_path / "job")


def test_two_files_of_one_place_are_refused(here: Path, tmp_path: Path) -> None:
    (tmp_path / "recipes").mkdir()
    recipe = written(tmp_path / "recipes", rewards=[{"file": "a.py"}, {"file": "b.py"}])  # type: ignore[arg-type]
    for path, source in ((here / "a.py", "import same"), (tmp_path / "recipes" / "b.py", "import same")):
        path.write_text(source)
        (path.parent / "same.py").write_text(f"# {path}")
    with pytest.raises(
        UserError, match=r"rewards\[1\].file=b.py: .*recipes/same.py and .*here/same.py would both be same.py"
    ):
        packed(recipe, tmp_path / "job")


def test_too_much_is_refused_with_the_largest_file(here: Path, tmp_path: Path) -> None:
    recipe = written(here)
    (here / "reward.py").write_text("import large\ndef reward(completion, row):\n    return 1.0\n")
    (here / "large.py").write_text(f"WORDS = '{'x' * 11 * 2**20}'\n")
    with pytest.raises(
        UserError, match=r"^1[12]\.\d MiB would be uploaded, and the limit is 10: the largest .*large.py \(11.0 MiB"
    ):
        packed(recipe, tmp_path / "job")
    assert not list((tmp_path / "job").iterdir())


@pytest.mark.parametrize(
    ("override", "words"),
    [
        (
            "model.path=base",
            r"model.path=base is not sent with the job: .*\(here it is .*/here/base\), or a hub id",
        ),
        ("model.path=./nowhere", r"model.path=./nowhere is not sent"),
        ("model.path=~/base", r"model.path=~/base is not sent"),
        ("data.train=train.jsonl", r"data.train\[0\].path=train.jsonl is not sent"),
        ("data.train=base:main", r"data.train\[0\].path=base:main is not sent"),
        ("data.eval.sets=a/b/c", r"data.eval.sets\[0\].path=a/b/c is not sent"),
        ("run.dir=runs", r"run.dir=runs would be in the working directory of the job"),
        ("cluster.address=1.2.3.4:6379", r"cluster.address=1.2.3.4:6379: .* --address; leave it out"),
        ("cluster.cpus=64", r"cluster.cpus=64 has no effect on a cluster that runs already"),
        ("cluster.gpus=8", r"cluster.gpus=8 has no effect on a cluster that runs already"),
    ],
)
def test_what_means_something_here_only_is_refused(here: Path, tmp_path: Path, override: str, words: str) -> None:
    (here / "base").mkdir()
    with pytest.raises(UserError, match=f"^{words}"):
        packed(written(here), tmp_path / "job", override)


def test_every_option_that_means_something_here_only_is_named(here: Path, tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"^model.path=./base is not sent.*; data.train\[0\].path=./rows.jsonl is not"):
        packed(written(here), tmp_path / "job", "model.path=./base", "data.train=./rows.jsonl")


def test_only_a_dry_run_does_without_an_address(here: Path, capsys: pytest.CaptureFixture[str]) -> None:
    recipe = written(here)
    assert main(["submit", str(recipe), "run.dir=/shared/runs", "--dry-run"]) == 0
    assert "nothing has been submitted" in capsys.readouterr().out
    assert main(["submit", str(recipe), "run.dir=/shared/runs"]) == 2
    assert "grpo submit needs --address http://HEAD:8265" in capsys.readouterr().err


def test_hub_ids_travel_as_they_are(here: Path, tmp_path: Path) -> None:
    packed(
        written(here), tmp_path / "job", "model.path=owner/name", "data.train=owner/data:main", resume="/shared/runs/a"
    )
    assert config_module.load(tmp_path / "job" / "mine.yaml").data.train[0].path == "owner/data:main"


def test_resume_names_a_folder_that_the_job_sees(here: Path, tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"^resume=runs/a: give auto, or an absolute path"):
        packed(written(here), tmp_path / "job", resume="runs/a")


def test_secrets_do_not_travel(here: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("JUDGE_TOKEN", "sesame-open")
    recipe = written(here, data={"template": "${oc.env:JUDGE_TOKEN}"})
    with pytest.raises(UserError, match="JUDGE_TOKEN"):
        packed(recipe, tmp_path / "job")


def test_variables_are_given_or_taken_from_here(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TAKEN", "a=b")
    assert parse_env(["GIVEN=x=y", "TAKEN", "EMPTY="]) == {"GIVEN": "x=y", "TAKEN": "a=b", "EMPTY": ""}
    with pytest.raises(UserError, match=r"^--env MISSING: it is not set on this machine; give MISSING=VALUE"):
        parse_env(["MISSING"])
    with pytest.raises(UserError, match=r"^--env takes NAME=VALUE") as raised:
        parse_env(["=sesame"])
    assert "sesame" not in str(raised.value)


@pytest.mark.parametrize("code", [0, 75])
def test_the_entrypoint_outlives_sigterm_and_says_how_the_run_ended(code: int, tmp_path: Path) -> None:
    """Ray sends the signal to the shell and to what it has started."""
    fake = tmp_path / "python"
    fake.write_text(f'#!/bin/sh\necho "$@"\nkill -TERM $PPID\nsleep 0.2\nexit {code}\n')
    fake.chmod(0o755)
    line = entrypoint("a b.yaml", {"resume": "auto"})
    ended = subprocess.run(line, shell=True, env={"PATH": f"{tmp_path}:/bin:/usr/bin"}, capture_output=True, text=True)
    assert ended.stdout == f"-m grpo train a b.yaml resume=auto\ngrpo: exit code {code}\n"
    assert ended.returncode == code


class Job:
    """Of a job that was stopped: Ray has no exit code, and its log."""

    driver_exit_code = None

    def __init__(self, log: str) -> None:
        self.log = log

    def get_job_logs(self, job: str) -> str:
        return self.log


@pytest.mark.parametrize(
    ("log", "code"),
    [
        ("step 1\ngrpo: exit code 75\n", 75),
        ("grpo: exit code 75\nand then it was killed\n", None),
        ("a reward says: grpo: exit code 0", None),
        ("", None),
    ],
)
def test_the_exit_code_of_a_stopped_job_is_its_last_line(log: str, code: int | None) -> None:
    assert exit_code(Job(log), "job", Job(log)) == code


@pytest.mark.parametrize("cpus", [-1.0, float("nan"), float("inf")])
def test_a_driver_s_cpus_are_a_number(here: Path, cpus: float) -> None:
    recipe = written(here)
    config = config_module.load(recipe)
    with pytest.raises(UserError, match=r"^--driver-cpus must be a number that is not negative, not"):
        jobs.submit(config, recipe, {}, address="http://head", env=[], then="end", driver_cpus=cpus)


@pytest.mark.parametrize(
    ("address", "words"),
    [
        ("127.0.0.1:8265", "is not of the form http://HEAD:8265"),
        ("ray://head:10001", "is not of the form"),
        ("http://:8265", "is not of the form"),
        ("http://head:port", "is not of the form"),
        ("http://127.0.0.1:9", "nothing answers there"),
        ("http://[::1", "is not of the form"),
        ("http://a..b:8265", "nothing answers there"),
    ],
)
def test_an_address_where_no_job_server_is(address: str, words: str) -> None:
    with pytest.raises(UserError, match=f"^--address {re.escape(address)}:? {words}"), answers(address):
        pass


@pytest.mark.parametrize("address", ["http://me:sesame@127.0.0.1:9", "http://me:sesame@[::1", "me:sesame@head"])
def test_an_address_takes_no_password(address: str) -> None:
    with pytest.raises(UserError, match=r"^--address must not contain a user or password") as raised, answers(address):
        pass
    assert "sesame" not in str(raised.value)


@pytest.mark.parametrize("job", ["", "..", "../version", "a/b", "a b", "a?b", ".hidden", "jöb"])
@pytest.mark.parametrize("command", ["status", "logs", "stop"])
def test_a_name_that_no_job_has_is_not_sent_to_the_server(
    command: str, job: str, capsys: pytest.CaptureFixture[str]
) -> None:
    """It would be another address there: of all jobs, or of no job."""
    assert main([command, job, "--address", "http://127.0.0.1:9"]) == 2
    assert capsys.readouterr().err.startswith(f"grpo: {job!r} is not a job name, which has letters, digits, ")


def test_a_pipe_without_a_reader_ends_a_command_without_words() -> None:
    read, write = os.pipe()
    os.close(read)
    with open(write, "w") as nobody:
        options = subprocess.run(
            [sys.executable, "-m", "grpo", "options"], stdout=nobody, stderr=subprocess.PIPE, text=True, timeout=60,
            cwd=ROOT,
        )  # fmt: skip
    assert (options.returncode, options.stderr) == (130, "")


@pytest.fixture
def answering() -> Iterator[Callable[[bytes | None], str]]:
    """Starts a server that gives every request one body, or no answer at all; gives its address."""
    with contextlib.ExitStack() as stack:

        def serve(body: bytes | None) -> str:
            listening = stack.enter_context(socket.create_server(("127.0.0.1", 0)))

            def accept() -> None:
                with contextlib.suppress(OSError):  # closed
                    while True:
                        client = stack.enter_context(listening.accept()[0])
                        if body is not None and client.recv(1 << 16):
                            client.sendall(b"HTTP/1.1 200 OK\r\nContent-Length: %d\r\n\r\n%s" % (len(body), body))

            threading.Thread(target=accept, daemon=True).start()
            stack.callback(listening.shutdown, socket.SHUT_RDWR)
            return f"http://127.0.0.1:{listening.getsockname()[1]}"

        yield serve


SAYS = """
import sys
from grpo.cluster import jobs
from grpo.types import ExitCode, UserError
jobs.ANSWER_S = 0.2
for address in sys.argv[1:]:
    for command in (jobs.status, jobs.stop, jobs.follow):
        try:
            command("job", address)
        except UserError as error:
            print(error)
"""
"""In a process of its own: Ray keeps the first token that it is given."""


def test_what_answers_is_no_job_server_or_answers_nothing(answering: Any) -> None:
    odd = [answering(body) for body in (b"[]", b"3", b"<html>", b'{"other": 1}')]
    silent = answering(None)
    ended = subprocess.run(
        [sys.executable, "-c", SAYS, *odd, silent], env=os.environ | {"RAY_AUTH_TOKEN": "a" * 32}, capture_output=True,
        text=True, timeout=60, cwd=ROOT,
    )  # fmt: skip
    lines = ended.stdout.splitlines()
    words = "the server there is not a job server of Ray"
    expected = [f"--address {address}: {words}" for address in odd for _ in range(3)]
    assert lines[:12] == expected, ended.stderr
    assert [re.sub(".*Read timed out.*", "late", line) for line in lines[12:]] == ["late"] * 3
    assert all(line.startswith(f"--address {silent}: ") for line in lines[12:])


class Nodes:
    """What Ray's state interface says of the nodes."""

    def __init__(self, *cpus: float, state: str = "ALIVE") -> None:
        self.nodes = [
            {"node_ip": f"10.0.0.{i}", "state": state, "resources_total": {"CPU": cpu} if cpu else {}}
            for i, cpu in enumerate(cpus)
        ]

    def _do_request(self, *what: Any, **options: Any) -> Any:
        answer = {"data": {"result": {"result": self.nodes}}}
        return SimpleNamespace(raise_for_status=lambda: None, json=lambda: answer)


def test_cpus_that_no_node_has_are_refused_before_ray_waits_for_them() -> None:
    jobs.refuse_unplaceable(Nodes(2, 8), 8)
    jobs.refuse_unplaceable(Nodes(), 0)
    with pytest.raises(UserError) as raised:
        jobs.refuse_unplaceable(Nodes(0, 2), 2.5)
    assert str(raised.value) == (
        "--driver-cpus 2.5: no node has so many CPUs; there is 10.0.0.0 with 0, 10.0.0.1 with 2; nearest: 2"
    )
    several = Nodes(1, 8, 1)
    for node in several.nodes:
        node["node_ip"] = "10.0.0.1"
    jobs.refuse_unplaceable(several, 8)
    with pytest.raises(UserError, match="there is no node"):
        jobs.refuse_unplaceable(Nodes(8, state="DEAD"), 1)


class Server:
    """A job server by a script: what comes of each attempt to follow; and whether the job was asked to stop."""

    def __init__(self, *attempts: list[str | BaseException]) -> None:
        self.attempts, self.stopped, self.submitted = [*attempts], 0, dict[str, Any]()

    @contextmanager
    def answers(self, address: str) -> Iterator[Any]:
        yield self

    def get_job_info(self, job: str) -> Any:
        return SimpleNamespace(status=SimpleNamespace(is_terminal=lambda: True), driver_exit_code=75)

    def stop_job(self, job: str) -> None:
        self.stopped += 1

    def printed(self, client: Any, job: str) -> Iterator[str]:
        for one in self.attempts.pop(0):
            if isinstance(one, BaseException):
                raise one
            yield one


@pytest.fixture
def followed(monkeypatch: pytest.MonkeyPatch) -> Callable[..., int]:
    def run(server: Server, **options: bool) -> int:
        monkeypatch.setattr(jobs, "answers", server.answers)
        monkeypatch.setattr(jobs, "printed", server.printed)
        monkeypatch.setattr(jobs, "POLL_S", 0)
        return jobs.follow("job", "http://head", **options)

    return run


AWAY = UserError("--address http://head: nothing answers there")


def test_a_server_that_comes_back_is_followed_on(followed: Any, capsys: pytest.CaptureFixture[str]) -> None:
    """Nothing is said twice; also where the job has said nothing yet."""
    assert followed(Server([AWAY], ["one\n", "two", AWAY], ["one\ntwo\n", "three\n"]), known=True) == 75
    assert capsys.readouterr().out == "one\ntwo\nthree\n"


def test_a_signal_reaches_the_job_once_its_server_answers(
    followed: Any, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Also one that comes between two attempts."""
    server = Server(["one\n", KeyboardInterrupt()], ["one\n", "two\n"])
    assert followed(server, stop_on_signal=True) == 75
    assert server.stopped == 1
    server, pauses = Server(["one\n", AWAY], ["one\n", "two\n"]), [KeyboardInterrupt()]

    def sleep(seconds: float) -> None:
        if pauses:
            raise pauses.pop()

    monkeypatch.setattr(jobs.time, "sleep", sleep)
    assert followed(server, stop_on_signal=True) == 75
    assert server.stopped == 1
    assert capsys.readouterr().out.count(" to finish its step, save and end") == 2


def test_a_stop_is_asked_again_where_the_server_was_away(followed: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    server = Server(["one\n", KeyboardInterrupt()], ["one\n"])
    refusals: list[Exception] = [AWAY]

    def stop_job(job: str) -> None:
        if refusals:
            raise refusals.pop()
        server.stopped += 1

    monkeypatch.setattr(server, "stop_job", stop_job)
    assert followed(server, stop_on_signal=True) == 75
    assert server.stopped == 1


def test_ctrl_c_while_a_server_is_away_ends_the_following(
    followed: Any, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def sleep(seconds: float) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(jobs.time, "sleep", sleep)
    assert followed(Server(["one\n", AWAY])) == ExitCode.DETACHED
    assert "no longer following the job, which continues. Follow it: grpo logs job" in capsys.readouterr().out


def test_ctrl_c_while_a_job_ends_leaves_it_to_its_end(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    server = Server()

    def sleep(seconds: float) -> None:
        raise KeyboardInterrupt

    running = SimpleNamespace(status=SimpleNamespace(is_terminal=lambda: False))
    monkeypatch.setattr(server, "get_job_info", lambda job: running)
    monkeypatch.setattr(jobs, "answers", server.answers)
    monkeypatch.setattr(jobs.time, "sleep", sleep)
    assert jobs.stop("job", "http://head") == ExitCode.DETACHED
    assert server.stopped == 1
    assert "no longer waiting; the job will still end" in capsys.readouterr().out


def test_a_job_that_never_begins_is_not_waited_for_without_end(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    server = Server()
    status = type("Status", (str,), {"is_terminal": lambda self: False})("PENDING")
    monkeypatch.setattr(
        server, "get_job_info", lambda job: SimpleNamespace(status=status, message="It waits for CPUs.")
    )
    monkeypatch.setattr(jobs, "answers", server.answers)
    monkeypatch.setattr(jobs, "PENDING_S", 0)
    assert jobs.stop("job", "http://head") == ExitCode.INTERNAL
    assert server.stopped == 1
    assert "it has not begun: It waits for CPUs. It ends as soon as it begins" in capsys.readouterr().out


class Silent:
    """A job that says "begun" late."""

    def __init__(self, status: str) -> None:
        self.status, self.asked = status, 0

    def get_job_info(self, job: str) -> Any:
        self.asked += 1
        return SimpleNamespace(status=self.status, message="It waits.")

    async def tail_job_logs(self, job: str) -> AsyncIterator[str]:
        while self.asked < 3:
            await asyncio.sleep(0.01)
        yield "begun\n"


@pytest.mark.parametrize(("status", "said"), [("PENDING", "grpo: It waits.\n"), ("RUNNING", "")])
def test_the_server_of_a_job_that_says_nothing_is_asked(
    status: str, said: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Nothing of what it says at last is lost, and that it waits is said once."""
    monkeypatch.setattr(jobs, "QUIET_S", 0.05)
    assert list(jobs.printed(Silent(status), "job")) == ["begun\n"]
    assert capsys.readouterr().out == said


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGUSR1, signal.SIGINT])
def test_a_signal_in_the_handing_over_is_the_jobs_where_signals_are(
    here: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], number: signal.Signals
) -> None:
    """The job's name is said all the same."""
    server = Server(["one\n"])

    def submit_job(**options: Any) -> None:
        os.kill(os.getpid(), number)
        server.submitted = options

    monkeypatch.setattr(jobs, "answers", server.answers)
    monkeypatch.setattr(jobs, "printed", server.printed)
    monkeypatch.setattr(server, "submit_job", submit_job, raising=False)
    recipe, then = written(here), "follow, stop on signals"
    assert jobs.submit(config_module.load(recipe), recipe, {}, address="http://head", env=[], then=then) == 75
    assert f"submitted  {server.submitted['submission_id']}: " in capsys.readouterr().out
    assert server.stopped == 1


def test_ctrl_c_as_a_job_is_handed_over_names_it(
    here: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """It may have begun: its name is made here."""
    server = Server()

    def submit_job(**options: Any) -> None:
        server.submitted = options
        raise KeyboardInterrupt

    monkeypatch.setattr(jobs, "answers", server.answers)
    monkeypatch.setattr(server, "submit_job", submit_job, raising=False)
    recipe = written(here)
    code = jobs.submit(config_module.load(recipe), recipe, {}, address="http://head", env=[], then="follow")
    assert code == ExitCode.DETACHED
    assert server.submitted["runtime_env"]["env_vars"] == {"RAY_JOB_STOP_WAIT_TIME_S": "180"}  # run.grace_s + 60
    job = server.submitted["submission_id"]
    assert f"grpo stop {job} --address http://head" in capsys.readouterr().out


class Status(str):
    """A job's status, as Ray has it."""

    def is_terminal(self) -> bool:
        return self not in ("PENDING", "RUNNING")


def job(name: str | None, status: str, start: int, **more: Any) -> SimpleNamespace:
    """What Ray says of a job; `start` in minutes."""
    details = {"driver_exit_code": None, "end_time": None, "metadata": {"grpo": "0.1.0"}} | more
    return SimpleNamespace(
        submission_id=name, status=Status(status), start_time=start * 60_000 if start else None, **details
    )


@pytest.fixture
def utc(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    monkeypatch.setenv("TZ", "UTC")
    time.tzset()
    yield
    monkeypatch.undo()
    time.tzset()


@pytest.mark.usefixtures("utc")
def test_jobs_are_listed_the_newest_first(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    """Without what others have submitted; the code of a stopped one is its last line, where its log is still there."""
    server = Server()
    logs = {"grpo-stopped": "step 1\ngrpo: exit code 75\n"}
    done = {"run": "first", "recipe": "a.yaml", "grpo": "0.1.0"}
    every = [
        job("grpo-done", "SUCCEEDED", 1, driver_exit_code=0, end_time=120_000, metadata=done),
        job("grpo-going", "RUNNING", 4, metadata=done | {"run": "a-rather-long-name"}),
        job("grpo-stopped", "STOPPED", 2, end_time=180_000, metadata=done | {"run": "second"}),
        job("grpo-gone", "FAILED", 3, end_time=190_000),
        job("grpo-waits", "PENDING", 0),
        job("raysubmit_x", "RUNNING", 5, metadata={}),
        job(None, "RUNNING", 5, metadata=None),
    ]

    def get_job_logs(name: str) -> str:
        if name not in logs:
            raise RuntimeError("its node is gone")
        return logs[name]

    monkeypatch.setattr(server, "list_jobs", lambda: every, raising=False)
    monkeypatch.setattr(server, "get_job_logs", get_job_logs, raising=False)
    monkeypatch.setattr(jobs, "answers", server.answers)
    assert jobs.jobs("http://head") == 0
    assert capsys.readouterr().out.splitlines() == [
        "job           status     run                 recipe  started              ended                exit",
        "grpo-going    RUNNING    a-rather-long-name  a.yaml  1970-01-01 00:04:00",
        "grpo-gone     FAILED                                 1970-01-01 00:03:00  1970-01-01 00:03:10",
        "grpo-stopped  STOPPED    second              a.yaml  1970-01-01 00:02:00  1970-01-01 00:03:00  75",
        "grpo-done     SUCCEEDED  first               a.yaml  1970-01-01 00:01:00  1970-01-01 00:02:00  0",
        "grpo-waits    PENDING",
    ]
    every.clear()
    assert jobs.jobs("http://head") == 0
    assert capsys.readouterr().out == "no run has been submitted to http://head\n"


def test_jobs_of_a_cluster_that_does_not_answer(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["jobs", "--address", "http://127.0.0.1:9"]) == 2
    assert capsys.readouterr().err.startswith("grpo: --address http://127.0.0.1:9: nothing answers there")


def test_a_dry_run_checks_and_asks_no_server(here: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Port 9 has none."""
    recipe, address = written(here), ["--address", "http://127.0.0.1:9", "--dry-run"]
    assert main(["submit", str(recipe), *address]) == 0
    assert re.fullmatch(r"packed     \d\.\d\d MiB; nothing has been submitted\n", capsys.readouterr().out)
    assert main(["submit", str(recipe), "cluster.address=auto", *address]) == 2
    assert "a submitted run joins the cluster of --address" in capsys.readouterr().err


@pytest.mark.parametrize("flag", [[], ["--queue"]])
def test_a_run_that_is_submitted_may_queue(here: Path, monkeypatch: pytest.MonkeyPatch, flag: list[str]) -> None:
    """The job finds it in its recipe."""
    server, recipes = Server(), []

    def submit_job(**options: Any) -> None:
        server.submitted = options
        recipes.append(config_module.load(Path(options["runtime_env"]["working_dir"]) / "mine.yaml"))

    monkeypatch.setattr(jobs, "answers", server.answers)
    monkeypatch.setattr(server, "submit_job", submit_job, raising=False)
    recipe = written(here)
    assert main(["submit", str(recipe), "--no-follow", "--address", "http://head", *flag]) == 0
    assert [config.cluster.queue for config in recipes] == [bool(flag)]
    assert server.submitted["metadata"]["run"] == "mine"
