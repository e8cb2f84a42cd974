"""What a page of the gallery sends and reads, without a browser: for tests of its server."""

import asyncio
import base64
import contextlib
import html
import json
import re
import uuid
from collections.abc import AsyncIterator

import httpx

_PNG = re.compile(r'<a href="data:image/png;base64,([^"]+)" download="[^"]*" title=')
_STATE = re.compile(r'data-state="(\w+)"')
_REFUSAL = re.compile(r'role="alert"><b>Not painted</b>([^<]*)<')
GRID = "A grid of several seeds"


class Page:
    """One open page: a session of its own, kept alive by a heartbeat as a browser does."""

    def __init__(self, address: str) -> None:
        self.name = uuid.uuid4().hex[:12]
        self.client = httpx.AsyncClient(base_url=address, timeout=httpx.Timeout(300))
        self._alive: asyncio.Task | None = None
        self._paint = self._stop = -1

    async def __aenter__(self) -> "Page":
        config = (await self.client.get("/config")).json()
        names = {one["id"]: one["props"].get("elem_id") for one in config["components"]}
        for event in config["dependencies"]:
            clicked = {names.get(part) for part, kind in event["targets"] if kind == "click"}
            if "paint" in clicked:
                self._paint = event["id"]
            elif "stop" in clicked:
                self._stop = event["id"]
        self._alive = asyncio.create_task(self._heartbeat())
        return self

    async def __aexit__(self, *_: object) -> None:
        await self.leave()

    async def leave(self) -> None:
        """Close everything, as a closed tab does."""
        if self._alive is not None:
            self._alive.cancel()
            with contextlib.suppress(asyncio.CancelledError, httpx.HTTPError):
                await self._alive
            self._alive = None
        await self.client.aclose()

    async def paint(
        self, label: str = "", seed: int = 0, count: int = 1, steps: int = 2, side: int = 16
    ) -> AsyncIterator[tuple[str, str]]:
        """Ask for a grid; yields (state, page) as they come: the state of the wall, or refused.

        The pipeline is the one of `load_gallery.small_pipeline`: the fields style and genre.
        """
        asked = [GRID, count, seed, steps, 2.0, "FlowMatchEulerDiscreteScheduler", side, label, ""]
        answer = await self._join(self._paint, asked)
        if answer.status_code != 200:
            yield "refused by the server", answer.text
            return
        async for message in self._messages(answer.json()["event_id"]):
            output = message.get("output") or {}
            data = output.get("data") or []
            if message["msg"] == "process_completed":
                shown = data[0] if data and isinstance(data[0], str) else ""
                yield state_of(shown) if shown else "cancelled", shown
                return
            if message["msg"] == "process_generating":
                # Later ones are differences; that something came is enough.
                yield "under way", data[0] if isinstance(data[0], str) else ""

    async def stop(self) -> int:
        """The Stop button; returns the status of the server's answer."""
        return (await self._join(self._stop, [])).status_code

    async def _join(self, event: int, data: list) -> httpx.Response:
        body = {"data": data, "fn_index": event, "session_hash": self.name}
        return await self.client.post("/gradio_api/queue/join", json=body)

    async def _messages(self, event: str) -> AsyncIterator[dict]:
        path = f"/gradio_api/queue/data?session_hash={self.name}"
        async with self.client.stream("GET", path) as stream:
            async for line in stream.aiter_lines():
                message = json.loads(line[5:]) if line.startswith("data:") else {}
                if message.get("event_id") == event:
                    yield message
                elif message.get("msg") == "close_stream":
                    return

    async def _heartbeat(self) -> None:
        async with self.client.stream("GET", f"/gradio_api/heartbeat/{self.name}") as stream:
            async for _ in stream.aiter_raw():
                pass


def state_of(page: str) -> str:
    """done, denoising, stopped, waiting; refused; or empty."""
    if _REFUSAL.search(page):
        return "refused"
    found = _STATE.search(page)
    return found[1] if found else "empty"


def reason_of(page: str) -> str:
    """Why nothing was painted."""
    found = _REFUSAL.search(page)
    return html.unescape(found[1]) if found else ""


def pngs_of(page: str) -> list[bytes]:
    """The pictures of a finished wall, as a user would save them."""
    return [base64.b64decode(text) for text in _PNG.findall(page)]
