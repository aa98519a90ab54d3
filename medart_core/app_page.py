"""The page of the web demo: four tabs, for a desk and for a phone; what their buttons do is handed in."""

import base64
import html
import io
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import gradio as gr  # pyright: ignore[reportMissingImports]
from PIL import Image

from medart_core import app_orders as orders

WARNING = "Not for diagnosis."
QUIET: dict[str, Any] = {"show_progress": "hidden", "api_visibility": "private"}
ONE_AT_A_TIME: dict[str, Any] = {"concurrency_id": "models", "concurrency_limit": 1}
SYSTEM_FONTS = ("system-ui", "-apple-system", "Segoe UI", "Roboto", "Helvetica", "Arial", "sans-serif")  # none fetched
THEME = gr.themes.Default(
    primary_hue="teal", secondary_hue="teal", neutral_hue="slate", radius_size="md",
    font=SYSTEM_FONTS, font_mono=("ui-monospace", "Consolas", "monospace"),
)  # fmt: skip
CSS = """
.gradio-container {max-width: 1180px !important; margin: 0 auto !important}
.gradio-container .main {padding: clamp(10px, 3vw, 32px) !important}
.gradio-container h1 {font-size: 1.6rem; margin: 0}
.head {display: flex; flex-wrap: wrap; gap: .3rem 1rem; align-items: baseline; padding: .4rem 0}
.head p {margin: 0; color: var(--body-text-color-subdued)}
.head .warning {flex-basis: 100%; padding: .35rem .7rem; border-left: 4px solid #d97706; border-radius: 4px;
  color: var(--body-text-color); background: color-mix(in srgb, #d97706 12%, transparent)}
.gallery button, .gallery-item {max-width: 100%; white-space: normal; text-align: left}
.said {min-height: 1.6rem}
.figures {overflow-x: auto}
.figures table {font-variant-numeric: tabular-nums}
.figures :is(td, th) {padding: .3rem .6rem !important; overflow-wrap: normal; word-break: normal}
.nothing {border: 1px dashed var(--border-color-primary); border-radius: 8px; padding: 3.5rem 1rem; text-align: center;
  color: var(--body-text-color-subdued)}
.gradio-container .html-container {padding: 0}
.pictures {display: grid; gap: .7rem}
.pictures figure {margin: 0}
.pictures img {width: 100%; border-radius: 6px; display: block}
.pictures figcaption {font-size: .85rem; line-height: 1.3; padding: .3rem 0; overflow-wrap: anywhere;
  color: var(--body-text-color-subdued)}
.attempt {border: 1px solid var(--border-color-primary); border-radius: 8px; padding: .7rem .9rem; margin: 0 0 .7rem}
.attempt p {margin: 0 0 .5rem}
.attempt ul {display: flex; flex-wrap: wrap; gap: .3rem; list-style: none; margin: 0; padding: 0; font-size: .85rem}
.attempt li {margin: 0; padding: .1rem .55rem; border-radius: 99px;
  background: color-mix(in srgb, #059669 14%, transparent)}
.attempt li.failed {background: color-mix(in srgb, #dc2626 18%, transparent); font-weight: 600}
footer {display: none !important}
@media (max-width: 600px) {.tab-container button {padding: .5rem .4rem !important; font-size: .8rem !important}}
"""
HEAD = f"""<div class="head"><h1>Med-Art</h1><p>Medical images from words, by PixArt-alpha and HLDF</p>
<p class="warning"><strong>{WARNING}</strong> The pictures are made up, and the descriptions say what they are told.
Do not upload pictures of patients that must not leave your machine, unless this page runs on it.</p></div>"""
NOTHING_YET = '<p class="nothing">Pictures appear here.</p>'
NO_DIT = (
    "There is no checkpoint of a class-conditional DiT below the folder of this page. "
    "Make one with `make demo-dit`, in minutes, then load this page again."
)


@dataclass(frozen=True)
class Handlers:
    """What the page calls; each takes the values of the fields in the order of its tab."""

    found: Callable[..., Any]  # -> updates of: models, checkpoints, the two panels of their tab, folders
    ready: Callable[..., Any]  # -> update of the size, and a line
    generate: Callable[..., Any]
    classes: Callable[..., Any]  # a checkpoint -> update of its classes
    draw_class: Callable[..., Any]
    describe: Callable[..., Any]
    propose: Callable[..., Any]  # a kind of image -> update of its classes
    open_report: Callable[..., Any]
    stop: Callable[..., Any]  # -> the line under the buttons
    leave: Callable[..., Any]  # the page is closed


def figures(pictures: Iterable[tuple[str, Image.Image]], columns: int) -> str:
    """Pictures with their titles below, so many side by side; they travel in the page, as PNG."""
    found = []
    for title, picture in pictures:
        content = io.BytesIO()
        picture.save(content, "PNG")
        source = f"data:image/png;base64,{base64.b64encode(content.getvalue()).decode()}"
        shown = html.escape(title)
        found.append(f'<figure><img src="{source}" alt="{shown}"><figcaption>{shown}</figcaption></figure>')
    columns = min(columns, len(found))
    return f'<div class="pictures" style="grid-template-columns: repeat({columns}, 1fr)">{"".join(found)}</div>'


