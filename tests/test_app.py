"""The web demo: what it draws is what sample.py draws, what it reads lies in one folder, and all of it in Chromium."""

import base64
import io
import json
import os
import re
import shlex
import shutil
import subprocess
import sys
import threading
import time
import urllib.error
import urllib.request
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from functools import partial
from pathlib import Path
from types import SimpleNamespace
from urllib.parse import quote

import app_browser
import numpy as np
import pytest
import torch
from app_browser import choose, choose_tab, open_page, run
from packaging.specifiers import SpecifierSet
from PIL import Image
from test_lora import write_run

import sample
from medart_core import app_report, lora, pretrained
from medart_core.app_drawing import Studio
from medart_core.app_jobs import Jobs, Outbox, Stopped
from medart_core.app_orders import DiTOrder, PixArtOrder
from medart_core.app_root import Root, first_choice
from medart_core.errors import UserError
from medart_core.sampling import sample_images
from models import DiT, DiT_models

ROOT = Path(__file__).resolve().parents[1]
ORDER = PixArtOrder("a chest", "", seed=3, steps=2, cfg=4.5, size=32, strength=1.0)
SECRET = "SECRET-OF-SOMEBODY-ELSE"


# --- What may be asked for ---


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"prompt": "  "}, "the prompt is empty"),
        ({"prompt": "x" * 2001}, "2,001 characters"),
        ({"seed": -1}, "the seed is -1; give a whole number from 0"),
        ({"seed": None}, "the seed is empty"),
        ({"seed": 2**31}, "the seed is 2147483648; give a whole number from 0 to 2,147,483,647"),
        ({"steps": 51}, "the number of steps is 51; give a whole number from 2 to 50"),
        ({"steps": 2.5}, "give a whole number"),
        ({"cfg": float("nan")}, "the guidance is nan"),
        ({"cfg": "9"}, "the guidance is 9; give a number"),
        ({"size": 4096}, "the image size is 4096"),
        ({"size": 40}, "give a multiple of 16"),
        ({"strength": -1}, "the LoRA's strength is -1"),
    ],
)
def test_orders_are_bounded(changes, message):
    fields = {
        "prompt": "x",
        "negative_prompt": "",
        "seed": 0,
        "steps": 2,
        "cfg": 1,
        "size": 32,
        "strength": 1,
    } | changes
    with pytest.raises(UserError, match=re.escape(message)):
        PixArtOrder.checked(**fields, sizes=range(16, 65, 16))


def test_orders_of_classes_are_bounded():
    good = {"label": "a", "seed": 0, "steps": 2, "cfg": 1, "images": 4, "guided_channels": 3}
    assert DiTOrder.checked(**good, labels=["a"]).images == 4
    for name, value in {"label": "b", "steps": 251, "images": 5, "guided_channels": 2}.items():
        with pytest.raises(UserError, match=str(value)):
            DiTOrder.checked(**good | {name: value}, labels=["a"])


# --- What is drawn ---


@pytest.fixture(scope="module")
def tiny_lora(tmp_path_factory, tiny_pixart) -> Path:
    """A LoRA of both parts that does something, as medart.py leaves it."""
    folder = tmp_path_factory.mktemp("runs") / "run"
    write_run(folder, tiny_pixart)
    (folder / "options.json").write_text(json.dumps({"no_hldf": True}))
    return folder


def test_loras_come_and_go_without_a_trace(tiny_pixart, tiny_lora):
    studio = Studio(str(tiny_pixart), {}, Path)
    drawn = {}
    for name, folder, strength in (
        ("base", None, 1),
        ("full", tiny_lora, 1),
        ("half", tiny_lora, 0.5),
        ("none", tiny_lora, 0),
    ):
        drawn[name] = np.asarray(studio.draw(replace(ORDER, strength=strength), folder, lambda: None))
        model = pretrained.load(tiny_pixart, torch.float32, torch.device("cpu"))
        if folder:
            lora.load(model, folder, strength)
        [expected] = sample_images(model, ["a chest"], [3], num_inference_steps=2, batch_size=1)
        assert (drawn[name] == expected.numpy()).all(), name
    assert (drawn["none"] == drawn["base"]).all() and not (drawn["half"] == drawn["full"]).all()
    with pytest.raises(UserError, match="does not belong to this transformer"):
        studio.draw(ORDER, ROOT / "nano" / "lora-chest-xray", lambda: None)
    assert (np.asarray(studio.draw(ORDER, None, lambda: None)) == drawn["base"]).all()


