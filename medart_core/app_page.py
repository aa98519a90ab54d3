"""The page of the web demo: four tabs, for a desk and for a phone; what their buttons do is handed in."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import gradio as gr

from medart_core import app_orders as orders

WARNING = "Not for diagnosis."
ONE_AT_A_TIME = {"concurrency_id": "models", "concurrency_limit": 1}
SYSTEM_FONTS = ("system-ui", "-apple-system", "Segoe UI", "Roboto", "Helvetica", "Arial", "sans-serif")  # none fetched
THEME = gr.themes.Default(
    primary_hue="teal", secondary_hue="teal", neutral_hue="slate", radius_size="md",
    font=SYSTEM_FONTS, font_mono=("ui-monospace", "Consolas", "monospace"),
)  # fmt: skip
CSS = """
.gradio-container {max-width: 1180px !important; margin: 0 auto !important}
.gradio-container h1 {font-size: 1.6rem; margin: 0}
.head {display: flex; flex-wrap: wrap; gap: .3rem 1rem; align-items: baseline; padding: .4rem 0}
.head p {margin: 0; color: var(--body-text-color-subdued)}
.head .warning {flex-basis: 100%; padding: .35rem .7rem; border-left: 4px solid #d97706; border-radius: 4px;
  color: var(--body-text-color); background: color-mix(in srgb, #d97706 12%, transparent)}
.said {min-height: 1.6rem}
.figures {overflow-x: auto}
.figures table {font-variant-numeric: tabular-nums}
.attempt {border: 1px solid var(--border-color-primary); border-radius: 8px; padding: .7rem .9rem; margin: 0 0 .7rem}
.attempt p {margin: 0 0 .5rem}
.attempt ul {display: flex; flex-wrap: wrap; gap: .3rem; list-style: none; margin: 0; padding: 0; font-size: .85rem}
.attempt li {margin: 0; padding: .1rem .55rem; border-radius: 99px; background: color-mix(in srgb, #059669 14%, transparent)}
.attempt li.failed {background: color-mix(in srgb, #dc2626 18%, transparent); font-weight: 600}
footer {display: none !important}
"""
HEAD = f"""<div class="head"><h1>Med-Art</h1><p>Medical images from words, by PixArt-alpha and HLDF</p>
<p class="warning"><strong>{WARNING}</strong> The pictures are made up, and the descriptions say what they are told.
Do not upload pictures of patients that must not leave your machine, unless this page runs on it.</p></div>"""
NO_DIT = (
    "There is no checkpoint of a class-conditional DiT below the folder of this page. "
    "Make one in 6 minutes with `make demo-dit`, then load this page again."
)


@dataclass(frozen=True)
class Handlers:
    """What the page calls; each takes the values of the fields in the order of its tab."""

    found: Callable[..., Any]  # -> updates of: models, checkpoints, its two panels, folders
    generate: Callable[..., Any]
    classes: Callable[..., Any]  # a checkpoint -> update of its classes
    draw_class: Callable[..., Any]
    describe: Callable[..., Any]
    labels: Callable[..., Any]  # a domain -> update of its classes
    open_report: Callable[..., Any]
    stop: Callable[..., Any]  # -> the line under the buttons


@dataclass(frozen=True)
class Offers:
    """What there is to choose from, whatever lies in the folder."""

    prompts: Sequence[str]
    sizes: range
    size: int
    domains: Mapping[str, Sequence[str]]
    images: Sequence[Path]


def build(handlers: Handlers, offers: Offers) -> gr.Blocks:
    """The whole page; nothing is drawn or read before a button is pressed."""
    with gr.Blocks(title="Med-Art", analytics_enabled=False, delete_cache=(600, 3600)) as page:
        gr.HTML(HEAD, padding=False)
        with gr.Tabs():
            with gr.Tab("Generate", id="generate"):
                models = _generate(handlers, offers)
            with gr.Tab("Class-conditional", id="classes") as tab:
                checkpoints = _classes(handlers, tab)
            with gr.Tab("Caption", id="caption"):
                _caption(handlers, offers)
            with gr.Tab("Report", id="report"):
                folders = _report(handlers)
        page.load(handlers.found, outputs=[models, *checkpoints, folders], show_progress="hidden")
        page.unload(handlers.stop)
    return page


def _run_and_stop(handlers: Handlers, name: str, work: Callable[..., Any], button: str, inputs: Sequence[Any],
                  outputs: Sequence[Any]) -> None:  # fmt: skip
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


def _shown(name: str, columns: int) -> tuple[gr.Gallery, list[Any]]:
    """A gallery with what can be taken away of it; the latter in the order: picture, settings, the settings' text."""
    gallery = gr.Gallery(
        label="Pictures", columns=columns, height="auto", object_fit="contain", format="png", interactive=False,
        buttons=["download", "fullscreen"], elem_id=f"{name}-pictures",
    )  # fmt: skip
    with gr.Row():
        picture = gr.DownloadButton("Download PNG", interactive=False, size="sm", elem_id=f"{name}-png")
        settings = gr.DownloadButton("Download settings", interactive=False, size="sm", elem_id=f"{name}-json")
    with gr.Accordion("Settings, and the command that draws the same", open=False):
        text = gr.Code(language="json", show_label=False, interactive=False, wrap_lines=True)
    return gallery, [picture, settings, text]


def _seed_steps_guidance(steps: tuple[int, int], default: int, guidance: float) -> list[Any]:
    with gr.Row():
        seed = gr.Number(0, label="Seed", precision=0, minimum=orders.SEEDS[0], maximum=orders.SEEDS[1], min_width=90)
        count = gr.Slider(*steps, value=default, step=1, label="Steps", min_width=150)
        cfg = gr.Slider(*orders.GUIDANCE, value=guidance, step=0.1, label="Guidance (CFG)", min_width=150)
    return [seed, count, cfg]


def _generate(handlers: Handlers, offers: Offers) -> gr.Dropdown:
    with gr.Row():
        with gr.Column(scale=5, min_width=320):
            prompt = gr.Textbox(
                offers.prompts[0], label="Prompt", lines=3, max_length=orders.MOST_CHARACTERS, elem_id="prompt"
            )
            gr.Examples([[text] for text in offers.prompts], prompt, label="Examples")
            models = gr.Dropdown(
                label="Models, side by side from the same noise", multiselect=True, max_choices=orders.MOST_MODELS,
                elem_id="models",
            )  # fmt: skip
            numbers = _seed_steps_guidance(orders.STEPS, 20, 4.5)
            with gr.Accordion("More", open=False):
                strength = gr.Slider(*orders.STRENGTH, value=1, step=0.05, label="Strength of the LoRA")
                negative = gr.Textbox(label="Negative prompt", max_length=orders.MOST_CHARACTERS)
                sizes = offers.sizes
                size = gr.Slider(sizes[0], sizes[-1], offers.size, step=sizes.step, label="Image size in pixels",
                                 info=f"The model was made for {offers.size}.")  # fmt: skip
            buttons = gr.Column()
        with gr.Column(scale=6, min_width=320):
            gallery, files = _shown("generate", 3)
    with buttons:
        inputs = [prompt, negative, models, *numbers, size, strength]
        _run_and_stop(handlers, "generate", handlers.generate, "Generate", inputs, [gallery, *files])
    return models


def _classes(handlers: Handlers, tab: gr.Tab) -> list[Any]:
    none = gr.Markdown(NO_DIT, visible=False, elem_id="no-dit")
    with gr.Row(visible=False) as some:
        with gr.Column(scale=5, min_width=320):
            ckpt = gr.Dropdown(label="Checkpoint", elem_id="ckpt")
            label = gr.Dropdown(label="Class", elem_id="class")
            numbers = _seed_steps_guidance(orders.DIT_STEPS, 25, 2.0)
            images = gr.Slider(1, orders.MOST_IMAGES, value=orders.MOST_IMAGES, step=1, label="Images")
            with gr.Accordion("More", open=False):
                guided = gr.Radio([3, 4], value=4, label="Guided channels of the noise",
                                  info="3 is how the published DiT-XL/2 was measured.")  # fmt: skip
            buttons = gr.Column()
        with gr.Column(scale=6, min_width=320):
            gallery, files = _shown("classes", 2)
    with buttons:
        inputs = [ckpt, label, *numbers, images, guided]
        _run_and_stop(handlers, "classes", handlers.draw_class, "Generate", inputs, [gallery, *files])
    for event in (tab.select, ckpt.input):
        event(handlers.classes, [ckpt, label], label, show_progress="hidden", api_visibility="private", **ONE_AT_A_TIME)
    return [ckpt, none, some]


class DroppedImage(gr.Image):
    """An image as the file that it came in, whatever is in it: it is opened, and refused, by our own rules."""

    def preprocess(self, payload: Any) -> tuple[str, str] | None:
        """The path of the uploaded file and the name that it had."""
        return (payload.path, payload.orig_name or "image") if payload and payload.path else None


def _caption(handlers: Handlers, offers: Offers) -> None:
    domains = list(offers.domains)
    with gr.Row():
        with gr.Column(scale=5, min_width=320):
            image = DroppedImage(
                label="Image", sources=["upload", "clipboard"], height=260, buttons=[], elem_id="dropped"
            )
            if offers.images:
                gr.Examples([[str(path)] for path in offers.images], image, label="Examples")
            domain = gr.Dropdown(domains, value=domains[0], label="Kind of image", elem_id="domain")
            label = gr.Dropdown(
                list(offers.domains[domains[0]]), value=offers.domains[domains[0]][0], allow_custom_value=True,
                label="Class", info="You say it: the captioner repeats it and does not judge.", elem_id="label",
            )  # fmt: skip
            seed = gr.Number(0, label="Seed", precision=0, minimum=0, maximum=orders.SEEDS[1])
            buttons = gr.Column()
        with gr.Column(scale=6, min_width=320):
            text = gr.Textbox(label="Description", lines=5, interactive=False, buttons=["copy"], elem_id="description")
            attempts = gr.HTML(padding=False, elem_id="attempts")
    with buttons:
        _run_and_stop(
            handlers, "caption", handlers.describe, "Describe", [image, domain, label, seed], [text, attempts]
        )
    domain.input(handlers.labels, domain, label, show_progress="hidden", queue=False, api_visibility="private")


def _report(handlers: Handlers) -> gr.Dropdown:
    with gr.Row(equal_height=True):
        folder = gr.Dropdown(
            label="Folder of a run, an evaluation or samples", allow_custom_value=True, scale=5, elem_id="folder"
        )
        button = gr.Button("Open", variant="primary", scale=1, min_width=120, elem_id="report-run")
    with gr.Row():
        with gr.Column(scale=5, min_width=320):
            figures = gr.Markdown(elem_id="figures", elem_classes="figures")
            curves = gr.LinePlot(x="step", y="value", color="loss", title="Losses", height=260, visible=False)
        with gr.Column(scale=6, min_width=320):
            pictures = gr.Gallery(
                label="Pictures", columns=1, height="auto", object_fit="contain", format="png", interactive=False,
                buttons=["download", "fullscreen"], elem_id="report-pictures",
            )  # fmt: skip
    outputs = [figures, curves, pictures]
    button.click(handlers.open_report, folder, outputs, concurrency_limit=2, api_visibility="private")
    return folder
