"""What happens when a button of the web demo is pressed: fields in, pictures and words out, a mistake in one line."""

from __future__ import annotations

import functools
import html
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import Future
from dataclasses import asdict, fields
from importlib.metadata import version
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple, Protocol

import gradio as gr  # pyright: ignore[reportMissingImports]
from PIL import Image

from medart_core import app_page
from medart_core.app_jobs import Job, Jobs, Outbox, Stopped
from medart_core.app_orders import MOST_MODELS, SEEDS, DiTOrder, PixArtOrder, text_within, within
from medart_core.app_root import Lora, Root, first_choice
from medart_core.errors import UserError
from medart_core.images import open_image

if TYPE_CHECKING:
    from medart_core.app_drawing import Studio

BASE = "base model"
SKIPPED = gr.skip()


class Said(NamedTuple):
    """One attempt at a description, or how it ended; `failed` are the names of the checks that it does not pass."""

    what: str
    text: str
    failed: Sequence[str]


class Captioner(Protocol):
    """What describes an image; VSG's checks by their names, each with what a person reads."""

    checks: Mapping[str, str]

    def describe(self, image: Image.Image, name: str, domain: str, label: str, seed: int) -> Iterator[Said]: ...


class Desk:
    """The handlers of the page, in the order of its tabs."""

    def __init__(
        self,
        root: Root,
        outbox: Outbox,
        studio: Future[Studio],
        captioner: Future[Captioner],
        model: str,
        labels: Mapping[str, Sequence[str]],
    ):
        """The models may still be loading; `model` is PixArt's name, `labels` are classes for each kind of image."""
        self.root, self.outbox, self.studio, self.captioner, self.labels = root, outbox, studio, captioner, labels
        self.model = Path(model).name
        self.jobs = Jobs()

    # --- What there is ---

    def loras(self) -> list[Lora]:
        """Those that were made for the model of this page, as far as they say so."""
        return [lora for lora in self.root.loras() if lora.base is None or Path(lora.base).name == self.model]

    def lists(self) -> app_page.Lists:
        """What lies in the folder now."""
        loras = self.loras()
        models = [(BASE, BASE), *((lora.title, lora.name) for lora in loras)]
        return app_page.Lists(models, [BASE, *first_choice(loras)], self.root.checkpoints(), self.root.reports())

    def found(self) -> tuple[Any, ...]:
        """The lists anew: of models, of checkpoints with the two panels of their tab, of folders to open."""
        now = self.lists()
        return (
            gr.update(choices=now.models),
            gr.update(choices=now.checkpoints, value=now.checkpoints[0][1] if now.checkpoints else None),
            gr.update(visible=not now.checkpoints),
            gr.update(visible=bool(now.checkpoints)),
            gr.update(choices=now.folders),
        )

    def ready(self) -> tuple[Any, str]:
        """The sizes of the loaded model, when it is."""
        studio = self.studio.result()
        sizes, made_for = studio.sizes, studio.pixart.image_size
        size = gr.update(
            minimum=sizes[0], maximum=sizes[-1], step=sizes.step, value=made_for,
            info=f"The model was made for {made_for}.",
        )  # fmt: skip
        return size, f"{studio.pixart.name} is loaded ({studio.dtype} on {studio.device})."

    def stop(self, request: gr.Request) -> str:
        """End what this page is busy with, before its next step."""
        self.jobs.stop(request.session_hash)
        return "Stopped."

    def leave(self, request: gr.Request) -> None:
        """The page is closed: nobody waits for what it asked for."""
        self.jobs.stop(request.session_hash)

    # --- Pictures ---

    def generate(self, prompt, negative, models, seed, steps, cfg, size, strength,
                 request: gr.Request, progress=gr.Progress()) -> Iterator[tuple[Any, ...]]:  # fmt: skip  # noqa: B008
        """A picture of each model, from the same noise."""
        studio = _loaded(self.studio, progress)
        order = PixArtOrder.checked(prompt, negative, seed, steps, cfg, size, strength, sizes=studio.sizes)
        chosen = self._chosen(models)
        folders = {title: self.root.folder(lora) if lora else None for title, lora in chosen}
        commands = {
            title: order.command(studio.pixart.name, self.root.told(lora) if lora else None) for title, lora in chosen
        }
        job = self.jobs.begin(request.session_hash, len(folders) * order.steps, progress)
        drawn = (
            (title, studio.draw(order, folder, lambda title=title: job.step(title)))
            for title, folder in folders.items()
        )
        left_out = studio.left_out(order.prompt)
        note = f" The last {left_out} tokens of the prompt were left out: the model reads 120." if left_out else ""
        facts = {"model": studio.pixart.name, **asdict(order), "commands": commands}
        yield from self._draw(job, drawn, f"medart-seed-{order.seed}", facts, MOST_MODELS, note)

    def _chosen(self, models: Sequence[str] | None) -> list[tuple[str, str | None]]:
        """Titles and names of the LoRAs asked for, the base model's name None."""
        if not models or len(models) > MOST_MODELS:
            raise UserError(f"{len(models or ())} models are chosen; choose 1 to {MOST_MODELS}")
        known = {lora.name: lora for lora in self.loras()}
        if unknown := [name for name in models if name != BASE and name not in known]:
            raise UserError(f"there is no LoRA {unknown[0]!r}; choose from the list")
        return [(BASE, None) if name == BASE else (known[name].title, name) for name in models]

    def classes(self, name: str | None, label: str | None) -> Any:
        """The classes of a checkpoint."""
        if not name:
            return SKIPPED
        labels = self.studio.result().dit(self.root.checkpoint(name)).labels
        return gr.update(choices=labels, value=label if label in labels else labels[0])

    def draw_class(self, ckpt, label, seed, steps, cfg, images, guided_channels,
                   request: gr.Request, progress=gr.Progress()) -> Iterator[tuple[Any, ...]]:  # fmt: skip  # noqa: B008
        """Pictures of a class, as they come."""
        file, studio = self.root.checkpoint(ckpt), _loaded(self.studio, progress)
        labels = studio.dit(file).labels
        order = DiTOrder.checked(label, seed, steps, cfg, images, guided_channels, labels=labels)
        job = self.jobs.begin(request.session_hash, order.images * order.steps, progress)
        pictures = studio.draw_class(order, file, lambda: job.step(order.label))
        drawn = ((f"{order.label}, {number}", picture) for number, picture in enumerate(pictures, 1))
        facts = {"checkpoint": ckpt, **asdict(order), "command": order.command(self.root.told(ckpt))}
        yield from self._draw(job, drawn, f"medart-class-seed-{order.seed}", facts, columns=2)

    def _draw(self, job: Job, drawn: Iterator[tuple[str, Image.Image]], name: str, facts: Mapping[str, Any],
              columns: int, note: str = "") -> Iterator[tuple[Any, ...]]:  # fmt: skip
        """Show pictures as they come; when all are there, let them be taken away with the facts that made them."""
        pictures: dict[str, Image.Image] = {}
        try:
            for title, picture in drawn:
                pictures[title] = picture
                said = f"{len(pictures)} drawn, {job.done} of {job.total} steps."
                yield said, app_page.figures(pictures.items(), columns), SKIPPED, SKIPPED, SKIPPED
        except Stopped as reason:
            yield f"Not finished: {reason}.", SKIPPED, SKIPPED, SKIPPED, SKIPPED
            return
        versions = {package: version(package) for package in ("torch", "diffusers", "transformers", "peft")}
        kept = self.outbox.keep(name, pictures, {**facts, "versions": versions, "not_for": "diagnosis"})
        yield (
            f"Drawn in {job.seconds:.1f} seconds.{note}",
            app_page.figures(pictures.items(), columns),
            gr.update(value=str(kept.picture), interactive=True),
            gr.update(value=str(kept.settings), interactive=True),
            kept.settings.read_text("utf-8"),
        )

    # --- Words ---

    def propose(self, domain: str) -> Any:
        """The classes of a kind of image."""
        labels = list(self.labels.get(domain, ()))
        return gr.update(choices=labels, value=labels[0] if labels else None)

    def describe(self, image, domain, label, seed,
                 request: gr.Request, progress=gr.Progress()) -> Iterator[tuple[Any, ...]]:  # fmt: skip  # noqa: B008
        """VSG's description of one image, with all attempts and the checks that each passed or failed."""
        if not image:
            raise UserError("there is no image; drop one on the field, or take an example")
        path, name = image
        picture = open_image(Path(path), name)
        label = text_within("the class", label)
        if not label or len(label) > 80:
            raise UserError("the class is empty or longer than 80 characters; choose one, or write it in a few words")
        seed = int(within("the seed", seed, SEEDS))
        captioner = _loaded(self.captioner, progress)
        job = self.jobs.begin(request.session_hash, 1, progress)
        tried: list[Said] = []
        try:
            job.step("describing")
            for said in captioner.describe(picture, name, domain, label, seed):
                tried.append(said)
                yield f"{said.what}.", SKIPPED, app_page.attempts(tried, captioner.checks)
                if job.stopping.is_set():
                    raise Stopped(f"stopped after {len(tried)} attempts")
        except Stopped as reason:
            yield f"Not finished: {reason}.", SKIPPED, SKIPPED
            return
        yield (
            f"{tried[-1].what}, in {job.seconds:.1f} seconds.",
            tried[-1].text,
            app_page.attempts(tried, captioner.checks),
        )

    # --- Reports ---

    def open_report(self, name: str | None) -> tuple[Any, ...]:
        """The figures, the losses and the pictures of a folder."""
        from medart_core import app_report  # torch with it, which takes seconds

        opened = app_report.open_folder(self.root, name)
        table = _table(opened.curves)
        return (
            opened.figures,
            gr.update(value=table, visible=len(opened.curves) > 0),
            app_page.figures(opened.pictures, columns=1),
        )


def told(desk: Desk, errors: tuple[type[Exception], ...]) -> app_page.Handlers:
    """The handlers of a desk, with a person's mistakes shown on the page instead of raised."""

    def telling(handler: Callable[..., Any]) -> Callable[..., Iterator[Any]]:
        @functools.wraps(handler)
        def shown(*args: Any) -> Iterator[Any]:
            try:
                answer = handler(*args)
                yield from answer if isinstance(answer, Iterator) else [answer]
            except errors as error:
                # The page takes messages for HTML, and they repeat what was typed.
                message = html.escape(str(error))
                raise gr.Error(message, duration=20, title="Not possible", print_exception=False) from None

        return shown

    return app_page.Handlers(**{field.name: telling(getattr(desk, field.name)) for field in fields(app_page.Handlers)})


def _loaded(model: Future[Any], progress: Callable[..., Any]) -> Any:
    """The model, when it is there; what could not be loaded raises again."""
    if not model.done():
        progress(0, "the models are being loaded")
    return model.result()


def _table(curves: Sequence[tuple[int, str, float]]) -> Any:
    import pandas

    return pandas.DataFrame(curves, columns=["step", "loss", "value"])  # pyright: ignore[reportArgumentType]