def test_a_drawing_is_stopped_before_its_next_step(tiny_pixart):
    studio, jobs, told = Studio(str(tiny_pixart), {}, Path), Jobs(), []
    job = jobs.begin("page", 2, lambda *progress: told.append(progress))

    def step() -> None:
        job.step("base")
        jobs.stop("another page")
        jobs.stop("page")

    with pytest.raises(Stopped, match="after 1 of 2 steps"):
        studio.draw(ORDER, None, step)
    assert told == [((0, 2), "base")]
    studio.draw(ORDER, None, lambda: None)


def test_who_is_stopped_ends_nobody_else(tiny_pixart, tiny_lora):
    """The stopped one is still inside a step, with its LoRA on the model, when the next one is let through."""
    studio, inside, told_to_stop = Studio(str(tiny_pixart), {}, Path), threading.Event(), threading.Event()
    alone = np.asarray(studio.draw(ORDER, tiny_lora, lambda: None))

    def stopped() -> None:
        inside.set()
        told_to_stop.wait(60)
        raise Stopped("stopped")

    with ThreadPoolExecutor(2) as pool:
        first = pool.submit(studio.draw, ORDER, tiny_lora, stopped)
        assert inside.wait(60)
        second = pool.submit(studio.draw, ORDER, tiny_lora, lambda: None)
        time.sleep(0.3)
        told_to_stop.set()
        with pytest.raises(Stopped):
            first.result()
        assert (np.asarray(second.result()) == alone).all()


def test_a_dit_may_name_a_decoder_inside_the_folder_only(root, tmp_path):
    small = partial(DiT, depth=1, hidden_size=32, num_heads=2, patch_size=2)
    facts = {"model": "small", "image_size": 128, "num_classes": 2, "vae": str(tmp_path / "elsewhere")}
    weights = small(input_size=16, num_classes=2).state_dict()
    torch.save({"ema": weights, "args": facts}, root.path / "sly.pt")
    studio = Studio(None, {"small": small}, root.inside)
    with pytest.raises(UserError, match="outside of the folder"):
        studio.dit(root.checkpoint("sly.pt"))


def test_what_is_taken_away(tmp_path):
    outbox, grey = Outbox(tmp_path / "out"), Image.new("RGB", (32, 32), "grey")
    alone = outbox.keep("one", {"base": grey}, {"seed": 1})
    assert Image.open(alone.picture).size == (32, 32) and json.loads(alone.settings.read_text()) == {"seed": 1}
    both = outbox.keep("two", {"base": grey, "tuned": grey}, {})
    assert Image.open(both.picture).width > 2 * 160 and alone.picture.exists()


# --- What is read ---


@pytest.fixture
def root(tmp_path) -> Root:
    """A folder with a run, links that lead out of it, and a secret beside it."""
    (tmp_path / "secret.txt").write_text(SECRET)
    (tmp_path / "elsewhere").mkdir()
    (tmp_path / "elsewhere" / "log.jsonl").write_text("")
    Image.new("RGB", (8, 8)).save(tmp_path / "elsewhere" / "secret.png")
    folder = tmp_path / "root"
    (folder / "run" / "samples").mkdir(parents=True)
    (folder / "run" / "log.jsonl").write_text(
        '{"step": 1, "loss_noise": 0.5}\n{"step": 9, "loss_noise": 0.25, "loss_color": null}\n{"step": 10, "lo'
    )
    Image.new("RGB", (8, 8)).save(folder / "run" / "samples" / "step-000009.png")
    (folder / "link").symlink_to(tmp_path / "elsewhere")
    shutil.copytree(folder / "run", folder / "sly")
    (folder / "sly" / "samples" / "a.png").symlink_to(tmp_path / "elsewhere" / "secret.png")
    (folder / "loop").symlink_to("loop")
    return Root(folder.resolve())


