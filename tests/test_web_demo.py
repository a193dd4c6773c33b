"""`web_demo.py` in headless Chromium, with the bundled checkpoint made slow where it matters."""

import os
import socket
import threading
from types import SimpleNamespace

import pages
import pytest
from conftest import ROOT
from page_models import SlowModel
from pages import MARKUP, check_addresses, check_markup, opened_tab, served_page

import web_demo
from chatglm2.chat.shared_model import Chat


@pytest.fixture(scope="module")
def page_server(tiny_model, tiny_tokenizer):
    """The page's address, its handlers, its model and the questions that were dealt with."""
    model = SlowModel(tiny_model)
    handlers, finished = [], []

    class Handlers(web_demo.Handlers):
        def __init__(self, *args):
            super().__init__(*args)
            handlers.append(self)
            answer = self.shared.answer

            def note_the_end(chat, query, **settings):
                try:
                    yield from answer(chat, query, **settings)
                finally:
                    finished.append(query)

            self.shared.answer = note_the_end

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(web_demo, "Handlers", Handlers)
        demo = web_demo.build_demo(model, tiny_tokenizer, "chatglm2-tiny")
    _, address, _ = demo.launch(prevent_thread_lock=True, quiet=True, **web_demo.LOOK)
    yield SimpleNamespace(address=address, handlers=handlers[0], model=model, finished=finished)
    demo.close()


class Tab(pages.Tab):
    MESSAGES, STOP = "[data-testid=user], [data-testid=bot]", ".stop-button"

    def ask(self, query: str) -> str:
        """Ask and return the answer."""
        finished = self.server.finished.count(query)
        self.send(query)
        self.wait_for(lambda: self.server.finished.count(query) > finished)
        self.stop_button.wait_for(state="detached")
        self.page.wait_for_timeout(100)
        return self.messages()[-1] if self.messages() else ""

    def click(self, name: str):
        self.page.get_by_role("button", name=name, exact=True).click()


@pytest.fixture
def tab(browser, page_server):
    with opened_tab(browser, page_server) as page:
        yield Tab(page, page_server)


other = tab  # another one


def the_chat(tab) -> Chat:
    """Return the only chat, once those of closed tabs are gone."""
    tab.wait_for(lambda: len(tab.server.handlers.chats) == 1)
    return next(iter(tab.server.handlers.chats.values()))


def test_an_example_is_answered(tab):
    assert "chatglm2-tiny, cpu, float32" in tab.text()
    tab.page.get_by_text("你好", exact=True).click()
    tab.wait_for(lambda: "ChatGLM2-tiny" in "".join(tab.messages()[1:]))
    assert len(tab.messages()) == 2


@pytest.mark.slow
def test_stop_and_clear_during_an_answer(tab):
    tab.start_story()
    tab.send("下一个问题")
    tab.stop_button.click()
    tab.stop_button.wait_for(state="detached", timeout=1000)
    assert tab.box.input_value() == "下一个问题"  # not sent, and not lost
    chat = the_chat(tab)
    [(query, answer)] = chat.rounds
    assert query == "讲个故事" and 3 < len(answer) < 60
    assert chat.cache.history == chat.rounds and tab.server.handlers.shared.queue == []
    assert tab.messages() == [query, answer] and "已停止" in tab.text()
    assert "ChatGLM2-tiny" in tab.ask("你好")
    assert "已停止" not in tab.text()
    assert tab.server.model.calls[-1]["history"] == [(query, answer)]
    tab.start_story()
    tab.click("Clear")
    tab.stop_button.wait_for(state="detached")
    tab.wait_for(lambda: tab.messages() == [])
    assert chat.rounds == [] and tab.server.handlers.shared.queue == []
    assert "ChatGLM2-tiny" in tab.ask("你好")


@pytest.mark.slow
def test_retry_undo_and_clear(tab):
    tab.ask("你好")
    first = tab.ask("讲个笑话")
    tab.box.fill("a draft")
    tab.click("Retry")
    tab.wait_for(lambda: tab.server.finished[-3:] == ["你好", "讲个笑话", "讲个笑话"])
    tab.wait_for(lambda: len(tab.messages()) == 4 and tab.messages()[-1] == first)
    tab.stop_button.wait_for(state="detached")
    chat = the_chat(tab)
    assert tab.server.model.calls[-1]["history"] == chat.rounds[:1]
    assert tab.box.input_value() == "a draft"
    tab.box.fill("")
    tab.click("Undo")
    tab.wait_for(lambda: len(tab.messages()) == 2)
    assert tab.box.input_value() == "讲个笑话"
    assert [query for query, _ in chat.rounds] == ["你好"]
    tab.click("Undo")
    tab.wait_for(lambda: len(tab.messages()) == 0)
    assert tab.box.input_value() == "讲个笑话"  # not "你好": the box was not empty
    tab.click("清空对话 Clear history")
    tab.wait_for(lambda: chat.rounds == [] and chat.cache.get_seq_length() == 0)
    tab.box.press("Enter")  # the question that was taken back
    tab.wait_for(lambda: len(tab.messages()) == 2)


