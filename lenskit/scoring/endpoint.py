"""Asking a model behind an OpenAI-compatible chat endpoint: attempts, budget, and the key's safety.

The key is read from the environment for each request, is sent over https or to this machine only,
never follows a redirect, and is in nothing that is kept, logged, written or raised.
"""

from __future__ import annotations

import http.client
import json
import logging
import os
import ssl
import threading
import urllib.error
import urllib.parse
import urllib.request
from collections.abc import Mapping
from datetime import UTC, datetime
from email.message import Message
from email.utils import parsedate_to_datetime
from time import monotonic, sleep
from types import MappingProxyType
from typing import Any

__all__ = ["OPENAI", "BudgetSpent", "ChatEndpoint", "EndpointError"]

OPENAI = "https://api.openai.com/v1"

# Of a response: the text of a verdict is a few bytes, and what surrounds it a few thousand.
_MOST_BYTES = 2**20
# What a request says in any case.
_FIXED = ("model", "messages", "stream")

_log = logging.getLogger(__name__)


class EndpointError(RuntimeError):
    """The endpoint gave no usable reply; the message says why."""


class BudgetSpent(EndpointError):
    """As many requests were sent as were allowed."""


class _NoRedirects(urllib.request.HTTPRedirectHandler):
    """A redirect would carry the key to another place."""

    def redirect_request(self, *_: Any, **__: Any) -> None:
        return None