def attempts(tried: Sequence[tuple[str, str, Sequence[str]]], checks: Mapping[str, str]) -> str:
    """What was tried, its text and the names of the checks that failed, each with all `checks`; the newest first."""
    blocks = []
    for what, text, failed in reversed(tried):
        marks = [("failed", "&#10007;") if name in failed else ("passed", "&#10003;") for name in checks]
        items = [
            f'<li class="{kind}">{mark} {html.escape(title)}</li>'
            for (kind, mark), title in zip(marks, checks.values(), strict=True)
        ]
        blocks.append(
            f'<div class="attempt"><p><strong>{html.escape(what)}</strong></p><p>{html.escape(text)}</p>'
            f"<ul>{''.join(items)}</ul></div>"
        )
    return "".join(blocks)


@dataclass(frozen=True)
class Lists:
    """What lies in the folder: models and checkpoints as (title, name), the names of the first models, folders."""

    models: Sequence[tuple[str, str]]
    chosen: Sequence[str]
    checkpoints: Sequence[tuple[str, str]]
    folders: Sequence[str]


@dataclass(frozen=True)
class Offers:
    """What there is to choose from."""

    lists: Lists
    prompts: Sequence[str]
    domains: Mapping[str, Sequence[str]]
    images: Sequence[Path]


def build(handlers: Handlers, offers: Offers) -> gr.Blocks:
    """The whole page; nothing is drawn or read before a button is pressed."""
    with gr.Blocks(title="Med-Art", analytics_enabled=False, delete_cache=(600, 3600)) as page:
        gr.HTML(HEAD, padding=False)
        with gr.Tabs():
            with gr.Tab("Generate", id="generate"):
                models, size, said = _generate(handlers, offers)
            with gr.Tab("Class-conditional", id="classes") as tab:
                checkpoints = _classes(handlers, tab)
            with gr.Tab("Caption", id="caption"):
                _caption(handlers, offers)
            with gr.Tab("Report", id="report"):
                folders = _report(handlers, offers)
        page.load(handlers.found, outputs=[models, *checkpoints, folders], **QUIET)
        page.load(handlers.ready, outputs=[size, said], **QUIET)
        page.unload(handlers.leave)
    return page


def _run_and_stop(handlers: Handlers, name: str, work: Callable[..., Any], button: str, inputs: Sequence[Any],
                  outputs: Sequence[Any]) -> gr.Markdown:  # fmt: skip
    """The two buttons of a tab with the line under them, which is the first output of `work`."""
    with gr.Row():
        run = gr.Button(button, variant="primary", elem_id=f"{name}-run")
        stop = gr.Button("Stop", elem_id=f"{name}-stop")
    said = gr.Markdown(elem_classes="said", elem_id=f"{name}-said")
    running = run.click(
        work, inputs, [said, *outputs], show_progress_on=said, scroll_to_output=True, api_visibility="private",
        **ONE_AT_A_TIME,
    )  # fmt: skip
    stop.click(handlers.stop, outputs=said, cancels=running, queue=False, show_progress="hidden",
               api_visibility="private")  # fmt: skip
    return said


def _shown(name: str) -> tuple[gr.HTML, list[Any]]:
    """Where pictures appear, and what can be taken away of them: the picture, the settings, the settings' text."""
    pictures = gr.HTML(NOTHING_YET, padding=False, elem_id=f"{name}-pictures")
    with gr.Row():
        picture = gr.DownloadButton("Download PNG", interactive=False, size="sm", elem_id=f"{name}-png")
        settings = gr.DownloadButton("Download settings", interactive=False, size="sm", elem_id=f"{name}-json")
    with gr.Accordion("Settings, and the command that draws the same", open=False):
        text = gr.Code(language="json", show_label=False, interactive=False, wrap_lines=True)
    return pictures, [picture, settings, text]


def _number(label: str, bounds: tuple[float, float], value: float, **settings: Any) -> gr.Number:
    """A number with its bounds told; they are checked where it is used, with a message of our own."""
    whole = isinstance(bounds[0], int)
    return gr.Number(value, label=label, precision=0 if whole else None, step=1 if whole else 0.1, min_width=90,
                     **settings)  # fmt: skip


def _seed_steps_guidance(name: str, steps: tuple[int, int], default: int, guidance: float) -> list[Any]:
    with gr.Row():
        return [
            _number("Seed", orders.SEEDS, 0),
            _number(f"Steps, {steps[0]}-{steps[1]}", steps, default, elem_id=f"{name}-steps"),
            _number(f"CFG, {orders.GUIDANCE[0]:g}-{orders.GUIDANCE[1]:g}", orders.GUIDANCE, guidance),
        ]


