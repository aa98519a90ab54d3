"""The web demo: draw from words or classes, describe an image, look at a run; in a browser on your machine.

    python app.py                                     then open http://127.0.0.1:7860
    python app.py --root results --port 8000          runs and reports from another folder
    python app.py --model PixArt-alpha/PixArt-XL-2-512x512 --root /data/runs
    python app.py --share                             a public link, through Gradio's servers

The page reads what lies below --root, and no other file. Models load while the page opens; one picture is drawn at a
time, others wait. It needs requirements-app.txt; as a Hugging Face Space see docs/space/README.md. Not for diagnosis.
"""

from medart_core.errors import UserError, exit_codes  # isort: skip (first, for a Ctrl-C while the rest loads)
import argparse
import os
import signal
import sys
import tempfile
import threading
from collections.abc import Iterator, Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from PIL import Image

ROOT = Path(__file__).resolve().parent
# A Space installs its requirements before our files are there, so the two local packages cannot be among them.
sys.path += [str(ROOT / "diffusers"), str(ROOT / "LLaVA-NeXT")]

from llava_next_captioner import checks, engines, prompts, shortening  # noqa: E402
from medart_core.app_jobs import Outbox  # noqa: E402
from medart_core.app_root import Root  # noqa: E402
from medart_core.options import Parser  # noqa: E402

BUNDLED = "nano/pixart"
EXTRA = "python -m pip install -r requirements-app.txt"
PROMPTS = (
    "A chest X-ray image of normal lungs",
    "A chest X-ray image of bacterial pneumonia",
    "A chest X-ray image of viral pneumonia",
    "A chest X-ray image of viral pneumonia. The film is brightly exposed, with low contrast. The lungs are hazy.",
    "a photo of a flower",
)
# Kinds of images: their simple captions as prepare.py writes them, and classes to propose.
CAPTIONS: Mapping[str, tuple[str, tuple[str, ...]]] = {
    "chest-xray": ("A chest X-ray image of {}", ("normal lungs", "bacterial pneumonia", "viral pneumonia")),
    "dermoscopy": (
        "A dermoscopic image patch, {}",
        ("light brown", "dark brown", "red-pink", "pale tan", "blue-grey", "black"),
    ),
    "histology": ("A histology image of {} stained tissue", ("H&E", "IHC")),
    "endoscopy": ("An endoscopic image of {}", ("polyps", "ulcerative colitis", "esophagitis", "normal cecum")),
}
MOST_PROMPTS = 8
EXAMPLE_IMAGES = ("IM-0029-0001", "person1018_bacteria_2949", "person1184_virus_2019")
ATTEMPTS, MAX_WORDS, MAX_TOKENS = 5, 100, 120  # VSG.py's defaults


def parse_options() -> argparse.Namespace:
    parser = Parser(description=__doc__)
    page = parser.add_argument_group("page")
    page.add_argument(
        "--root", type=Path, default=ROOT, metavar="DIR", help="the folder to read (default: the project's own)"
    )
    page.add_argument(
        "--host", default=os.environ.get("GRADIO_SERVER_NAME", "127.0.0.1"), metavar="NAME",
        help="address to listen at; 0.0.0.0: reachable from other machines (default: 127.0.0.1)",
    )  # fmt: skip
    page.add_argument(
        "--port", type=int, default=os.environ.get("GRADIO_SERVER_PORT", "7860"), metavar="N",
        help="port to listen at (default: 7860)",
    )  # fmt: skip
    page.add_argument("--share", action="store_true", help="also make a temporary public link; needs a network")
    page.add_argument("--open", action="store_true", help="open the page in your browser")
    page.add_argument("--max-waiting", type=int, default=20, metavar="N", help="requests that may wait (default: 20)")
    models = parser.add_argument_group("models")
    models.add_argument("--model", metavar="NAME", help="PixArt folder or hub id (default: the bundled nano/pixart)")
    models.add_argument(
        "--captioner", metavar="NAME", help="LLaVA-NeXT folder or hub id (default: the bundled nano/llava-next)"
    )
    options = parser.parse_args()
    if not options.root.is_dir():
        raise UserError(f"--root {options.root} is no folder; give one with runs in it, or leave it out")
    if not 1 <= options.port <= 65535:
        raise UserError(f"--port is {options.port}; give a number from 1 to 65535")
    if options.max_waiting < 1:
        raise UserError(f"--max-waiting is {options.max_waiting}; give at least 1")
    return options


