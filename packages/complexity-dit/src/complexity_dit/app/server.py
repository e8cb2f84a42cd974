"""The gallery in a browser: `complexity-dit app PIPELINE`.

The widgets and the server; what is painted is `gallery.py`'s, how it looks `app_page.py`'s. Needs
the extra `[app]`, works without a network, and calls nobody.
"""

import json
import os
import random
import re
import threading
import time
from collections.abc import Awaitable, Callable, Iterable, Iterator, MutableMapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

from complexity_dit.app.gallery import MAX_SEED, Gallery, Settings
from complexity_dit.app.page import CSS, empty_wall, masthead, refusal, waiting, wall
from complexity_dit.config import AppConfig
from complexity_dit.distributed import pick_device
from complexity_dit.pipelines.sampling import load_pipeline
from inl_core.run.errors import UserError
from inl_core.run.json_files import parse_json

# What the gallery's server answers, and nothing else.
#
# gradio's server can also serve files, take uploads and pass requests on to other servers. The
# gallery needs none of that, so requests are held to a list: fixed addresses, and the files of
# gradio's own pages by the names they had when the server started. No path of a request is ever
# looked up on a disk, and the values of an event are numbers and text, never a file description.

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


# Whose turn it is to paint: one at a time, the others in a line of bounded length.

AWAY_SECONDS = 60.0
"""After so long without being asked for its next frame a painting has nobody who looks."""

T = TypeVar("T")


@dataclass(eq=False)
class Ticket:
    """A place in the line.

    Attributes:
        stop: Is set when the place is lost, or by whoever asked for the painting.
        away_since: When its last frame was handed out; None while the next one is being made.
    """

    stop: threading.Event
    away_since: float | None = None


class Turns:
    """A line of paintings; the first one paints.

    Not the queue of the server: that one counts every click, so a full one would refuse the click
    that stops a painting and makes room.

    Args:
        waiting: How many may wait behind the one that paints.
    """

    def __init__(self, waiting: int) -> None:
        self.waiting = waiting
        self._line: list[Ticket] = []
        self._lock = threading.Lock()

    def join(self, stop: threading.Event) -> Ticket:
        """Take the last place.

        Raises:
            UserError: The line is full.
        """
        with self._lock:
            self._drop_the_absent()
            if len(self._line) > self.waiting:
                raise UserError(
                    f"one painting is under way and {self.waiting} wait, which is the most "
                    "(--queue_size): try again in a moment"
                )
            self._line.append(ticket := Ticket(stop))
        return ticket

    def before(self, ticket: Ticket) -> int:
        """How many are before this one; those who have left are not counted."""
        with self._lock:
            self._drop_the_absent()
            return self._line.index(ticket) if ticket in self._line else 0

    def leave(self, ticket: Ticket) -> None:
        """Give the place free."""
        with self._lock:
            if ticket in self._line:
                self._line.remove(ticket)

    def frames(self, ticket: Ticket, made: Iterable[T]) -> Iterator[T]:
        """Hand out what is made, noting when nobody asks for more; the place is free at the end."""
        try:
            for frame in made:
                ticket.away_since = time.monotonic()
                yield frame
                ticket.away_since = None
        finally:
            self.leave(ticket)

    def _drop_the_absent(self) -> None:
        now = time.monotonic()
        for ticket in list(self._line):
            if ticket.away_since is not None and now - ticket.away_since > AWAY_SECONDS:
                ticket.stop.set()
                self._line.remove(ticket)


# Read by gradio when it is imported; said again where its arguments allow it.
os.environ.setdefault("GRADIO_ANALYTICS_ENABLED", "False")

try:
    import gradio as gr
    import uvicorn
    from fastapi import FastAPI
    from starlette.middleware.trustedhost import TrustedHostMiddleware
except ImportError as missing:
    from inl_core.run.errors import UserError

    raise UserError(
        f"the gallery needs gradio ({missing}): pip install 'complexity-dit[app]'"
    ) from missing

_ANY = "any"
_GRID = "A grid of several seeds"
_CLICKS = 64  # beside paintings: stops, new seeds, refusals on their way
_LOOK_SECONDS = 0.3  # between two looks at whose turn it is
_LOOPBACK = {"127.0.0.1", "localhost", "::1"}


class Session:
    """The paintings of all open pages, so that a page can stop its own."""

    def __init__(self) -> None:
        self._stops: dict[str, threading.Event] = {}
        self._lock = threading.Lock()

    def start(self, page: str) -> threading.Event:
        """A new painting of a page; what the page painted before is stopped."""
        self.stop(page)
        with self._lock:
            self._stops[page] = event = threading.Event()
        return event

    def stop(self, page: str) -> None:
        """Ask the page's painting to end after its current step."""
        with self._lock:
            event = self._stops.pop(page, None)
        if event is not None:
            event.set()


