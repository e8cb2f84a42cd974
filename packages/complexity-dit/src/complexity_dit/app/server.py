"""`complexity-dit app PIPELINE`: the widgets of the gallery and the server that answers them.

Needs the extra `[app]`. Works offline and sends nothing to other servers.
"""

import os
import random
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

from complexity_dit.app.gallery import MAX_PROMPT, MAX_SEED, Gallery, Settings
from complexity_dit.app.page import (
    CSS,
    EASEL,
    chips,
    easel_script,
    empty_wall,
    masthead,
    refusal,
    wall,
)
from complexity_dit.config import AppConfig
from complexity_dit.distributed import pick_device
from complexity_dit.pipelines.sampling import load_pipeline
from inl_core.run.errors import UserError
from inl_core.run.json_files import parse_json

os.environ.setdefault("GRADIO_ANALYTICS_ENABLED", "False")  # read when gradio is imported

try:
    import gradio as gr
    import uvicorn
    from fastapi import FastAPI
    from starlette.middleware.trustedhost import TrustedHostMiddleware
    from starlette.responses import JSONResponse
    from starlette.types import ASGIApp, Message, Receive, Scope, Send
    from starlette.websockets import WebSocketClose
except ImportError as missing:
    raise UserError(
        f"the gallery needs gradio ({missing}): pip install 'complexity-dit[app]'"
    ) from missing

MAX_BODY = 16 * 1024
"""Largest request in bytes without a picture; an event of the gallery has a few hundred."""

BYTES_PER_PIXEL = 8
"""Of a picture and its mask in a request: PNG in base64, however little they compress."""

_GET = {
    "/", "/config", "/theme.css", "/favicon.ico", "/robots.txt",
    "/gradio_api/queue/data", "/gradio_api/startup-events", "/gradio_api/app_id",
}  # fmt: skip
_POST = {"/gradio_api/queue/join", "/gradio_api/cancel", "/gradio_api/reset"}
_HEARTBEAT = re.compile(r"/gradio_api/heartbeat/\w{1,40}")
_LOOPBACK = {"127.0.0.1", "localhost", "::1"}
# As a browser writes ::1, and what older versions of starlette take from it. No name on a network
# can be one of the two.
_IPV6 = {"[::1]", "["}

_ANY = "any"
_NOISE, _PICTURE, _TWO = "noise", "picture", "two"
_STARTS = [("Noise", _NOISE), ("A picture", _PICTURE), ("Two images", _TWO)]
_GRID = "A grid of several seeds"


class Guard:
    """ASGI middleware that passes on the gallery's own requests and refuses all others.

    gradio's server can also serve files, accept uploads, download the URLs of file descriptions and
    forward requests to other servers. The gallery needs none of that, so only a fixed list of
    addresses is answered, and the values of an event are numbers and text. No path of a request is
    looked up on disk.

    Args:
        app: The server.
        files: Addresses of the files of gradio's page.
        max_body: Largest request in bytes.
    """

    def __init__(self, app: ASGIApp, files: frozenset[str], max_body: int = MAX_BODY) -> None:
        self.app, self.max_body = app, max_body
        self.addresses = files | _GET

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] == "websocket":
            await WebSocketClose()(scope, receive, send)
            return
        status, message = 200, ""
        if scope["type"] == "http":
            method, path = scope["method"], scope["path"]
            if method == "POST" and path in _POST:
                body = await _read(receive, self.max_body)
                receive = _replay(body, receive)
                if len(body) > self.max_body:
                    status, message = 413, f"refused: more than {self.max_body} bytes"
                elif error := event_error(body):
                    status, message = 400, f"refused: {error}"
            elif method not in ("GET", "HEAD") or not (
                path in self.addresses or _HEARTBEAT.fullmatch(path)
            ):
                status, message = 404, "the gallery has no such address"
        app = self.app if status == 200 else JSONResponse({"error": message}, status)
        await app(scope, receive, send)


def event_error(body: bytes) -> str:
    """Check that a request is an event of the gallery.

    Returns:
        What is wrong with it; empty if nothing is.
    """
    try:
        event = parse_json(body)
    except ValueError as error:
        return f"the body is not JSON ({error})"
    if not isinstance(event, dict):
        return "the body is not a JSON object"
    values = event.get("data") or []
    if not isinstance(values, list) or not all(_is_plain(value) for value in values):
        return "values must be numbers and text"
    return "" if _is_plain(event.get("event_data")) else "event_data must be empty"


def _is_plain(value: Any) -> bool:
    return value is None or isinstance(value, str | int | float)


async def _read(receive: Receive, limit: int) -> bytes:
    """Read a body, or a little more than `limit` bytes of it."""
    body, more = bytearray(), True
    while more and len(body) <= limit:
        message = await receive()
        body += message.get("body", b"")
        more = message.get("more_body", False)
    return bytes(body)


