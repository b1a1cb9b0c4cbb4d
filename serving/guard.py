"""Checks that surround every request: the API key, foreign web pages, body size and time, and request metrics."""

import asyncio
import base64
import contextlib
import functools
import re
import secrets
import time

from starlette.exceptions import HTTPException
from starlette.requests import ClientDisconnect
from starlette.responses import JSONResponse

MAX_BODY = 32 << 20  # bytes of one request
MAX_BODIES = 256 << 20  # bytes of all requests in progress
BODY_TIMEOUT = 60  # seconds within which a request body must arrive
LINGER = 5  # seconds for which the rest of a refused body is read, so that the client gets to read the response
LOOPBACK = ("localhost", "127.0.0.1", "[::1]")
PORT = re.compile(rb":\d*$")


class Guard:
    """ASGI middleware that refuses requests before they reach the application, and counts all of them."""

    def __init__(self, app, metrics, key: str, paths: set[str], hosts: tuple[str, ...] = ()):
        self.app, self.key, self.paths = app, key.encode(), paths
        self.requests, self.seconds = map(functools.cache, (metrics.requests.labels, metrics.seconds.labels))
        self.hosts = {host.encode() for host in hosts}  # names under which the service may be requested; empty = any
        self.bodies = 0  # bytes of the requests in progress

    async def __call__(self, scope, receive, send):
        if scope["type"] != "http":
            return await self.app(scope, receive, send)
        began, status, size = time.perf_counter(), 0, 0
        deadline = asyncio.get_running_loop().time() + BODY_TIMEOUT
        headers = dict(scope["headers"])
        unread = headers.get(b"content-length", b"0") != b"0" or b"transfer-encoding" in headers

        async def receive_body():
            nonlocal size, deadline, unread
            try:
                async with asyncio.timeout_at(deadline):
                    message = await receive()
            except TimeoutError:
                raise HTTPException(408, f"the request body must arrive within {BODY_TIMEOUT} seconds.") from None
            size += len(message.get("body", b""))
            self.bodies += len(message.get("body", b""))
            if not message.get("more_body"):
                deadline, unread = None, False  # the body is complete: later calls only wait for a disconnect
            if size > MAX_BODY:
                raise HTTPException(413, f"the request body exceeds {MAX_BODY:,} bytes.")
            if self.bodies > MAX_BODIES:
                raise HTTPException(503, "too many uploads at once: try again in a second.", {"Retry-After": "1"})
            return message

        async def send_response(message):
            nonlocal status
            status = message.get("status", status)
            if not unread:
                return await send(message)
            if message["type"] == "http.response.start":
                return await send(message | {"headers": [*message["headers"], (b"connection", b"close")]})
            await send(message | {"more_body": True})
            if not message.get("more_body"):
                await _discard(receive)
                await send({"type": "http.response.body"})

        try:
            if self.hosts and not self._is_local(headers):
                raise HTTPException(403, "without an API key only localhost is served: set API_KEY.")
            scope["authorized"] = self._is_authorized(headers)
            if not scope["authorized"] and scope["path"] != "/health":
                challenge = {"WWW-Authenticate": 'Basic realm="model"'}
                raise HTTPException(401, "the API key is missing or wrong: Authorization: Bearer KEY.", challenge)
            if _is_foreign(scope["method"], headers):
                raise HTTPException(403, "pages of other sites cannot use this service.")
            await self.app(scope, receive_body, send_response)
        except HTTPException as error:
            response = JSONResponse({"detail": error.detail}, error.status_code, error.headers)
            await response(scope, receive, send_response)
        except ClientDisconnect:
            status = 499
        except asyncio.CancelledError:  # the service stops
            if not status:
                response = JSONResponse({"detail": "the service stops."}, 503, {"Connection": "close"})
                await response(scope, receive, send_response)
        finally:
            self.bodies -= size
            path = scope["path"] if scope["path"] in self.paths else "other"
            self.requests(path, status or 500).inc()
            self.seconds(path).observe(time.perf_counter() - began)

    def _is_local(self, headers: dict[bytes, bytes]) -> bool:
        """Return whether the Host is ours: a foreign name can be made to resolve to 127.0.0.1 (DNS rebinding)."""
        return PORT.sub(b"", headers.get(b"host", b"")).lower() in self.hosts

    def _is_authorized(self, headers: dict[bytes, bytes]) -> bool:
        if not self.key:
            return True
        scheme, _, value = headers.get(b"authorization", b"").partition(b" ")
        if scheme.lower() == b"basic":  # what a browser sends for a password prompt
            with contextlib.suppress(ValueError):
                value = base64.b64decode(value).partition(b":")[2]
        return secrets.compare_digest(value, self.key)


async def _discard(receive) -> None:
    """Read the rest of a body that is refused: closing at once would reset the connection of a client that sends."""
    size = 0
    with contextlib.suppress(TimeoutError):
        async with asyncio.timeout(LINGER):
            while size < MAX_BODY and (message := await receive()).get("more_body"):
                size += len(message["body"])


def _is_foreign(method: str, headers: dict[bytes, bytes]) -> bool:
    """Return whether a page of another site sends the request, with credentials that the browser may have stored.

    Browsers send Sec-Fetch-Site (https://www.w3.org/TR/fetch-metadata/), but not over HTTP. There, Origin is checked
    against Host, so proxies must forward it. Top-level navigation is allowed.
    """
    if method == "GET" and headers.get(b"sec-fetch-mode") == b"navigate":
        return False
    if b"sec-fetch-site" in headers:
        return headers[b"sec-fetch-site"] not in (b"same-origin", b"none")
    origin = headers.get(b"origin", b"").partition(b"://")[2]
    return bool(headers.get(b"origin")) and origin not in (headers.get(b"host"), headers.get(b"x-forwarded-host"))
