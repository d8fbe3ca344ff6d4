"""The server of the viewer: who may ask, what the responses carry, and a real one over a socket."""

from __future__ import annotations

import json
import os
import re
import signal
import subprocess
import sys
import time
import urllib.error
import urllib.request
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import pytest
from conftest import ROOT
from made_run import make_run, sample, write_samples

from grpo.types import UserError
from grpo.view.api import open_paths
from grpo.view.server import POLICY, PORT, listen, make_app

TOKEN = "a-token"
BEARER = {"authorization": f"Bearer {TOKEN}"}


class Client:
    """Sends requests to the application, without a socket."""

    def __init__(self, run: Path, port: int = 8270) -> None:
        self._app, self._base = make_app(open_paths([run]), TOKEN, port), f"http://127.0.0.1:{port}"

    def __call__(self, path: str, method: str = "GET", **headers: str) -> httpx.Response:
        import anyio

        async def ask() -> httpx.Response:
            transport = httpx.ASGITransport(app=self._app, raise_app_exceptions=False)  # type: ignore[arg-type]
            async with httpx.AsyncClient(transport=transport, base_url=self._base) as client:
                named = {name: value.encode("latin-1") for name, value in headers.items()}
                return await client.request(method, path, headers=named)

        return anyio.run(ask)


@pytest.fixture
def run(tmp_path: Path) -> Path:
    return make_run(tmp_path / "run")


@pytest.fixture
def ask(run: Path) -> Client:
    return Client(run)


def test_the_token_becomes_a_cookie_and_leaves_the_address(ask: Client) -> None:
    response = ask(f"/?token={TOKEN}")
    assert (response.status_code, response.headers["location"]) == (303, "/")
    cookie = response.headers["set-cookie"]
    assert cookie == f"grpo_view_8270={TOKEN}; HttpOnly; Path=/; SameSite=strict"
    assert ask("/", cookie=f"grpo_view_8270={TOKEN}").status_code == 200
    assert ask("/api/runs", cookie=f"other=1; grpo_view_8270={TOKEN}").status_code == 200
    assert ask("/api/runs", **BEARER).status_code == 200


@pytest.mark.parametrize(
    ("path", "headers"),
    [
        ("/", {}),
        ("/?token=", {}),
        ("/?token=a-tokem", {}),
        ("/?token=a-token2", {}),
        ("/?token=%00", {}),
        ("/api/runs", {}),
        ("/api/runs?token=a-token", {}),
        ("/static/app.js", {}),
        ("/nothing", {}),
        ("/api/runs", {"cookie": "grpo_view_8270=wrong"}),
        ("/api/runs", {"cookie": "grpo_view_8271=a-token"}),
        ("/api/runs", {"cookie": "grpo_view_8270="}),
        ("/api/runs", {"authorization": "Bearer wrong"}),
        ("/api/runs", {"authorization": "Basic a-token"}),
        ("/api/runs", {"authorization": "Bearer é"}),
        ("/api/runs", {"authorization": ""}),
    ],
)
def test_without_the_token_nothing_is_given(ask: Client, path: str, headers: dict[str, str]) -> None:
    response = ask(path, **headers)
    assert response.status_code == 401
    assert response.json() == {"error": "the token is missing or wrong; open the address that grpo view has printed"}
    assert "set-cookie" not in response.headers


@pytest.mark.parametrize(
    "host",
    ["evil.com", "evil.com:8270", "127.0.0.1", "127.0.0.1:8271", "localhost", "127.0.0.1:8270.evil.com", "",
     "127.0.0.2:8270", "[::1]", "user@127.0.0.1:8270"],
)  # fmt: skip
def test_another_host_is_refused_also_with_the_token(ask: Client, host: str) -> None:
    response = ask("/api/runs", host=host, **BEARER)
    assert response.status_code == 403
    assert response.json()["error"].startswith("this server answers only to 127.0.0.1:8270 and localhost:8270, not to")