def _replay(body: bytes, receive: Receive) -> Receive:
    """Make a `receive` that returns the body again, and then what else arrives."""
    waiting: list[Message] = [{"type": "http.request", "body": body, "more_body": False}]

    async def replay() -> Message:
        return waiting.pop() if waiting else await receive()

    return replay


def page_files(frontend: Path) -> frozenset[str]:
    """Addresses of the files of gradio's page.

    Args:
        frontend: The folder with `assets` and `static`.
    """
    return frozenset(
        f"/{path.relative_to(frontend).as_posix()}"
        for folder in ("assets", "static")
        for path in (frontend / folder).rglob("*")
        if path.is_file()
    )


def build_page(gallery: Gallery, queue_size: int) -> gr.Blocks:
    """Build the page: settings on the left, the wall with the pictures on the right.

    gradio's queue samples for one request at a time. A request that waits is dropped, and one that
    runs ends after its current step, when its page is closed or *Stop* is pressed. A request that
    finds `queue_size` others waiting is refused.
    """
    defaults, limits, own = Settings(), gallery.limits, gallery.pipe.guidance
    fields = list(gallery.label_names)
    strips = {f"Every {field}, one seed": field for field in fields}

    with gr.Blocks(analytics_enabled=False, title="Gallery") as page:
        gr.HTML(masthead(gallery))
        with gr.Row(equal_height=False):
            with gr.Column(scale=1, min_width=300):
                start = gr.Radio(_STARTS, value=_NOISE, label="Start from", elem_id="start")
                reads = gallery.pipe.text_encoder is not None
                prompt = gr.Textbox(
                    "", label="Prompt", lines=2, max_length=MAX_PROMPT, elem_id="prompt",
                    visible=reads,
                )  # fmt: skip
                gr.HTML(chips(gallery), visible=reads and bool(fields))
                labels = _dropdowns(gallery, "")
                with gr.Column(elem_classes=f"from-{_NOISE}", visible=bool(strips)):
                    show = gr.Dropdown([_GRID, *strips], value=_GRID, label="Show")
                with gr.Column(elem_classes=f"from-{_PICTURE}"):
                    gr.HTML(EASEL, elem_id="easel")
                    # Filled in by the script of the page when a button is pressed.
                    image, mask = gr.Textbox(visible=False), gr.Textbox(visible=False)
                    strength = gr.Slider(
                        0, 1, defaults.strength, step=0.05, label="Strength",
                        info="0 keeps the picture, 1 forgets it",
                    )  # fmt: skip
                with gr.Column(elem_classes=f"from-{_TWO}"):
                    last = _dropdowns(gallery, "To ")
                    to_seed = gr.Number(1, label="To seed", precision=0)
                count = gr.Slider(
                    1, min(16, limits.max_images), defaults.num_images, step=1, precision=0,
                    label="Pictures",
                )  # fmt: skip
                with gr.Row():
                    seed = gr.Number(
                        defaults.seed, label="Seed", precision=0, min_width=120, scale=2
                    )
                    dice = gr.Button("New seed", min_width=90, scale=1, elem_id="dice")
                surprise = gr.Button("Surprise me", visible=bool(gallery.labels_of(0)))
                with gr.Row():
                    paint = gr.Button("Paint", variant="primary", scale=2, elem_id="paint")
                    stop = gr.Button("Stop", variant="stop", min_width=90, elem_id="stop")
                with gr.Accordion("How it is painted", open=False):
                    steps = gr.Number(defaults.num_inference_steps, label="Steps", precision=0)
                    guidance = gr.Slider(
                        0, min(10.0, limits.max_guidance), own["guidance_scale"], step=0.1,
                        label="Guidance", info="1 is off",
                    )  # fmt: skip
                    internal = gr.Slider(
                        0, min(10.0, limits.max_guidance), own["internal_guidance_scale"],
                        step=0.1, label="Internal guidance", info="1 is off",
                        visible=bool(gallery.pipe.transformer.config.get("auxiliary_layer")),
                    )  # fmt: skip
                    scheduler = gr.Dropdown(
                        [(name.removesuffix("Scheduler"), name) for name in gallery.schedulers],
                        value=gallery.own_scheduler,
                        label="Scheduler",
                    )
                    side = gr.Number(gallery.pipe.sample_size, label="Size in pixels", precision=0)
            with gr.Column(scale=3, min_width=420):
                canvas = gr.HTML(empty_wall(), elem_id="canvas")

        def sample(
            image: str,
            mask: str,
            start: str,
            show: str,
            strength: float,
            to_seed: int,
            count: int,
            seed: int,
            steps: int,
            guidance: float,
            internal: float,
            scheduler: str,
            side: int,
            prompt: str,
            *names: str,
        ) -> Iterator[str]:
            first, second = (
                {f: name for f, name in zip(fields, half, strict=True) if name}
                for half in (names[: len(fields)], names[len(fields) :])
            )
            forms: dict[str, dict[str, Any]] = {
                _NOISE: {"strip": strips.get(show)},
                _PICTURE: {"image": image, "mask": mask or None, "strength": strength},
                _TWO: {"to_labels": second, "to_seed": to_seed},
            }
            settings = Settings(
                labels=first,
                prompt=prompt or "",
                **forms.get(start, {}),
                seed=seed,
                num_images=count,
                num_inference_steps=steps,
                guidance_scale=guidance,
                internal_guidance_scale=internal,
                scheduler=scheduler,
                side=side,
            )
            try:
                settings = gallery.check(settings)
                for frame in gallery.paint(settings):
                    yield wall(gallery, settings, frame)
            except UserError as error:
                yield refusal(str(error))

        def surprised() -> list[int | str]:
            number = random.randrange(MAX_SEED + 1)
            chosen = gallery.labels_of(number)
            return [number, *(chosen.get(field, "") for field in fields)]

        painting = paint.click(
            sample,
            [
                image,
                mask,
                start,
                show,
                strength,
                to_seed,
                count,
                seed,
                steps,
                guidance,
                internal,
                scheduler,
                side,
                prompt,
                *labels,
                *last,
            ],
            canvas,
            js="(image, mask, ...rest) => [...window.easel.pictures(), ...rest]",
            concurrency_limit=1,
            show_progress="minimal",
            api_visibility="private",
        )
        start.change(None, start, None, js="start => { document.body.dataset.start = start; }")
        stop.click(None, cancels=painting, queue=False)
        surprise.click(
            surprised, None, [seed, *labels], show_progress="hidden", api_visibility="private"
        )
        dice.click(None, None, seed, js=f"() => Math.floor(Math.random() * {MAX_SEED + 1})")
    page.queue(max_size=queue_size, api_open=False)
    return page


