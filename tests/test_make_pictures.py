"""`make_pictures`: a session in a terminal and an animation."""

import pytest
from PIL import Image

pytest.importorskip("pexpect", reason="needs pexpect")
pytest.importorskip("playwright", reason="needs Playwright")

import make_pictures

pytestmark = pytest.mark.alone


@pytest.mark.slow
def test_terminal():
    lines = make_pictures.run_terminal(["你好"]).splitlines()
    assert lines[0].startswith("欢迎使用") and "用户：你好" in lines
    assert any(line.startswith("ChatGLM：你好👋") for line in lines)
    assert lines[-1] == "用户：stop"


def test_film(browser, tmp_path):
    page = browser.new_page()
    film = make_pictures.Film(page)
    for text in ("一", "二", "三"):
        page.set_content(text)
        film.shoot()
        page.wait_for_timeout(100)
    page.close()
    film.save(tmp_path / "film.gif")
    with Image.open(tmp_path / "film.gif") as image:
        assert image.n_frames == 3
        image.seek(1)
        assert 100 <= image.info["duration"] < 2000
        image.seek(2)
        assert image.info["duration"] == 3000
