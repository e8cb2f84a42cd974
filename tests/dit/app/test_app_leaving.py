"""A painting ends when whoever asked for it goes: counted in evaluations of the network.

The server listens on a port, as `complexity-dit app` does, and clients close their connections in
the middle. The network is slow, so that a painting left alone would go on for a minute.
"""

import asyncio
import contextlib
import socket
import threading
import time
from collections import Counter

import pytest

from complexity_dit.app.gallery import Gallery
from complexity_dit.config import AppConfig

# gradio, in a thread of its own, asks pandas for what pandas is about to drop.
pytestmark = pytest.mark.filterwarnings("ignore:.*(no_silent_downcasting|copy keyword)")

STEPS = 1000
PAUSE = 0.05
QUICK = 8
"""Side of the pictures whose evaluations do not pause."""


@pytest.fixture
def evaluations(pipe, monkeypatch) -> Counter:
    """How often the network was evaluated, by the side of the pictures."""
    forward, count = pipe.transformer.forward, Counter()

    def slow(hidden_states, *args, **kwargs):
        side = hidden_states.shape[-1]
        count[side] += 1
        if side != QUICK:
            time.sleep(PAUSE)
        return forward(hidden_states, *args, **kwargs)

    monkeypatch.setattr(pipe.transformer, "forward", slow)
    return count


@pytest.fixture
def play(pipe, monkeypatch):
    """Runs a scenario, which is given a function that opens pages, beside a server."""
    pytest.importorskip("gradio", reason="the gallery needs the extra [app]")
    import uvicorn
    from benchmarks.robustness.gallery_client import Page

    from complexity_dit.app.server import build_server

    async def run(scenario) -> None:
        gallery = Gallery(pipe, AppConfig(max_steps=STEPS).limits)
        config = uvicorn.Config(build_server(gallery, AppConfig()), log_level="warning")
        server = uvicorn.Server(config)
        with socket.socket() as listening:
            listening.bind(("127.0.0.1", 0))
            address = f"http://127.0.0.1:{listening.getsockname()[1]}"
            serving = asyncio.create_task(server.serve([listening]))
            await until(lambda: server.started)
            try:
                await scenario(lambda: Page(address))
            finally:
                server.should_exit = True
                await serving

    return lambda scenario: asyncio.run(run(scenario))


async def until(is_so) -> None:
    end = time.monotonic() + 120
    while not is_so():
        assert time.monotonic() < end
        await asyncio.sleep(0.01)


def paints() -> bool:
    return "painter" in {thread.name for thread in threading.enumerate()}


async def last_state(page, **asked) -> str:
    state = ""
    async for found, _ in page.paint(**asked):
        state = found
    return state


async def vanish(page, painting: asyncio.Task) -> None:
    """Close all connections of a page, as the death of its browser does."""
    painting.cancel()
    with contextlib.suppress(asyncio.CancelledError):
        await painting
    await page.leave()


@pytest.mark.parametrize("heartbeat", [True, False], ids=["a tab", "a request alone"])
def test_no_evaluation_is_made_for_who_has_gone(play, evaluations, heartbeat):
    async def scenario(new_page) -> None:
        async with new_page() as page:
            if not heartbeat:
                page._alive.cancel()
            painting = asyncio.create_task(last_state(page, steps=STEPS, side=16))
            await until(lambda: evaluations[16] >= 10)
            await vanish(page, painting)
            await until(lambda: not paints())
            # The server notices by itself, and the step under way is finished first.
            assert evaluations[16] < STEPS / 2

    play(scenario)


def test_who_leaves_the_line_is_not_painted_for_and_the_next_one_is(play, evaluations):
    async def scenario(new_page) -> None:
        async with new_page() as first, new_page() as second, new_page() as third:
            painting = asyncio.create_task(last_state(first, steps=STEPS, side=16))
            await until(lambda: evaluations[16])
            states = []

            async def waiting() -> None:
                async for state, _ in second.paint(steps=STEPS, side=24):
                    states.append(state)

            line = asyncio.create_task(waiting())
            await until(lambda: states)
            await vanish(second, line)
            await vanish(first, painting)
            assert await last_state(third, steps=2, side=QUICK) == "done"
            await until(lambda: not paints())
            assert not evaluations[24]
            assert evaluations[QUICK]
            assert evaluations[16] < STEPS / 2

    play(scenario)
