"""The server of `grpo view`: read-only, on the loopback interface, with a token.

Every request must name this server in its Host header, so that a page of another site cannot reach it by DNS
rebinding. The first page takes the token from its URL, stores it in a cookie and removes it from the address bar.
Scripts send `Authorization: Bearer TOKEN`.
"""

from __future__ import annotations

import errno
import hmac
import secrets
import socket
from collections.abc import Callable, Iterator
from http.cookies import CookieError, SimpleCookie

import anyio
import anyio.to_thread
import uvicorn
from starlette.applications import Starlette
from starlette.exceptions import HTTPException
from starlette.requests import Request
from starlette.responses import FileResponse, RedirectResponse, Response, StreamingResponse
from starlette.routing import Mount, Route
from starlette.staticfiles import StaticFiles
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from grpo.types import Json, UserError
from grpo.view import api
from grpo.view.bundle import STATIC
from grpo.view.files import NotFoundError
from grpo.view.filters import FilterError

PORT = 8270
"""Default port; the next free one is used if it is taken."""
TRIES = 50
POLICY = (
    "default-src 'none'; script-src 'self'; style-src 'self'; img-src 'self' data:; connect-src 'self'; "
    "base-uri 'none'; form-action 'none'; frame-ancestors 'none'"
)
HEADERS = {
    "content-security-policy": POLICY,
    "x-content-type-options": "nosniff",
    "referrer-policy": "no-referrer",
    "cross-origin-resource-policy": "same-origin",
    "cross-origin-opener-policy": "same-origin",
    "cache-control": "no-store",
}
"""Headers of every response."""
RAW_HEADERS = [(name.encode(), value.encode()) for name, value in HEADERS.items()]
AT_ONCE = 2
"""Requests whose answers are computed at the same time; the others wait."""


def serve(opened: api.Runs, port: int | None, say: Callable[[str], None]) -> None:
    """Serve runs until Ctrl-C. `say` prints the address.

    Raises UserError when the port is not free.
    """
    token = secrets.token_urlsafe(24)
    listening = listen(port)
    port = listening.getsockname()[1]
    config = uvicorn.Config(
        make_app(opened, token, port), log_level="warning", access_log=False, server_header=False, lifespan="off",
        timeout_graceful_shutdown=1,
    )  # fmt: skip
    say(f"http://127.0.0.1:{port}/?token={token}")
    with listening:
        uvicorn.Server(config).run(sockets=[listening])


def listen(port: int | None) -> socket.socket:
    """Return a socket on the loopback interface. `port`: None for the first free one from PORT, 0 for any.

    Raises UserError when the port is not free.
    """
    for number in range(PORT, PORT + TRIES) if port is None else [port]:
        listening = socket.socket(socket.AF_INET, socket.SOCK_STREAM)
        listening.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            listening.bind(("127.0.0.1", number))
            listening.listen(128)
        except OSError as error:
            listening.close()
            if error.errno not in (errno.EADDRINUSE, errno.EACCES):
                raise
            reason = error.strerror
            continue
        return listening
    named = f"--port {port}" if port is not None else f"ports {PORT} to {PORT + TRIES - 1}"
    raise UserError(f"{named}: {reason}; --port 0 uses any free port")


def make_app(opened: api.Runs, token: str, port: int) -> ASGIApp:
    """Return the application. `port`: of its socket; requests for another host or port are refused."""
    limiter: list[anyio.CapacityLimiter] = []

    async def answer(request: Request) -> Response:
        if not limiter:
            limiter.append(anyio.CapacityLimiter(AT_ONCE))
        return await anyio.to_thread.run_sync(respond, opened, request, limiter=limiter[0])

    async def page(request: Request) -> Response:
        return FileResponse(STATIC / "index.html")

    app = Starlette(
        routes=[
            Route("/", page),
            Route("/api/{path:path}", answer),
            Mount("/static", StaticFiles(directory=STATIC, check_dir=False)),
        ],
        exception_handlers={HTTPException: not_found, Exception: internal},
    )
    return Guard(app, token, port)


