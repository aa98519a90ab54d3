"""The options of VSG.py: everything it can be told, with defaults, groups and checks."""

import typing
from dataclasses import asdict, dataclass
from pathlib import Path

from medart_core.errors import UserError
from medart_core.options import option

RANDOM = ("llama3-llava-next-8b",)
POSITIVE = (
    "batch_size", "attempts", "max_new_tokens", "max_words", "max_tokens", "concurrency", "timeout",
    "workers",
)  # fmt: skip


@dataclass
class VSGOptions:
    """Everything that `VSG.py` can be told."""

    data_dir: str | None = option(
        None, "data", "folder with raw.csv beside its images, or a parent of such folders "
        "(default: dataset/kvasir/train, where it is not there dataset/chest-xray/train)",
    )  # fmt: skip
    max_images: int | None = option(
        None, "data", "describe about that many images of each folder only, evenly spread; may change from run to run"
    )
    overwrite: bool = option(False, "data", "start anew, and replace captions that a person has edited, too")

    model: str | None = option(
        None, "model", "LLaVA-NeXT folder or hub id, or the server's name for its model (default: nano/llava-next)"
    )
    engine: str = option("transformers", "model", "where the model runs", ("transformers", "openai"))
    base_url: str | None = option(None, "model", "of an OpenAI-compatible server, such as http://localhost:8000/v1")
    random_weights: str | None = option(None, "model", "the published shapes with random weights, to measure", RANDOM)
    dtype: str = option("auto", "model", "auto: bf16 on CUDA, else fp32", ("auto", "fp32", "bf16", "fp16"))
    attn: str = option("sdpa", "model", "implementation of attention", ("sdpa", "flash_attention_2"))
    concurrency: int = option(8, "model", "requests to a server at a time")
    timeout: float = option(120.0, "model", "seconds that a server may take for one request")
    retries: int = option(5, "model", "how often a request to a server is repeated")

    batch_size: int = option(16, "sampling", "images of a chunk, the unit of work and restart")
    seed: int = option(0, "sampling", "of the noise; an image's depends on its name and attempt besides")
    attempts: int = option(5, "sampling", "descriptions that are tried before an image keeps its simple caption")
    max_new_tokens: int = option(150, "sampling", "tokens after which a description is cut off")
    temperature: float = option(0.8, "sampling", "of the choice of tokens; 0: always the likeliest")
    top_k: int = option(
        50,
        "sampling",
        "choose among that many tokens, 1,000 at most; 0: not sent to a server, for OpenAI's own rejects it",
    )
    top_p: float = option(0.9, "sampling", "choose among the tokens that make up this share")
    force_prefix: bool = option(False, "sampling", "make every answer begin with the simple caption")

    domain: str | None = option(None, "captions", "what the images are (default: read from the simple captions)")
    features: str | None = option(
        None, "captions", "what to describe, separated by semicolons (default: by the domain)"
    )
    prompt_file: str | None = option(
        None, "captions", "text file with a prompt of your own, with {caption}, {label} and {features}"
    )
    shortener: str = option(
        "sentences", "captions", "for what is only too long: drop sentences, or a T5 model", ("sentences", "t5-large")
    )
    tokenizer: str | None = option(
        None, "captions", "the PixArt model to be trained, whose T5 tokenizer counts (default: nano/pixart)"
    )
    max_words: int = option(100, "captions", "words of a caption")
    max_tokens: int = option(120, "captions", "T5 tokens of a caption; PixArt-alpha knows at most 120")
    max_fallback: float = option(0.02, "captions", "exit with 3 if a larger share had to keep its simple caption")

    workers: int = option(2, "output", "threads that decode images ahead of the model")
    picture: str | None = option(
        None, "output", "12 images with their captions (default: results/captions.png of the project)"
    )

    def check(self) -> None:
        """Find values that cannot work. Raises UserError naming the flag, the value and the remedy."""
        for name in (*POSITIVE, *(["max_images"] if self.max_images is not None else [])):
            if getattr(self, name) <= 0:
                raise UserError(f"--{_flag(name)} is {getattr(self, name)}; give a number above 0")
        for name in ("seed", "retries", "temperature", "top_k"):
            if getattr(self, name) < 0:
                raise UserError(f"--{name} is {getattr(self, name)}; give 0 or more")
        for name, low in (("top_p", 0.0), ("max_fallback", -1e-9)):
            if not low < getattr(self, name) <= 1:
                raise UserError(f"--{_flag(name)} is {getattr(self, name)}; give a share, 1 at most")
        if self.picture and Path(self.picture).suffix.lower() not in (".png", ".jpg", ".jpeg"):
            raise UserError(f"--picture is {self.picture}; give a name that ends in .png or .jpg")
        if self.engine == "openai" and not (self.base_url and self.model):
            raise UserError("--engine openai needs --base-url and --model; give the server's address and model name")
        if self.engine != "openai" and self.base_url:
            raise UserError("--base-url is for --engine openai; add that, or leave --base-url out")
        if self.random_weights and (self.model or self.engine == "openai"):
            raise UserError("--random-weights takes the place of --model and of a server; leave one of them out")
        if self.random_weights and not self.data_dir:
            raise UserError("--random-weights describes nothing and still writes; give a copy of a set as --data-dir")

    def feature_list(self) -> list[str]:
        """The features asked for on the command line."""
        return [feature.strip() for feature in (self.features or "").split(";") if feature.strip()]

    def read_template(self) -> str | None:
        """The prompt in --prompt-file. Raises UserError if that cannot be read."""
        if self.prompt_file is None:
            return None
        try:
            return Path(self.prompt_file).read_text(encoding="utf-8")
        except (OSError, UnicodeDecodeError) as error:
            raise UserError(f"--prompt-file {self.prompt_file} cannot be read ({error}); give a text file") from error

    def of_the_captions(self) -> dict[str, typing.Any]:
        """The options that the captions depend on: a journal is continued with the same ones only."""
        return {name: value for name, value in asdict(self).items() if name not in FREE_ON_RESUME}

    def part(self, name: str) -> dict[str, typing.Any]:
        """The options of one of the `PARTS`, to be passed on as named arguments."""
        return {option: getattr(self, option) for option in PARTS[name]}


def _flag(name: str) -> str:
    return name.replace("_", "-")


# What may differ between a run and its continuation.
FREE_ON_RESUME = frozenset(
    ["data_dir", "max_images", "overwrite", "max_fallback", "workers", "picture", "concurrency", "timeout", "retries",
     "base_url"]
)  # fmt: skip

# Which options go to which part of the program.
PARTS = {
    "sampling": ("max_new_tokens", "temperature", "top_k", "top_p"),
    "server": ("concurrency", "timeout", "retries"),
}
