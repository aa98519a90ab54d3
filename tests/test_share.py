"""share.py: the folder and its card, what is uploaded and what is not."""

import json
import sys
import threading
from http.server import BaseHTTPRequestHandler, HTTPServer

import huggingface_hub
import pytest
from PIL import Image
from test_lora import write_run

import share
from medart_core import lora, model_card
from medart_core.errors import UserError

FIGURE = {"value": 0.25, "low": 0.2, "high": 0.3, "n_generated": 40, "n_real": 40, "floor": 0.1, "seed": 0}


@pytest.fixture
def run(tmp_path, tiny_pixart):
    folder = tmp_path / "mine"
    write_run(folder, tiny_pixart)
    data = tmp_path / "data" / "train"
    data.mkdir(parents=True)
    header = {"journal": {"options": {"model": "nano/llava-next", "seed": 3}}}
    (data / "captions.jsonl").write_text(json.dumps(header) + "\n")
    settings = {
        "dataset_name": str(data),
        "caption_column": "text",
        "rank": 4,
        "output_dir": str(folder),
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
        "license: cc-by-4.0", f"base_model: {tiny_pixart}", "7 steps of Med-Art", "with HLDF", "Not for diagnosis",
        "images: data/train; licence: CC0 1.0", "described by nano/llava-next (seed 3)",
        "| KID | 0.25 | 0.2 to 0.3 | 0.1 |",
        "N = 40", "| `rank` | `4` |", '--prompt "a chest"', "(samples.png)",
    ]  # fmt: skip
    assert [words for words in wanted if words not in card] == []
    assert str(run) not in card and "data/train" in card and str(tmp_path / "data") not in card
    for name in (lora.FILE_NAME, "comfyui.safetensors"):
        assert lora.read(out / name).keys() == {"transformer", "text_encoder"}
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
