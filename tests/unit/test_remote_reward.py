"""The HTTP reward against a real server on the loopback interface."""

from __future__ import annotations

import contextlib
import json
import re
import sys
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import pytest

from grpo.config import RewardConfig
from grpo.rewards.groups import RewardItem
from grpo.rewards.pool import RewardPool
from grpo.types import Failed, Scored

sys.path.append(str(Path(__file__).parents[2] / "reward_fns"))  # behind recipes/, which has an arithmetic.py too
import remote as module
from remote import remote

Answer = tuple[int, bytes | Iterator[bytes]]
"""Status, and the body: whole, or in parts."""


class Service:
    """Answers by `judge`; knows what it was sent, and how many requests it had at once."""

    def __init__(self) -> None:
        self.judge: Callable[[Any], Answer] = lambda body: (
            200,
            json.dumps({"reward": len(body["completion"])}).encode(),
        )
        self.headers: dict[str, str] = {}
        self.written = 0
        self.bodies: list[Any] = []
        self.tokens: list[str | None] = []
        self.paths: list[str] = []
        self.now = self.most = 0
        lock, service = threading.Lock(), self

        class Handler(BaseHTTPRequestHandler):
            protocol_version = "HTTP/1.1"

            def do_POST(self) -> None:
                body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
                with lock:
                    service.now += 1
                    service.most = max(service.most, service.now)
                    service.bodies.append(body)
                    service.paths.append(self.path)
                    service.tokens.append(self.headers["Authorization"])
                status, answer = service.judge(body)
                with lock:
                    service.now -= 1
                self.send_response(status)
                for name, value in service.headers.items():
                    self.send_header(name, value)
                if isinstance(answer, bytes):
                    self.send_header("Content-Length", str(len(answer)))
                else:
                    self.close_connection = True
                self.end_headers()
                with contextlib.suppress(OSError):  # nobody listens any more
                    for part in [answer] if isinstance(answer, bytes) else answer:
                        self.wfile.write(part)
                        service.written += len(part)

            def log_message(self, *_: Any) -> None:
                """Say nothing."""

        self.server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self.url = f"http://127.0.0.1:{self.server.server_port}/score"