class ChatEndpoint:
    """A model at ``{base_url}/chat/completions`` (OpenAI, vLLM, llama.cpp's server, ...).

    The key comes from ``LENSKIT_JUDGE_KEY`` and, for OpenAI's own address only, from
    ``OPENAI_API_KEY``; local servers need none. ``requests``: how many were sent, repeated
    attempts counted; ``max_requests`` is the budget. ``options``: further fields of the request
    (``None`` leaves one out: some models refuse ``temperature``).

    ``timeout``: seconds in which the whole response must be there, to its last byte. Timeouts and
    the answers 408, 429 and 5xx are tried again ``retries`` times, after as many seconds as
    ``Retry-After`` says or ``backoff``, doubled each time; where that is more than
    ``longest_wait``, it gives up. Raises ValueError for a base URL that is none, or has a
    password or a query in it, and for options that would replace what is asked.
    """

    def __init__(
        self,
        model: str,
        base_url: str = OPENAI,
        *,
        max_requests: int | None = None,
        options: Mapping[str, Any] = MappingProxyType({}),
        timeout: float = 60.0,
        retries: int = 5,
        backoff: float = 1.0,
        longest_wait: float = 120.0,
    ) -> None:
        parts = urllib.parse.urlsplit(base_url)
        if parts.scheme not in ("http", "https") or not parts.hostname:
            raise ValueError(f"base_url must be like {OPENAI!r} or 'http://localhost:8000/v1'")
        if parts.username or parts.password or parts.query or parts.fragment:
            raise ValueError(
                "base_url must not hold a user, a password or a query; put the key into the "
                "environment variable LENSKIT_JUDGE_KEY"
            )
        if (max_requests is not None and max_requests < 0) or retries < 0:
            raise ValueError(f"max_requests={max_requests} and retries={retries} must be 0 or more")
        if fixed := [name for name in options if name in _FIXED]:
            raise ValueError(
                f"options must not hold {', '.join(fixed)}: the model is an argument of its own, "
                "and the messages are the judge's"
            )
        if not 0 < timeout < float("inf"):
            raise ValueError(f"timeout must be a positive number of seconds, got {timeout}")
        self.model, self.url = model, base_url.rstrip("/") + "/chat/completions"
        self.options = {name: value for name, value in options.items() if value is not None}
        self.max_requests, self.timeout, self.retries = max_requests, timeout, retries
        self.backoff, self.longest_wait = backoff, longest_wait
        self.requests = 0
        self._lock = threading.Lock()
        self._opener = _opener(self.url)

    def __repr__(self) -> str:
        budget = "" if self.max_requests is None else f" of {self.max_requests}"
        return f"ChatEndpoint({self.model!r}, {self.url!r}, {self.requests}{budget} requests)"

    def __getstate__(self) -> dict[str, Any]:
        if self.max_requests is not None:
            raise TypeError(
                f"max_requests={self.max_requests} cannot be shared among processes, each of which "
                "would spend as much; run with one process, or leave it out"
            )
        kept = {**vars(self), "requests": 0}
        return {name: value for name, value in kept.items() if name not in ("_lock", "_opener")}

    def __setstate__(self, state: Mapping[str, Any]) -> None:
        vars(self).update(state)
        self._lock, self._opener = threading.Lock(), _opener(self.url)

    def body(self, system: str, user: str) -> dict[str, Any]:
        """The JSON of a request."""
        messages = [{"role": "system", "content": system}, {"role": "user", "content": user}]
        return {"model": self.model, "messages": messages, **self.options}

    def complete(self, body: Mapping[str, Any]) -> str:
        """The text that the model replies. Raises BudgetSpent or EndpointError."""
        data = json.dumps(body).encode()
        problem = ""
        for attempt in range(self.retries + 1):
            self._spend()
            found, problem, asked = self._send(data)
            if found is not None:
                return self._text(found)
            wait = self.backoff * 2**attempt if asked is None else asked
            if wait > self.longest_wait:
                raise EndpointError(
                    f"{self.url} {problem}; the next attempt would be in {wait:.0f} s, later than "
                    f"longest_wait={self.longest_wait:g}"
                )
            if attempt < self.retries:
                _log.info("%s %s; trying again in %.1f s", self.url, problem, wait)
                sleep(wait)
        raise EndpointError(
            f"{self.url} {problem} (attempts: {self.retries + 1}); raise retries, or try later"
        )

    def _spend(self) -> None:
        with self._lock:
            if self.max_requests is not None and self.requests >= self.max_requests:
                raise BudgetSpent(
                    f"the budget of max_requests={self.max_requests} is spent; raise it to go on "
                    "(what a cache holds is not asked again)"
                )
            self.requests += 1

    def _send(self, data: bytes) -> tuple[bytes | None, str, float | None]:
        """The body of a good response, or else what went wrong and how long to wait, if it says.

        Raises EndpointError for what trying again cannot mend.
        """
        request = urllib.request.Request(self.url, data, {"Content-Type": "application/json"})
        key = _key(self.url)
        if key:
            request.add_unredirected_header("Authorization", f"Bearer {key}")
        try:
            status, headers, found = _exchange(self._opener, request, self.timeout)
        except (OSError, http.client.HTTPException) as error:
            reason = getattr(error, "reason", error)
            # A certificate that is not trusted will not be trusted in a second either.
            if isinstance(reason, ssl.SSLCertVerificationError):
                raise EndpointError(f"{self.url}: {reason}") from None
            if isinstance(reason, TimeoutError):
                return None, f"gave no answer in {self.timeout:g} s", None
            return None, f"gave no answer: {reason!r}", None
        if status < 300:
            if len(found) > _MOST_BYTES:
                raise EndpointError(
                    f"{self.url} answered with more than {_MOST_BYTES:,} bytes, which is no verdict"
                )
            return found, "", None
        said = f"answered {status}: {_excerpt(found, key)}"
        if status not in (408, 429) and status < 500:
            raise EndpointError(f"{self.url} {said}{_hint(status, key)}") from None
        return None, said, _seconds(headers.get("Retry-After"))

    def _text(self, found: bytes) -> str:
        try:
            text = json.loads(found)["choices"][0]["message"]["content"]
        except (ValueError, LookupError, TypeError, RecursionError):
            text = None
        if not isinstance(text, str):
            raise EndpointError(
                f"{self.url} did not answer with the text of a chat completion: "
                f"{_excerpt(found, _key(self.url))}"
            )
        return text

    def without_key(self, text: str) -> str:
        """The start of what a server said, fit for a message: one line, and the key taken out."""
        return _excerpt(text.encode("utf-8", "backslashreplace"), _key(self.url))


