"""A client of the gallery's server that sends and reads what its page does, without a browser."""

import asyncio
import base64
import contextlib
import json
import re
import uuid
from collections.abc import AsyncIterator
from typing import Any

import httpx

_PNG = re.compile(r'<a href="data:image/png;base64,([^"]+)" download="[^"]*" title=')
_STATE = re.compile(r'data-state="(\w+)"')


def values(
    label: str, seed: int, count: int, steps: int, side: int, show: Any = "A grid of several seeds"
) -> list[Any]:
    """What the widgets of a pipeline with the fields style and genre send with *Paint*."""
    scheduler = "FlowMatchEulerDiscreteScheduler"
    form, labels = ["", "", "noise", show, 0.6, 1], [label, "", "", ""]
    return [*form, count, seed, steps, 2.0, 1.0, scheduler, side, "", *labels]


class Page:
    """One open page: a session of its own, kept alive by a heartbeat as in a browser.

    Args:
        address: URL of the server.
        heartbeat: Whether to send the heartbeat.
    """

    def __init__(self, address: str, heartbeat: bool = True) -> None:
        self.session = uuid.uuid4().hex[:12]
        self.client = httpx.AsyncClient(base_url=address, timeout=httpx.Timeout(300))
        self._heartbeat = asyncio.create_task(self._beat()) if heartbeat else None
        self._event = ""

    async def __aenter__(self) -> "Page":
        config = (await self.client.get("/config")).json()
        names = {part["id"]: part["props"].get("elem_id") for part in config["components"]}
        self._paint = next(
            event["id"] for event in config["dependencies"]
            if [names.get(part) for part, kind in event["targets"] if kind == "click"] == ["paint"]
        )  # fmt: skip
        return self

    async def __aexit__(self, *_: object) -> None:
        await self.leave()

    async def leave(self) -> None:
        """Close all connections, as a closed tab does."""
        if self._heartbeat is not None:
            self._heartbeat.cancel()
            with contextlib.suppress(asyncio.CancelledError, httpx.HTTPError):
                await self._heartbeat
            self._heartbeat = None
        await self.client.aclose()

    async def click(self, values: list[Any]) -> httpx.Response:
        """Press *Paint* with these values of the widgets."""
        body = {"data": values, "fn_index": self._paint, "session_hash": self.session}
        return await self.client.post("/gradio_api/queue/join", json=body)

    async def paint(
        self, label: str = "", seed: int = 0, count: int = 1, steps: int = 2, side: int = 16
    ) -> AsyncIterator[tuple[str, str]]:
        """Ask for a grid of a pipeline with the fields style and genre.

        Yields:
            (state, HTML of the wall): waiting, generating, and at the end done, refused, cancelled,
            or HTTP 503 if the queue is full.
        """
        answer = await self.click(values(label, seed, count, steps, side))
        if answer.status_code != 200:
            yield f"HTTP {answer.status_code}", answer.text
            return
        self._event = answer.json()["event_id"]
        path = f"/gradio_api/queue/data?session_hash={self.session}"
        async with self.client.stream("GET", path) as stream:
            async for line in stream.aiter_lines():
                message = json.loads(line[5:]) if line.startswith("data:") else {}
                data = (message.get("output") or {}).get("data") or [""]
                if message.get("event_id") != self._event:
                    continue
                if message["msg"] == "process_completed":
                    state = _STATE.search(data[0])
                    refused = "refused" if 'role="alert"' in data[0] else "cancelled"
                    yield state[1] if state else refused, data[0]
                    return
                if message["msg"] in ("estimation", "process_generating"):
                    yield "waiting" if message["msg"] == "estimation" else "generating", ""

    async def stop(self) -> None:
        """Press *Stop*."""
        body = {"fn_index": self._paint, "session_hash": self.session, "event_id": self._event}
        assert (await self.client.post("/gradio_api/cancel", json=body)).status_code == 200

    async def _beat(self) -> None:
        async with self.client.stream("GET", f"/gradio_api/heartbeat/{self.session}") as stream:
            async for _ in stream.aiter_raw():
                pass


def pngs_of(page: str) -> list[bytes]:
    """The images of a finished wall, as a user would save them."""
    return [base64.b64decode(text) for text in _PNG.findall(page)]
