"""The web demo in a real headless Chromium, to be tested, and to be photographed for the README.

python tests/app_browser.py img      img/app-desktop.png and img/app-phone.png of the runs that lie in the project, and
                                     img/report.png, the page that make demo ends with
"""

import contextlib
import io
import os
import shutil
import socket
import subprocess
import sys
import time
import urllib.request
from collections.abc import Iterator
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from PIL import Image

ROOT = Path(__file__).resolve().parents[1]
X_RAY = ROOT / "tests" / "data" / "person1018_bacteria_2949.jpeg"
REPORT = ROOT / "medart" / "evaluation" / "report.html"
TABS = ("Generate", "Class-conditional", "Caption", "Report")
PATIENCE = 300  # seconds, on a machine that is busy otherwise
DESKTOP, PHONE = {"width": 1280, "height": 800}, {"width": 390, "height": 844}
LEVELS = 31  # of a colour in the figures


def chromium() -> str | None:
    """The browser that is installed."""
    return next(
        (path for name in ("chromium", "chromium-browser", "google-chrome") if (path := shutil.which(name))), None
    )


def missing() -> str | None:
    """What there is not, with the command that brings it."""
    if not chromium():
        return "no Chromium: sudo apt-get install chromium && make test-app"
    absent = [name for name in ("gradio", "playwright") if find_spec(name) is None]
    return f"no {' and '.join(absent)}: make test-app" if absent else None


@contextlib.contextmanager
def served(*arguments: str, before: str = "") -> Iterator[str]:
    """The address of `python app.py` with these arguments, after the code `before`; it ends with the context."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    call = ["app.py", *arguments, f"--port={port}"]
    if before:
        code = f"import runpy, sys; sys.argv = {call!r}; {before}; runpy.run_path('app.py', run_name='__main__')"
        call = ["-c", code]
    process = subprocess.Popen([sys.executable, *call], cwd=ROOT, env=os.environ | {"PYTHONPATH": path_of_ours()})
    url = f"http://127.0.0.1:{port}"
    try:
        until = time.monotonic() + PATIENCE
        while not answers(url):
            assert process.poll() is None and time.monotonic() < until, "app.py has not begun to serve"
            time.sleep(0.2)
        yield url
    finally:
        process.terminate()
        try:
            process.wait(PATIENCE)
        except subprocess.TimeoutExpired:
            process.kill()
            raise


def path_of_ours() -> str:
    """Where the child finds what this process imports from the checkout."""
    return os.pathsep.join([str(ROOT / "diffusers"), str(ROOT / "LLaVA-NeXT"), str(ROOT / "tests"), str(ROOT)])


def answers(url: str) -> bool:
    with contextlib.suppress(OSError), urllib.request.urlopen(url, timeout=10):
        return True
    return False


@contextlib.contextmanager
def browser() -> Iterator[Any]:
    """A Chromium that nobody sees."""
    from playwright.sync_api import sync_playwright  # pyright: ignore[reportMissingImports]

    with sync_playwright() as playwright:
        opened = playwright.chromium.launch(executable_path=chromium(), args=["--no-sandbox"])
        try:
            yield opened
        finally:
            opened.close()


def open_page(opened: Any, url: str, size: dict[str, int]) -> Any:
    """The page, when its buttons are there."""
    page = opened.new_page(viewport=size)
    page.set_default_timeout(PATIENCE * 1000)
    page.goto(url)
    page.wait_for_selector("#generate-run")
    return page


def choose_tab(page: Any, name: str) -> None:
    page.get_by_role("tab", name=name).click()


def run(page: Any, tab: str, says: str) -> None:
    """Press a tab's button, and wait until the line under it says so."""
    page.click(f"#{tab}-run")
    page.wait_for_selector(f"#{tab}-said:has-text('{says}')")


def choose(page: Any, field: str, value: str) -> None:
    """Type a value into a list that takes values of one's own."""
    box = page.locator(f"#{field} input")
    box.click()
    box.fill(value)
    box.press("Enter")


# --- Figures ---


def photograph(page: Any) -> list[Image.Image]:
    """A picture of each tab after its button was pressed."""
    pictures = []
    for name in TABS:
        choose_tab(page, name)
        if name == "Generate":
            run(page, "generate", "Drawn in")
        elif name == "Class-conditional":
            page.wait_for_selector("#class input:not([value=''])", state="attached")
            page.wait_for_timeout(2000)
            choose(page, "ckpt", "results/dit")  # that of README's grid; the list is searched for it
            page.wait_for_timeout(2000)
            run(page, "classes", "Drawn in")
        elif name == "Caption":
            page.set_input_files("#dropped input[type=file]", str(X_RAY))
            page.wait_for_selector("#dropped img")
            choose(page, "label", "bacterial pneumonia")
            run(page, "caption", "seconds")
        else:
            page.click("#report-run")
            page.wait_for_selector("#figures table")
        page.wait_for_timeout(1500)  # what slides and fades in
        page.evaluate("window.scrollTo(0, 0)")
        pictures.append(photographed(page))
    return pictures


def photographed(page: Any) -> Image.Image:
    """All of a page, from its top to its end."""
    return Image.open(io.BytesIO(page.screenshot(full_page=True))).convert("RGB")


def sheet(pictures: list[Image.Image], columns: int, height: int, scale: float) -> Image.Image:
    """Pictures side by side, cut at `height` pixels, with fewer shades of each colour to be small."""
    width, gap = pictures[0].width, 24
    rows = -(-len(pictures) // columns)
    whole = Image.new("RGB", (columns * (width + gap) + gap, rows * (height + gap) + gap), (203, 213, 225))
    for number, picture in enumerate(pictures):
        cut = Image.new("RGB", (width, height), "white")
        cut.paste(picture, (0, 0))
        row, column = divmod(number, columns)
        whole.paste(cut, (gap + column * (width + gap), gap + row * (height + gap)))
    small = whole.resize((round(whole.width * scale), round(whole.height * scale)), Image.Resampling.LANCZOS)
    return small.point([round(round(value * LEVELS / 255) * 255 / LEVELS) for value in range(256)] * 3)


def main() -> None:
    folder = Path(sys.argv[1])
    if reason := missing():
        sys.exit(f"error: {reason}")
    if not REPORT.is_file():
        sys.exit(f"error: there is no {REPORT}: make demo")
    views = (("desktop", DESKTOP, 2, 930, 0.5), ("phone", PHONE, 4, 1240, 0.75))
    with served() as url, browser() as opened:
        for name, size, columns, height, scale in views:
            file = folder / f"app-{name}.png"
            sheet(photograph(open_page(opened, url, size)), columns, height, scale).save(file, optimize=True)
            print(file)
        page = opened.new_page(viewport=DESKTOP)
        page.goto(REPORT.as_uri())
        file = folder / "report.png"
        sheet([photographed(page)], 1, 1500, 0.6).save(file, optimize=True)
        print(file)


if __name__ == "__main__":
    main()