def _generate(handlers: Handlers, offers: Offers) -> tuple[gr.Dropdown, gr.Slider, gr.Markdown]:
    with gr.Row():
        with gr.Column(scale=5, min_width=320):
            prompt = gr.Textbox(
                offers.prompts[0], label="Prompt", lines=3, max_length=orders.MOST_CHARACTERS, elem_id="prompt"
            )
            models = gr.Dropdown(
                [*offers.lists.models], value=[*offers.lists.chosen], multiselect=True, max_choices=orders.MOST_MODELS,
                label="Models, side by side from the same noise", elem_id="models",
            )  # fmt: skip
            numbers = _seed_steps_guidance("generate", orders.STEPS, 20, 4.5)
            with gr.Accordion("More", open=False):
                strength = gr.Slider(*orders.STRENGTH, value=1, step=0.05, label="Strength of the LoRA")
                negative = gr.Textbox(label="Negative prompt", max_length=orders.MOST_CHARACTERS)
                size = gr.Slider(64, 256, 128, step=16, label="Image size in pixels")  # mended when the model is there
            buttons = gr.Column()
        with gr.Column(scale=6, min_width=320):
            pictures, files = _shown("generate")
            gr.Examples([[text] for text in offers.prompts], prompt, label="Examples of prompts", elem_id="examples")
    with buttons:
        inputs = [prompt, negative, models, *numbers, size, strength]
        said = _run_and_stop(handlers, "generate", handlers.generate, "Generate", inputs, [pictures, *files])
    return models, size, said


def _classes(handlers: Handlers, tab: gr.Tab) -> list[Any]:
    none = gr.Markdown(NO_DIT, visible=False, elem_id="no-dit")
    with gr.Row(visible=False) as some:
        with gr.Column(scale=5, min_width=320):
            ckpt = gr.Dropdown(label="Checkpoint", elem_id="ckpt")
            label = gr.Dropdown(label="Class", elem_id="class")
            numbers = _seed_steps_guidance("classes", orders.DIT_STEPS, 25, 2.0)
            images = _number(f"Images, 1-{orders.MOST_IMAGES}", (1, orders.MOST_IMAGES), orders.MOST_IMAGES)
            with gr.Accordion("More", open=False):
                guided = gr.Radio([3, 4], value=4, label="Guided channels of the noise",
                                  info="3 is how the published DiT-XL/2 was measured.")  # fmt: skip
            buttons = gr.Column()
        with gr.Column(scale=6, min_width=320):
            pictures, files = _shown("classes")
    with buttons:
        inputs = [ckpt, label, *numbers, images, guided]
        _run_and_stop(handlers, "classes", handlers.draw_class, "Generate", inputs, [pictures, *files])
    for event in (tab.select, ckpt.input):
        event(handlers.classes, [ckpt, label], label, **QUIET, **ONE_AT_A_TIME)
    return [ckpt, none, some]


def _as_uploaded(payload: Any) -> tuple[str, str] | None:
    """The path of an uploaded file and the name that it had: it is opened, and refused, by our own rules."""
    return (payload.path, payload.orig_name or "image") if payload and payload.path else None


def _caption(handlers: Handlers, offers: Offers) -> None:
    domains = list(offers.domains)
    with gr.Row():
        with gr.Column(scale=5, min_width=320):
            image: Any = gr.Image(
                label="Image", sources=["upload", "clipboard"], height=260, buttons=[], elem_id="dropped"
            )
            image.preprocess = _as_uploaded
            if offers.images:
                gr.Examples([[str(path)] for path in offers.images], image, label="Examples")
            domain = gr.Dropdown(domains, value=domains[0], label="Kind of image", elem_id="domain")
            label = gr.Dropdown(
                list(offers.domains[domains[0]]), value=offers.domains[domains[0]][0], allow_custom_value=True,
                label="Class", info="You say it: the captioner repeats it and does not judge.", elem_id="label",
            )  # fmt: skip
            seed = _number("Seed", orders.SEEDS, 0)
            buttons = gr.Column()
        with gr.Column(scale=6, min_width=320):
            text = gr.Textbox(label="Description", lines=5, interactive=False, buttons=["copy"], elem_id="description")
            tried = gr.HTML(padding=False, elem_id="attempts")
    with buttons:
        _run_and_stop(handlers, "caption", handlers.describe, "Describe", [image, domain, label, seed], [text, tried])
    domain.input(handlers.propose, domain, label, show_progress="hidden", queue=False, api_visibility="private")


def _report(handlers: Handlers, offers: Offers) -> gr.Dropdown:
    with gr.Row(equal_height=True):
        folder = gr.Dropdown(
            [*offers.lists.folders], value=next(iter(offers.lists.folders), None), allow_custom_value=True, scale=5,
            label="Folder of a run, an evaluation or samples", elem_id="folder",
        )  # fmt: skip
        button = gr.Button("Open", variant="primary", scale=1, min_width=120, elem_id="report-run")
    with gr.Row():
        with gr.Column(scale=5, min_width=320):
            figures = gr.Markdown(elem_id="figures", elem_classes="figures")
            curves = gr.LinePlot(x="step", y="value", color="loss", title="Losses", height=260, visible=False)
        with gr.Column(scale=6, min_width=320):
            pictures = gr.HTML(padding=False, elem_id="report-pictures")
    outputs = [figures, curves, pictures]
    button.click(handlers.open_report, folder, outputs, concurrency_limit=2, api_visibility="private")
    return folder