@pytest.mark.parametrize("host", ["127.0.0.1:8270", "localhost:8270", "LOCALHOST:8270", "[::1]:8270"])
def test_our_hosts_are_served(ask: Client, host: str) -> None:
    assert ask("/api/runs", host=host, **BEARER).status_code == 200


@pytest.mark.parametrize("method", ["POST", "PUT", "DELETE", "PATCH", "OPTIONS", "TRACE", "PROPFIND"])
def test_nothing_can_be_changed(ask: Client, method: str) -> None:
    response = ask("/api/runs", method, **BEARER)
    assert response.status_code == 405
    assert response.json() == {"error": f"{method} is not allowed: the viewer only reads"}


@pytest.mark.parametrize("path", ["/", "/api/runs", "/api/nothing", "/static/style.css", "/static/nothing", "/nothing",
                                  f"/?token={TOKEN}", "/api/export?file=step-000001"])  # fmt: skip
@pytest.mark.parametrize("headers", [BEARER, {}, {"host": "evil.com"}])
def test_every_response_has_the_headers(ask: Client, path: str, headers: dict[str, str]) -> None:
    found = ask(path, **headers).headers
    assert found["content-security-policy"] == POLICY
    assert "unsafe" not in POLICY
    assert found["x-content-type-options"] == "nosniff"
    assert found["referrer-policy"] == "no-referrer"
    assert found["cross-origin-resource-policy"] == "same-origin"
    assert found["cache-control"] == "no-store"
    assert "access-control-allow-origin" not in found


def test_static_files(ask: Client) -> None:
    page = ask("/", **BEARER)
    assert page.headers["content-type"].startswith("text/html")
    assert ask("/static/app.js", **BEARER).headers["content-type"].startswith("text/javascript")
    for path in ("/static/../files.py", "/static/%2e%2e/files.py", "/static/..%2ffiles.py", "/static//etc/passwd",
                 "/static/../../../../etc/passwd", "/static/", "/static"):  # fmt: skip
        response = ask(path, **BEARER)
        assert response.status_code in (404, 405, 307), path
        assert "import" not in response.text


def test_errors_are_json(ask: Client) -> None:
    assert ask("/api/runs/5", **BEARER).status_code == 404
    response = ask("/api/runs/0/samples/step-000001?filter=reward %3C 1 and lenght %3E 2", **BEARER)
    assert response.status_code == 400
    assert response.json() == {"error": "filter: there is no column 'lenght'; did you mean length?", "position": 15}
    response = ask("/nothing", **BEARER)
    assert (response.status_code, [*response.json()]) == (404, ["error"])


def test_a_bug_of_the_viewer_is_one_sentence(ask: Client, monkeypatch: pytest.MonkeyPatch) -> None:
    from grpo.view import runs

    def broken(opened: Any) -> Any:
        raise ZeroDivisionError("secret")

    monkeypatch.setattr(runs, "runs_answer", broken)
    response = ask("/api/runs", **BEARER)
    assert response.status_code == 500
    assert response.json() == {"error": "the viewer failed: ZeroDivisionError; its console has the traceback"}


def test_an_export_is_a_download(ask: Client) -> None:
    response = ask("/api/export?file=step-000001&filter=reward == 1", **BEARER)
    assert response.headers["content-type"].startswith("application/x-ndjson")
    assert response.headers["content-disposition"] == 'attachment; filename="samples.jsonl"'
    assert [json.loads(line)["completion"] for line in response.text.splitlines()] == ["It is 0.", "It is 1."]


HOSTILE = [
    "<script>alert(1)</script>",
    '"><img src=x onerror=alert(1)>',
    "</script><!--",
    "\u202eevil\u202c\u2028\u2029\u0000\x1b[2J",
    "a" * 1_000_000,
    "\U0001f600" * 10,
]


