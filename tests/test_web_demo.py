"""`web_demo.py` in headless Chromium, with the bundled checkpoint made slow where it matters."""

import json
import os
import socket
from types import SimpleNamespace

import pages
import pytest
from conftest import ROOT
from page_models import ScriptedBatcher
from pages import (
    MARKUP,
    REST,
    check_accessibility,
    check_addresses,
    check_markup,
    opened_tab,
    served_page,
)

import web_demo
from chatglm2.chat import shared_model

pytestmark = pytest.mark.alone


@pytest.fixture(scope="module")
def page_server(tiny_model, tiny_tokenizer):
    """The page's address, the page and its batcher."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(shared_model, "Batcher", ScriptedBatcher)
        page = web_demo.Page(tiny_model, tiny_tokenizer, "resources/chatglm2-tiny")
    _, address, _ = page.demo.launch(prevent_thread_lock=True, quiet=True, **web_demo.LOOK)
    yield SimpleNamespace(address=address, page=page, batcher=page.shared.batcher)
    page.demo.close()
    page.shared.batcher.end()


class Tab(pages.Tab):
    MESSAGES, STOP = ".question, .message-content", ".stop-button"
    BOX = "textarea[placeholder^=输入问题]"

    def ask(self, query: str) -> str:
        """Ask and return the answer."""
        count = self.count_answers()
        self.send(query)
        return self.wait_for_answer(count + 1)

    def count_answers(self) -> int:
        return self.page.locator("[data-copy='1']").count()

    def wait_for_answer(self, number: int) -> str:
        """Wait for the end of the answer with this number, and return it."""
        self.wait_for(lambda: self.count_answers() == number)
        self.stop_button.wait_for(state="detached")
        self.page.wait_for_timeout(150)
        return self.messages()[-1]

    def click(self, name: str):
        self.page.get_by_role("button", name=name, exact=True).last.click()

    def upload(self, content: str):
        self.page.get_by_text("导入导出").click()
        file = {"name": "chat.json", "mimeType": "application/json", "buffer": content.encode()}
        self.page.locator(".import input").set_input_files(file)

    def download(self, name: str) -> str:
        if not self.page.get_by_role("button", name=name).is_visible():
            self.page.get_by_text("导入导出").click()
        with self.page.expect_download() as download:
            self.click(name)
        return download.value.path().read_text("utf-8")

    def titles(self) -> list[str]:
        return self.page.locator("#conversations li").all_inner_texts()


@pytest.fixture
def tab(browser, page_server):
    with opened_tab(browser, page_server) as page:
        page.evaluate("localStorage.clear(), dispatchEvent(new Event('storage'))")
        yield Tab(page, page_server)


@pytest.fixture
def other(browser, page_server):
    with opened_tab(browser, page_server) as page:
        yield Tab(page, page_server)


def last_request() -> dict:
    return ScriptedBatcher.requests[-1]


# A conversation.


def test_an_empty_question_changes_nothing(tab):
    tab.ask("你好")
    tab.send("  ")
    tab.page.wait_for_timeout(500)
    assert len(tab.messages()) == 2 and tab.titles() == ["你好"]


def test_loading_the_page_does_not_end_an_answer(page_server):
    page, request = page_server.page, SimpleNamespace(session_hash="early")
    page.chats["early"] = chat = shared_model.Chat()
    assert page.show_first({}, request) == page.nothing and not chat.is_stopped
    del page.chats["early"]


def test_an_example_is_answered(tab):
    assert "chatglm2-tiny, cpu, float32" in tab.text() and tab.page.title() == "chatglm2-tiny"
    tab.page.get_by_text("你好", exact=True).click()
    assert "ChatGLM2-tiny" in tab.wait_for_answer(1)
    assert len(tab.messages()) == 2 and " tokens · " in tab.text()


@pytest.mark.slow
@pytest.mark.parametrize("by_key", [False, True])
def test_stop_and_clear_during_an_answer(tab, by_key):
    tab.start_story()
    tab.send("下一个问题")
    tab.box.press("Escape") if by_key else tab.stop_button.click()
    tab.stop_button.wait_for(state="detached")
    tab.wait_for(lambda: "已停止" in tab.text())
    assert tab.box.input_value() == "下一个问题"  # not sent, and not lost
    [query, answer] = tab.messages()
    assert query == "讲个故事" and 3 < len(answer) < 60
    tab.wait_for(lambda: not tab.server.batcher.running)
    assert tab.ask("你好") and "已停止" not in tab.text()
    assert f"问：讲个故事\n\n答：{answer}" in last_request()["prompt"]
    tab.start_story()
    tab.page.locator(".icon-button:has(svg)").first.click()  # its name is in the browser's language
    tab.stop_button.wait_for(state="detached")
    tab.wait_for(lambda: tab.messages() == [])
    assert tab.titles() == []
    assert "ChatGLM2-tiny" in tab.ask("你好") and len(tab.messages()) == 2


@pytest.mark.slow
def test_retry_undo_and_edit(tab):
    tab.ask("你好")
    first = tab.ask("讲个笑话")
    tab.box.fill("a draft")
    count = len(ScriptedBatcher.requests)
    tab.click("Retry")
    tab.wait_for(lambda: len(ScriptedBatcher.requests) == count + 1)
    tab.wait_for(lambda: tab.messages()[3:] == [first])
    assert last_request()["query"] == "讲个笑话" and last_request()["prompt"].count("答：") == 2
    assert tab.box.input_value() == "a draft"
    tab.box.fill("")
    tab.click("Undo")
    tab.wait_for(lambda: len(tab.messages()) == 2)
    assert tab.box.input_value() == "讲个笑话"
    tab.ask("谢谢")
    tab.page.locator("[data-edit]").first.click()
    tab.wait_for(lambda: tab.box.input_value() == "你好")
    assert "正在修改第 1 个问题" in tab.text() and len(tab.messages()) == 4
    tab.box.press("Escape")
    tab.wait_for(lambda: tab.box.input_value() == "" and "正在修改" not in tab.text())
    tab.page.locator("[data-edit]").first.click()
    tab.wait_for(lambda: tab.box.input_value() == "你好")
    tab.send("讲个笑话")
    tab.wait_for(lambda: tab.messages() == ["讲个笑话", first])
    assert last_request()["prompt"].count("答：") == 1


@pytest.mark.slow
def test_a_question_that_is_not_answered_is_given_back(tab):
    tab.ask("你好")
    for query, notice in (("fail", "no memory <b>left</b>"), ("很长" * 3000, "at most")):
        tab.send(query)
        tab.wait_for(lambda notice=notice: notice in tab.text())
        tab.wait_for(lambda query=query: tab.box.input_value() == query)
        tab.wait_for(lambda: len(tab.messages()) == 2)
    tab.ask("谢谢")
    assert "at most" not in tab.text() and len(tab.messages()) == 4


@pytest.mark.slow
def test_two_tabs_are_answered_at_the_same_time(tab, other):
    tab.start_story()
    assert "ChatGLM2-tiny" in other.ask("你好")
    assert tab.stop_button.count() and other.messages()[0] == "你好"
    running = [generation.request for generation in tab.server.batcher.running]
    assert len(running) == 1
    tab.page.close()
    other.wait_for(lambda: not tab.server.batcher.running)  # a closed tab ends its answer


@pytest.mark.slow
def test_settings(tab):
    """The sliders' values and the system text reach the model."""
    tab.page.get_by_text("参数设置").click()
    for label, value in (("最大长度", "100"), ("Top P", "0.5"), ("温度", "0")):
        slider = tab.page.get_by_label(f"number input for {label}")
        slider.fill(value)
        slider.press("Tab")
    tab.page.get_by_label("系统提示").fill("Be brief.")
    for _ in range(4):
        tab.ask("你好")
    request = last_request()
    assert (request["max_length"], request["top_p"], request["temperature"]) == (100, 0.5, 0)
    assert request["prompt"].startswith("[Round 1]\n\n问：Be brief.\n\n你好")
    assert "已忘记最早的" in tab.text() and len(tab.messages()) == 8


