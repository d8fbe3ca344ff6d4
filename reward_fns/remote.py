"""Rewards from a service over HTTP.

Each completion is a POST of {"completion": text, "row": {column: value, ...}} to REWARD_URL. The response is
{"reward": number}, or null instead of the number to abstain. REWARD_CONCURRENCY limits the concurrent requests of each
reward worker. In the recipe:

    rewards:
      - file: reward_fns/remote.py
        style: trl            # a whole group at a time
        timeout_s: 120        # deadline of a group, including retries and waits; the worker is killed when it passes
        env: [REWARD_TOKEN]   # only if the service requires one: sent as a bearer token

A request is retried up to REWARD_RETRIES (3) times if it fails to connect, takes longer than REWARD_TIMEOUT_S (10), or
gets the status 429, 502, 503 or 504. It is retried at once, after 0.5 s, after 1 s, or as the response's Retry-After
requests, but no later than after REWARD_TIMEOUT_S.

Only the completion of a failed request fails. A request fails when its retries are used up, and for any other
response, a response of more than 1 MiB, and a response whose body is incomplete after REWARD_TIMEOUT_S. Headers that
arrive in small parts are awaited until `timeout_s`, as long as no part takes longer than REWARD_TIMEOUT_S. Error
messages show neither the token nor the part of REWARD_URL after `?`.
"""

from __future__ import annotations

import functools
import json
import math
import os
import time
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any
from urllib.parse import urlsplit

import urllib3

TRIED_AGAIN = (429, 502, 503, 504)
LONGEST = 1 << 20
"""Maximum bytes of a response."""
NOT_COLUMNS = ("prompts", "completion_ids", "trainer_state", "log_extra", "log_metric")
"""Arguments of style trl other than completions and the columns of the rows."""


def remote(completions: Sequence[Any], **columns: Any) -> list[float | Exception | None]:
    """Return the service's reward of each completion, or an exception for a completion whose request failed.

    Raises ValueError if an environment variable is invalid.
    """
    url, headers, concurrency = _url(), _headers(), _count("REWARD_CONCURRENCY", 16, least=1)
    client = _client(concurrency, _count("REWARD_RETRIES", 3, least=0), _timeout_s())
    columns = {name: values for name, values in columns.items() if name not in NOT_COLUMNS}
    rows = [{name: values[i] for name, values in columns.items()} for i in range(len(completions))]
    texts = [text if isinstance(text, str) else text[-1]["content"] for text in completions]
    with ThreadPoolExecutor(concurrency) as threads:
        return list(threads.map(functools.partial(_ask, client, url, headers), texts, rows))


def _url() -> str:
    url = os.environ.get("REWARD_URL", "")
    try:
        place = urlsplit(url)
        whole = place.scheme in ("http", "https") and place.hostname and (place.port is None or place.port > 0)
    except ValueError:
        whole = False
    if not whole:
        raise ValueError("REWARD_URL must be set to the service's address, of the form http://HOST:PORT/PATH")
    if "@" in place.netloc:  # urllib3 would not send user and password
        raise ValueError("REWARD_URL takes no user and no password; REWARD_TOKEN is sent as a bearer token")
    return url


def _headers() -> dict[str, str]:
    token = os.environ.get("REWARD_TOKEN", "").strip()
    if not (token.isascii() and token.isprintable()):
        raise ValueError("REWARD_TOKEN has characters that no HTTP header may have")
    return {"Authorization": f"Bearer {token}"} if token else {}


def _count(name: str, usual: int, *, least: int) -> int:
    text = os.environ.get(name, str(usual))
    if not text.isdecimal() or int(text) < least:
        raise ValueError(f"{name} must be a whole number of at least {least}, not {text!r}")
    return int(text)


def _timeout_s() -> float:
    text = os.environ.get("REWARD_TIMEOUT_S", "10")
    try:
        seconds = float(text)
    except ValueError:
        seconds = math.nan
    if not 0 < seconds < math.inf:
        raise ValueError(f"REWARD_TIMEOUT_S must be a number of seconds above 0, not {text!r}")
    return seconds


@functools.cache
def _client(concurrency: int, retries: int, timeout_s: float) -> urllib3.PoolManager:
    """Return the client for all calls of this process. It keeps its connections open."""
    tries = _Retry(
        total=retries, backoff_factor=0.25, status_forcelist=TRIED_AGAIN, allowed_methods=None, redirect=False
    )
    return urllib3.PoolManager(maxsize=concurrency, block=True, retries=tries, timeout=urllib3.Timeout(total=timeout_s))


class _Retry(urllib3.Retry):
    def increment(self, *what: Any, **more: Any) -> Any:
        """Close a response before the retry. Otherwise urllib3 would read it to its end, however long that takes."""
        if (response := more.get("response")) is not None:
            response.close()
            response.release_conn()
        return super().increment(*what, **more)

    def get_retry_after(self, response: Any) -> float | None:
        """Return the response's Retry-After in seconds, at most REWARD_TIMEOUT_S, so that a single completion does not
        use up the group's deadline."""
        try:
            after = super().get_retry_after(response)
        except (urllib3.exceptions.InvalidHeader, ValueError, OverflowError):  # neither a number nor a valid date
            return None
        return None if after is None else min(after, _timeout_s())


def _ask(
    client: urllib3.PoolManager, url: str, headers: Mapping[str, str], completion: str, row: Mapping[str, Any]
) -> float | Exception | None:
    """Return the service's reward of one completion, None if it abstains, or the error."""
    shown = url.partition("?")[0]
    try:
        answer = client.request(
            "POST", url, json={"completion": completion, "row": row}, headers=headers, preload_content=False
        )
        body = _body(answer, shown)
        if answer.status != 200:
            raise ValueError(f"{shown} answered {answer.status}: {body[:100]!r}")
        reward = json.loads(body)["reward"]
        if reward is not None and (isinstance(reward, bool) or not isinstance(reward, int | float)):
            raise ValueError(f"{shown} answered a reward that is no number: {reward!r:.80}")
    except urllib3.exceptions.MaxRetryError as error:  # its message contains the whole URL
        return ConnectionError(f"{shown}: {error.reason}")
    except (urllib3.exceptions.HTTPError, ValueError, LookupError, TypeError, RecursionError) as error:
        return error
    return reward


def _body(answer: Any, url: str) -> bytes:
    """Return the body of a response. urllib3's timeout applies to each packet, so a slow stream would never reach it.

    Raises ValueError for a response that is too slow or too long.
    """
    body, deadline = b"", time.monotonic() + _timeout_s()
    try:
        while part := answer.read1(1 << 16):
            body += part
            if len(body) > LONGEST or time.monotonic() > deadline:
                raise ValueError(f"{url} answered {len(body)} bytes in {_timeout_s():g} s and was not at its end")
    finally:  # a connection with unread data cannot be reused, but its slot in the pool can
        answer.close()
        answer.release_conn()
    return body
