from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
from contextlib import contextmanager
from pathlib import Path
from types import SimpleNamespace
from urllib.parse import urlsplit

import pytest
from PIL import Image

from clip_pgs.data.world.draw import draw_scene
from clip_pgs.data.world.scene import make_scene
from clip_pgs.inspection.__main__ import main
from clip_pgs.masking import describe_masking

BROWSER, DRIVER = shutil.which("chromium"), shutil.which("chromedriver")


def test_without_gradio_the_extra_is_named(monkeypatch, capsys):
    monkeypatch.delitem(sys.modules, "clip_pgs.inspection.app", raising=False)
    monkeypatch.setitem(sys.modules, "gradio", None)
    assert main(["app"]) == 2
    error = capsys.readouterr().err
    assert "clip-pgs[app]" in error
    assert error.count("\n") == 1


def test_a_port_that_is_none_is_refused(capsys):
    with pytest.raises(SystemExit, match="2"):
        main(["app", "--port", "0"])
    assert "--port" in capsys.readouterr().err


def test_a_model_that_is_none_is_refused(capsys):
    pytest.importorskip("gradio")
    assert main(["app", "--model", "no such model"]) == 2
    assert "no such model" in capsys.readouterr().err


def test_an_option_at_its_default_is_not_set():
    app = pytest.importorskip("clip_pgs.inspection.app", exc_type=ModuleNotFoundError)
    options = {option.name: option for option in describe_masking("pgs").options}
    set_edges, set_reach = (app._setter(options[name]) for name in ("edges", "neighborhood"))
    near = set_reach(set_edges({}, False), "3")
    assert near == {"edges": False, "neighborhood": 3}
    assert set_edges(near, True) == {"neighborhood": 3}
    for nothing in ("", " ", "none", None):
        assert set_reach(near, nothing) == {"edges": False}


@pytest.mark.parametrize("index", ["/etc/hostname", -1, 10_000, None, 1.5, [0]])
def test_a_scene_that_there_is_not_cannot_be_chosen(index):
    app = pytest.importorskip("clip_pgs.inspection.app", exc_type=ModuleNotFoundError)
    with pytest.raises(app.gr.Error, match="no such scene"):
        app._chosen(SimpleNamespace(index=index))
    assert app._chosen(SimpleNamespace(index=2)) == (2, None)


@contextmanager
def serving(folder):
    """Serve the page, with `folder` for temporary files, and yield its address."""
    pytest.importorskip("gradio")
    command = [sys.executable, "-m", "clip_pgs.inspection", "app"]
    environment = {**os.environ, "TMPDIR": str(folder)}
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True, env=environment) as server:
        try:
            yield server.stdout.readline().split()[0]
            server.send_signal(signal.SIGINT)
            assert server.wait(timeout=60) == 0
        finally:
            server.kill()


def test_what_is_uploaded_goes_with_the_page(tmp_path):
    httpx = pytest.importorskip("httpx")
    with serving(tmp_path) as url:
        answer = httpx.post(f"{url}gradio_api/upload", files={"files": ("a.txt", b"mine")})
        (place,) = answer.json()
        assert Path(place).is_relative_to(tmp_path)
        assert Path(place).read_bytes() == b"mine"
    assert list(tmp_path.iterdir()) == []


@pytest.fixture
def url(tmp_path_factory):
    with serving(tmp_path_factory.mktemp("temporary")) as url:
        yield url


@pytest.fixture
def browser(url):
    webdriver = pytest.importorskip("selenium.webdriver")
    options = webdriver.ChromeOptions()
    options.binary_location = BROWSER
    options.set_capability("goog:loggingPrefs", {"performance": "ALL"})
    for flag in ("--headless=new", "--no-sandbox", "--disable-gpu", "--disable-dev-shm-usage"):
        options.add_argument(flag)
    driver = webdriver.Chrome(options=options, service=webdriver.ChromeService(DRIVER))
    driver.get(url)
    yield driver
    driver.quit()


def wait_for(browser, found):
    from selenium.common import StaleElementReferenceException
    from selenium.webdriver.support.ui import WebDriverWait

    ignored = (StaleElementReferenceException,)
    return WebDriverWait(browser, 60, ignored_exceptions=ignored).until(found)


def shown(browser, css, attribute):
    found = browser.find_elements("css selector", css)
    return found[0].get_attribute(attribute) if found else ""


def open_part(browser, label):
    places = browser.find_elements("xpath", f"//button[contains(., '{label}')]")
    browser.execute_script("arguments[0].click()", places[0])


@pytest.mark.slow
@pytest.mark.skipif(BROWSER is None or DRIVER is None, reason="no chromium and chromedriver here")
def test_in_a_browser_a_picture_is_masked_changed_and_refused(browser, tmp_path):
    of_pgs = '#masks img[alt^="pgs"]'
    first = wait_for(browser, lambda b: shown(b, of_pgs, "src"))
    ratio = browser.find_element("css selector", "#ratio input[type=number]")
    browser.execute_script("arguments[0].value = ''", ratio)
    ratio.send_keys("0.75", "\t")
    wait_for(browser, lambda b: "49 of 196" in b.find_element("id", "tokens").text)
    second = shown(browser, of_pgs, "src")
    assert second != first
    assert "mask_ratio=0.75" in browser.find_element("id", "lines").text

    open_part(browser, "Options of the masking")
    transport = wait_for(
        browser,
        lambda b: b.find_elements(
            "xpath", "//label[contains(., 'transport')]//input[@type='checkbox']"
        ),
    )
    transport[0].click()
    wait_for(browser, lambda b: "transport=False" in b.find_element("id", "lines").text)

    browser.find_elements("css selector", "#scenes button.thumbnail-item")[3].click()
    wait_for(browser, lambda b: "scene 4" in shown(b, "#masks img", "alt"))
    assert shown(browser, of_pgs, "src") != second

    photo, bad = tmp_path / "a photo.png", tmp_path / "bad.png"
    Image.fromarray(draw_scene(make_scene("a photo", num_things=2)).pixels).save(photo)
    upload = "#upload input[type=file]"
    browser.find_element("css selector", upload).send_keys(str(photo))
    wait_for(browser, lambda b: "a photo.png" in shown(b, "#masks img", "alt"))

    asked = [json.loads(entry["message"])["message"] for entry in browser.get_log("performance")]
    urls = [one["params"]["request"]["url"] for one in asked if "request" in one["params"]]
    hosts = {urlsplit(one).hostname for one in urls if one.startswith(("http", "ws"))}
    assert hosts == {"127.0.0.1"}

    browser.refresh()
    wait_for(browser, lambda b: shown(b, of_pgs, "src"))
    bad.write_text("no picture")
    browser.find_element("css selector", upload).send_keys(str(bad))
    wait_for(browser, lambda b: "bad.png" in shown(b, "#masks .refusal", "textContent"))
    assert not browser.find_elements("css selector", "#masks img, #stages img")
