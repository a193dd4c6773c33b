"""`web_demo2.py`: with Streamlit's AppTest, and in headless Chromium with a slow model."""

import json
import subprocess
import sys
import time

import httpx2
import pages
import pytest
from conftest import ROOT
from page_models import PAUSE_S, ScriptedBatcher
from pages import (
    MARKUP,
    REST,
    check_accessibility,
    check_addresses,
    check_markup,
    opened_tab,
    served_page,
)
from streamlit.testing.v1 import AppTest

pytestmark = pytest.mark.alone

SCRIPT = ROOT / "web_demo2.py"


# Without a browser.


@pytest.fixture
def app(tiny_checkpoint, monkeypatch):
    """The page after its first run."""
    monkeypatch.setattr(sys, "argv", ["web_demo2.py", "--model", str(tiny_checkpoint)])
    monkeypatch.setattr("chatglm2.chat.shared_model.Batcher", ScriptedBatcher)
    return finish(AppTest.from_file(str(SCRIPT), default_timeout=30))


def finish(app):
    """Run the script, and again until the answer is complete."""
    app.run()
    while app.session_state.tab.is_answering:
        time.sleep(0.05)
        app.run()
    assert not app.exception
    return app.run()


def ask(app, query: str) -> list[str]:
    app.chat_input[0].set_value(query)
    finish(app)
    return messages(app)


def click(app, label: str):
    [button] = [button for button in app.button if label in button.label]
    button.click()
    finish(app)


def messages(app) -> list[str]:
    """Return all questions and answers."""
    return [(message.text or message.markdown)[0].value for message in app.chat_message]


def notices(app) -> list[str]:
    return [element.value for element in app.info]


def test_rounds_and_clear(app):
    assert app.main.text[0].value == "chatglm2-tiny, cpu, float32"
    assert "Hello!" in app.markdown[0].value
    [query, answer] = ask(app, "你好")
    assert query == "你好" and "ChatGLM2-tiny" in answer
    assert " tokens · " in app.chat_message[1].markdown[1].value
    assert len(ask(app, "讲个笑话")) == 4
    assert answer in ScriptedBatcher.requests[-1]["prompt"]
    click(app, "Clear history")
    assert messages(app) == [] and app.session_state.tab.chat.rounds == []


def test_an_example(app):
    click(app, "晚上睡不着")
    assert "手机" in messages(app)[1]


def test_settings(app):
    max_length, top_p, temperature = app.sidebar.slider
    assert (max_length.value, top_p.value, temperature.value) == (2048, 0.8, 0.8)
    max_length.set_value(100)
    top_p.set_value(0.5)
    temperature.set_value(0.0)
    app.sidebar.text_area[0].set_value("Be brief.").run()
    for _ in range(4):
        ask(app, "你好")
    request = ScriptedBatcher.requests[-1]
    assert (request["max_length"], request["top_p"], request["temperature"]) == (100, 0.5, 0)
    assert request["prompt"].startswith("[Round 1]\n\n问：Be brief.\n\n你好")
    dropped = app.session_state.tab.chat.first_round
    assert 0 < dropped < 4 and any(f"最早的 {dropped} 轮" in text for text in notices(app))
    assert len(messages(app)) == 8


def test_retry_undo_and_edit(app):
    ask(app, "你好")
    first = ask(app, "讲个笑话")
    click(app, "Retry")
    assert messages(app) == first
    assert ScriptedBatcher.requests[-1]["prompt"].count("答：") == 2
    click(app, "Undo")
    assert messages(app) == first[:2]
    ask(app, "谢谢")
    app.button("edit 0").click().run()
    assert "editing question 1" in notices(app)[0]
    click(app, "Cancel")
    assert notices(app) == [] and len(messages(app)) == 4
    app.button("edit 0").click().run()
    assert ask(app, "讲个笑话") == first[2:]


