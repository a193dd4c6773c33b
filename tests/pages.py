"""What the tests of both web pages share: the page's process, a tab, hostile text."""

import json
import os
import re
import socket
import subprocess
import sys
import time
from contextlib import contextmanager
from pathlib import Path
from types import SimpleNamespace

import pytest
from conftest import ROOT

TIMEOUT_S = 20
REST = "log => log.scrollHeight - log.clientHeight - log.scrollTop"  # pixels below the screen

MARKUP = """<script>window.hacked = 1</script> 1 <b>2</b> vector<int>
<img src="http://192.0.2.1/a.png" onerror="window.hacked = 1"> ![](http://192.0.2.1/b.png)

价格 $5 和 $6，$E=mc^2$，\\(a<b\\)

```python
print("<i>")
```
`x<y>`

see[^1]

[^1]: a

    ![x](http://192.0.2.1/foot.png)

$$c
+ d$$

```
$$
![x](http://192.0.2.1/math.png)
```

$$a = b \\\\
\\quad c = d$$

AFTER **bold** :red[red] :smile: std::vector

\\[
```
\\]
<b>bold</b> <div style='position:fixed'>fixed</div>
```"""


def check_markup(message):
    """Check that nothing of `MARKUP` became HTML, and that formulas and code are drawn."""
    message.locator(".katex").nth(3).wait_for()  # formulas and colours are drawn last
    message.locator("pre code span").first.wait_for()
    assert message.page.evaluate("window.hacked") is None
    text = message.inner_text()
    for part in MARKUP.splitlines()[:2]:
        assert part in text
    assert "价格 $5 和 $6，" in text, text
    assert 'print("<i>")' in text and "x<y>" in text, text
    assert message.locator("img, script, b, i, [style*=fixed]").count() == 0
    assert message.locator(".katex").count() == 4
    assert message.locator(".katex-display").count() == 2
    assert message.locator("strong").inner_text() == "bold"
    for part in ("see[^1]", ":red[red] :smile: std::vector", "foot.png", "math.png"):
        assert part in text


@contextmanager
def served_page(program: list, arguments: list, folder: Path):
    """Start a page in a process of its own, on a free port, which stands for "{port}"."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    notes = folder / "notes.jsonl"
    words = [str(word).format(port=port) for word in (*program, *arguments)]
    process = subprocess.Popen(
        [sys.executable, str(ROOT / "tests" / "page_models.py"), str(notes), *words],
        cwd=folder,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
    )
    try:
        wait_for_port(process, port)
        yield SimpleNamespace(address=f"http://127.0.0.1:{port}/", notes=notes)
    finally:
        process.terminate()
        process.wait()


def wait_for_port(process: subprocess.Popen, port: int):
    deadline = time.monotonic() + 4 * TIMEOUT_S  # imports take long on a busy machine
    while time.monotonic() < deadline and process.poll() is None:
        with socket.socket() as probe:
            if probe.connect_ex(("127.0.0.1", port)) == 0:
                return
        time.sleep(0.1)
    raise AssertionError(f"no server on port {port}, exit code {process.poll()}")


def check_addresses(server):
    """Check that the page's process asked and listened on no other address than this machine's."""
    notes = [json.loads(line) for line in server.notes.read_text("utf-8").splitlines()]
    assert any(event == "socket.bind" for event, _ in notes)
    local = re.compile(r"\('(127\.0\.0\.1|::1)', .*|127\.0\.0\.1|localhost|None")
    assert [note for note in notes if not local.fullmatch(note[1])] == []


@contextmanager
def opened_tab(browser, server):
    """Open the page in a tab of its own, which has asked no other host when it is closed."""
    tab = browser.new_page()
    tab.set_viewport_size({"width": 1000, "height": 800})
    requests = []
    tab.on("request", lambda request: requests.append(request.url))
    try:
        tab.goto(server.address)
        yield tab
    finally:
        tab.close()
    outside = ("data:", "blob:", server.address, server.address.replace("http", "ws"))
    assert requests and not [url for url in requests if not url.startswith(outside)]


def check_accessibility(page, known: str | None = None):
    """Check that axe-core finds nothing but a `known` fault; skip the test without it."""
    axe = pytest.importorskip("axe_playwright_python.sync_playwright", reason="needs axe-core")
    violations = axe.Axe().run(page).response["violations"]
    found = [
        (v["id"], [node["html"] for node in v["nodes"]]) for v in violations if v["id"] != known
    ]
    assert found == [], str(found)


class Tab:
    """A browser tab with one of the pages, found by its selectors."""

    MESSAGES, STOP, BOX = "", "", "textarea"

    def __init__(self, page, server):
        self.page, self.server = page, server
        self.stop_button = page.locator(self.STOP)
        self.box = page.locator(self.BOX)
        self.box.wait_for()

    def messages(self) -> list[str]:
        return self.page.locator(self.MESSAGES).all_inner_texts()

    def text(self) -> str:
        return self.page.inner_text("body")

    def wait_for(self, condition, timeout_s=TIMEOUT_S):
        deadline = time.monotonic() + timeout_s
        while not condition():
            assert time.monotonic() < deadline, self.text()
            self.page.wait_for_timeout(30)

    def send(self, query: str):
        self.box.fill(query)
        self.box.press("Enter")

    def start_story(self):
        """Ask for a long answer, and wait until it grows."""
        self.send("讲个故事")
        self.stop_button.wait_for()
        lengths = set()
        self.wait_for(lambda: lengths.add(len(self.messages()[-1])) or len(lengths) > 4)

    def check_following(self, log, wheel: int, least: int):
        """Check that a growing answer is followed until the reader scrolls, and from the end on.

        Args:
            log: What scrolls, and stands at its end.
            wheel: By how many pixels the reader scrolls up.
            least: Pixels of the answer that are below the screen one second later.
        """
        log.hover()
        self.page.mouse.wheel(0, -wheel)
        self.page.wait_for_timeout(200)
        top = log.evaluate("log => log.scrollTop")
        self.page.wait_for_timeout(1000)
        assert log.evaluate("log => log.scrollTop") == top and log.evaluate(REST) > least
        self.page.mouse.wheel(0, 2000)
        self.page.wait_for_timeout(1000)
        assert log.evaluate(REST) < 4 and self.stop_button.count()
        self.stop_button.click()

    def show_on_dark_phone(self):
        self.page.emulate_media(color_scheme="dark")
        self.page.set_viewport_size({"width": 360, "height": 640})
        self.page.reload()
        self.box.wait_for()

    def check_phone(self):
        """Check that a list is drawn, and that page and text box fit on the screen."""
        assert self.page.locator(self.MESSAGES).locator("li").count() == 4
        assert self.page.evaluate("document.documentElement.scrollWidth") <= 360
        assert self.box.bounding_box()["y"] < 640
