"""What the gallery's server answers, and nothing else.

gradio's server can also serve files, take uploads and pass requests on to other servers. The
gallery needs none of that, so requests are held to a list: fixed addresses, and the files of
gradio's own pages by the names they had when the server started. No path of a request is ever
looked up on a disk, and the values of an event are numbers and text, never a description of a file.
"""

import json
import re
from collections.abc import Awaitable, Callable, MutableMapping
from pathlib import Path
from typing import Any

from inl_core.run.json_files import parse_json

Scope = MutableMapping[str, Any]
Receive = Callable[[], Awaitable[MutableMapping[str, Any]]]
Send = Callable[[MutableMapping[str, Any]], Awaitable[None]]

MAX_BODY = 16 * 1024
"""Bytes of a request; an event of the gallery has a few hundred."""

_GET = {
    "/", "/config", "/theme.css", "/favicon.ico", "/robots.txt",
    "/gradio_api/queue/data", "/gradio_api/startup-events", "/gradio_api/app_id",
}  # fmt: skip
_POST = {"/gradio_api/queue/join", "/gradio_api/cancel", "/gradio_api/reset"}
_HEARTBEAT = re.compile(r"/gradio_api/heartbeat/\w{1,40}")


def page_files(frontend: Path) -> frozenset[str]:
    """Addresses of the files of gradio's pages.

    Args:
        frontend: The folder with `assets` and `static`.
    """
    return frozenset(
        f"/{path.relative_to(frontend).as_posix()}"
        for folder in ("assets", "static")
        for path in (frontend / folder).rglob("*")
        if path.is_file()
    )


class Guard:
    """ASGI middleware that lets the gallery's requests through and refuses all others.

    Args:
        app: The server.
        files: Addresses of the page's files.
    """

    def __init__(self, app: Any, files: frozenset[str]) -> None:
        self.app = app
        self.files = files

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] == "lifespan":
            await self.app(scope, receive, send)
        elif scope["type"] != "http":
            await send({"type": "websocket.close", "code": 1008})
        elif scope["method"] in ("GET", "HEAD") and self._is_page(scope["path"]):
            await self.app(scope, receive, send)
        elif scope["method"] == "POST" and scope["path"] in _POST:
            body = await _read(receive)
            why = "more than 16 KiB" if body is None else _unfit(body)
            if body is None or why:
                await _refuse(send, 413 if body is None else 400, f"refused: {why}")
            else:
                await self.app(scope, _again(body, receive), send)
        else:
            await _refuse(send, 404, "the gallery has no such address")

    def _is_page(self, path: str) -> bool:
        return path in _GET or path in self.files or _HEARTBEAT.fullmatch(path) is not None


def _unfit(body: bytes) -> str:
    """Why a body is no event of the gallery; empty if it is one."""
    try:
        event = parse_json(body)
    except ValueError as error:
        return f"the body is no JSON ({error})"
    if not isinstance(event, dict):
        return "the body is no JSON object"
    values = event.get("data") or []
    if not isinstance(values, list) or not all(_is_plain(value) for value in values):
        return "values must be numbers and text"
    if not _is_plain(event.get("event_data")):
        return "event_data must be empty"
    return ""


def _is_plain(value: Any) -> bool:
    return value is None or isinstance(value, str | int | float)


async def _read(receive: Receive) -> bytes | None:
    """The whole body, or None if it is too long."""
    parts, size = [], 0
    while True:
        message = await receive()
        part = message.get("body", b"")
        size += len(part)
        if size > MAX_BODY:
            return None
        parts.append(part)
        if not message.get("more_body", False):
            return b"".join(parts)


def _again(body: bytes, receive: Receive) -> Receive:
    """A `receive` that gives the body once more, and then what else comes."""
    waiting = [{"type": "http.request", "body": body, "more_body": False}]

    async def replay() -> MutableMapping[str, Any]:
        return waiting.pop() if waiting else await receive()

    return replay


async def _refuse(send: Send, status: int, message: str) -> None:
    body = json.dumps({"error": message}).encode()
    headers = [(b"content-type", b"application/json"), (b"content-length", b"%d" % len(body))]
    await send({"type": "http.response.start", "status": status, "headers": headers})
    await send({"type": "http.response.body", "body": body})