def test_a_failure_is_shown_and_the_question_given_back(app):
    ask(app, "你好")
    for query, notice in (("fail", "no memory <b>left</b>"), ("很长" * 3000, "at most")):
        assert len(ask(app, query)) == 2
        assert notice in notices(app)[0]
    assert len(ask(app, "谢谢")) == 4 and notices(app) == []


def test_the_model_is_loaded_once(app, monkeypatch):
    monkeypatch.setattr("utils.load_model", None)
    other = finish(AppTest.from_file(str(SCRIPT), default_timeout=30))
    assert ask(other, "你好")[0] == "你好" and messages(app.run()) == []


@pytest.mark.slow
@pytest.mark.parametrize(
    ("program", "code", "message"),
    [
        ([SCRIPT], 1, "streamlit run web_demo2.py -- --model"),
        (["-m", "streamlit", "run", SCRIPT, "--", "--model", "nowhere"], 1, "no such folder"),
        (["-m", "streamlit", "run", SCRIPT, "--", "--modle", "x"], 2, "--modle x"),
        (["-m", "streamlit", "run", SCRIPT, "--", "--auth", "ann"], 2, "must be USER:PASSWORD"),
    ],
)
def test_a_wrong_start_is_told_in_the_terminal(program, code, message, tmp_path):
    result = subprocess.run(
        [sys.executable, *program], cwd=tmp_path, capture_output=True, text=True
    )
    assert result.returncode == code
    assert message in result.stderr and "Traceback" not in result.stderr


# In a browser.


def serve(folder, *flags):
    """Start the page in a folder that has no settings for Streamlit."""
    return served_page(
        ["streamlit", "run", SCRIPT, "--server.port", "{port}", "--server.headless", "true"],
        ["--", *flags],
        folder,
    )


@pytest.fixture(scope="module")
def server(tiny_checkpoint, tmp_path_factory):
    with serve(tmp_path_factory.mktemp("elsewhere"), "--model", tiny_checkpoint) as server:
        yield server


class Tab(pages.Tab):
    MESSAGES, STOP = "[data-testid=stChatMessage]", "button:has-text('停止 Stop')"
    BOX = "textarea[placeholder^=输入问题]"

    def ask(self, query: str, num_messages: int):
        """Ask, and wait for an answer that is the last of this number of messages."""
        self.send(query)
        self.wait_for(lambda: len(self.messages()) == num_messages and self.is_ready())

    def is_ready(self) -> bool:
        return bool(self.button("撤销 Undo").count()) and not self.stop_button.count()

    def answers(self) -> list[str]:
        messages = self.page.locator(self.MESSAGES).all()[1::2]
        return [message.get_by_test_id("stMarkdown").first.inner_text() for message in messages]

    def button(self, name: str):
        return self.page.get_by_role("button", name=name)

    def upload(self, name: str, content: bytes, selector: str):
        chosen = self.page.locator(selector).locator("input[type=file]")
        chosen.set_input_files({"name": name, "mimeType": "text/plain", "buffer": content})

    def titles(self) -> list[str]:
        return self.page.locator("nav li").all_inner_texts()


@pytest.fixture
def tab(browser, server):
    with opened_tab(browser, server) as page:
        page.evaluate("localStorage.clear()")
        yield Tab(page, server)


@pytest.fixture
def other(browser, server):
    with opened_tab(browser, server) as page:
        yield Tab(page, server)


@pytest.mark.slow
def test_an_answer_is_stopped(tab):
    """By the button, the key, or another question."""
    tab.ask("你好", 2)
    for stop in (tab.stop_button.click, lambda: tab.page.keyboard.press("Escape")):
        tab.start_story()
        assert not tab.button("撤销 Undo").count()  # nothing of the page before
        stop()
        tab.stop_button.wait_for(state="detached", timeout=5000)
        tab.wait_for(lambda: "已停止" in tab.text())
        assert 3 < len(tab.messages()[-1]) < 150
    story = tab.answers()[-1]
    tab.start_story()
    tab.ask("谢谢", 10)
    assert tab.answers()[2] == story
    assert "已停止" not in tab.text() and "谢谢" in tab.messages()[8]
    tab.button("Clear history").click()
    tab.wait_for(lambda: tab.messages() == [] and tab.titles() == [])