@pytest.mark.slow
def test_markup_of_user_and_model(tab):
    """Nothing becomes HTML; formulas and code are drawn, in the question and in the answer."""
    tab.ask("echo " + MARKUP)
    for role in ("user", "bot"):
        message = tab.page.locator(f"[data-testid={role}]")
        check_markup(message)
        assert message.get_by_title("copy").count() == 4
    assert the_chat(tab).rounds == [("echo " + MARKUP, MARKUP)]


@pytest.mark.slow
def test_two_tabs(tab, other):
    tab.start_story()
    other.send("你好")
    other.wait_for(lambda: "前面还有 1 个问题" in other.text())
    assert other.messages() == ["你好", "…"]
    other.stop_button.click()
    other.stop_button.wait_for(state="detached")
    other.wait_for(lambda: not other.messages() and other.box.input_value() == "你好")
    other.box.press("Enter")  # the question that was given back
    other.wait_for(lambda: "前面还有 1 个问题" in other.text())
    tab.stop_button.click()
    other.wait_for(lambda: "ChatGLM2-tiny" in other.messages()[-1])
    other.stop_button.wait_for(state="detached")
    assert "前面还有" not in other.text()
    assert tab.messages()[0] == "讲个故事" and len(tab.messages()) == 2
    other.ask("谢谢")
    assert [len(call["history"]) for call in tab.server.model.calls[-2:]] == [0, 1]


@pytest.mark.slow
@pytest.mark.parametrize("is_waiting", [False, True])
def test_a_closed_tab_ends_its_answer_and_frees_its_cache(tab, other, is_waiting):
    if is_waiting:
        tab.start_story()
    before = set(tab.server.handlers.chats.values())
    if is_waiting:
        other.send("讲个故事")
        other.wait_for(lambda: len(other.messages()) == 2)
    else:
        other.start_story()
    (chat,) = set(tab.server.handlers.chats.values()) - before
    other.page.close()
    tab.wait_for(lambda: not chat.is_busy)
    tab.wait_for(lambda: chat not in tab.server.handlers.chats.values())
    tab.wait_for(lambda: chat.cache.get_seq_length() == 0)
    assert len(tab.server.handlers.shared.queue) == is_waiting


@pytest.mark.slow
def test_a_failure_is_shown_and_the_page_goes_on(tab):
    tab.ask("你好")
    tab.ask("fail")
    assert "no memory <b>left</b>" in tab.text()
    assert len(tab.messages()) == 2 and tab.box.input_value() == "fail"
    tab.ask("很长" * 3000)
    assert "at most" in tab.text()
    tab.ask("谢谢")
    assert "no memory" not in tab.text() and len(tab.messages()) == 4


@pytest.mark.slow
def test_settings(tab):
    """The sliders' values reach the model."""
    tab.page.get_by_text("参数设置").click()
    for label, value in (("最大长度", "80"), ("Top P", "0.5"), ("温度", "0")):
        slider = tab.page.get_by_label(f"number input for {label}")
        slider.fill(value)
        slider.press("Tab")
    for _ in range(4):
        tab.ask("你好")
    call = tab.server.model.calls[-1]
    assert (call["max_length"], call["top_p"], call["temperature"]) == (80, 0.5, 0)
    dropped = the_chat(tab).first_round
    assert 0 < dropped < 4 and f"已忘记最早的 {dropped} 轮" in tab.text()
    assert len(tab.messages()) == 8


def test_waiting_is_drawn_only_when_it_changes(tiny_model, tiny_tokenizer):
    handlers = web_demo.Handlers(tiny_model, tiny_tokenizer)
    handlers.shared.queue[:] = [object()]
    steps = handlers.respond("你好", None, 500, 0.8, 0.8, "你好", SimpleNamespace(session_hash="1"))
    _, notice, _, chat, _ = next(steps)
    assert "1 question comes first" in notice
    threading.Timer(0.5, setattr, (chat, "is_stopped", True)).start()
    [(*_, given_back)] = steps
    assert given_back == "你好"


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
