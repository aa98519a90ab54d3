"""share.py: the folder and its card, what is uploaded and what is not."""

import json
import re
import sys
import threading
from http.server import BaseHTTPRequestHandler, HTTPServer

import huggingface_hub
import pytest
import torch
from PIL import Image
from safetensors import safe_open
from test_lora import write_run

import sample
import share
from medart_core import lora, model_card
from medart_core.errors import UserError

FIGURE = {"value": 0.25, "low": 0.2, "high": 0.3, "n_generated": 40, "n_real": 40, "floor": 0.1, "seed": 0}


@pytest.fixture
def run(tmp_path, tiny_pixart):
    folder = tmp_path / "mine"
    write_run(folder, tiny_pixart)
    data = tmp_path / "hospital-7" / "train"
    data.mkdir(parents=True)
    header = {"journal": {"options": {"model": str(tmp_path / "hospital-7" / "llava-next"), "seed": 3}}}
    (data / "captions.jsonl").write_text(json.dumps(header) + "\n")
    settings = {
        "dataset_name": str(data),
        "caption_column": "text",
        "rank": 4,
        "output_dir": str(folder),
        "validation_data_dir": str(data.with_name("val")),
        "resume_from_checkpoint": str(folder / "checkpoint-5"),
        "validation_prompt": ["a/c x-ray", str(tmp_path / "hospital-7" / "notes.txt")],
        "variant": "../hospital-7/x",
        "no_hldf": False,
    }
    (folder / "options.json").write_text(json.dumps(settings))
    (folder / "finished.json").write_text(json.dumps({"step": 7, "prompts": ["a chest"]}))
    (folder / "samples").mkdir()
    for step, colour in ((0, "red"), (7, "blue")):
        Image.new("RGB", (8, 8), colour).save(folder / "samples" / f"step-{step:06d}.png")
    (tmp_path / "evaluation").mkdir()
    report = {"run": {"generated_images": 40}, "kid": FIGURE}
    (tmp_path / "evaluation" / "report.json").write_text(json.dumps(report))
    return folder


class Hub:
    """Stands for huggingface_hub.HfApi, and notes what it is asked."""

    asked: list = []  # noqa: RUF012 (of the one test that uses it)
    fault: Exception | None = None

    def create_repo(self, name, **options):
        if Hub.fault:
            raise Hub.fault
        Hub.asked.append((name, options))
        return f"https://hub/{name}"

    def upload_folder(self, **options):
        Hub.asked.append(options)


def call(monkeypatch, *arguments):
    monkeypatch.setattr(sys, "argv", ["share.py", *map(str, arguments)])
    monkeypatch.setattr(huggingface_hub, "HfApi", Hub)
    monkeypatch.setenv("HF_TOKEN", "hf_x")
    Hub.asked, Hub.fault = [], None
    share.main()


def test_the_folder_and_its_card(run, tmp_path, tiny_pixart, monkeypatch, capsys):
    out = tmp_path / "out"
    licences = ["--license", "cc-by-4.0", "--data-license", "CC0 1.0"]
    where = ["--out", out, "--push_to_hub", "me/x", "--dry_run"]
    call(monkeypatch, run, "--evaluation", tmp_path / "evaluation", *licences, *where)
    assert Hub.asked == [] and "would be uploaded to me/x" in capsys.readouterr().out
    assert sorted(file.name for file in out.iterdir()) == [
        "README.md", "comfyui.safetensors", lora.FILE_NAME, "samples.png",
    ]  # fmt: skip
    assert Image.open(out / "samples.png").getpixel((0, 0)) == (0, 0, 255)
    card = (out / "README.md").read_text()
    wanted = [
        "license: cc-by-4.0", f"A LoRA of {tiny_pixart.name}: 7 steps of Med-Art", "with HLDF", "Not for diagnosis",
        "images: train; licence: CC0 1.0", "described by llava-next (seed 3)",
        "| KID | 0.25 | 0.2 to 0.3 | 0.1 |",
        "N = 40", "| `rank` | `4` |", "| `validation_prompt` | `['a/c x-ray', 'notes.txt']` |",
        '--model PATH/TO/pixart --lora pytorch_lora_weights.safetensors --prompt "a chest"', "(samples.png)",
    ]  # fmt: skip
    assert [words for words in wanted if words not in card] == []
    assert "base_model" not in card
    told = [card]
    for name in (lora.FILE_NAME, "comfyui.safetensors"):
        assert lora.read(out / name).keys() == {"transformer", "text_encoder"}
        with safe_open(out / name, "pt") as content:
            told.append("".join(content.metadata().values()))
    # A slash after a letter is no path's beginning; the page's own https:// would be none either.
    assert [path for words in told for path in re.findall(r"(?<![\w./:])[/~][\w./-]+|hospital-7", words)] == []
    assert all('base_model_name_or_path": "pixart"' in words for words in told[1:])
    monkeypatch.setattr(sys, "argv", ["sample.py", "--lora", str(out / lora.FILE_NAME)])
    with pytest.raises(UserError, match=r"made for a folder named pixart, which is not here; give it as --model$"):
        sample.load_pixart(sample.parse_options(), torch.float32, torch.device("cpu"))
    monkeypatch.setattr(sys, "argv", [*sys.argv, "--model", str(tiny_pixart)])
    sample.load_pixart(sample.parse_options(), torch.float32, torch.device("cpu"))
    with pytest.raises(UserError, match="not an empty folder"):
        call(monkeypatch, run, "--out", out)