class Captioner:
    """VSG's way with one image: attempts until one passes every check, then shortening, then the simple caption."""

    checks: Mapping[str, str] = {
        "begins_with_caption": "begins with the simple caption",
        "wrong_class": "names its class and no other",
        "too_many_words": f"at most {MAX_WORDS} words",
        "too_many_tokens": f"at most {MAX_TOKENS} tokens",
        "echoes_features": "does not repeat the prompt",
        "loops": "does not go in circles",
        "unfinished": "ends with a sentence",
    }

    def __init__(self, model: str | None):
        from llava_next_captioner.transformers_engine import TransformersEngine
        from medart_core import captioners, text, training_data

        self.model = model or captioners.NANO
        self.known = captioners.known_domains(self.model)
        self.engine = TransformersEngine(training_data.locate(self.model))
        self.using = threading.Lock()  # who stops is still inside an attempt when the next one is let through
        tokenizer = text.load_tokenizer(training_data.locate(captioners.TOKENIZER))
        self.count_tokens = lambda said: text.count_tokens(tokenizer, [said])[0]

    def describe(self, image: Image.Image, name: str, domain: str, label: str, seed: int) -> Iterator[Any]:
        """What VSG.py writes for an image of that file name, attempt by attempt; the last one is what it takes."""
        from medart_core.app_desk import Said

        if domain not in CAPTIONS or (self.known is not None and domain not in self.known):
            known = ", ".join(self.known or CAPTIONS)
            raise UserError(f"{self.model} knows {known} only, not {domain!r}; start app.py with another --captioner")
        template, classes = CAPTIONS[domain]
        caption = template.format(label)
        with self.using:
            chunk = self.engine.prepare([engines.Request(name, image, prompts.build(domain, caption, label))])

        def failed(text: str, finished: bool = True) -> list[str]:
            return checks.check(
                text, finished=finished, simple_caption=caption, label=label, labels={*classes, label},
                features=prompts.DOMAINS[domain].features, count_tokens=self.count_tokens, max_words=MAX_WORDS,
                max_tokens=MAX_TOKENS,
            )  # fmt: skip

        too_long = []
        for attempt in range(ATTEMPTS):
            with self.using:
                self.engine.seed = seed
                [answer] = chunk.sample([(0, attempt)])
            faults = failed(answer.text, answer.finished)
            yield Said(f"Attempt {attempt + 1} {'rejected' if faults else 'accepted'}", answer.text, faults)
            if not faults:
                return
            if set(faults) <= checks.ONLY_LENGTH | (set() if answer.finished else {"unfinished"}):
                too_long.append(answer.text)
        for text in too_long:
            if shorter := shortening.drop_sentences(text, lambda said: not failed(said)):
                yield Said("Shortened", shorter, [])
                return
        yield Said("No attempt was good enough: the simple caption is kept", caption, [])


def load_studio(model: str | None, root: Root) -> Any:
    from medart_core.app_drawing import Studio  # takes seconds, in which the page is built
    from models import DiT_models

    return Studio(model, DiT_models, root.inside)


def build_page(options: argparse.Namespace, root: Root, folder: Path, studio: Future, captioner: Future) -> Any:
    """The page over the models, with every mistake of a person told on it."""
    from medart_core import app_desk, app_page

    labels = {domain: classes for domain, (_, classes) in CAPTIONS.items()}
    outbox = Outbox(folder / "taken-away")
    desk = app_desk.Desk(root, outbox, studio, captioner, options.model or BUNDLED, labels)
    handlers = app_desk.told(desk, (UserError, engines.CaptionerError))
    examples = [path for name in EXAMPLE_IMAGES if (path := ROOT / "tests" / "data" / f"{name}.jpeg").is_file()]
    known = dict.fromkeys([prompt for lora in desk.loras() for prompt in lora.prompts] + [*PROMPTS])
    offers = app_page.Offers(desk.lists(), [*known][:MOST_PROMPTS], labels, examples)
    return app_page.build(handlers, offers).queue(max_size=options.max_waiting)


def main() -> None:
    options = parse_options()
    if find_spec("gradio") is None:
        raise UserError(f"the page needs Gradio, which is not installed; {EXTRA} (or make app)")
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))  # by way of the end of the folder below
    root = Root(options.root.resolve(), "" if options.root == ROOT else str(options.root))
    # 1. Models load in the background.
    loader = ThreadPoolExecutor(1, "loader")
    studio = loader.submit(load_studio, options.model, root)
    captioner = loader.submit(Captioner, options.captioner)

    # 2. What is uploaded or drawn lies in a folder that goes when the page goes.
    with tempfile.TemporaryDirectory(prefix="medart-app-") as folder:
        os.environ["GRADIO_TEMP_DIR"] = folder
        page = build_page(options, root, Path(folder), studio, captioner)

        # 3. The page is served; a model that cannot be loaded ends it.
        from medart_core import app_page

        try:
            page.launch(
                server_name=options.host, server_port=options.port, share=options.share, inbrowser=options.open,
                theme=app_page.THEME, css=app_page.CSS, footer_links=[], ssr_mode=False, max_file_size="32mb",
                allowed_paths=[], prevent_thread_lock=True, quiet=True,
            )  # fmt: skip
        except OSError as error:
            place = f"{options.host}, port {options.port}"
            raise UserError(f"cannot listen at {place}: taken already, or not here; give another --port") from error
        print(f"http://{options.host}:{options.port}  (Ctrl-C ends it)", flush=True)
        try:
            for model in (studio, captioner):
                model.result()
            threading.Event().wait()  # for Ctrl-C, which Gradio's own waiting would take for a good end
        finally:
            page.close()


if __name__ == "__main__":
    with exit_codes(engines.CaptionerError):
        sys.exit(main())
