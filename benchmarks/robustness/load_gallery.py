"""The gallery under load: concurrent clients and a batch `sample` beside them.

    python -m benchmarks.robustness.load_gallery --rows benchmarks/results.csv

Starts `complexity-dit app` as a user does, on a free port, and `complexity-dit sample` beside it.

1. `--clients` pages at once ask `--requests` times each, every time for another label and seed.
   Each picture that comes back is compared, bit by bit, with what the pipeline paints alone for the
   settings embedded in the PNG, and those settings with what the page asked for.
2. More pages ask than the line holds, all for something slow: the refusals are counted and must
   say what to do. While the line is full a page that waits presses Stop, and must be heard.
3. The page that is painted for is closed in the middle: its painting must end, and the next begin.

Without `--pipeline` it makes a small one. Writes `result.json` to `--out`; any number that is not
as promised ends it with status 1.
"""

import argparse
import asyncio
import io
import json
import os
import signal
import socket
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import numpy as np
import torch
from benchmarks.common.results import append_rows
from benchmarks.robustness.gallery_client import Page, pngs_of, reason_of
from PIL import Image

from complexity_dit.app.gallery import Gallery, Settings, read_png
from complexity_dit.config import ObjectiveConfig, SampleConfig
from complexity_dit.models.transformer import ComplexityDiTTransformer2DModel
from complexity_dit.pipelines.pipeline import ComplexityDiTPipeline
from complexity_dit.pipelines.sampling import load_pipeline, sample
from complexity_dit.training.objective import build_scheduler

QUEUE_SIZE = 4
SLOW = {"steps": 100, "side": 128}
PATIENCE = 240.0


def small_pipeline(folder):
    """A pipeline whose every weight matters, and whose labels change the picture."""
    torch.manual_seed(0)
    network = ComplexityDiTTransformer2DModel(
        sample_size=16, hidden_size=64, num_layers=2, num_attention_heads=4,
        label_fields=["style", "genre"], num_classes=[3, 2],
    ).eval()  # fmt: skip
    with torch.no_grad():
        for name, parameter in network.named_parameters():
            if "adaln" in name or "proj_out" in name or "label" in name:
                parameter.normal_(std=0.2)
    names = {
        "style": {0: "Cubism", 1: "Fauvism", 2: "Ukiyo_e"},
        "genre": {0: "landscape", 1: "portrait"},
    }
    scheduler = build_scheduler(ObjectiveConfig())
    ComplexityDiTPipeline(network, scheduler, id2label=names).save_pretrained(folder)
    return folder


def start(pipeline, port, log):
    command = [sys.executable, "-m", "complexity_dit", "app", str(pipeline)]
    command += [f"--port={port}", f"--queue_size={QUEUE_SIZE}"]
    with log.open("w") as file:
        return subprocess.Popen(command, stdout=file, stderr=file)


def wait_for(server, port, log):
    until = time.monotonic() + PATIENCE
    while time.monotonic() < until:
        if server.poll() is not None:
            raise SystemExit(f"the gallery ended:\n{log.read_text()}")
        try:
            socket.create_connection(("127.0.0.1", port)).close()
            return
        except ConnectionRefusedError:
            time.sleep(0.2)
    raise SystemExit(f"the gallery does not answer on port {port}")


def free_port():
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        return free.getsockname()[1]


def peak_megabytes(pid):
    status = Path(f"/proc/{pid}/status").read_text()
    return int(status.partition("VmHWM:")[2].split()[0]) / 1024


async def many_pages(address, gallery, clients, requests, counts):
    """Part 1."""
    names = gallery.label_names["style"]
    alone = {}

    async def one(number):
        async with Page(address) as page:
            for turn in range(requests):
                label, seed = names[(number + turn) % len(names)], 100 * number + turn
                async for state, shown in page.paint(label, seed, count=2):
                    last = state, shown
                counts["asked"] += 1
                if last[0] != "done":
                    counts["not painted"] += 1
                    continue
                for data in pngs_of(last[1]):
                    told = read_png(data)
                    mine = told.settings.labels == {"style": label} and told.settings.seed == seed
                    pixels = np.asarray(Image.open(io.BytesIO(data)))
                    counts["pictures"] += 1
                    counts["of another page"] += not mine
                    key = json.dumps(told.settings.as_dict())
                    alone.setdefault(key, []).append((told.picture, pixels))

    await asyncio.gather(*(one(number) for number in range(clients)))
    return alone


def compare_alone(gallery, alone, counts):
    """Every picture again, by the pipeline in this process with nobody beside it."""
    for key, found in alone.items():
        *_, frame = gallery.paint(Settings.from_dict(json.loads(key)))
        for picture, pixels in found:
            counts["other bits"] += not np.array_equal(frame.images[picture], pixels)


async def more_than_fit(address, counts):
    """Part 2; returns the pages that stay, the one that is painted for first."""
    pages, tasks = [], []
    for number in range(2 * (QUEUE_SIZE + 1)):
        pages.append(await Page(address).__aenter__())
        tasks.append(asyncio.create_task(first_of(pages[-1], number)))
        if number == 0:
            await asyncio.sleep(1)
    await asyncio.sleep(3)
    taken = [page for page, task in zip(pages, tasks, strict=True) if not task.done()]
    for task in tasks:
        if task.done():
            state, shown = task.result()
            counts["refused"] += state == "refused"
            counts["refused clearly"] += "try again" in reason_of(shown)
    counts["accepted"] = len(taken)
    # The last in line gives up: its click must not wait behind those whom it waits for.
    waiting = taken[-1]
    begun = time.monotonic()
    counts["stop heard"] += await waiting.stop() == 200
    state, _ = await asyncio.wait_for(tasks[pages.index(waiting)], PATIENCE)
    counts["stopped while waiting"] += state == "empty"
    counts["seconds to stop"] = round(time.monotonic() - begun, 2)
    return pages, tasks, taken