# What is kept in the browser.


@pytest.mark.slow
def test_a_reload_keeps_the_conversations(tab, other):
    tab.ask("你好")
    tab.page.reload()
    tab.wait_for(lambda: len(tab.messages()) == 2)
    tab.ask("讲个笑话")
    assert last_request()["prompt"].count("答：") == 2
    tab.click("新对话 New chat")
    tab.wait_for(lambda: tab.messages() == [])
    tab.ask("谢谢")
    tab.wait_for(lambda: tab.titles() == ["谢谢", "你好"])
    tab.page.get_by_role("button", name="你好").click()
    tab.wait_for(lambda: len(tab.messages()) == 4)
    tab.page.goto("about:blank")
    tab.page.go_back()
    tab.wait_for(lambda: len(tab.messages()) == 4)
    other.wait_for(lambda: len(other.titles()) == 2)  # another tab sees the list
    assert other.messages() == []
    tab.start_story()
    tab.page.get_by_role("button", name="谢谢").click()  # while an answer grows
    tab.stop_button.wait_for(state="detached")
    tab.wait_for(lambda: tab.messages()[0] == "谢谢" and len(tab.messages()) == 2)
    tab.wait_for(lambda: tab.server.batcher.running == [])
    tab.page.wait_for_timeout(300)
    assert len(tab.messages()) == 2