@pytest.mark.parametrize("text", HOSTILE, ids=lambda text: repr(text[:12]))
def test_hostile_completions_are_data(run: Path, text: str) -> None:
    """They travel inside JSON, which no browser runs, and come back as they were."""
    write_samples(run, "step-000003", [sample(completion=text, prompt=text, extracted=text)])
    ask = Client(run)
    response = ask("/api/runs/0/samples/step-000003/groups/0", **BEARER)
    assert response.headers["content-type"] == "application/json"
    assert response.json()["completions"][0]["text"] == text[:200_000]
    assert response.json()["completions"][0]["truncated_text"] == (len(text) > 200_000)
    assert response.json()["prompt"] == text
    assert len(ask("/api/runs/0/samples/step-000003", **BEARER).content) < 20_000
    found = ask(f"/api/search?q={'a' * 500 if len(text) > 1000 else 'nothing of this'}", **BEARER).json()
    assert all(len(hit["after"]) <= 60 for hit in found["hits"])


def test_the_port_is_the_first_free_one() -> None:
    first = listen(None)
    with first:
        second = listen(None)
        with second:
            assert PORT <= first.getsockname()[1] < second.getsockname()[1]
            assert second.getsockname()[0] == "127.0.0.1"
            taken = first.getsockname()[1]
            with pytest.raises(
                UserError, match=rf"--port {taken}: Address already in use; --port 0 uses any free port"
            ):
                listen(taken)


# --- a real server ----------------------------------------------------------------------------------------------------


@pytest.fixture
def server(run: Path) -> Iterator[tuple[subprocess.Popen[str], str, str]]:
    """A `grpo view` process, its address and its token."""
    command = [sys.executable, "-m", "grpo", "view", str(run), "--port", "0"]
    environment = os.environ | {"PYTHONPATH": str(ROOT)}
    with subprocess.Popen(
        command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env=environment
    ) as process:
        try:
            assert process.stdout is not None
            line = process.stdout.readline()
            assert process.stdout.readline() == "Ctrl-C ends it\n"
            named = re.fullmatch(r"grpo view: (http://127\.0\.0\.1:\d+)/\?token=([\w-]{32})\n", line)
            assert named is not None, (line, process.poll())
            yield process, named[1], named[2]
        finally:
            process.kill()


def fetch(url: str, token: str) -> Any:
    request = urllib.request.Request(url, headers={"Authorization": f"Bearer {token}"})
    with urllib.request.urlopen(request, timeout=30) as response:
        return json.load(response)


def test_a_server_that_runs(server: tuple[subprocess.Popen[str], str, str], run: Path) -> None:
    process, address, token = server
    deadline = time.monotonic() + 60
    while True:
        try:
            assert fetch(f"{address}/api/runs", token)["runs"][0]["steps"] == 2
            break
        except urllib.error.URLError:
            assert time.monotonic() < deadline
            time.sleep(0.1)
    with pytest.raises(urllib.error.HTTPError, match="401"):
        fetch(f"{address}/api/runs", "wrong")
    # samples that appear while it runs
    write_samples(run, "step-000003", [sample(9, 0)])
    assert fetch(f"{address}/api/runs/0/samples/step-000003", token)["total_rows"] == 1
    with pytest.raises(urllib.error.HTTPError, match="404"):
        fetch(f"{address}/api/runs/0/samples/step-000004", token)
    process.send_signal(signal.SIGINT)
    out, errors = process.communicate(timeout=30)
    assert process.returncode == 0, errors
    assert (out, errors) == ("", "\n")


def test_the_viewer_loads_no_engine() -> None:
    """Neither the server nor the terminal view imports torch, ray, vllm or transformers."""
    code = (
        "import sys, grpo.commands.view, grpo.view.server, grpo.view.text, grpo.view.export\n"
        "print(sorted({'torch', 'ray', 'vllm', 'transformers', 'deepspeed'} & {*sys.modules}))"
    )
    environment = os.environ | {"PYTHONPATH": str(ROOT)}
    found = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, env=environment, check=True)
    assert found.stdout == "[]\n"