async def first_of(page, seed):
    """The last state of a slow painting."""
    last = "cancelled", ""
    async for state, shown in page.paint(seed=seed, **SLOW):
        last = state, shown
    return last


async def one_goes(pages, tasks, taken, counts):
    """Part 3: whoever is painted for closes the tab; the others stop, so that it does not last."""
    painter, follower = taken[0], taken[1]
    for page in taken[2:-1]:
        await page.stop()
    task = tasks[pages.index(painter)]
    counts["left in the middle"] += not task.done()
    task.cancel()
    await painter.leave()
    begun = time.monotonic()
    # With nobody before it the follower is painted, which a page that asks for little sees end.
    await asyncio.wait_for(follower.stop(), PATIENCE)
    async with Page(painter.client.base_url) as page:
        async for state, _ in page.paint(seed=1):
            last = state
    counts["painted after one left"] += last == "done"
    counts["seconds after one left"] = round(time.monotonic() - begun, 2)
    for page, one in zip(pages, tasks, strict=True):
        one.cancel()
        await page.leave()


def check(counts, clients, requests):
    """What is not as promised, in words."""
    wanted = {
        "asked": clients * requests, "not painted": 0, "pictures": 2 * clients * requests,
        "of another page": 0, "other bits": 0, "batch other bits": 0,
        "accepted": QUEUE_SIZE + 1, "refused": QUEUE_SIZE + 1, "refused clearly": QUEUE_SIZE + 1,
        "stop heard": 1, "stopped while waiting": 1, "left in the middle": 1,
        "painted after one left": 1, "tracebacks": 0,
    }  # fmt: skip
    return [f"{name}: {counts[name]}, not {n}" for name, n in wanted.items() if counts[name] != n]


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--pipeline", help="with the fields style and genre; a small one if absent")
    parser.add_argument("--clients", type=int, default=4)
    parser.add_argument("--requests", type=int, default=3)
    parser.add_argument("--batch", type=int, default=24, help="pictures of the batch sample")
    parser.add_argument("--out", default="runs/load-gallery")
    parser.add_argument("--rows", help="CSV that gets the row")
    options = parser.parse_args()
    out = Path(options.out)
    out.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=out) as scratch:
        pipeline = options.pipeline or small_pipeline(Path(scratch, "pipeline"))
        counts = run(Path(pipeline), Path(scratch), options)
    wrong = check(counts, options.clients, options.requests)
    result = {"settings": vars(options), "queue_size": QUEUE_SIZE, "counts": counts, "wrong": wrong}
    (out / "result.json").write_text(json.dumps(result, indent=1) + "\n")
    for name, value in counts.items():
        print(f"{name:>24}  {value}")
    if options.rows and not wrong:
        case = f"{options.clients} clients and a batch sample"
        rows = [{"case": case, "metric": n, "value": v, "unit": ""} for n, v in counts.items()]
        append_rows(options.rows, "load_gallery", rows)
    sys.exit("; ".join(wrong) or 0)


def run(pipeline, scratch, options):
    counts = dict.fromkeys(
        ["asked", "not painted", "pictures", "of another page", "other bits", "batch pictures",
         "batch other bits", "accepted", "refused", "refused clearly", "stop heard",
         "stopped while waiting", "left in the middle", "painted after one left", "tracebacks"], 0,
    )  # fmt: skip
    port, log = free_port(), scratch / "app.log"
    server = start(pipeline, port, log)
    batch = None
    try:
        wait_for(server, port, log)
        words = ["sample", str(pipeline), "--out", str(scratch / "batch")]
        words += ["--num_images", str(options.batch), "--num_inference_steps", "4"]
        command = [sys.executable, "-m", "complexity_dit", *words]
        batch = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
        gallery = Gallery(load_pipeline(str(pipeline)))
        address = f"http://127.0.0.1:{port}"
        alone = asyncio.run(many_pages(address, gallery, options.clients, options.requests, counts))
        compare_alone(gallery, alone, counts)

        async def crowd():
            await one_goes(*await more_than_fit(address, counts), counts)

        asyncio.run(crowd())
        if batch.wait(PATIENCE):
            raise SystemExit("the batch sample failed")
        sampling = SampleConfig(num_inference_steps=4)
        sample(str(pipeline), str(scratch / "again"), options.batch, sampling=sampling)
        for path in sorted((scratch / "again").glob("*.png")):
            there = np.asarray(Image.open(scratch / "batch" / path.name))
            counts["batch pictures"] += 1
            counts["batch other bits"] += not np.array_equal(there, np.asarray(Image.open(path)))
        counts["peak memory MB"] = round(peak_megabytes(server.pid))
    finally:
        for process in (batch, server):
            if process is not None and process.poll() is None:
                os.kill(process.pid, signal.SIGINT)
                process.wait(60)
    counts["tracebacks"] = log.read_text().count("Traceback")
    return counts


if __name__ == "__main__":
    main()