@pytest.mark.slow
def test_export_and_import(tab):
    tab.page.get_by_text("参数设置").click()
    tab.page.get_by_label("系统提示").fill("Be brief.")
    answer = tab.ask("你好")
    exported = tab.download("导出 JSON")
    assert [message["content"] for message in json.loads(exported)["messages"]] == [
        "Be brief.",
        "你好",
        answer,
    ]
    assert f"## user\n\n你好\n\n## assistant\n\n{answer}\n" in tab.download("导出 Markdown")
    tab.click("新对话 New chat")
    tab.wait_for(lambda: tab.messages() == [])
    tab.page.reload()
    tab.box.wait_for()
    tab.upload("no JSON")
    tab.page.get_by_text("not a conversation").wait_for()
    tab.upload(exported)
    tab.wait_for(lambda: tab.messages() == ["你好", answer])
    assert tab.titles() == ["你好", "你好"]
    tab.ask("谢谢")
    assert last_request()["prompt"].startswith("[Round 1]\n\n问：Be brief.\n\n你好\n\n答：你好")


# How texts are shown.


@pytest.mark.slow
def test_markup_of_the_model_and_copies(browser, tab):
    """Nothing becomes HTML; formulas and code are drawn; a copy is the model's own text."""
    browser.grant_permissions(["clipboard-read", "clipboard-write"])
    tab.ask("echo " + MARKUP)
    message = tab.page.locator("[data-testid=bot]").first
    check_markup(message)
    assert message.get_by_title("copy").count() == 4
    size = "code => parseFloat(getComputedStyle(code).fontSize)"
    assert message.locator("pre code").first.evaluate(size) >= 15  # the text has 16
    for number, text in (("0", "echo " + MARKUP), ("1", MARKUP)):
        tab.page.locator(f"[data-copy='{number}']").click()
        tab.page.locator(".done").wait_for()
        assert tab.page.evaluate("navigator.clipboard.readText()") == text
        tab.page.locator(".done").wait_for(state="detached")


@pytest.mark.slow
def test_questions_are_shown_as_typed(tab):
    text = "# a\n    _b_  **c** <b>d</b> $x$\n\n\n- e &lt; \\("
    tab.ask(text)
    assert tab.page.locator(".question").inner_text() == text
    assert tab.page.locator(".question *").count() == 0


@pytest.mark.slow
def test_following_ends_when_the_reader_scrolls(tab):
    tab.ask("echo " + "\n\n".join(map(str, range(40))))
    tab.start_story()
    log = tab.page.get_by_role("log")
    assert log.evaluate(REST) < 4
    tab.check_following(log, wheel=60, least=40)


@pytest.mark.slow
def test_a_file_that_is_dropped(tab):
    """Its text is appended to the question, in the usual encodings."""
    tab.box.fill("Summarize:")
    for content, name in (("中文".encode("gb18030"), "a.txt"), (b"b & c", "b.md")):
        data = tab.page.evaluate_handle(
            """([bytes, name]) => {
                const data = new DataTransfer();
                data.items.add(new File([new Uint8Array(bytes)], name));
                return data;
            }""",
            [list(content), name],
        )
        tab.box.dispatch_event("drop", {"dataTransfer": data})
        tab.page.wait_for_timeout(200)
    tab.wait_for(lambda: tab.box.input_value() == "Summarize:\n\n中文\n\nb & c")
    tab.box.press("Enter")
    tab.wait_for_answer(1)
    assert last_request()["query"] == "Summarize:\n\n中文\n\nb & c"


