"""The gallery in a browser: `complexity-dit app PIPELINE`.

The widgets and the server; what is painted is `gallery.py`'s, how it looks `app_page.py`'s. Needs
the extra `[app]`, works without a network, and calls nobody.
"""

import os
import random
import threading
from collections.abc import Iterator
from typing import Any

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

from pathlib import Path

from complexity_dit.app_guard import Guard, page_files
from complexity_dit.app_page import CSS, empty_wall, masthead, refusal, waiting, wall
from complexity_dit.config import AppConfig
from complexity_dit.distributed import pick_device
from complexity_dit.gallery import MAX_SEED, Gallery, Settings
from complexity_dit.pipelines.sampling import load_pipeline
from complexity_dit.turns import Ticket, Turns
from inl_core.run.errors import UserError

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
