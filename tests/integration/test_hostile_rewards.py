"""Hostile reward functions in real processes: each is bounded, the next sample is scored normally, nothing is left.

One worker, one group of three completions: an honest one, the attack, an honest one.
"""

from __future__ import annotations

import re
import time
from collections.abc import Iterator
from pathlib import Path

import psutil
import pytest

from grpo.config import RewardConfig
from grpo.rewards import reaper, worker
from grpo.rewards.groups import RewardItem
from grpo.rewards.pool import RewardPool
from grpo.rewards.process import scrubbed
from grpo.types import Failed, Scored

PROLOGUE = """
import builtins, ctypes, json, math, os, pickle, resource, signal, subprocess, sys, threading, time

def detach():
    '''A process that has left its session, its parent and its environment.'''
    subprocess.Popen(
        [sys.executable, "-c", "import os, time\\nif os.fork(): os._exit(0)\\nos.setsid()\\ntime.sleep(600)"],
        env={}, start_new_session=True,
    ).wait()

def childless():
    try:
        os.waitid(os.P_ALL, 0, os.WEXITED | os.WNOHANG | os.WNOWAIT)
    except ChildProcessError:
        return True

def around():
    return (os.getcwd(), sys.getrecursionlimit(), json.loads("[1, 2]"), resource.getrlimit(resource.RLIMIT_CPU),
            signal.getsignal(signal.SIGCHLD), signal.getitimer(signal.ITIMER_VIRTUAL), os.fstat(1).st_ino,
            childless(), sys.stdout is None)

BEFORE = around()

def f(completion, row):
    if completion == "honest":
        if around() != BEFORE:
            raise RuntimeError("the call before has left its mark")
        return float(len(json.dumps([1, 2])) + math.floor(0.5))
    return attack()
"""
HONEST = 6.0
MEMORY_GIB = 0.75