def test_uploads_and_refusals(run, tmp_path, monkeypatch, capsys):
    call(monkeypatch, run, "--out", tmp_path / "a", "--push-to-hub", "me/x", "--data-license", "CC0", "--private")
    assert (
        Hub.asked[0] == ("me/x", {"private": True, "exist_ok": True}) and Hub.asked[1]["folder_path"] == tmp_path / "a"
    )
    assert "uploaded: https://hub/me/x" in capsys.readouterr().out
    Hub.fault = OSError("no network\nand more")
    with pytest.raises(UserError, match=r"cannot upload to me/x \(no network\)[^\n]*hf upload me/x [^\n]*$"):
        share.push(tmp_path / "a", "me/x", False)
    for arguments, words in (
        (["--push_to_hub", "me/x"], "--data-license"),
        (["--dry_run"], "add --push_to_hub"),
        (["--out", tmp_path / "b", "--evaluation", tmp_path], r"report\.json is no report"),
        (["--out", tmp_path / "b", "--grid", tmp_path / "no.png"], r"no\.png does not exist"),
    ):
        with pytest.raises(UserError, match=words):
            call(monkeypatch, run, *arguments)
    with pytest.raises(UserError, match="no LoRA in"):
        call(monkeypatch, tmp_path / "gone", "--out", tmp_path / "b")


class Refusing(BaseHTTPRequestHandler):
    """The hub, to somebody who may not write there."""

    def do_POST(self):
        self.rfile.read(int(self.headers["Content-Length"]))
        reason = b'{"error": "You may not create a model under the namespace me"}'
        self.send_response(403)
        self.send_header("Content-Type", "application/json")
        self.send_header("X-Request-Id", "1")
        self.end_headers()
        self.wfile.write(reason)

    def log_message(self, *_):
        pass


def test_the_hubs_own_reason_is_told(tmp_path, monkeypatch):
    """Its library's first line names the request only."""
    monkeypatch.setenv("HF_TOKEN", "hf_x")
    with HTTPServer(("127.0.0.1", 0), Refusing) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        monkeypatch.setattr(huggingface_hub.constants, "ENDPOINT", f"http://127.0.0.1:{server.server_port}")
        with pytest.raises(UserError, match=r"cannot upload to me/x \(You may not create a model [^\n]*me\); check"):
            share.push(tmp_path, "me/x", False)
        server.shutdown()


def test_a_card_says_what_is_not_known():
    card = model_card.text("x", {"base": "nano/pixart"}, 0, [])
    assert card.count("not stated") == 2 and "Nothing was measured" in card and "images: not recorded" in card


def test_what_strangers_may_see(tmp_path):
    """Of a path its last name; ids of the hub, the project's own models and prompts are no paths of the machine."""
    (tmp_path / "here").mkdir()
    for value, shown in (
        (str(tmp_path / "here"), "here"), ("/no/more/pixart/", "pixart"), ("C:\\me\\pixart", "pixart"), ("~/x", "x"),
        ("../hospital-7/x", "x"), ("models/hospital-7/x", "x"), ("dataset", "dataset"), ("docs/space", "space"),
        (f"{model_card.ROOT}/nano/pixart", "nano/pixart"), ("nano/../docs", "docs"), (".", "folder"),
    ):  # fmt: skip
        assert model_card.public(value) == shown
    kept = ["PixArt-alpha/PixArt-XL-2-512x512", "nano/pixart", "nano/pixart/vae", "random-weights", "x" * 300,
            "left / right / both lungs", 3, None, True]  # fmt: skip
    assert model_card.public(kept) == kept
    assert "base_model: some/model\n" in model_card.text("x", {"base": "some/model"}, 0, [])
    names = {"/home/me/chest-xray/train": "chest-xray/train", "some/set": "some/set", "/home/me/train": "train"}
    for name, shown in names.items():
        assert model_card.data_of({"dataset_name": name}) == shown