@pytest.mark.slow
def test_markup_of_the_model_and_copies(browser, tab):
    """Nothing becomes HTML; the question is shown as typed; a copy is the text itself."""
    browser.grant_permissions(["clipboard-read", "clipboard-write"])
    tab.ask("echo " + MARKUP, 2)
    question, answer = tab.page.get_by_test_id("stChatMessage").all()
    check_markup(answer)
    assert question.get_by_test_id("stText").inner_text() == "echo " + MARKUP
    for message, text in ((question, "echo " + MARKUP), (answer, MARKUP)):
        message.get_by_role("button", name="复制 Copy").click()
        message.locator(".done").wait_for()
        assert tab.page.evaluate("navigator.clipboard.readText()") == text


@pytest.mark.slow
def test_questions_that_come_back_into_the_box(tab):
    tab.ask("你好", 2)
    tab.send("fail")
    tab.page.get_by_text("no memory").wait_for()
    tab.wait_for(lambda: tab.box.input_value() == "fail")
    tab.button("修改 Edit").click()
    tab.wait_for(lambda: tab.box.input_value() == "你好")
    tab.box.press("Escape")
    tab.wait_for(lambda: tab.box.input_value() == "")
    tab.button("撤销 Undo").click()
    tab.wait_for(lambda: tab.box.input_value() == "你好" and tab.messages() == [])
    kept = json.dumps({"id": "x", "rounds": [], "query": "lost", "time": 1})
    tab.page.evaluate("kept => localStorage.setItem('chatglm2:x', kept)", kept)
    tab.page.reload()
    tab.button("lost").click()
    tab.wait_for(lambda: tab.box.input_value() == "lost")


@pytest.mark.slow
def test_two_tabs(tab, other):
    """They are answered at the same time."""
    tab.start_story()
    other.ask("你好", 2)
    assert "ChatGLM2-tiny" in other.messages()[-1] and tab.stop_button.count()
    tab.stop_button.click()
    assert "你好" in other.messages()[0] and "讲个故事" in tab.messages()[0]


@pytest.mark.slow
def test_a_closed_tab_ends_its_answer(tab, other):
    other.start_story()
    tab.ask("running", 2)
    assert tab.answers()[-1] == "1"
    other.page.close()
    start = time.monotonic()
    while tab.answers()[-1] != "0":
        tab.ask("running", len(tab.messages()) + 2)
    assert time.monotonic() - start < 100 * PAUSE_S  # the story has more than a hundred tokens


@pytest.mark.slow
def test_a_reload_keeps_the_conversations(tab, other):
    tab.ask("你好", 2)
    tab.page.reload()
    tab.wait_for(lambda: len(tab.messages()) == 2)
    tab.ask("讲个笑话", 4)
    tab.button("新对话 New chat").click()
    tab.wait_for(lambda: tab.messages() == [])
    tab.ask("谢谢", 2)
    tab.wait_for(lambda: tab.titles() == ["谢谢", "你好"])
    tab.button("你好").click()
    tab.wait_for(lambda: len(tab.messages()) == 4)
    tab.page.goto("about:blank")
    tab.page.go_back()
    tab.wait_for(lambda: len(tab.messages()) == 4)
    other.wait_for(lambda: len(other.titles()) == 2)  # another tab sees the list
    assert other.messages() == []
    tab.start_story()
    tab.page.reload()  # while an answer grows
    tab.wait_for(lambda: len(tab.messages()) == 6)
    tab.start_story()
    tab.button("谢谢").click()
    tab.wait_for(lambda: len(tab.messages()) == 2 and "谢谢" in tab.messages()[0])
    tab.button("你好").click()
    tab.wait_for(lambda: len(tab.messages()) == 8)