KIT: dict[str, tuple[str, str, str]] = {
    # name: (body of attack(), outcome, what is said; outcome a number where the call's own answer counts)
    "spins in Python": ("while True: pass", "timeout", "ran longer than 1 s"),
    "spins in C, deaf to signals": (
        "for n in range(1, 32):\n    try: signal.signal(n, signal.SIG_IGN)\n    except OSError: pass\n9 ** 9 ** 9",
        "timeout",
        "ran longer than 1 s",
    ),
    "sleeps in a thread that will not end": (
        "t = threading.Thread(target=time.sleep, args=(600,)); t.start(); t.join()",
        "timeout",
        "ran longer than 1 s",
    ),
    "stops itself": ("os.kill(os.getpid(), signal.SIGSTOP)", "timeout", "ran longer than 1 s"),
    "leaves by os._exit": ("os._exit(7)", "worker_died", "exited with code 7"),
    "leaves by sys.exit": ("sys.exit(7)", "exception", "SystemExit: 7"),
    "crashes in C": ("ctypes.string_at(0)", "worker_died", "killed by SIGSEGV"),
    "raises what cannot be shown": (
        "class Bad(Exception):\n    def __str__(self): raise RuntimeError\nraise Bad",
        "exception",
        "its message cannot be printed",
    ),
    "recurses for ever": ("return attack()", "exception", "RecursionError"),
    "allocates 50 GB": ("x = bytearray(50 * 2**30)", "exception", "MemoryError"),
    "grows without end": (
        "x = []\nwhile True: x.append(bytearray(2**24))", "exception", "MemoryError",
    ),
    "lets others grow": (
        "for _ in range(4):\n    if os.fork() == 0:\n        x = b'x' * 2**28; time.sleep(60)\ntime.sleep(60)",
        "worker_died",
        "used more than memory_gib=0.75",
    ),
    "forks without end": (
        "while os.fork(): pass\ntime.sleep(600)", "worker_died", f"more than {reaper.MAX_PROCESSES} processes",
    ),
    "answers twice": ("os.fork(); return 1.0", "1.0", ""),
    "prints gigabytes": ("while True: os.write(1, b'x' * 2**20)", "exception", "File too large"),
    "writes a huge file": (
        "with open('huge', 'wb') as out:\n    while True: out.write(bytes(2**24))", "exception", "File too large",
    ),
    "leaves a daemon": ("detach(); return 1.0", "1.0", ""),
    "leaves a daemon and dies": ("detach(); os._exit(3)", "worker_died", "exited with code 3"),
    "leaves a daemon and hangs": ("detach(); time.sleep(600)", "timeout", "ran longer than 1 s"),
    "replaces a built-in": ("builtins.len = lambda x: 0; return 1.0", "1.0", ""),
    "replaces json": ("json.dumps = lambda *a, **k: 'no'; return 1.0", "worker_died", "closed or broke its connection"),
    "replaces the mathematics": ("math.floor = lambda x: 1000; return 1.0", "1.0", ""),
    "sets an alarm for later": ("signal.setitimer(signal.ITIMER_REAL, 0.5); return 1.0", "1.0", ""),
    "replaces a method of json": (
        "json.JSONEncoder.encode = lambda *a: '99'; return 1.0", "worker_died", "closed or broke its connection",
    ),
    "replaces another method of json": ("json.JSONDecoder.decode = lambda *a: 99; return 1.0", "1.0", ""),
    "replaces the worker's own": ("sys.modules['__main__'].calls.number = lambda value: 7.0; return 1.0", "7.0", ""),
    "closes its prints' files": ("os.close(1); os.close(2); return 1.0", "1.0", ""),
    "sets a timer of its processor time": ("signal.setitimer(signal.ITIMER_VIRTUAL, 0.01); return 1.0", "1.0", ""),
    "limits its processor time": ("resource.setrlimit(resource.RLIMIT_CPU, (1, 1)); return 1.0", "1.0", ""),
    "limits recursion": ("sys.setrecursionlimit(30); return 1.0", "1.0", ""),
    "ignores the end of children": ("signal.signal(signal.SIGCHLD, signal.SIG_IGN); return 1.0", "1.0", ""),
    "leaves children": (
        "for _ in range(40):\n    if os.fork() == 0: time.sleep(600)\nreturn 1.0", "1.0", "",
    ),
    "shares memory without end": (
        "import mmap\nx = mmap.mmap(-1, 2**30)\nfor i in range(0, 2**30, 4096): x[i] = 1\ntime.sleep(60)",
        "worker_died",
        "used more than memory_gib=0.75",
    ),
    "walks away while forking": (
        "if os.fork() == 0:\n    os.setsid()\n    until = time.monotonic() + 20\n"
        "    while time.monotonic() < until:\n        if os.fork(): os._exit(0)\n    os._exit(0)\nreturn 1.0",
        "1.0",
        "",
    ),
    "removes the logs and dies": (
        "import glob, shutil\nshutil.rmtree('logs')\nos._exit(5)", "worker_died", "exited with code 5",
    ),
    "goes elsewhere": ("os.chdir('/'); return 1.0", "1.0", ""),
    "closes the prints": ("sys.stdout = None; return 1.0", "1.0", ""),
    "answers for others": (
        "os.write(int(sys.argv[1]), b'{}\\n'); time.sleep(60)", "worker_died", "broke its connection",
    ),
    "floods the socket": (
        "while True: os.write(int(sys.argv[1]), b'x' * 65536)", "worker_died", "broke its connection",
    ),
    "returns not a number": ("return float('nan')", "not_finite", "returned nan"),
    "returns a liar": (
        "class Liar(float):\n    def __float__(self): return float('inf')\nreturn Liar(1)", "not_finite", "inf",
    ),
}  # fmt: skip


@pytest.fixture(autouse=True)
def nothing_left() -> Iterator[None]:
    """Detached processes have no mark and no parent of ours: whatever is new on this machine and sleeps is seen."""

    def sleepers() -> set[int]:
        return {
            p.pid for p in psutil.process_iter(["cmdline"]) if "time.sleep(600)" in " ".join(p.info["cmdline"] or [])
        }

    before, children = sleepers(), set(psutil.Process().children(recursive=True))
    yield
    assert sleepers() <= before
    assert set(psutil.Process().children(recursive=True)) == children


def written(tmp_path: Path, body: str, timeout_s: float = 20.0) -> RewardConfig:
    lines = "".join(f"    {line}\n" for line in body.splitlines())
    (tmp_path / "hostile.py").write_text(f"{PROLOGUE}\ndef attack():\n{lines}")
    return RewardConfig(
        file=str(tmp_path / "hostile.py"),
        name="f",
        timeout_s=timeout_s,
        memory_gib=MEMORY_GIB,
    )


