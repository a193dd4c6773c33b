"""`web_demo2.py`: with Streamlit's AppTest, and in headless Chromium with a slow model."""

import subprocess
import sys
import time

import pages
import pytest
import streamlit
from conftest import ROOT
from page_models import PAUSE_S, ScriptedBatcher
from pages import MARKUP, check_addresses, check_markup, opened_tab, served_page
from streamlit.testing.v1 import AppTest

SCRIPT = ROOT / "web_demo2.py"


# Without a browser.


@pytest.fixture
def app(tiny_checkpoint, monkeypatch):
    """The page after its first run."""
    monkeypatch.setattr(sys, "argv", ["web_demo2.py", "--model", str(tiny_checkpoint)])
    monkeypatch.setattr("chatglm2.chat.shared_model.Batcher", ScriptedBatcher)
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
    assert "cpu, float32" in notices(app)[-1]
    assert "Hello!" in app.markdown[0].value
    [query, answer] = ask(app, "你好")
    assert query == "你好" and "ChatGLM2-tiny" in answer
    assert len(ask(app, "讲个笑话")) == 4
    assert answer in ScriptedBatcher.requests[-1]["prompt"]
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
    call = ScriptedBatcher.requests[-1]
    assert (call["max_length"], call["top_p"], call["temperature"]) == (80, 0.5, 0)
    dropped = app.session_state.chat.first_round
    assert 0 < dropped < 4 and any(f"最早的 {dropped} 轮" in text for text in notices(app))
    assert len(messages(app)) == 8


def test_a_failure_is_shown_and_the_page_goes_on(app):
    ask(app, "你好")
    assert ask(app, "fail")[2:] == ["fail"]
    assert "no memory <b>left</b>" in notices(app)[0]
    app.main.button[0].click().run()
    assert [request["query"] for request in ScriptedBatcher.requests[-2:]] == ["fail"] * 2
    assert "no memory" in notices(app)[0] and messages(app)[2:] == ["fail"]
    ask(app, "很长" * 3000)
    assert "at most" in notices(app)[0]
    assert len(ask(app, "谢谢")) == 4
    assert len(notices(app)) == 1 and not app.main.button


def test_a_question_whose_run_ends_early_is_kept(app, monkeypatch):
    with monkeypatch.context() as patch:
        answer = "chatglm2.chat.shared_model.SharedModel.answer"
        patch.setattr(answer, lambda *args, **settings: streamlit.stop())
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


class Tab(pages.Tab):
    MESSAGES, STOP = "[data-testid=stChatMessage]", "button:has-text('停止 Stop')"

    def ask(self, query: str, num_messages: int):
        """Ask, and wait for an answer that is the last of this number of messages."""
        self.send(query)
        self.wait_for(lambda: len(self.messages()) == num_messages and self.is_ready())

    def is_ready(self) -> bool:
        return not self.stop_button.count() and "…" not in self.messages()[-1]


@pytest.fixture
def tab(browser, server):
    with opened_tab(browser, server) as page:
        yield Tab(page, server)


other = tab  # another one


@pytest.mark.slow
def test_an_answer_is_stopped(tab):
    """By the button, or by another question."""
    tab.ask("你好", 2)
    tab.start_story()
    assert tab.page.get_by_role("slider").first.is_disabled()
    tab.stop_button.click()
    tab.stop_button.wait_for(state="detached", timeout=2000)
    tab.wait_for(lambda: "已停止" in tab.text())
    story = tab.messages()[-1]
    assert 3 < len(story) < 60
    assert tab.page.get_by_role("slider").first.is_enabled()
    tab.start_story()
    tab.ask("谢谢", 8)
    assert tab.messages()[3] == story and "已停止" not in tab.text()
    assert 3 < len(tab.messages()[5]) < 60 and tab.messages()[6].endswith("谢谢")
    tab.page.get_by_role("button", name="Clear history").click()
    tab.wait_for(lambda: tab.messages() == [])


def test_markup_of_user_and_model(tab):
    tab.ask("echo " + MARKUP, 2)
    for message in tab.page.get_by_test_id("stChatMessage").all():
        check_markup(message)


@pytest.mark.slow
def test_two_tabs(tab, other):
    """They are answered at the same time."""
    tab.start_story()
    other.ask("你好", 2)
    assert "ChatGLM2-tiny" in other.messages()[-1] and tab.stop_button.count()
    tab.stop_button.click()
    assert other.messages()[0].endswith("你好") and tab.messages()[0].endswith("讲个故事")


@pytest.mark.slow
def test_a_closed_tab_ends_its_answer(tab, other):
    other.start_story()
    tab.ask("running", 2)
    assert tab.messages()[-1].split()[-1] == "1"
    other.page.close()
    start = time.monotonic()
    while tab.messages()[-1].split()[-1] != "0":
        tab.ask("running", len(tab.messages()) + 2)
    assert time.monotonic() - start < 100 * PAUSE_S  # the story has more than a hundred tokens


@pytest.mark.slow
def test_dark_and_phone_and_no_other_address(server, tab):
    tab.show_on_dark_phone()
    tab.page.get_by_role("button", name="晚上睡不着应该怎么办").click()
    tab.wait_for(lambda: len(tab.messages()) == 2 and tab.is_ready())
    tab.check_phone()
    color = "app => getComputedStyle(app).backgroundColor"
    assert tab.page.get_by_test_id("stApp").evaluate(color) != "rgb(255, 255, 255)"
    check_addresses(server)