@pytest.mark.parametrize(
    "name",
    [
        "..",
        "../elsewhere",
        "/etc",
        "run/../../elsewhere",
        "link",
        "link/log.jsonl",
        "loop",
        "a\0b",
        "~/../..",
        "x" * 300,
    ],
)
def test_what_lies_outside_is_refused(root, name):
    if name == "~/../..":  # no home is meant, but a folder of that name
        name = "~/../../elsewhere"
    with pytest.raises(UserError, match="outside of the folder"):
        root.folder(name, ["log.jsonl"])
    with pytest.raises(UserError, match=r"outside of the folder|no DiT checkpoint"):
        root.checkpoint(name)


def test_a_folder_with_a_link_that_leads_out_is_refused(root):
    with pytest.raises(UserError, match="outside of the folder"):
        app_report.open_folder(root, "sly")


def test_reports(root):
    opened = app_report.open_folder(root, "run")
    assert [title for title, _ in opened.pictures] == ["step 000009"]
    assert opened.curves == [(1, "noise loss", 0.5), (9, "noise loss", 0.25)]
    assert "| noise loss | 0.5 | 0.25 | 9 |" in opened.figures
    assert root.reports() == ["run", "sly"]
    for name in ("", None, ".", "gone"):
        with pytest.raises(UserError, match="choose one from the list"):
            app_report.open_folder(root, name)
    figure = {"value": 1.5, "low": 1.0, "high": 2.0, "n_generated": 20, "n_real": 30, "floor": 0.5, "seed": 0}
    (root.path / "run" / "report.json").write_text(json.dumps({"run": {}, "fid": figure}))
    assert "| FID | 1.5 | 1 to 2 | 0.5 | 20 / 30 | lower |" in app_report.open_folder(root, "run").figures
    for file, contents in {
        "report.json": ("{", "[]", '{"fid": 3}'),
        "demo.json": ('{"errors": null}', "3", '{"errors": {"base": {"color_distance": "x", "chroma_error": 1}}}'),
        "log.jsonl": ('{"loss": }\n', '{"loss": 1}\n', "\x80\n"),
    }.items():
        for damaged in contents:
            (root.path / "sly" / file).write_text(damaged, "latin-1")
            (root.path / "sly" / "samples" / "a.png").unlink(missing_ok=True)
            with pytest.raises(UserError, match=rf"^{file} is damaged, [^\n]*make it again$"):
                app_report.open_folder(root, "sly")
        (root.path / "sly" / file).unlink()


def test_loras_and_checkpoints_are_found(root, tiny_lora):
    shutil.copytree(tiny_lora, root.path / "a" / "lora")
    shutil.copytree(tiny_lora, root.path / "a" / "lora" / "checkpoint-5")
    for changed, (folder, step) in enumerate([("b", 5), ("b", 10), ("c", 5), ("ablation-quick", 5)]):
        kept = root.path / folder / "000-DiT-S-4" / "checkpoints"
        kept.mkdir(parents=True, exist_ok=True)
        (kept / f"{step:07d}-manifest.json").touch()
        (kept / f"{step:07d}.pt").touch()
        os.utime(kept / f"{step:07d}.pt", (changed, changed))
    [found] = root.loras()
    assert (found.name, found.hldf, found.title) == ("a/lora", False, "without HLDF (a/lora)")
    assert first_choice([]) == [] and first_choice([found]) == ["a/lora"]
    for twin in ("nano/x-without-hldf", "nano/x/without_hldf"):
        there = [found._replace(name=name, hldf=name == "nano/x") for name in ("a/lora", twin, "b", "nano/x")]
        assert first_choice(there) == [twin, "nano/x"]
    assert root.checkpoints() == [
        ("000-DiT-S-4, step 5 (c)", "c/000-DiT-S-4/checkpoints/0000005.pt"),
        ("000-DiT-S-4, step 10 (b)", "b/000-DiT-S-4/checkpoints/0000010.pt"),
    ]
    assert replace(root, given="results").told("a/lora") == "results/a/lora"


# --- The command ---