def build_page(gallery: Gallery, queue_size: int) -> gr.Blocks:
    """The page: what to paint at the left, the wall with the pictures at the right."""
    defaults, limits, sessions = Settings(), gallery.limits, Session()
    turns = Turns(queue_size)
    fields = list(gallery.label_names)
    strips = {f"Every {field}, one seed": field for field in fields}

    with gr.Blocks(analytics_enabled=False, title="Gallery") as page:
        gr.HTML(masthead(gallery))
        with gr.Row(equal_height=False):
            with gr.Column(scale=1, min_width=300):
                labels = [
                    gr.Dropdown(
                        [(_ANY, ""), *((name.replace("_", " "), name) for name in names)],
                        value="",
                        label=field.replace("_", " ").capitalize(),
                    )
                    for field, names in gallery.label_names.items()
                ]
                show = gr.Dropdown([_GRID, *strips], value=_GRID, label="Show")
                count = gr.Slider(
                    1,
                    min(16, limits.max_images),
                    defaults.num_images,
                    step=1,
                    precision=0,
                    label="Pictures",
                )
                with gr.Row():
                    seed = gr.Number(
                        defaults.seed, label="Seed", precision=0, min_width=120, scale=2
                    )
                    dice = gr.Button("New seed", min_width=90, scale=1, elem_id="dice")
                with gr.Row():
                    paint = gr.Button("Paint", variant="primary", scale=2, elem_id="paint")
                    stop = gr.Button(
                        "Stop", variant="stop", interactive=False, min_width=90, elem_id="stop"
                    )
                with gr.Accordion("How it is painted", open=False):
                    steps = gr.Number(defaults.num_inference_steps, label="Steps", precision=0)
                    guidance = gr.Slider(
                        0, min(10.0, limits.max_guidance), defaults.guidance_scale, step=0.1,
                        label="Guidance", info="1 is off",
                    )  # fmt: skip
                    scheduler = gr.Dropdown(
                        [(name.removesuffix("Scheduler"), name) for name in gallery.schedulers],
                        value=gallery.own_scheduler,
                        label="Scheduler",
                    )
                    side = gr.Number(gallery.pipe.sample_size, label="Size in pixels", precision=0)
            with gr.Column(scale=3, min_width=420):
                canvas = gr.HTML(empty_wall(), elem_id="canvas")

        def painting(
            request: gr.Request,
            show: str,
            count: int,
            seed: int,
            steps: int,
            guidance: float,
            scheduler: str,
            side: int,
            *names: str,
        ) -> Iterator[tuple[str, Any, Any]]:
            idle = gr.update(interactive=True), gr.update(interactive=False)
            busy = gr.update(interactive=False), gr.update(interactive=True)
            asked = Settings(
                labels={f: name for f, name in zip(fields, names, strict=True) if name},
                strip=strips.get(show),
                seed=seed,
                num_images=count,
                num_inference_steps=steps,
                guidance_scale=guidance,
                scheduler=scheduler,
                side=side,
            )

            def shown(stop: threading.Event, ticket: Ticket) -> Iterator[tuple[str, Any, Any]]:
                while (before := turns.before(ticket)) and not stop.is_set():
                    yield waiting(before), *busy
                    stop.wait(_LOOK_SECONDS)
                if stop.is_set():
                    yield empty_wall(), *idle
                    return
                for frame in gallery.paint(asked, stop):
                    going_on = not (frame.done or frame.stopped)
                    yield wall(gallery, asked, frame), *(busy if going_on else idle)

            try:
                asked = gallery.check(asked)
                stop = sessions.start(str(request.session_hash))
                ticket = turns.join(stop)
                yield from turns.frames(ticket, shown(stop, ticket))
            except UserError as error:
                yield refusal(str(error)), *idle

        def stopping(request: gr.Request) -> None:
            sessions.stop(str(request.session_hash))

        paint.click(
            painting,
            [show, count, seed, steps, guidance, scheduler, side, *labels],
            [canvas, paint, stop],
            concurrency_limit=None,  # the line is ours, see `Turns`
            show_progress="hidden",
            api_visibility="private",
        )
        stop.click(stopping, queue=True, concurrency_limit=None, api_visibility="private")
        dice.click(
            lambda: random.randint(0, MAX_SEED), None, seed,
            concurrency_limit=None, show_progress="hidden", api_visibility="private",
        )  # fmt: skip
        page.unload(stopping)
    # A flood is held off here; a click waits here for a thread alone, never behind a painting.
    page.queue(max_size=queue_size + _CLICKS, api_open=False)
    return page


def build_server(gallery: Gallery, config: AppConfig) -> Guard:
    """The page as an ASGI application that answers the gallery's requests only."""
    fonts = ["system-ui", "Helvetica Neue", "Liberation Sans", "sans-serif"]
    theme = gr.themes.Base(
        primary_hue="indigo",
        neutral_hue="stone",
        font=fonts,
        font_mono=["ui-monospace", "DejaVu Sans Mono", "monospace"],
    )
    server = FastAPI(docs_url=None, redoc_url=None, openapi_url=None)
    if config.host in _LOOPBACK:
        # A page of another site may have its name point here; only the names of this machine count.
        server.add_middleware(TrustedHostMiddleware, allowed_hosts=sorted(_LOOPBACK))
    gr.mount_gradio_app(
        server,
        build_page(gallery, config.queue_size),
        path="/",
        server_name=config.host,
        server_port=config.port,
        ssr_mode=False,
        mcp_server=False,
        pwa=False,
        run_history=False,
        footer_links=[],
        enable_monitoring=False,
        show_error=False,
        theme=theme,
        css=CSS,
    )
    return Guard(server, page_files(Path(gr.__file__).parent / "templates" / "frontend"))


def serve(pipeline: str, config: AppConfig) -> None:
    """Load a pipeline and serve the gallery until it is interrupted.

    Args:
        pipeline: Pipeline folder or Hub id.
        config: Where to listen, and the limits.

    Raises:
        UserError: No such pipeline or device, or the port is taken.
    """
    limits = config.limits
    pipe = load_pipeline(pipeline).to(pick_device(config.device))
    server = build_server(Gallery(pipe, limits), config)
    print(f"the gallery is at http://{config.host}:{config.port} (Ctrl-C ends it)", flush=True)
    try:
        uvicorn.run(server, host=config.host, port=config.port, log_level="warning")
    except SystemExit as stop:
        # uvicorn has logged why; the likely reason is said plainly.
        raise UserError(
            f"cannot listen on {config.host}:{config.port}: if the port is taken, choose another "
            "--port"
        ) from stop
