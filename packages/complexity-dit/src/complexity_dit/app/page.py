"""HTML of the gallery and its style sheet.

Pictures travel inside the page. `gr.Gallery` would write each frame to a file that any client can
fetch by its address, and encode it again without the settings that our PNGs hold. Text from labels
and errors is escaped.
"""

import base64
import html
import io
import re
from textwrap import shorten

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from complexity_dit.app.gallery import (
    Frame,
    Gallery,
    Settings,
    picture_png,
    sample_command,
    sheet_columns,
    sheet_png,
)
from inl_core.run.json_files import one_line

PREVIEW_SIDE = 256
"""Largest side of a preview in pixels; several are sent per second."""

CSS = """
.gradio-container { max-width: 1240px !important; --quiet: #6b6459; }
.dark .gradio-container, .gradio-container.dark { --quiet: #a8a29a; }
footer { display: none !important; }
#masthead { border-bottom: 1px solid var(--border-color-primary); padding: 6px 0 16px;
  margin: 0 -12px; }
#masthead h1 { font-family: Georgia, 'Liberation Serif', serif; font-size: 30px; font-weight: 500;
  letter-spacing: -.01em; margin: 0; }
#masthead p { color: var(--quiet); margin: 4px 0 0; font-size: 14px; }
#canvas, #canvas > div { padding: 0 !important; }
#dice { white-space: nowrap; font-size: 14px; font-weight: 500; align-self: stretch; }
.wall { background: var(--background-fill-secondary); border-radius: 8px; padding: 22px;
  border: 1px solid var(--border-color-primary); min-height: 560px; display: flex;
  flex-direction: column; justify-content: center; gap: 18px; }
.wall .pictures { display: grid; gap: 18px; justify-content: center; flex: 1;
  align-content: center; }
.wall figure { margin: 0; }
.wall figure a, .wall figure span.frame { display: block; background: #fff; padding: 7px;
  border-radius: 3px; box-shadow: 0 1px 2px rgba(20,18,14,.18), 0 8px 22px rgba(20,18,14,.12);
  transition: transform .15s; }
.wall figure a:hover { transform: translateY(-3px); }
.wall figure img { display: block; width: 100%; aspect-ratio: 1; image-rendering: pixelated; }
.wall figure img.smooth { image-rendering: auto; }
.wall figcaption { text-align: center; font-size: 12.5px; padding-top: 8px;
  color: var(--quiet); overflow: hidden; text-overflow: ellipsis;
  white-space: nowrap; }
.wall .line { display: flex; justify-content: space-between; align-items: center; gap: 14px;
  font-size: 13.5px; color: var(--quiet); flex-wrap: wrap; }
.wall .line b { color: var(--body-text-color); font-weight: 600; }
.wall .bar { height: 4px; border-radius: 2px; background: var(--border-color-primary);
  overflow: hidden; }
.wall .bar i { display: block; height: 100%; background: var(--color-accent);
  transition: width .2s linear; }
.wall a.download { background: var(--color-accent); color: #fff; padding: 8px 16px;
  border-radius: 8px; text-decoration: none; font-weight: 600; font-size: 13.5px;
  white-space: nowrap; }
.wall a.download:hover { filter: brightness(1.08); }
.wall code.command { display: block; font-size: 12px; line-height: 1.55; padding: 10px 12px;
  border-radius: 8px; background: var(--background-fill-primary); white-space: pre-wrap;
  border: 1px solid var(--border-color-primary); color: var(--quiet);
  overflow-wrap: anywhere; }
.wall .empty { margin: auto !important; text-align: center; color: var(--quiet);
  max-width: 380px; font-size: 14px; line-height: 1.6; }
.wall .empty svg { display: block; margin: 0 auto 18px; opacity: .55; }
.wall .refusal { margin: auto !important; max-width: 520px; padding: 16px 20px; border-radius: 10px;
  border-left: 4px solid #b3261e; background: var(--background-fill-primary);
  box-shadow: 0 1px 3px rgba(20,18,14,.14); font-size: 14.5px; line-height: 1.55; }
[data-start=noise] .from-picture, [data-start=noise] .from-two,
[data-start=picture] .from-noise, [data-start=picture] .from-two,
[data-start=two] .from-noise, [data-start=two] .from-picture { display: none !important; }
#chips { display: flex; flex-wrap: wrap; gap: 6px; max-height: 168px; overflow-y: auto; }
#chips button { all: unset; cursor: pointer; padding: 3px 10px; border-radius: 12px;
  font-size: 12.5px; border: 1px solid var(--border-color-primary); color: var(--quiet); }
#chips button:hover, #chips button:focus-visible { border-color: var(--color-accent); }
#easel .choose { display: block; padding: 10px 12px; border-radius: 8px; cursor: pointer;
  border: 1px dashed var(--border-color-primary); font-size: 14px; }
#easel input { display: block; margin-top: 6px; max-width: 100%; font-size: 13px; }
#easel-canvas { position: relative; margin-top: 10px; }
#easel-canvas canvas { display: block; width: 100%; border-radius: 4px; }
#easel-mask { position: absolute; inset: 0; opacity: .6; touch-action: none; cursor: crosshair; }
#easel p { margin: 6px 0 0; font-size: 12.5px; color: var(--quiet); }
#easel button { all: unset; cursor: pointer; text-decoration: underline; }
@media (max-width: 640px) {
  .wall { padding: 12px; min-height: 340px; }
  .wall .pictures { gap: 10px; }
}
.wall .refusal b { display: block; color: #b3261e; margin-bottom: 4px; }
"""