def respond(opened: api.Runs, request: Request) -> Response:
    """Return the answer of an endpoint as a response."""
    parameters = dict(request.query_params)
    try:
        found = api.answer(opened, request.url.path, parameters)
    except NotFoundError as error:
        return problem(404, str(error))
    except FilterError as error:
        return problem(400, str(error), error.position)
    except UserError as error:
        return problem(400, str(error))
    except FileNotFoundError as error:  # removed while it was read, as by a resume
        return problem(404, f"{error.filename} does not exist any more")
    if isinstance(found, Iterator):
        headers = {"content-disposition": 'attachment; filename="samples.jsonl"'}
        return StreamingResponse(found, media_type="application/x-ndjson", headers=headers)
    return Response(api.to_json(found), media_type="application/json")


def problem(status: int, sentence: str, position: int | None = None) -> Response:
    """Return a response with one sentence. `position`: of a mistake in a filter, from 0."""
    content: dict[str, Json] = {"error": sentence} | ({} if position is None else {"position": position})
    return Response(api.to_json(content), status_code=status, media_type="application/json")


async def not_found(request: Request, error: Exception) -> Response:
    """Return the response to a path that does not exist."""
    status = error.status_code if isinstance(error, HTTPException) else 404
    return problem(status, f"{request.url.path[:200]} does not exist; the pages are at / and the data at /api/describe")


async def internal(request: Request, error: Exception) -> Response:
    """Return the response to an error of the viewer; its traceback is on the console."""
    return problem(500, f"the viewer failed: {type(error).__name__}; its console has the traceback")


class Guard:
    """Refuses requests that are not for this server, lack the token, or would change something. Adds the headers."""

    def __init__(self, app: ASGIApp, token: str, port: int) -> None:
        self._app, self._token, self._port = app, token, port
        self._hosts = {f"{host}:{port}" for host in ("127.0.0.1", "localhost", "[::1]")}
        self._cookie = f"grpo_view_{port}"  # browsers do not separate the cookies of ports

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":  # a websocket
            await send({"type": "websocket.close", "code": 1008})
            return

        async def send_guarded(message: Message) -> None:
            if message["type"] == "http.response.start":
                message["headers"] = [*message.get("headers", ()), *RAW_HEADERS]
            await send(message)

        refused = self._refuse(Request(scope))
        await (refused or self._app)(scope, receive, send_guarded)

    def _refuse(self, request: Request) -> Response | None:
        """Return the response to a request that is not passed on; None for one that is."""
        hosts = [value.decode("latin-1") for name, value in request.scope["headers"] if name == b"host"]
        if len(hosts) != 1 or hosts[0].lower() not in self._hosts:
            shown = ", ".join(hosts)[:200] or "no host"
            return problem(
                403,
                f"this server answers only to 127.0.0.1:{self._port} and localhost:{self._port}, not to {shown}; "
                "forward the same port number",
            )
        if request.method not in ("GET", "HEAD"):
            return problem(405, f"{request.method[:20]} is not allowed: the viewer only reads")
        if request.url.path == "/" and "token" in request.query_params:
            if self._is_token(request.query_params["token"]):
                response = RedirectResponse("/", status_code=303)
                response.set_cookie(self._cookie, self._token, httponly=True, samesite="strict", path="/")
                return response
        elif self._is_token(bearer(request)) or self._is_token(cookie(request, self._cookie)):
            return None
        return problem(401, "the token is missing or wrong; open the address that grpo view has printed")

    def _is_token(self, given: str) -> bool:
        return hmac.compare_digest(given.encode(errors="replace"), self._token.encode())


def bearer(request: Request) -> str:
    """Return the token of the Authorization header; empty without one."""
    scheme, _, token = request.headers.get("authorization", "").partition(" ")
    return token.strip() if scheme.lower() == "bearer" else ""


def cookie(request: Request, name: str) -> str:
    """Return a cookie; empty without it."""
    try:
        found = SimpleCookie(request.headers.get("cookie", "")).get(name)
    except CookieError:
        return ""
    return found.value if found else ""