def test_the_extra_is_asked_for_in_one_line(tmp_path):
    (tmp_path / "sitecustomize.py").write_text("import sys\nsys.modules['gradio'] = None\n")
    path = f"{tmp_path}:{app_browser.path_of_ours()}"
    for arguments, message in (
        ([], "needs Gradio, which is not installed; python -m pip install -r requirements-app.txt"),
        (["--root", "gone"], "--root gone is no folder"),
        (["--port", "0"], "--port is 0"),
        (["--ports", "80"], "there is no option --ports, perhaps --port is meant"),
    ):
        done = subprocess.run(
            [sys.executable, "app.py", *arguments], cwd=ROOT, env={"PYTHONPATH": path}, capture_output=True, text=True
        )
        assert (done.returncode, done.stdout) == (2, "")
        assert re.fullmatch(rf"error: [^\n]*{re.escape(message)}[^\n]*\n", done.stderr), done.stderr


def test_what_a_space_is_made_of():
    space = ROOT / "docs" / "space"
    names = (space / "files.txt").read_text().split()
    assert [name for name in names if not (ROOT / name).exists()] == []
    assert "app.py" in names and not any(name in ("dataset", "medart", "results") for name in names)
    settings = dict(re.findall(r"^(\w+): (.+)$", (space / "README.md").read_text().split("---")[1], re.MULTILINE))
    assert (settings["sdk"], settings["app_file"]) == ("gradio", "app.py")
    lines = [*(space / "requirements.txt").read_text().splitlines(), f"gradio=={settings['sdk_version']}"]
    pins = {name: pin for line in lines if "==" in line for name, pin in [line.split("==")]}
    bounds = "\n".join((ROOT / name).read_text() for name in ("requirements.txt", "requirements-app.txt"))
    for name, bound in re.findall(r"^([\w-]+)([<>=][^\n]*)$", bounds, re.MULTILINE):
        assert name not in pins or SpecifierSet(bound).contains(pins[name]), name
    assert {"torch", "diffusers", "transformers", "peft", "gradio"} <= pins.keys()


# --- In a browser ---

in_chromium = pytest.mark.skipif(app_browser.missing() is not None, reason=str(app_browser.missing()))
DIT = "results/000-DiT-T-2"


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    """A root with a LoRA, a DiT and a run; beside it lies what must not be read."""
    top = tmp_path_factory.mktemp("app")
    (top / "secret.txt").write_text(SECRET)
    shutil.copytree(ROOT / "nano" / "lora-chest-xray", top / "root" / "tuned")
    (top / "root" / "tuned" / "log.jsonl").write_text(
        '{"step": 1, "loss_noise": 0.5}\n{"step": 9, "loss_noise": 0.25}\n'
    )
    (top / "root" / "link").symlink_to(top)
    (top / "root" / "inside.txt").write_text(SECRET)
    checkpoints = top / "root" / DIT / "checkpoints"
    checkpoints.mkdir(parents=True)
    model = partial(DiT_models["DiT-S/2"].func, depth=2, hidden_size=32, num_heads=2, patch_size=2)(
        input_size=16, num_classes=2
    )
    facts = {"model": "DiT-T/2", "image_size": 128, "num_classes": 2, "class_names": ["red", "blue"], "vae": "nano"}
    torch.save({"ema": model.state_dict(), "args": facts}, checkpoints / "0000007.pt")
    (checkpoints / "0000007-manifest.json").touch()
    return top / "root"


@pytest.fixture(scope="module")
def started() -> float:
    return time.monotonic()


@pytest.fixture(scope="module")
def url(folder, started):
    with app_browser.served(f"--root={folder}", before="import tiny_dit; tiny_dit.make_known()") as address:
        yield address


@pytest.fixture(scope="module")
def page(url):
    with app_browser.browser() as opened:
        page = open_page(opened, url, app_browser.DESKTOP)
        page.outside = []
        page.on("request", lambda r: None if r.url.startswith((url, "data:", "blob:")) else page.outside.append(r.url))
        yield page


def message(page) -> str:
    """What the page says is wrong; it is then put away."""
    toast = page.locator(".toast-body").first
    text = toast.inner_text()
    toast.locator(".toast-close").click()
    toast.wait_for(state="detached")
    return text


