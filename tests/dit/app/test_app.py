"""The addresses that the gallery's server answers, and a session in a browser."""

import asyncio
import base64
import contextlib
import io
import json
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from complexity_dit.app.gallery import CHUNK, Gallery, Settings
from complexity_dit.app.server import MAX_BODY, Guard, build_server, page_files
from complexity_dit.config import AppConfig
from inl_core.run.errors import UserError
from support.pictures import encoded

CHROMIUM = Path("/usr/bin/chromium")


def answer(method: str, path: str, body: bytes = b"", **limits: int) -> tuple[int, bytes]:
    """Send a request to the guard; its status, and the body that the guarded server received."""
    received, sent = [], []

    async def server(scope, receive, send):
        message = await receive()
        received.append(message["body"])
        await send({"type": "http.response.start", "status": 200, "headers": []})

    async def receive():
        return {"type": "http.request", "body": body, "more_body": False}

    async def send(message):
        sent.append(message)

    scope = {"type": "http", "method": method, "path": path}
    guard = Guard(server, frozenset({"/assets/a.js"}), **limits)
    asyncio.run(guard(scope, receive, send))
    return sent[0]["status"], received[0] if received else b""


@pytest.mark.parametrize(
    ("method", "path"),
    [
        ("GET", "/"),
        ("HEAD", "/"),
        ("GET", "/assets/a.js"),
        ("GET", "/gradio_api/queue/data"),
        ("GET", "/gradio_api/heartbeat/abc123"),
        ("POST", "/gradio_api/cancel"),
    ],
)
def test_the_guard_passes_on_requests_of_the_page(method, path):
    assert answer(method, path, b"{}") == (200, b"{}")


@pytest.mark.parametrize(
    ("method", "path"),
    [
        ("GET", "/gradio_api/file=/etc/passwd"),
        ("GET", "/file=/etc/passwd"),
        ("GET", "/gradio_api/proxy=http://127.0.0.1:1/"),
        ("GET", "/assets/../../../etc/passwd"),
        ("GET", "/assets/b.js"),
        ("GET", "/gradio_api/heartbeat/../file=/etc/passwd"),
        ("GET", "/gradio_api/info"),
        ("POST", "/gradio_api/upload"),
        ("POST", "/gradio_api/run/predict"),
        ("POST", "/"),
        ("DELETE", "/"),
    ],
)
def test_the_guard_refuses_other_addresses(method, path):
    assert answer(method, path)[0] == 404


def test_the_guard_accepts_only_plain_values():
    join = "/gradio_api/queue/join"
    assert answer("POST", join, b'{"data": [1, "a", null, 2.5, true]}')[0] == 200
    file = b'{"data": [{"path": "/etc/passwd", "meta": {"_type": "gradio.FileData"}}]}'
    for body in (file, b'{"data": [[1]]}', b'{"event_data": {"path": "x"}}', b"[]", b"no json"):
        assert answer("POST", join, body)[0] == 400, body
    large = b'{"data": ["' + b"a" * MAX_BODY + b'"]}'
    assert answer("POST", join, large)[0] == 413
    assert answer("POST", join, large, max_body=2 * MAX_BODY) == (200, large)


def test_page_files_are_given_as_addresses(tmp_path):
    (tmp_path / "assets" / "deep").mkdir(parents=True)
    (tmp_path / "assets" / "deep" / "a.js").touch()
    (tmp_path / "index.html").touch()
    assert page_files(tmp_path) == {"/assets/deep/a.js"}


@pytest.fixture
def address(pipe, tmp_path) -> Iterator[str]:
    """A gallery started by the command, on a free port."""
    pytest.importorskip("gradio", reason="the gallery needs the extra [app]")
    pipe.save_pretrained(tmp_path / "pipeline")
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    command = [sys.executable, "-m", "complexity_dit", "app", str(tmp_path / "pipeline")]
    log = tmp_path / "app.log"
    with log.open("w") as file:
        server = subprocess.Popen([*command, f"--port={port}"], stdout=file, stderr=file)
    try:
        while True:
            assert server.poll() is None, log.read_text()
            with contextlib.suppress(ConnectionRefusedError):
                socket.create_connection(("127.0.0.1", port)).close()
                break
            time.sleep(0.1)
        yield f"http://127.0.0.1:{port}"
    finally:
        server.send_signal(signal.SIGINT)
        server.wait(timeout=30)
    assert "Traceback" not in log.read_text(), log.read_text()


def test_the_server_serves_its_page_and_no_file(pipe):
    pytest.importorskip("gradio", reason="the gallery needs the extra [app]")
    asyncio.run(request_addresses(Gallery(pipe)))


async def request_addresses(gallery: Gallery) -> None:
    import httpx

    # Built inside a running loop: gradio would create loops of its own, and not close them.
    transport = httpx.ASGITransport(app=build_server(gallery, AppConfig()))
    async with httpx.AsyncClient(transport=transport, base_url="http://127.0.0.1") as client:
        page = await client.get("/")
        assert page.status_code == 200
        assert "Fauvism" in page.text
        for outside in ("googleapis", "gstatic", "cdn.", "cdnjs"):
            assert outside not in page.text
        assert "googleapis" not in (await client.get("/theme.css")).text
        for path in ("/gradio_api/file=/etc/passwd", "/gradio_api/info", "/openapi.json", "/docs"):
            assert (await client.get(path)).status_code == 404, path
        assert (await client.get("/", headers={"host": "evil.example"})).status_code == 400