def _dropdowns(gallery: Gallery, prefix: str) -> list[gr.Dropdown]:
    """One for each label field, which may be left open."""
    fields = {field: field.replace("_", " ") for field in gallery.label_names}
    return [
        gr.Dropdown(
            [(_ANY, ""), *((name.replace("_", " "), name) for name in names)],
            value="",
            label=f"{prefix}{fields[field]}" if prefix else fields[field].capitalize(),
        )
        for field, names in gallery.label_names.items()
    ]


def build_server(gallery: Gallery, config: AppConfig) -> Guard:
    """Build the page as an ASGI application that answers only the gallery's own requests."""
    fonts = ["system-ui", "Helvetica Neue", "Liberation Sans", "sans-serif"]
    theme = gr.themes.Base(
        primary_hue="indigo",
        neutral_hue="stone",
        font=fonts,
        font_mono=["ui-monospace", "DejaVu Sans Mono", "monospace"],
    )
    server = FastAPI(docs_url=None, redoc_url=None, openapi_url=None)
    if config.host in _LOOPBACK:
        # Refuse DNS rebinding: another site's name that resolves to this machine.
        public = urlsplit(config.root_path).hostname
        hosts = sorted(_LOOPBACK | _IPV6 | ({public} if public else set()))
        server.add_middleware(TrustedHostMiddleware, allowed_hosts=hosts, www_redirect=False)
    gr.mount_gradio_app(
        server,
        build_page(gallery, config.queue_size),
        path="/",
        server_name=config.host,
        server_port=config.port,
        root_path=config.root_path.rstrip("/") or None,
        ssr_mode=False,
        mcp_server=False,
        pwa=False,
        run_history=False,
        footer_links=[],
        enable_monitoring=False,
        show_error=False,
        theme=theme,
        css=CSS,
        js=easel_script(gallery),
    )
    return Guard(
        server,
        page_files(Path(gr.__file__).parent / "templates" / "frontend"),
        MAX_BODY + BYTES_PER_PIXEL * gallery.limits.max_side**2,
    )


def serve(pipeline: str, config: AppConfig) -> None:
    """Load a pipeline and serve the gallery until it is interrupted.

    Args:
        pipeline: Pipeline folder or Hub id.
        config: Address, device and limits.

    Raises:
        UserError: If the pipeline or device does not exist, or the port is taken.
    """
    pipe = load_pipeline(pipeline).to(pick_device(config.device))
    server = build_server(Gallery(pipe, config.limits), config)
    host = f"[{config.host}]" if ":" in config.host else config.host
    address = config.root_path or f"http://{host}:{config.port}"
    print(f"the gallery is at {address} (Ctrl-C ends it)", flush=True)
    try:
        uvicorn.run(server, host=config.host, port=config.port, log_level="warning")
    except SystemExit as stop:  # uvicorn has logged the reason
        raise UserError(
            f"cannot listen on {config.host}:{config.port}: if the port is taken, choose another "
            "--port"
        ) from stop