@pytest.mark.slow
def test_export_and_import(tab):
    tab.ask("你好", 2)
    tab.page.get_by_text("导入导出").click()
    exported = []
    for name in ("导出 JSON", "导出 Markdown"):
        with tab.page.expect_download() as download:
            tab.button(name).click()
        exported.append(download.value.path().read_text("utf-8"))
    [question, answer] = json.loads(exported[0])["messages"]
    assert question == {"role": "user", "content": "你好"}
    assert exported[1].endswith(f"## assistant\n\n{answer['content']}\n")
    tab.button("新对话 New chat").click()
    tab.wait_for(lambda: tab.messages() == [])
    uploader = "[data-testid=stFileUploader]"
    tab.upload("chat.json", b"no JSON", uploader)
    tab.page.get_by_text("not a conversation").wait_for()
    tab.upload("chat.json", exported[0].encode(), uploader)
    tab.wait_for(lambda: len(tab.messages()) == 2 and answer["content"] in tab.messages()[1])
    tab.wait_for(lambda: tab.titles() == ["你好", "你好"])


@pytest.mark.slow
def test_files_in_a_question(tab):
    box = "[data-testid=stChatInput]"
    tab.upload("a.txt", "中文 <b>".encode("gb18030"), box)
    tab.page.get_by_text("a.txt").wait_for()
    tab.send("echo")
    tab.wait_for(lambda: "echo\n\n中文 <b>" in tab.text())
    tab.upload("a.bin", b"\0\xff", box)
    tab.page.get_by_text("a.bin").wait_for()
    tab.send("Summarize")
    tab.page.get_by_text("a.bin: 不是文本文件").wait_for()
    tab.wait_for(lambda: tab.box.input_value() == "Summarize")


@pytest.mark.slow
def test_following_ends_when_the_reader_scrolls(tab):
    tab.ask("echo " + "\n\n".join(map(str, range(40))), 2)
    tab.start_story()
    main = tab.page.get_by_test_id("stMain")
    tab.wait_for(lambda: main.evaluate(REST) < 4)
    tab.check_following(main, wheel=300, least=100)


@pytest.mark.slow
def test_dark_and_phone_and_no_other_address(server, tab):
    tab.show_on_dark_phone()
    tab.button("晚上睡不着应该怎么办").click()
    tab.wait_for(lambda: len(tab.messages()) == 2 and tab.is_ready())
    tab.check_phone()
    color = "app => getComputedStyle(app).backgroundColor"
    assert tab.page.get_by_test_id("stApp").evaluate(color) != "rgb(255, 255, 255)"
    check_addresses(server)


@pytest.mark.slow
@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_accessibility(tab, scheme):
    tab.page.emulate_media(color_scheme=scheme)
    tab.page.reload()
    tab.button("Tell me a joke").wait_for()
    tab.page.wait_for_timeout(500)
    check_accessibility(tab.page)
    tab.ask("echo " + MARKUP, 2)
    for name in ("导入导出", "参数设置"):
        tab.page.get_by_text(name).click()
    tab.page.wait_for_timeout(1000)
    check_accessibility(tab.page, "presentation-role-conflict")  # minor, of Streamlit's uploader


@pytest.mark.slow
def test_login(browser, tiny_checkpoint, tmp_path):
    flags = ("--model", tiny_checkpoint, "--auth", "ann:sécret")
    with serve(tmp_path, *flags) as server:
        wrong = httpx2.get(server.address, auth=("ann", "wrong"))
        assert wrong.status_code == 401 and "Basic" in wrong.headers["WWW-Authenticate"]
        credentials = {"username": "ann", "password": "sécret"}
        context = browser.browser.new_context(http_credentials=credentials)
        page = context.new_page()
        page.goto(server.address)
        Tab(page, server).ask("你好", 2)
        context.close()