EASEL = (
    '<label class="choose">Choose a picture'
    '<input id="easel-file" type="file" accept="image/*"></label>'
    '<div id="easel-canvas" hidden><canvas id="easel-picture"></canvas>'
    '<canvas id="easel-mask"></canvas></div>'
    '<p id="easel-hint" hidden>Paint over what is to be made anew; without that, all of it is. '
    '<button id="easel-clear" type="button">Clear</button></p>'
)
"""The picture to start from and, over it, the mask that is painted with a finger or a mouse."""

_SCRIPT = """() => {
  const side = SIDE, brush = side / 10;
  const part = name => document.getElementById("easel-" + name);
  let chosen = false, masked = false, last = null;
  document.body.dataset.start = "noise";

  function clear(name) {  // also what a canvas of a new size is
    part(name).width = part(name).height = side;
    masked = false;
  }

  async function show(file) {
    const image = await createImageBitmap(file), draw = part("picture").getContext("2d");
    const shorter = Math.min(image.width, image.height);
    clear("picture");
    clear("mask");
    draw.fillStyle = "white";
    draw.fillRect(0, 0, side, side);
    draw.imageSmoothingQuality = "high";
    draw.drawImage(image, (image.width - shorter) / 2, (image.height - shorter) / 2, shorter,
                   shorter, 0, 0, side, side);
    chosen = true;
    part("canvas").hidden = part("hint").hidden = false;
  }

  function stroke(event) {
    const box = part("mask").getBoundingClientRect(), draw = part("mask").getContext("2d");
    const now = [event.clientX - box.left, event.clientY - box.top].map(x => x * side / box.width);
    draw.lineWidth = brush;
    draw.lineCap = draw.lineJoin = "round";
    draw.strokeStyle = "white";
    draw.beginPath();
    draw.moveTo(...(last ?? now));
    draw.lineTo(...now);
    draw.stroke();
    last = now;
    masked = true;
  }

  document.addEventListener("change", event => {
    if (event.target.id === "easel-file" && event.target.files.length) show(event.target.files[0]);
  });
  document.addEventListener("click", event => {
    if (event.target.id === "easel-clear") clear("mask");
    if (event.target.matches("#chips button")) {
      const box = document.querySelector("#prompt textarea");
      box.value = [box.value.trim(), event.target.textContent].filter(Boolean).join(", ");
      box.dispatchEvent(new Event("input", {bubbles: true}));
    }
  });
  document.addEventListener("pointerdown", event => {
    if (event.target.id === "easel-mask") { last = null; stroke(event); }
  });
  document.addEventListener("pointermove", event => {
    if (event.target.id === "easel-mask" && event.buttons) stroke(event);
  });

  const data = canvas => canvas.toDataURL("image/png").split(",")[1];
  function on_black() {
    const canvas = document.createElement("canvas"), draw = canvas.getContext("2d");
    canvas.width = canvas.height = side;
    draw.fillRect(0, 0, side, side);
    draw.drawImage(part("mask"), 0, 0);
    return canvas;
  }
  window.easel = {
    pictures() {
      if (!chosen || document.body.dataset.start !== "picture") return ["", ""];
      return [data(part("picture")), masked ? data(on_black()) : ""];
    },
  };
}"""


def easel_script(gallery: Gallery) -> str:
    """The script of the page, which reads and sends the picture at most as large as is painted."""
    return _SCRIPT.replace("SIDE", str(gallery.limits.max_side), 1)


_DRAWING = (
    '<svg width="72" height="72" viewBox="0 0 72 72" fill="none" stroke="currentColor" '
    'stroke-width="2.4" stroke-linecap="round" stroke-linejoin="round"><rect x="14" y="16" '
    'width="44" height="32" rx="2"/><path d="M20 42l10-12 8 8 6-6 8 10M36 16V8M24 48l-6 18M48 48l6 '
    '18M36 48v12"/><circle cx="46" cy="25" r="3.4"/></svg>'
)


def masthead(gallery: Gallery) -> str:
    """Name of the page, the size of the model, and what it takes."""
    parameters = sum(p.numel() for p in gallery.pipe.transformer.parameters())
    taken = ["prompts"] if gallery.pipe.text_encoder is not None else []
    taken += [f"{len(names)} of {name}" for name, names in gallery.label_names.items()]
    side = gallery.pipe.sample_size
    about = f"{parameters / 1e6:.1f} M parameters · {side} × {side} · "
    about += ", ".join(taken) or "no labels"
    return f'<div id="masthead"><h1>Gallery</h1><p>{html.escape(about)}</p></div>'