def pictures(page, name: str) -> list[np.ndarray]:
    found = page.locator(f"#{name}-pictures img").evaluate_all("images => images.map(image => image.src)")
    return [np.asarray(Image.open(io.BytesIO(base64.b64decode(each.partition(",")[2])))) for each in found]


def steps(page, tab: str, count: int) -> None:
    page.locator(f"#{tab}-steps input").fill(str(count))


def download(page, button: str) -> Path:
    with page.expect_download() as event:
        page.click(f"#{button}")
    return event.value.path()


@in_chromium
def test_pictures_of_a_prompt(page, folder, started, tmp_path, monkeypatch):
    assert "Not for diagnosis" in page.inner_text(".head")
    steps(page, "generate", 2)
    run(page, "generate", "Drawn in")
    base, tuned = pictures(page, "generate")
    assert time.monotonic() - started < 3 * 20  # 20 on two cores that have nothing else to do
    assert base.shape == (128, 128, 3) and not (base == tuned).all()
    assert page.locator("#generate-pictures figcaption").all_inner_texts()[1] == "with HLDF, 1200 steps (tuned)"
    settings = json.loads(download(page, "generate-json").read_text())
    assert (settings["seed"], settings["steps"], settings["not_for"]) == (0, 2, "diagnosis")
    assert Image.open(download(page, "generate-png")).width > 256

    # The command in the settings draws the same picture.
    command = shlex.split(settings["commands"]["with HLDF, 1200 steps (tuned)"])
    monkeypatch.setattr(sys, "argv", [*command[1:], "--out", str(tmp_path / "same")])
    sample.main()
    same = np.asarray(Image.open(tmp_path / "same" / "000000.png")).astype(int)
    assert abs(same - tuned.astype(int)).max() <= 1


@in_chromium
def test_mistakes_are_told(page):
    prompt = page.locator("#prompt textarea")
    before = prompt.input_value()
    for fill, told in (
        (lambda: prompt.fill(" "), "the prompt is empty"),
        (lambda: steps(page, "generate", 999), "999"),
    ):
        fill()
        page.click("#generate-run")
        assert told in message(page)
        prompt.fill(before)
    steps(page, "generate", 2)


@in_chromium
def test_a_job_is_stopped_from_its_page(tmp_path):
    from medart_core.app_desk import Desk

    person, models = SimpleNamespace(session_hash="a"), SimpleNamespace(result=lambda: studio, done=lambda: True)

    def draw(order, tuned, on_step):
        on_step()
        desk.stop(SimpleNamespace(session_hash="b"))
        on_step()
        desk.stop(person)
        on_step()

    studio = SimpleNamespace(sizes=range(16, 65, 16), pixart=SimpleNamespace(name="x"), draw=draw, left_out=len)
    desk = Desk(Root(tmp_path), Outbox(tmp_path / "out"), models, models, "x", {})  # pyright: ignore[reportArgumentType]
    *_, last = desk.generate("a chest", "", ["base model"], 0, 5, 1, 32, 1, person, lambda *_: None)
    assert last[0] == "Not finished: stopped after 2 of 5 steps."


@in_chromium
def test_stop(page):
    steps(page, "generate", 50)
    page.click("#generate-run")
    page.wait_for_selector("#generate-said:has-text('/')")  # a step of all
    page.click("#generate-stop")
    page.wait_for_selector("#generate-said:has-text('Stopped')")
    steps(page, "generate", 2)
    run(page, "generate", "Drawn in")
    assert len(pictures(page, "generate")) == 2


@in_chromium
def test_pictures_of_a_class(page):
    choose_tab(page, "Class-conditional")
    page.wait_for_function("document.querySelector('#class input').value === 'red'")
    steps(page, "classes", 2)
    run(page, "classes", "Drawn in")
    drawn = pictures(page, "classes")
    assert len(drawn) == 4 and drawn[0].shape == (128, 128, 3)
    assert "--ckpt" in json.loads(download(page, "classes-json").read_text())["command"]


