"""The gallery's server on a port: its queue, clients that stop or disconnect, hostile events."""

import asyncio
import contextlib
import io
import json
import socket
import threading
import time
from collections import Counter

import numpy as np
import pytest
from PIL import Image

from complexity_dit.app.gallery import CHUNK, Gallery, Settings
from complexity_dit.config import AppConfig

# A thread of gradio calls deprecated functions of pandas.
pytestmark = pytest.mark.filterwarnings("ignore:.*(no_silent_downcasting|copy keyword)")

STEPS = 1000
PAUSE = 0.05
FAST = 8
"""Side of the images whose network evaluations do not pause."""


@pytest.fixture
def evaluations(pipe, monkeypatch) -> Counter:
    """Network evaluations by side of the images; slow ones, so that 1000 steps take a minute."""
    forward, count = pipe.transformer.forward, Counter()

    def slow(hidden_states, *args, **kwargs):
        side = hidden_states.shape[-1]
        count[side] += 1
        if side != FAST:
            time.sleep(PAUSE)
        return forward(hidden_states, *args, **kwargs)

    monkeypatch.setattr(pipe.transformer, "forward", slow)
    return count


@pytest.fixture
def play(pipe):
    """Runs a scenario, an async function of one that opens pages, against a server."""
    pytest.importorskip("gradio", reason="the gallery needs the extra [app]")
    import uvicorn

    from complexity_dit.app.server import build_server
    from support.gallery_client import Page

    async def run(scenario, queue_size) -> None:
        config = AppConfig(max_steps=STEPS, queue_size=queue_size)
        app = build_server(Gallery(pipe, config.limits), config)
        server = uvicorn.Server(uvicorn.Config(app, log_level="warning"))
        with socket.socket() as listening:
            listening.bind(("127.0.0.1", 0))
            address = f"http://127.0.0.1:{listening.getsockname()[1]}"
            serving = asyncio.create_task(server.serve([listening]))
            await until(lambda: server.started)
            try:
                await scenario(lambda **options: Page(address, **options))
            finally:
                server.should_exit = True
                await serving

    return lambda scenario, queue_size=8: asyncio.run(run(scenario, queue_size))


async def until(condition) -> None:
    end = time.monotonic() + 120
    while not condition():
        assert time.monotonic() < end
        await asyncio.sleep(0.01)


def is_painting() -> bool:
    return "painter" in {thread.name for thread in threading.enumerate()}


def start(page, **request) -> tuple[asyncio.Task, list[str]]:
    """A painting in the background, whose result is the last (state, HTML); the states so far."""
    states = []

    async def paint() -> tuple[str, str]:
        last = "", ""
        async for last in page.paint(**request):
            states.append(last[0])
        return last

    return asyncio.create_task(paint()), states


async def disconnect(page, painting: asyncio.Task) -> None:
    """Close all connections of a page, as the death of its browser does."""
    painting.cancel()
    with contextlib.suppress(asyncio.CancelledError):
        await painting
    await page.leave()


@pytest.mark.parametrize("heartbeat", [True, False], ids=["tab", "single request"])
def test_sampling_ends_when_the_client_disconnects(play, evaluations, heartbeat):
    async def scenario(new_page) -> None:
        async with new_page(heartbeat=heartbeat) as page:
            painting, _ = start(page, steps=STEPS, side=16)
            await until(lambda: evaluations[16] >= 10)
            await disconnect(page, painting)
            await until(lambda: not is_painting())
            assert evaluations[16] < STEPS / 2  # the step under way is finished

    play(scenario)


def test_a_client_that_leaves_the_queue_is_not_sampled_for(play, evaluations):
    async def scenario(new_page) -> None:
        async with new_page() as first, new_page() as second, new_page() as third:
            running, _ = start(first, steps=STEPS, side=16)
            await until(lambda: evaluations[16])
            waiting, states = start(second, steps=STEPS, side=24)
            await until(lambda: states)
            await disconnect(second, waiting)
            await disconnect(first, running)
            assert (await start(third, side=FAST)[0])[0] == "done"
            await until(lambda: not is_painting())
            assert not evaluations[24]
            assert evaluations[16] < STEPS / 2

    play(scenario)


def test_a_full_queue_refuses_and_stop_frees_a_place(play, evaluations):
    async def scenario(new_page) -> None:
        async with new_page() as first, new_page() as second, new_page() as third:
            running, _ = start(first, steps=STEPS, side=16)
            await until(lambda: evaluations[16])
            waiting, states = start(second, steps=STEPS, side=24)
            await until(lambda: states == ["waiting"])
            state, text = await start(third, side=FAST)[0]
            assert (state, json.loads(text)["detail"][:14]) == ("HTTP 503", "Queue is full.")
            await second.stop()
            assert (await waiting)[0] == "cancelled"
            next_one, _ = start(third, side=FAST)
            await first.stop()
            assert (await running)[0] == "cancelled"
            assert (await next_one)[0] == "done"
            assert not evaluations[24]
            assert evaluations[16] < STEPS / 2

    play(scenario, queue_size=1)


def test_each_client_gets_its_own_images_with_the_right_bits(play, pipe):
    async def scenario(new_page) -> None:
        pages = [await new_page().__aenter__() for _ in range(3)]
        labels = ["Cubism", "Fauvism", "Ukiyo_e"]
        paintings = [
            start(page, label=label, seed=seed, count=2)[0]
            for seed, (page, label) in enumerate(zip(pages, labels, strict=True))
        ]
        for seed, (label, painting) in enumerate(zip(labels, paintings, strict=True)):
            state, html = await painting
            assert state == "done"
            for i, data in enumerate(pngs_of(html)):
                image = Image.open(io.BytesIO(data))
                content = json.loads(image.text[CHUNK])
                settings = Settings(**content["settings"])
                assert (settings.labels, settings.seed) == ({"style": label}, seed)
                assert content["picture"] == i
                *_, frame = Gallery(pipe).paint(settings)
                np.testing.assert_array_equal(np.asarray(image), frame.images[i])
        for page in pages:
            await page.leave()

    from support.gallery_client import pngs_of

    play(scenario)


def test_the_server_listens_to_this_machine_only_by_default():
    assert AppConfig().host == "127.0.0.1"


def test_a_hostile_event_reaches_no_file(play):
    from support.gallery_client import values

    async def scenario(new_page) -> None:
        async with new_page() as page:
            for value in (
                {"path": "/etc/passwd"},
                ["/etc/passwd"],
                "../../etc/passwd",
                "\x00",
                9e9,
            ):
                answer = await page.click(values("Fauvism", 3, 1, 2, 8, show=value))
                assert answer.status_code == (400 if isinstance(value, dict | list) else 200)
            deep = b'{"data": ' + b"[" * 8000 + b"]" * 8000 + b"}"
            answer = await page.client.post("/gradio_api/queue/join", content=deep)
            assert answer.status_code == 400
            assert "nested deeper" in answer.text

    play(scenario)