@pytest.fixture
def service(monkeypatch: pytest.MonkeyPatch) -> Iterator[Service]:
    made = Service()
    thread = threading.Thread(target=made.server.serve_forever)
    thread.start()
    for name in ("REWARD_TOKEN", "REWARD_CONCURRENCY", "REWARD_TIMEOUT_S", "REWARD_RETRIES"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("REWARD_URL", made.url)
    module._client.cache_clear()
    yield made
    module._client(16, 3, 10.0).clear()
    made.server.shutdown()
    made.server.server_close()
    thread.join()


def test_each_completion_is_asked_about_with_its_row(service: Service) -> None:
    assert remote(["a", "bcd"], prompts=["p", "p"], answer=["1", "2"], level=[3, 4]) == [1, 3]
    assert sorted(service.bodies, key=str) == [
        {"completion": "a", "row": {"answer": "1", "level": 3}},
        {"completion": "bcd", "row": {"answer": "2", "level": 4}},
    ]
    assert service.tokens == [None, None]


def test_chat_completions_are_their_text_and_a_token_is_sent(service: Service, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("REWARD_TOKEN", "abc\n")  # as of a file
    assert remote([[{"role": "assistant", "content": "four"}]]) == [4]
    assert service.tokens == ["Bearer abc"]


@pytest.mark.parametrize("status", [429, 502, 503, 504])
def test_a_passing_trouble_is_tried_again(service: Service, status: int) -> None:
    seen: Counter[str] = Counter()

    def judge(body: Any) -> Answer:
        seen[body["completion"]] += 1
        return (status, b"") if seen[body["completion"]] < 3 else (200, b'{"reward": 0.5}')

    service.judge = judge
    assert remote(["a", "b"]) == [0.5, 0.5]
    assert seen == {"a": 3, "b": 3}


def test_what_fails_for_good_fails_alone(service: Service) -> None:
    answers = {
        "down": (503, b""), "wrong": (500, b"oops"), "text": (200, b"hello"), "none": (200, b'{"reward": null}'),
        "word": (200, b'{"reward": "1"}'), "true": (200, b'{"reward": true}'), "other": (200, b'{"score": 1}'),
        "moved": (302, b""), "list": (200, b"[1]"), "deep": (200, b"[" * 100_000), "good": (200, b'{"reward": -2}'),
    }  # fmt: skip
    service.judge = lambda body: answers[body["completion"]]
    found = dict(zip(answers, remote(list(answers)), strict=True))
    assert found.pop("good") == -2
    assert found.pop("none") is None
    assert all(isinstance(value, Exception) for value in found.values()), found
    assert "answered 500: b'oops'" in str(found["wrong"])
    asked = Counter(body["completion"] for body in service.bodies)
    assert asked["down"] == 4  # once, and three times again
    assert asked["wrong"] == asked["moved"] == 1


def test_no_more_at_once_than_allowed(service: Service, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("REWARD_CONCURRENCY", "3")

    def judge(body: Any) -> Answer:
        time.sleep(0.05)
        return 200, b'{"reward": 1}'

    service.judge = judge
    assert remote([str(i) for i in range(12)]) == [1] * 12
    assert service.most == 3


def test_a_silent_service_has_a_deadline(service: Service, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("REWARD_TIMEOUT_S", "0.2")
    monkeypatch.setenv("REWARD_RETRIES", "1")
    release = threading.Event()

    def judge(body: Any) -> Answer:
        release.wait(10)
        return 200, b'{"reward": 1}'

    service.judge = judge
    started = time.monotonic()
    [found] = remote(["a"])
    took = time.monotonic() - started
    release.set()
    assert isinstance(found, Exception)
    assert took < 5
    assert len(service.bodies) == 2


def test_an_answer_in_drips_and_one_without_end_are_given_up(service: Service, monkeypatch: pytest.MonkeyPatch) -> None:
    """And their place among the requests at once is free again."""
    monkeypatch.setenv("REWARD_TIMEOUT_S", "0.5")
    monkeypatch.setenv("REWARD_CONCURRENCY", "1")

    def judge(body: Any) -> Answer:
        if body["completion"] == "drips":
            return 200, (time.sleep(0.1) or b" " for _ in range(200))  # type: ignore[func-returns-value]
        if body["completion"] == "endless":
            return 200, (b" " * (1 << 18) for _ in range(1000))
        return 200, b'{"reward": 1}'

    service.judge = judge
    started = time.monotonic()
    drips, endless, good = remote(["drips", "endless", "good"])
    assert time.monotonic() - started < 8
    assert "bytes in 0.5 s and was not at its end" in str(drips)
    assert "and was not at its end" in str(endless)
    assert good == 1
    assert service.written < 100 << 20


def test_a_service_may_not_ask_for_more_patience_than_a_request_has(
    service: Service, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("REWARD_TIMEOUT_S", "0.3")
    monkeypatch.setenv("REWARD_RETRIES", "1")
    service.headers = {"Retry-After": "20"}
    service.judge = lambda body: (429, b"")
    started = time.monotonic()
    [found] = remote(["a"])
    assert isinstance(found, Exception)
    assert 0.3 <= time.monotonic() - started < 8
    assert len(service.bodies) == 2


@pytest.mark.parametrize("after", ["soon", "Fri, 31 Dec 99999999999999999999 23:59:59 GMT", "9" * 5000])
def test_a_retry_after_that_means_nothing_is_passed_over(
    after: str, service: Service, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("REWARD_RETRIES", "1")
    service.headers = {"Retry-After": after}
    service.judge = lambda body: (429, b"") if len(service.bodies) == 1 else (200, b'{"reward": 1}')
    assert remote(["a"]) == [1]


def test_the_answer_of_a_passing_trouble_is_not_read_to_its_end(
    service: Service, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Which may never come; and the place of the request is free again."""
    monkeypatch.setenv("REWARD_RETRIES", "1")
    monkeypatch.setenv("REWARD_CONCURRENCY", "1")

    def judge(body: Any) -> Answer:
        if body["completion"] == "good" or len(service.bodies) > 2:
            return 200, b'{"reward": 1}'
        return 503, (time.sleep(0.1) or b" " for _ in range(200))  # type: ignore[func-returns-value]

    service.judge = judge
    started = time.monotonic()
    down, good = remote(["down", "good"])
    assert time.monotonic() - started < 8
    assert str(down) == f"{service.url}: too many 503 error responses"
    assert good == 1
    assert [body["completion"] for body in service.bodies] == ["down", "down", "good"]


@pytest.mark.parametrize(
    ("name", "value", "words"),
    [
        ("REWARD_TOKEN", "sesame\nopen", "REWARD_TOKEN has characters that no HTTP header may have"),
        ("REWARD_TOKEN", "sesame€", "REWARD_TOKEN has characters that no HTTP header may have"),
        ("REWARD_URL", "http://me:sesame@127.0.0.1/", "REWARD_URL takes no user and no password"),
        ("REWARD_URL", "", "REWARD_URL must be set to the service's address, of the form http://HOST:PORT/PATH"),
        ("REWARD_URL", "sesame/score", "REWARD_URL must be set"),
        ("REWARD_URL", "http://host:sesame/", "REWARD_URL must be set"),
        ("REWARD_URL", "http://[sesame", "REWARD_URL must be set"),
        ("REWARD_TIMEOUT_S", "0", "REWARD_TIMEOUT_S must be a number of seconds above 0, not '0'"),
        ("REWARD_TIMEOUT_S", "inf", "REWARD_TIMEOUT_S must be a number of seconds above 0, not 'inf'"),
        ("REWARD_TIMEOUT_S", "ten", "REWARD_TIMEOUT_S must be a number of seconds above 0, not 'ten'"),
        ("REWARD_CONCURRENCY", "0", "REWARD_CONCURRENCY must be a whole number of at least 1, not '0'"),
        ("REWARD_CONCURRENCY", "x", "REWARD_CONCURRENCY must be a whole number of at least 1, not 'x'"),
        ("REWARD_RETRIES", "-1", "REWARD_RETRIES must be a whole number of at least 0, not '-1'"),
        ("REWARD_RETRIES", "", "REWARD_RETRIES must be a whole number of at least 0, not ''"),
    ],
)
def test_a_variable_that_is_not_what_it_must_be_is_named(
    name: str, value: str, words: str, service: Service, monkeypatch: pytest.MonkeyPatch
) -> None:
    """And what may be a secret is not quoted."""
    monkeypatch.setenv(name, value)
    with pytest.raises(ValueError, match=f"^{re.escape(words)}") as raised:
        remote(["a"])
    assert "sesame" not in str(raised.value)
    assert service.bodies == []


def test_a_key_in_the_address_is_sent_and_not_shown(service: Service, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("REWARD_RETRIES", "0")
    answers = {
        "wrong": (500, b""),
        "word": (200, b'{"reward": "1"}'),
        "down": (503, b""),
        "good": (200, b'{"reward": 1}'),
    }
    service.judge = lambda body: answers[body["completion"]]
    monkeypatch.setenv("REWARD_URL", f"{service.url}?key=sesame")
    wrong, word, down, good = remote(list(answers))
    assert str(wrong) == f"{service.url} answered 500: b''"
    assert str(word) == f"{service.url} answered a reward that is no number: '1'"
    assert str(down) == f"{service.url}: too many 503 error responses"
    assert good == 1
    assert set(service.paths) == {"/score?key=sesame"}
    monkeypatch.setenv("REWARD_URL", "http://127.0.0.1:9/score?key=sesame")
    [nobody] = remote(["good"])
    assert "http://127.0.0.1:9/score: " in str(nobody)
    assert "Connection refused" in str(nobody)
    assert "sesame" not in str(nobody)


def test_a_connection_is_kept(service: Service, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("REWARD_CONCURRENCY", "1")
    assert remote(["a", "bb"]) == [1, 2]
    assert remote(["ccc"]) == [3]
    [pool] = module._client(1, 3, 10.0).pools._container.values()
    assert (pool.num_connections, pool.num_requests) == (1, 3)


def test_nobody_there(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("REWARD_URL", "http://127.0.0.1:9/")
    monkeypatch.setenv("REWARD_RETRIES", "0")
    module._client.cache_clear()
    [found] = remote(["a"])
    assert isinstance(found, Exception)


def test_in_a_worker_one_failure_is_one_rollout_s(service: Service, tmp_path: Path) -> None:
    """The token is kept from rewards unless the recipe names it."""
    service.judge = lambda body: (500, b"no") if body["completion"] == "b" else (200, b'{"reward": 1}')
    reward = RewardConfig(file=str(Path(module.__file__)), style="trl")
    with RewardPool([reward], files=[Path(module.__file__)], workers=1, log_dir=tmp_path) as pool:
        items = [
            RewardItem(completion=text, row={"answer": "1"}, messages=None, info={"prompt": "p"}, dataset="train")
            for text in "abc"
        ]
        one, two, three = pool.submit(items).result(timeout=60)
    assert isinstance(one, Scored)
    assert isinstance(three, Scored)
    assert isinstance(two, Failed)
    assert two.kind == "exception"
    assert "answered 500" in two.detail
