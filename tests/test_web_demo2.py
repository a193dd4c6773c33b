"""`web_demo2.py`: with Streamlit's AppTest, and in headless Chromium with a slow model."""

import subprocess
import sys
import time

import pytest
import streamlit
from conftest import ROOT
from page_models import PAUSE_S, load_slow_model
from pages import MARKUP, check_addresses, check_markup, opened_tab, served_page, wait_for
from streamlit.testing.v1 import AppTest

SCRIPT = ROOT / "web_demo2.py"


# Without a browser.


@pytest.fixture
def app(tiny_checkpoint, monkeypatch):
    """The page after its first run."""
    monkeypatch.setattr(sys, "argv", ["web_demo2.py", "--model", str(tiny_checkpoint)])
    monkeypatch.setattr("utils.load_model", load_slow_model)
    app = AppTest.from_file(str(SCRIPT), default_timeout=30).run()
    assert not app.exception
    return app


def ask(app, query: str) -> list[str]:
    app.chat_input[0].set_value(query).run()
    assert not app.exception
    return messages(app)


def messages(app) -> list[str]:
    return [message.markdown[0].value for message in app.chat_message]


def notices(app) -> list[str]:
    return [element.value for element in (*app.info, *app.caption)]


def test_rounds_and_clear(app):
    assert f"{app.session_state.chat.model.device}, float32" in notices(app)[-1]
    assert "Hello!" in app.markdown[0].value
    [query, answer] = ask(app, "你好")
    assert query == "你好" and "ChatGLM2-tiny" in answer
    assert len(ask(app, "讲个笑话")) == 4
    calls = app.session_state.chat.model.calls
    assert calls[-1]["history"] == [(query, answer)]
    app.sidebar.button[0].click().run()
    assert messages(app) == [] and app.session_state.chat.rounds == []


def test_an_example(app):
    app.button[1].click().run()
    assert "手机" in messages(app)[1]


def test_settings(app):
    max_length, top_p, temperature = app.sidebar.slider
    assert (max_length.value, top_p.value, temperature.value) == (2048, 0.8, 0.8)
    max_length.set_value(80)
    top_p.set_value(0.5)
    temperature.set_value(0.0).run()
    for _ in range(4):
        ask(app, "你好")
    call = app.session_state.chat.model.calls[-1]
    assert (call["top_p"], call["temperature"]) == (0.5, 0)
    assert call["max_length"] == 80
    dropped = app.session_state.chat.first_round
    assert 0 < dropped < 4 and any(f"最早的 {dropped} 轮" in text for text in notices(app))
    assert len(messages(app)) == 8


def test_a_failure_is_told_and_the_page_goes_on(app):
    ask(app, "你好")
    assert ask(app, "fail")[2:] == ["fail"]
    assert "no memory <b>left</b>" in notices(app)[0]
    app.main.button[0].click().run()
    assert [call["query"] for call in app.session_state.chat.model.calls[-2:]] == ["fail"] * 2
    assert "no memory" in notices(app)[0] and messages(app)[2:] == ["fail"]
    ask(app, "很长" * 3000)
    assert "at most" in notices(app)[0]
    assert len(ask(app, "谢谢")) == 4
    assert len(notices(app)) == 1 and not app.main.button


def test_a_question_whose_run_ends_early_is_kept(app, monkeypatch):
    with monkeypatch.context() as patch:
        patch.setattr(
            "chatglm2.chat.shared_model.SharedModel.answer",
            lambda *args, **settings: streamlit.stop(),
        )
        assert ask(app, "你好") == ["你好", "…"]
    app.run()
    assert messages(app) == ["你好"]
    app.main.button[0].click().run()
    assert "ChatGLM2-tiny" in messages(app)[1]


def test_the_model_is_loaded_once(app, monkeypatch):
    monkeypatch.setattr("utils.load_model", None)
    other = AppTest.from_file(str(SCRIPT), default_timeout=30).run()
    assert not other.exception
    assert ask(other, "你好")[0] == "你好" and messages(app) == []
    assert other.session_state.chat.model is app.session_state.chat.model


@pytest.mark.parametrize(
    ("argv", "message"),
    [(["--model", "nowhere"], "there is no such folder"), (["--modle", "x"], "see the terminal")],
)
def test_what_cannot_be_loaded(argv, message, monkeypatch):
    monkeypatch.setattr(sys, "argv", ["web_demo2.py", *argv])
    app = AppTest.from_file(str(SCRIPT), default_timeout=30).run()
    assert not app.exception
    assert message in app.error[0].value and not app.chat_input


@pytest.mark.slow
def test_started_without_streamlit():
    result = subprocess.run([sys.executable, SCRIPT], capture_output=True, text=True)
    assert result.returncode == 1 and result.stdout == ""
    assert "streamlit run web_demo2.py -- --model" in result.stderr.splitlines()[2]
    assert "Traceback" not in result.stderr


# In a browser.