@pytest.mark.parametrize(
    ("root_path", "host", "status"),
    [
        ("", "127.0.0.1:7860", 200), ("", "localhost", 200), ("", "[::1]:7860", 200),
        ("", "example.org", 400),
        ("https://example.org/gallery", "example.org", 200),
        ("https://example.org/gallery", "other.org", 400),
    ],
)  # fmt: skip
def test_the_names_under_which_the_gallery_answers(pipe, root_path, host, status):
    httpx = pytest.importorskip("httpx")

    async def ask():
        app = build_server(Gallery(pipe), AppConfig(root_path=root_path))
        transport = httpx.ASGITransport(app)
        async with httpx.AsyncClient(transport=transport, base_url="http://127.0.0.1") as client:
            return await client.get("/", headers={"host": host})

    response = asyncio.run(ask())
    assert response.status_code == status
    if root_path and status == 200:
        assert f'"root":"{root_path}"' in response.text.replace(" ", "")


def test_an_address_behind_a_proxy_is_whole():
    with pytest.raises(UserError, match="root_path '/gallery' must be the whole address"):
        AppConfig(root_path="/gallery")


@pytest.fixture
def browser():
    """Debian's Chromium."""
    playwright = pytest.importorskip(
        "playwright.sync_api", reason="the browser test needs the package playwright"
    )
    if not CHROMIUM.exists():
        pytest.skip(f"the browser test needs {CHROMIUM} (apt-get install chromium)")
    arguments = ["--no-sandbox", "--disable-gpu", "--disable-background-networking"]
    with playwright.sync_playwright() as driver:
        chromium = driver.chromium.launch(
            executable_path=str(CHROMIUM), args=[*arguments, "--no-first-run"]
        )
        yield chromium
        chromium.close()


@pytest.mark.slow
def test_a_session_in_a_browser(address, browser, pipe, tmp_path):
    page = browser.new_page()
    urls, errors = [], []
    page.on("request", lambda request: urls.append(request.url))
    page.on("pageerror", lambda error: errors.append(str(error)))
    page.goto(address)

    def choose(label: str, option: str) -> None:
        page.get_by_label(label, exact=True).click()
        page.get_by_role("option", name=option).click()

    def write(label: str, value: str) -> None:
        field = page.get_by_label(label, exact=True)
        field.fill(value)
        field.press("Tab")

    def paint(state: str) -> None:
        page.click("#paint")
        page.wait_for_selector(state)

    def saved(selector: str) -> tuple[Image.Image, Settings, int | None]:
        with page.expect_download() as download:
            page.locator(selector).first.click()
        file = tmp_path / download.value.suggested_filename
        download.value.save_as(file)
        image = Image.open(file)
        content = json.loads(image.text[CHUNK])
        return image, Settings(**content["settings"]), content["picture"]

    # A grid, whose settings in the file reproduce the same bits.
    choose("Style", "Fauvism")
    page.click("#dice")
    write("Seed", "5")
    paint("[data-state=done]")
    assert page.locator(".wall figure").count() == 4
    image, settings, picture = saved(".wall figure a")
    assert (settings.labels, settings.seed) == ({"style": "Fauvism"}, 5)
    *_, frame = Gallery(pipe).paint(settings)
    np.testing.assert_array_equal(np.asarray(image), frame.images[picture])
    assert (tmp_path / "gallery-Fauvism-seed-5-1.png").is_file()

    # A strip over all styles.
    choose("Show", "Every style, one seed")
    page.click("#paint")
    page.wait_for_function("document.querySelectorAll('.wall figure').length == 3")
    page.wait_for_selector("[data-state=done]")
    assert "Ukiyo e" in page.inner_text(".wall")
    assert saved("a.download")[1].strip == "style"

    # A picture from the visitor's device, painted over in part: the rest stays as it is.
    page.get_by_label("A picture", exact=True).click()
    paint(".refusal")
    assert "no image yet" in page.inner_text(".refusal")
    own = np.random.default_rng(0).integers(0, 256, (8, 8, 3), dtype=np.uint8)
    page.set_input_files("#easel-file", {
        "name": "own.png", "mimeType": "image/png", "buffer": encoded(Image.fromarray(own)),
    })  # fmt: skip
    page.wait_for_selector("#easel-mask")
    box = page.locator("#easel-mask").bounding_box()
    page.mouse.move(box["x"] + 0.9 * box["width"], box["y"] + 0.1 * box["height"])
    page.mouse.down()
    page.mouse.move(box["x"] + 0.9 * box["width"], box["y"] + 0.9 * box["height"])
    page.mouse.up()
    paint("[data-state=done]")
    image, settings, picture = saved(".wall figure a")
    assert settings.mask is not None
    *_, frame = Gallery(pipe).paint(settings)
    np.testing.assert_array_equal(np.asarray(image), frame.images[picture])
    kept = Image.open(io.BytesIO(base64.b64decode(settings.image)))
    assert (np.asarray(image)[:, :4] == np.asarray(kept)[:, :4]).all()

    # A strip between two images.
    page.get_by_label("Two images", exact=True).click()
    choose("To style", "Cubism")
    paint("[data-state=done]")
    _, settings, _ = saved("a.download")
    assert (settings.to_labels, settings.to_seed) == ({"style": "Cubism"}, 1)
    page.get_by_label("Noise", exact=True).click()

    # A refusal names what to do; sampling can be stopped, and started again.
    page.get_by_text("How it is painted").click()
    write("Size in pixels", "9")
    paint(".refusal")
    assert "take 8 or 10" in page.inner_text(".refusal")
    write("Size in pixels", "64")
    write("Steps", "100")
    paint("[data-state=denoising]")
    with page.expect_response("**/gradio_api/cancel"):  # after the step under way
        page.click("#stop")
    write("Size in pixels", "8")
    write("Steps", "2")
    paint("[data-state=done]")

    assert not errors
    assert {url for url in urls if not url.startswith(("data:", f"{address}/"))} == set()