@pytest.mark.parametrize("name", KIT)
def test_an_attack_is_bounded_and_the_next_sample_scored(
    name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    body, outcome, said = KIT[name]
    reward = written(tmp_path, body, 1.0 if outcome == "timeout" else 20.0)
    row = {"answer": "2"}
    items = [
        RewardItem(completion=text, row=row, messages=None, info={}, dataset="d")
        for text in ("honest", "attack", "honest")
    ]
    monkeypatch.chdir(tmp_path)
    started = time.monotonic()
    with RewardPool([reward], files=[Path(reward.file)], workers=1, log_dir=tmp_path / "logs") as pool:
        first, attacked, last = pool.submit(items).result(timeout=60)
        [again] = pool.submit(items[:1]).result(timeout=60)
    assert time.monotonic() - started < 40
    for honest in (first, last, again):
        assert honest == Scored(value=HONEST, parts={"f": HONEST})
    if isinstance(attacked, Scored):
        assert str(attacked.value) == outcome
    else:
        assert attacked.kind == outcome
        assert said in attacked.detail
    written_bytes = sum(path.stat().st_size for path in tmp_path.rglob("*") if path.is_file())
    assert written_bytes <= 2 * worker.FILE_BYTES


def test_a_log_is_cut_before_it_grows_again(tmp_path: Path) -> None:
    reward = written(
        tmp_path, "print('x' * (worker_bytes + 1)); return 1.0".replace("worker_bytes", str(worker.LOG_BYTES))
    )
    items = [RewardItem(completion="attack", row={}, messages=None, info={}, dataset="d")] * 5
    with RewardPool([reward], files=[Path(reward.file)], workers=1, log_dir=tmp_path / "logs") as pool:
        outcomes = pool.submit(items).result(timeout=60)
    assert [o.value for o in outcomes if isinstance(o, Scored)] == [1.0] * 5
    assert (tmp_path / "logs" / "reward-worker-0.log").stat().st_size < 2 * worker.LOG_BYTES


SECRETS = {
    "HF_TOKEN": "s1", "WANDB_API_KEY": "s2", "AWS_SECRET_ACCESS_KEY": "s3", "AWS_SESSION_TOKEN": "s4",
    "DB_PASSWORD": "s5", "GOOGLE_APPLICATION_CREDENTIALS": "s6", "RAY_AUTH_TOKEN": "s7", "openai_apikey": "s8",
    "HTTPS_PROXY": "http://me:s9@proxy:80", "SSH_AUTH_SOCK": "s10", "JUDGE_KEY": "s11",
    "PGPASSWORD": "s", "MYPASSWORD": "s", "ACCESSTOKEN": "s", "GITHUB_TOKENS": "s", "API_KEYS": "s", "PRIVATEKEY": "s",
    "CLIENTSECRET": "s", "ENCRYPTIONKEY": "s", "SSHPASS": "s", "DB_PASS": "s", "MYSQL_PWD": "s", "JWT": "s",
    "AZURE_STORAGE_CONNECTION_STRING": "s", "SENTRY_DSN": "s", "SLACK_WEBHOOK_URL": "s", "X_URL": "https://s@host/a",
}  # fmt: skip
HARMLESS = {
    "PATH": "/bin",
    "TOKENIZERS_PARALLELISM": "false",
    "KEYBOARD": "de",
    "HTTP_PROXY": "http://proxy:80",
    "MONKEY": "1",
    "PWD": "/",
    "OLDPWD": "/",
    "COMPASS": "1",
    "GIT_AUTHOR_NAME": "me",
    "X_URL_WITHOUT": "https://host/a@b",
}


def test_secrets_are_recognised() -> None:
    assert scrubbed(SECRETS | HARMLESS, ()) == HARMLESS
    assert scrubbed(SECRETS | HARMLESS, {"JUDGE_KEY"}) == HARMLESS | {"JUDGE_KEY": "s11"}


def test_a_reward_sees_no_secret_but_those_it_is_given(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for name, value in SECRETS.items():
        monkeypatch.setenv(name, value)
    (tmp_path / "f.py").write_text(
        f"import os\ndef f(completion, row): raise ValueError(' '.join(os.environ.get(n, '') for n in {list(SECRETS)}))"
    )
    reward = RewardConfig(file=str(tmp_path / "f.py"), env=("JUDGE_KEY",))
    with RewardPool([reward], files=[Path(reward.file)], workers=1, log_dir=tmp_path / "logs") as pool:
        [outcome] = pool.submit([RewardItem(completion="", row={}, messages=None, info={}, dataset="d")]).result(
            timeout=60
        )
    assert isinstance(outcome, Failed)
    assert re.findall(r"\bs\d+\b", outcome.detail) == ["s11"]