@pytest.fixture(scope="module")
def server(tiny_checkpoint, tmp_path_factory):
    """The page, started in a folder that has no settings for Streamlit."""
    with served_page(
        ["streamlit", "run", ROOT / "web_demo2.py", "--server.port", "{port}"],
        ["--", "--model", tiny_checkpoint],
        tmp_path_factory.mktemp("elsewhere"),
    ) as server:
        yield server


@pytest.fixture
def tab(browser, server):
    with opened_tab(browser, server) as page:
        yield Tab(page)


class Tab:
    """A browser tab with the page."""

    def __init__(self, page):
        self.page = page
        self.box = page.locator("textarea")
        self.box.wait_for()
        self.stop_button = page.get_by_role("button", name="停止 Stop")

    def messages(self) -> list[str]:
        return self.page.get_by_test_id("stChatMessage").all_inner_texts()

    def wait_for(self, condition):
        wait_for(self.page, condition, lambda: self.page.inner_text("body"))

    def ask(self, query: str, num_messages: int | None = None):
        """Ask; if the number of messages is given, wait for an answer that is the last of them."""
        self.box.fill(query)
        self.box.press("Enter")
        if num_messages:
            self.wait_for(lambda: len(self.messages()) == num_messages and self.is_ready())

    def is_ready(self) -> bool:
        return not self.stop_button.count() and "…" not in self.messages()[-1]

    def see_text_grow(self):
        lengths = set()
        self.stop_button.wait_for()
        self.wait_for(lambda: lengths.add(len(self.messages()[-1])) or len(lengths) > 4)


@pytest.mark.slow
def test_stop_keeps_what_was_answered(tab):
    tab.ask("你好", 2)
    tab.ask("讲个故事")
    tab.see_text_grow()
    assert tab.page.get_by_role("slider").first.is_disabled()
    tab.stop_button.click()
    tab.stop_button.wait_for(state="detached", timeout=2000)
    tab.wait_for(lambda: "已停止" in tab.page.inner_text("body"))
    story = tab.messages()[-1]
    assert 3 < len(story) < 60
    assert tab.page.get_by_role("slider").first.is_enabled()
    tab.ask("谢谢", 6)
    assert tab.messages()[3] == story and "已停止" not in tab.page.inner_text("body")
    tab.page.get_by_role("button", name="Clear history").click()
    tab.wait_for(lambda: tab.messages() == [])


@pytest.mark.slow
def test_a_question_during_an_answer_ends_it(tab):
    tab.ask("讲个故事")
    tab.see_text_grow()
    tab.ask("你好", 4)
    assert 3 < len(tab.messages()[1]) < 60 and tab.messages()[2].endswith("你好")


def test_markup_of_user_and_model(tab):
    tab.ask("echo " + MARKUP, 2)
    tab.page.wait_for_timeout(300)
    assert tab.page.evaluate("window.hacked") is None
    tab.page.locator("pre code span").nth(1).wait_for()  # highlighted later than drawn
    for message in tab.page.get_by_test_id("stChatMessage").all():
        check_markup(message)


@pytest.mark.slow
def test_two_tabs(browser, server, tab):
    tab.ask("讲个故事")
    tab.see_text_grow()
    with opened_tab(browser, server) as page:
        other = Tab(page)
        other.ask("你好")
        other.wait_for(lambda: "前面还有 1 个问题" in page.inner_text("body"))
        tab.stop_button.click()
        other.wait_for(lambda: "ChatGLM2-tiny" in other.messages()[-1])
        assert other.messages()[0].endswith("你好") and tab.messages()[0].endswith("讲个故事")


@pytest.mark.slow
def test_a_closed_tab_ends_its_answer_and_frees_its_cache(browser, server, tab):
    with opened_tab(browser, server) as page:
        other = Tab(page)
        other.ask("讲个故事")
        other.see_text_grow()
    start = time.monotonic()
    tab.ask("caches", 2)
    assert time.monotonic() - start < 100 * PAUSE_S  # the story has more than a hundred tokens
    deadline = time.monotonic() + 15  # Streamlit keeps the session itself for minutes
    while tab.messages()[-1].split()[-1] != "0":
        assert time.monotonic() < deadline
        tab.ask("caches", len(tab.messages()) + 2)


@pytest.mark.slow
def test_dark_and_phone_and_no_other_address(server, tab):
    tab.page.emulate_media(color_scheme="dark")
    tab.page.set_viewport_size({"width": 360, "height": 640})
    tab.page.reload()
    tab.page.get_by_role("button", name="晚上睡不着应该怎么办").click()
    tab.wait_for(lambda: len(tab.messages()) == 2 and tab.is_ready())
    assert tab.page.get_by_test_id("stChatMessage").locator("li").count() == 4
    app = tab.page.get_by_test_id("stApp")
    assert app.evaluate("app => getComputedStyle(app).backgroundColor") != "rgb(255, 255, 255)"
    assert tab.page.evaluate("document.documentElement.scrollWidth") <= 360
    assert tab.box.bounding_box()["y"] < 640
    check_addresses(server)
