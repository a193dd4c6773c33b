"""Make the pictures of both READMEs from real runs with the bundled model.

    python resources/make_pictures.py [FOLDER]

Needs requirements-dev.txt, Chromium and fonts (Debian's packages chromium, fonts-noto-cjk and
fonts-noto-color-emoji). In the animation the model is slowed down to `TOKENS_PER_SECOND`.
"""

import argparse
import html
import io
import re
import shutil
import sys
import time
from contextlib import contextmanager
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import utils  # first: it explains which library is missing

# isort: split
import pexpect
from PIL import Image
from playwright.sync_api import sync_playwright

import web_demo
from chatglm2.chat import shared_model
from chatglm2.serving.batching import Batcher

ROOT = Path(__file__).resolve().parent.parent

MODEL = "resources/chatglm2-tiny"
TOKENS_PER_SECOND = 25
TIMEOUT_S = 60
BOX = "textarea[placeholder*=请在], textarea[placeholder*=输入]"
QUESTION = "晚上睡不着应该怎么办"
TERMINAL = """<body style="margin: 0; background: #1d1f27">
<pre style="margin: 0; padding: 20px 24px; color: #e4e6ec; white-space: pre-wrap;
font: 15px/1.5 'Noto Sans Mono CJK SC', monospace">{}</pre>"""


class PacedBatcher(Batcher):
    """Answers greedily, slowed down so that an animation shows the tokens."""

    def submit(self, request, queue, index=0):
        def pause(input_ids, scores):
            time.sleep(1 / TOKENS_PER_SECOND)
            return scores

        request.temperature = 0
        request.processors.append(pause)
        return super().submit(request, queue, index)


def load_model():
    parser = argparse.ArgumentParser()
    utils.add_model_arguments(parser)
    return utils.load_model(parser.parse_args(["--model", MODEL]))


@contextmanager
def opened_browser():
    path = shutil.which("chromium") or shutil.which("google-chrome")
    if path is None:
        raise SystemExit("Chromium is not installed: apt-get install chromium")
    with sync_playwright() as driver:
        chromium = driver.chromium.launch(executable_path=path, args=["--no-sandbox"])
        yield chromium
        chromium.close()


def open_page(browser, address: str | None, width: int, height: int, scale=2):
    viewport = {"width": width, "height": height}
    page = browser.new_page(viewport=viewport, device_scale_factor=scale, locale="zh-CN")
    if address:
        page.goto(address)
        page.locator(BOX).wait_for()
        page.wait_for_timeout(1000)
    return page


class Film:
    """Screenshots of a page, each with the seconds that it is shown."""

    def __init__(self, page):
        self.page, self.frames, self.times = page, [], []

    def shoot(self):
        self.times.append(time.monotonic())
        self.frames.append(Image.open(io.BytesIO(self.page.screenshot())))

    def save(self, path: Path):
        """Write an animation with the recorded times; the last frame stays for three seconds."""
        pairs = zip(self.times, self.times[1:], strict=False)
        durations = [int(1000 * (after - before)) for before, after in pairs] + [3000]
        colors = self.frames[-1].convert("RGB").quantize(64)
        frames = [
            frame.convert("RGB").quantize(palette=colors, dither=Image.Dither.NONE)
            for frame in self.frames
        ]
        frames[0].save(path, save_all=True, append_images=frames[1:], duration=durations, loop=0)


def film_an_answer(browser, address: str, path: Path):
    page = open_page(browser, address, 800, 620, scale=1)
    film = Film(page)
    film.shoot()
    box, is_answered = page.locator(BOX), page.locator("[data-testid=bot] li >> nth=3")
    for character in QUESTION:
        box.press_sequentially(character)
        film.shoot()
        page.wait_for_timeout(60)
    box.press("Enter")
    page.locator(".stop-button").wait_for()
    while page.locator(".stop-button").count():
        film.shoot()
        page.wait_for_timeout(30)
    is_answered.wait_for()
    film.shoot()
    film.save(path)


def ask(page, query: str, answer: str):
    """Ask, and wait until an answer with these words is complete."""
    page.locator(BOX).fill(query)
    page.locator(BOX).press("Enter")
    page.get_by_text(answer).wait_for()
    page.wait_for_timeout(2000)


def picture_page(browser, address: str, path: Path, settings: str | None = None):
    """Picture a page after two rounds; open the settings with the given heading first."""
    page = open_page(browser, address, 1080, 960)
    if settings:
        page.get_by_text(settings).click()
    ask(page, "你好", "很高兴见到你")
    ask(page, QUESTION, "请去看医生")
    page.mouse.move(0, 0)
    page.screenshot(path=path)


def spawn(*arguments: str) -> pexpect.spawn:
    """Start a Python program in a terminal."""
    options = {"cwd": ROOT, "encoding": "utf-8", "timeout": TIMEOUT_S}
    return pexpect.spawn(sys.executable, [*arguments], **options)


@contextmanager
def served_gradio(model, tokenizer):
    """Serve the page of `web_demo.py` from this process; yield its address."""
    shared_model.Batcher = PacedBatcher
    demo = web_demo.Page(model, tokenizer, MODEL).demo
    _, address, _ = demo.launch(prevent_thread_lock=True, quiet=True, **web_demo.LOOK)
    yield address
    demo.close()


@contextmanager
def served_streamlit():
    """Serve the page of `web_demo2.py`; yield its address."""
    server = spawn("-m", "streamlit", "run", "web_demo2.py", "--", "--model", MODEL)
    server.expect(r"http://[\w.:]+")  # printed before the model is loaded
    address = server.after
    server.expect("Loading weights: 100%")
    yield address
    server.close(force=True)


def run_terminal(queries: list[str]) -> str:
    """Return the text that a session of `cli_demo.py` shows in a terminal."""
    session = spawn("cli_demo.py", "--model", MODEL, "--temperature", "0")
    session.logfile_read = shown = io.StringIO()
    for query in [*queries, "stop"]:
        session.expect("用户：")
        session.sendline(query)
    session.expect(pexpect.EOF)
    text = re.sub(r"\x1b\[[?0-9;]*[a-zA-Z]|\r", "", shown.getvalue())
    return text[text.index("欢迎使用") :].strip()


def picture_terminal(browser, folder: Path):
    shown = f"$ python cli_demo.py --model {MODEL}\n"
    shown += run_terminal(["你好", QUESTION, "Tell me a joke"])
    page = open_page(browser, None, 760, 100)
    page.set_content(TERMINAL.format(html.escape(shown)))
    page.screenshot(path=folder / "cli-demo.png", full_page=True)


def main(argv=None):
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("folder", nargs="?", type=Path, default=ROOT / "resources")
    folder = parser.parse_args(argv).folder
    tokenizer, model = load_model()
    with opened_browser() as browser:
        picture_terminal(browser, folder)
        with served_gradio(model, tokenizer) as address:
            film_an_answer(browser, address, folder / "web-demo.gif")
            picture_page(browser, address, folder / "web-demo.png", settings="参数设置")
        with served_streamlit() as address:
            picture_page(browser, address, folder / "web-demo2.png")


if __name__ == "__main__":
    main()
