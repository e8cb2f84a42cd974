"""The gallery's line: bounded, fair, free again when somebody stops or leaves; no path gets in."""

import asyncio
import contextlib
import json
import threading

import pytest

from complexity_dit.app import server as turns_module
from complexity_dit.app.gallery import Gallery
from complexity_dit.app.server import Turns
from complexity_dit.config import AppConfig
from inl_core.run.errors import UserError


def test_the_line_is_bounded_and_in_order():
    turns = Turns(2)
    tickets = [turns.join(threading.Event()) for _ in range(3)]
    assert [turns.before(ticket) for ticket in tickets] == [0, 1, 2]
    with pytest.raises(UserError, match=r"one painting is under way and 2 wait.*--queue_size"):
        turns.join(threading.Event())
    turns.leave(tickets[1])
    assert [turns.before(tickets[0]), turns.before(tickets[2])] == [0, 1]
    turns.join(threading.Event())


def test_a_place_is_free_when_its_frames_end_or_are_abandoned():
    turns = Turns(0)
    assert list(turns.frames(turns.join(threading.Event()), [1, 2])) == [1, 2]
    frames = turns.frames(turns.join(threading.Event()), [1, 2])
    next(frames)
    frames.close()
    turns.join(threading.Event())


def test_who_does_not_come_back_loses_the_place(monkeypatch):
    turns, stop = Turns(0), threading.Event()
    frames = turns.frames(turns.join(stop), iter([1, 2]))
    next(frames)
    with pytest.raises(UserError):
        turns.join(threading.Event())
    monkeypatch.setattr(turns_module, "AWAY_SECONDS", -1.0)
    turns.join(threading.Event())
    assert stop.is_set()


def test_a_slow_step_does_not_lose_the_place(monkeypatch):
    monkeypatch.setattr(turns_module, "AWAY_SECONDS", -1.0)
    turns, seen = Turns(0), []

    def slow():
        with contextlib.suppress(UserError):
            turns.join(threading.Event())
            seen.append("taken")
        yield 1

    list(turns.frames(turns.join(threading.Event()), slow()))
    assert not seen


# -- the server, as the page speaks to it ---------------------------------------------------------


class Page:
    """A page of the gallery: what its scripts send and read."""

    def __init__(self, client, name: str) -> None:
        self.client, self.name = client, name

    async def click(self, trigger: str, data: list | None = None):
        config = (await self.client.get("/config")).json()
        wanted = next(
            one["id"] for one in config["dependencies"]
            if any(event == trigger for _, event in one["targets"])
            and len(one["inputs"]) == (len(data) if data else 0)
            and one["backend_fn"]
        )  # fmt: skip
        body = {"data": data or [], "fn_index": wanted, "session_hash": self.name}
        return await self.client.post("/gradio_api/queue/join", json=body)

    async def paint(self, steps: int = 2, side: int = 8):
        asked = ["A grid of several seeds", 1, 3, steps, 2.0, None, side, "Fauvism", ""]
        return await self.click("click", asked)

    async def ends(self) -> list[dict]:
        """The messages of the page's events until all have ended."""
        messages = []
        path = f"/gradio_api/queue/data?session_hash={self.name}"
        async with self.client.stream("GET", path) as stream:
            async for line in stream.aiter_lines():
                if line.startswith("data:"):
                    messages.append(json.loads(line[5:]))
                    if messages[-1]["msg"] == "close_stream":
                        break
        return messages


def with_server(gallery: Gallery, scenario, **config):
    """Run a scenario against the server in one event loop."""
    httpx = pytest.importorskip("httpx", reason="the gallery needs the extra [app]")
    pytest.importorskip("gradio", reason="the gallery needs the extra [app]")

    async def run() -> None:
        from complexity_dit.app.server import build_server

        transport = httpx.ASGITransport(app=build_server(gallery, AppConfig(**config)))
        async with httpx.AsyncClient(transport=transport, base_url="http://127.0.0.1") as client:
            await scenario(client)

    asyncio.run(run())


def test_only_this_machine_is_listened_to_by_default():
    assert AppConfig().host == "127.0.0.1"


def test_a_hostile_event_reaches_no_file(pipe):
    async def scenario(client) -> None:
        page = Page(client, "x")
        for value in ({"path": "/etc/passwd"}, ["/etc/passwd"], "../../etc/passwd", "\x00", 1e300):
            asked = [value, 1, 3, 2, 2.0, None, 8, "Fauvism", ""]
            answer = await page.click("click", asked)
            if isinstance(value, dict | list):
                assert answer.status_code == 400
        deep = b"[" * 8000 + b"]" * 8000
        answer = await client.post("/gradio_api/queue/join", content=b'{"data": ' + deep + b"}")
        assert answer.status_code == 400
        assert "nested deeper" in answer.text

    with_server(Gallery(pipe), scenario)