def chips(gallery: Gallery) -> str:
    """The names of all labels, each a button that adds it to the prompt."""
    names = dict.fromkeys(
        one_line(n.replace("_", " ")) for f in gallery.label_names.values() for n in f
    )
    buttons = (f'<button type="button">{html.escape(name)}</button>' for name in names)
    return f'<div id="chips">{"".join(buttons)}</div>'


def empty_wall() -> str:
    """The wall before the first picture."""
    return _wall(
        f'<div class="empty">{_DRAWING}Choose what to paint and press <b>Paint</b>. The same seed '
        "gives the same pictures, here and on the command line.</div>"
    )


def refusal(message: str) -> str:
    """The wall with an error message."""
    return _wall(
        '<div class="refusal" role="alert"><b>Not painted</b>'
        f"{html.escape(message[:1].upper() + message[1:])}</div>"
    )


def wall(gallery: Gallery, settings: Settings, frame: Frame) -> str:
    """The wall with the images of a frame: previews, or links to PNGs when they are done."""
    captions = gallery.captions(settings)
    pictures = []
    for i, (image, caption) in enumerate(zip(frame.images, captions, strict=True)):
        words = html.escape(caption)
        if frame.done:
            source = _data(picture_png(gallery, settings, image, i), "png")
            name = html.escape(file_name(settings, caption))
            picture = (
                f'<a href="{source}" download="{name}" title="Save this picture">'
                f"{_picture(source, words, image.shape[1])}</a>"
            )
        else:
            shown = _picture(_data(_preview(image), "jpeg"), words, image.shape[1])
            picture = f'<span class="frame">{shown}</span>'
        pictures.append(f"<figure>{picture}<figcaption>{words}</figcaption></figure>")
    columns = sheet_columns(len(pictures))
    width = min(340, 480 // columns) if columns < 5 else 720 // columns
    grid = (
        f'<div class="pictures" style="grid-template-columns: repeat({columns}, '
        f'minmax(0, {width}px))">{"".join(pictures)}</div>'
    )
    return _wall(_status(gallery, settings, frame) + grid + _command(gallery, settings, frame))


def file_name(settings: Settings, caption: str | None = None) -> str:
    """A descriptive file name of letters, digits and hyphens."""
    words = ["gallery", shorten(settings.prompt, 40, placeholder=""), *settings.labels.values()]
    words += [f"seed-{settings.seed}", *([caption] if caption else [])]
    plain = (re.sub(r"[^A-Za-z0-9]+", "-", word).strip("-") for word in words)
    return "-".join(filter(None, plain)) + ".png"


def _status(gallery: Gallery, settings: Settings, frame: Frame) -> str:
    names = " · ".join(settings.labels.values()).replace("_", " ")
    asked = " · ".join(filter(None, (settings.prompt, names)))
    asked = asked or ("no label" if gallery.label_names else "no prompt")
    if settings.strip is not None:
        asked = f"every {settings.strip}, from the same noise"
    elif settings.to_labels is not None and gallery.label_names:
        there = " · ".join(settings.to_labels.values()).replace("_", " ") or "no label"
        asked = f"{asked} → {there}"
    elif settings.image is not None:
        asked = f"{asked}, over a picture at {settings.strength:g}"
    last = "" if settings.to_seed in (None, settings.seed) else f" → {settings.to_seed}"
    about = f"<span><b>{html.escape(asked)}</b> · seed {settings.seed}{last}</span>"
    if frame.done:
        sheet = _data(sheet_png(gallery, settings, frame.images), "png")
        name = html.escape(file_name(settings))
        right = f'<a class="download" href="{sheet}" download="{name}">Download PNG</a>'
        return f'<div class="line" data-state="done">{about}{right}</div>'
    right = f"<span>step {frame.step} of {frame.steps}</span>"
    share = 100 * frame.step // frame.steps
    return (
        f'<div class="line" data-state="denoising">{about}{right}</div>'
        f'<div class="bar"><i style="width: {share}%"></i></div>'
    )


def _command(gallery: Gallery, settings: Settings, frame: Frame) -> str:
    command = sample_command(gallery, settings) if frame.done else None
    return f'<code class="command">{html.escape(command)}</code>' if command else ""


def _picture(source: str, words: str, side: int) -> str:
    kind = "" if side < PREVIEW_SIDE else ' class="smooth"'
    return f'<img src="{source}" alt="{words}"{kind}>'


def _preview(image: NDArray[np.uint8]) -> bytes:
    picture, file = Image.fromarray(image), io.BytesIO()
    picture.thumbnail((PREVIEW_SIDE, PREVIEW_SIDE), Image.Resampling.BOX)
    picture.save(file, format="JPEG", quality=85)
    return file.getvalue()


def _data(content: bytes, kind: str) -> str:
    return f"data:image/{kind};base64,{base64.b64encode(content).decode()}"


def _wall(inside: str) -> str:
    return f'<div class="wall">{inside}</div>'