@in_chromium
def test_descriptions(page, tmp_path):
    choose_tab(page, "Caption")
    page.click("#caption-run")
    assert "there is no image" in message(page)
    (tmp_path / "broken.png").write_bytes(b"\x89PNG\r\n\x1a\n and then nothing")
    for file, answer in ((tmp_path / "broken.png", "broken.png cannot be read"), (app_browser.X_RAY, None)):
        page.set_input_files("#dropped input[type=file]", str(file))
        page.wait_for_selector("#dropped img")
        if answer:
            page.click("#caption-run")
            assert answer in message(page)
            page.locator("#dropped button[aria-label='Remove Image']").click()
    choose(page, "label", "bacterial pneumonia")
    run(page, "caption", "seconds")
    said = page.locator("#description textarea").input_value()
    assert said.lower().startswith("a chest x-ray image of bacterial pneumonia")
    assert page.locator("#attempts li.passed").count() >= 7


@in_chromium
def test_reports_in_the_page(page):
    choose_tab(page, "Report")
    choose(page, "folder", "tuned")
    page.click("#report-run")
    page.wait_for_selector("#figures td:has-text('noise loss')")
    for outside in ("../", "/etc", "link", "<img src=x onerror=alert(1)>"):
        choose(page, "folder", outside)
        page.click("#report-run")
        said = message(page)
        assert ("'<img src=x onerror=alert(1)>' is no folder" if "img" in outside else "outside of the folder") in said
    assert SECRET not in page.content()


@in_chromium
def test_nothing_is_wider_than_a_phone(page):
    page.set_viewport_size(app_browser.PHONE)
    for tab in app_browser.TABS:
        page.get_by_role("tab", name=tab).click()
        assert page.evaluate("document.documentElement.scrollWidth") <= app_browser.PHONE["width"], tab
    page.set_viewport_size(app_browser.DESKTOP)


@in_chromium
def test_without_a_dit_the_page_says_how_to_get_one(page, folder, url):
    (folder / DIT).rename(folder.parent / "away")
    page.goto(url)
    choose_tab(page, "Class-conditional")
    page.wait_for_selector("#no-dit:has-text('make demo-dit')")
    assert not page.is_visible("#classes-run")
    assert page.outside == []  # nothing is fetched from elsewhere


def post(url: str, body: bytes, kind: str) -> bytes:
    return urllib.request.urlopen(urllib.request.Request(url, body, {"Content-Type": kind})).read()


def upload(url: str, file: Path) -> str:
    """The path on the server of a file that is sent to it as the page sends it."""
    head = f'--x\r\nContent-Disposition: form-data; name="files"; filename="{file.name}"\r\n\r\n'
    [path] = json.loads(
        post(
            f"{url}/gradio_api/upload",
            head.encode() + file.read_bytes() + b"\r\n--x--\r\n",
            "multipart/form-data; boundary=x",
        )
    )
    return path


@in_chromium
def test_the_server_gives_no_file_away(url, folder):
    for path in (folder / "inside.txt", folder.parent / "secret.txt", ROOT / "README.md", Path("/etc/passwd")):
        ways = [f"{path}", f"..{path}", f"{folder}/../{path.name}"]
        for way in (*map(quote, ways), quote(str(path), safe="")):
            with pytest.raises(urllib.error.HTTPError) as refused:
                urllib.request.urlopen(f"{url}/gradio_api/file={way}")
            assert refused.value.code in (403, 404)

    # A file of the machine in the place of an uploaded one.
    config = json.load(urllib.request.urlopen(f"{url}/config"))
    ids = {part["props"].get("elem_id"): part["id"] for part in config["components"]}
    [call] = [each for each in config["dependencies"] if [ids["caption-run"], "click"] in map(list, each["targets"])]
    outside = Path(shutil.copy(app_browser.X_RAY, folder.parent))
    for path, described in ((outside, "false"), (upload(url, app_browser.X_RAY), "true")):
        sent = {"path": str(path), "meta": {"_type": "gradio.FileData"}}
        body = {"data": [sent, "chest-xray", "normal lungs", 0], "fn_index": call["id"], "session_hash": described}
        post(f"{url}/gradio_api/queue/join", json.dumps(body).encode(), "application/json")
        answer = urllib.request.urlopen(f"{url}/gradio_api/queue/data?session_hash={described}").read().decode()
        assert f'"success":{described}' in answer.replace(" ", ""), answer
        assert ("chest X-ray image of normal lungs" in answer) == (described == "true")