@pytest.mark.slow
def test_light_dark_and_phone(tab):
    color = "getComputedStyle(document.body).backgroundColor"
    assert tab.page.evaluate(color) == "rgb(255, 255, 255)"
    tab.show_on_dark_phone()
    assert tab.page.evaluate(color) != "rgb(255, 255, 255)"
    tab.ask("晚上睡不着应该怎么办")
    tab.check_phone()
    tab.ask("echo $$" + "+".join(["abcdefgh"] * 20) + "$$")
    formula = tab.page.locator("[data-testid=bot] .katex-display")
    assert formula.evaluate("x => getComputedStyle(x).overflowX") == "auto"
    tab.box.fill("line\n" * 100)
    assert tab.box.bounding_box()["height"] < 320


@pytest.mark.slow
@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_accessibility(tab, scheme):
    tab.page.emulate_media(color_scheme=scheme)
    tab.page.reload()
    tab.box.wait_for()
    tab.page.wait_for_timeout(1000)
    check_accessibility(tab.page)
    tab.ask("echo " + MARKUP)
    tab.ask("你好")
    for name in ("导入导出", "参数设置"):
        tab.page.get_by_text(name).click()
    tab.page.wait_for_timeout(1000)
    check_accessibility(tab.page)


@pytest.mark.slow
def test_keyboard_only(tab):
    """Every button can be reached with Tab; those of a message work."""
    tab.ask("你好")
    reached = set()
    tab.box.focus()
    for _ in range(40):
        tab.page.keyboard.press("Tab")
        reached.add(
            tab.page.evaluate(
                "[document.activeElement.ariaLabel, document.activeElement.innerText].join(' ')"
            ).strip()
        )
    for name in ("复制 Copy", "修改 Edit", "新对话 New chat", "你好", "Retry", "Undo", "Clear"):
        assert name in reached, (name, reached)
    tab.page.locator("[data-edit]").focus()
    tab.page.keyboard.press("Enter")
    tab.wait_for(lambda: tab.box.input_value() == "你好")


@pytest.mark.slow
def test_login(browser, tiny_model, tiny_tokenizer):
    page = web_demo.Page(tiny_model, tiny_tokenizer, "resources/chatglm2-tiny")
    options = {"prevent_thread_lock": True, "quiet": True, "auth": [("ann", "secret")]}
    _, address, _ = page.demo.launch(**options, **web_demo.LOOK)
    with opened_tab(browser, SimpleNamespace(address=address)) as tab:
        for password, selector in (("wrong", "text=Incorrect"), ("secret", Tab.BOX)):
            tab.locator("input").first.fill("ann")
            tab.locator("input[type=password]").fill(password)
            tab.get_by_role("button").first.click()
            tab.locator(selector).first.wait_for()
    page.demo.close()
    page.shared.batcher.end()


# The script.


@pytest.mark.slow
def test_the_process_uses_this_machine_only(browser, tiny_checkpoint, tmp_path):
    arguments = ["--model", tiny_checkpoint, "--port", "{port}"]
    with (
        served_page([ROOT / "web_demo.py"], arguments, tmp_path) as server,
        opened_tab(browser, server) as page,
    ):
        page.get_by_text("你好", exact=True).click()
        page.get_by_text("我是 ChatGLM2-tiny").wait_for()
        check_addresses(server)


@pytest.mark.parametrize("port", ["0", "http"])
def test_value_out_of_range(port, capsys):
    with pytest.raises(SystemExit, match="2"):
        web_demo.main(["--port", port])
    assert f"--port: '{port}' is not" in capsys.readouterr().err.splitlines()[-1]


def test_an_unusable_address_is_found_before_the_model_is_loaded():
    with socket.create_server(("127.0.0.1", 0)) as taken:
        for flags in (
            ["--port", str(taken.getsockname()[1])],
            *(["--host", host] for host in ("192.0.2.1", "no such host", "a" * 70)),
        ):
            with pytest.raises(SystemExit, match="choose another --host or --port") as error:
                web_demo.main(["--model", "not looked for", *flags])
            assert " ".join(flags) in str(error.value) and "\n" not in str(error.value)


def test_the_own_server_is_not_reached_through_a_proxy(monkeypatch):
    monkeypatch.setenv("no_proxy", "example.org")
    monkeypatch.setenv("NO_PROXY", "")
    with pytest.raises(SystemExit, match="there is no such folder"):
        web_demo.main(["--model", "nowhere", "--host", "127.0.0.2"])
    assert os.environ["no_proxy"] == "example.org,127.0.0.1,localhost,127.0.0.2"
    assert os.environ["NO_PROXY"] == "127.0.0.1,localhost,127.0.0.2"