def _opener(url: str) -> urllib.request.OpenerDirector:
    # What is on this machine is asked without a proxy, which would see the key in the clear.
    local = _is_local(urllib.parse.urlsplit(url))
    handlers = [urllib.request.ProxyHandler({})] if local else []
    return urllib.request.build_opener(_NoRedirects, *handlers)


def _exchange(
    opener: urllib.request.OpenerDirector, request: urllib.request.Request, timeout: float
) -> tuple[int, Message, bytes]:
    """Status, headers and body of a response that is there in ``timeout`` seconds.

    A socket's own timeout begins anew with each byte, so a server that sends one now and then
    would hold it for ever. A thread of its own is left behind where not even the headers end; it
    ends with the server's patience, and with this process.
    """
    end = monotonic() + timeout
    outcome: list[Any] = []

    def exchange() -> None:
        try:
            outcome.append(_received(opener, request, end))
        except BaseException as error:
            outcome.append(error)

    thread = threading.Thread(target=exchange, daemon=True, name="lenskit-endpoint")
    thread.start()
    thread.join(timeout)
    if not outcome:
        raise TimeoutError
    if isinstance(outcome[0], BaseException):
        raise outcome[0]
    return outcome[0]


def _received(
    opener: urllib.request.OpenerDirector, request: urllib.request.Request, end: float
) -> tuple[int, Message, bytes]:
    response: Any
    try:
        response = opener.open(request, timeout=max(0.01, end - monotonic()))
    except urllib.error.HTTPError as error:
        response = error
    with response:
        parts, size = [], 0
        while size <= _MOST_BYTES and (part := response.read1(2**16)):
            parts.append(part)
            size += len(part)
            if monotonic() > end:
                raise TimeoutError
        if size <= _MOST_BYTES and response.length:
            raise http.client.IncompleteRead(b"", response.length)
        return response.status, response.headers, b"".join(parts)


def _key(url: str) -> str:
    parts = urllib.parse.urlsplit(url)
    names = ["LENSKIT_JUDGE_KEY"]
    if parts.hostname == urllib.parse.urlsplit(OPENAI).hostname:
        names.append("OPENAI_API_KEY")  # to nobody else
    name, key = next(((n, k) for n in names if (k := os.environ.get(n, "").strip())), ("", ""))
    # What http.client says of a bad header holds the header.
    if key and not (key.isascii() and key.isprintable() and " " not in key):
        raise EndpointError(f"the key in {name} holds a character that no key has")
    if key and parts.scheme != "https" and not _is_local(parts):
        raise EndpointError(
            f"the key in {name} would be sent in the clear to {parts.hostname}; use https, or "
            f"unset {name} if the server needs no key"
        )
    return key


def _is_local(parts: urllib.parse.SplitResult) -> bool:
    return parts.hostname in ("localhost", "127.0.0.1", "::1")


def _hint(code: int, key: str) -> str:
    if code in (401, 403):
        return "; is the key right?" if key else "; set LENSKIT_JUDGE_KEY to your key"
    return "; it redirects: give the address itself" if 300 <= code < 400 else ""


def _excerpt(said: bytes, key: str) -> str:
    """The start of what a server said, on one line and without the key."""
    text = " ".join(said.decode("utf-8", "replace").split())
    return (text.replace(key, "[key]") if key else text)[:200]


def _seconds(retry_after: str | None) -> float | None:
    """``Retry-After`` is a number of seconds or a date to come; None where it is neither."""
    said = (retry_after or "").strip()
    try:
        seconds = float(said)
    except ValueError:
        try:
            date = parsedate_to_datetime(said)
            date = date if date.tzinfo else date.replace(tzinfo=UTC)
            seconds = (date - datetime.now(UTC)).total_seconds()
        except (ValueError, TypeError, LookupError, OverflowError):
            return None
    return seconds if seconds >= 0 else None
