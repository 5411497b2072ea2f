"""The report in a real browser without a screen; skipped where there is none.

Needs Chromium, its driver and the extra ``khosim[browser]``.
"""

from __future__ import annotations

import shutil
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from khosim import Machine
from khosim.view.recording import Recording, recording
from khosim.view.report import write_report

BROWSER, DRIVER = shutil.which("chromium"), shutil.which("chromedriver")
webdriver = pytest.importorskip("selenium.webdriver", reason="no selenium: khosim[browser]")
pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(BROWSER is None or DRIVER is None, reason="no chromium or no driver of it"),
    pytest.mark.xdist_group("browser"),
]
OPTIONS = (
    "--headless --no-sandbox --disable-gpu --disable-quic --no-first-run --disable-sync "
    "--disable-background-networking --disable-component-update --window-size=1280,1500"
)


@pytest.fixture(scope="module")
def browser() -> Iterator[Any]:
    """A browser that takes down what its console says."""
    from selenium.webdriver.chrome.service import Service

    options = webdriver.ChromeOptions()
    options.binary_location = BROWSER
    for option in OPTIONS.split():
        options.add_argument(option)
    options.set_capability("goog:loggingPrefs", {"browser": "ALL"})
    driver = webdriver.Chrome(options=options, service=Service(DRIVER))
    yield driver
    driver.quit()


@pytest.fixture(scope="module")
def story() -> Recording:
    """A folio is preserved, crosses, and a device writes into it meanwhile."""
    machine = Machine("64M")
    with recording(machine, "a folio", in_depth=True) as story:
        kernel = machine.boot(cmdline="kho=on")
        folio = kernel.alloc_folio(9, owner="guest")
        folio.write(0, b"hello")
        kernel.kho_preserve_folio(folio)
        story.mark("preserved")
        machine.load_successor(kernel)
        machine.hardware.ram.write(folio.phys, b"\xff", by=(0, "device"))
        machine.resume()
    return story


@pytest.fixture
def page(browser: Any, story: Recording, tmp_path: Path) -> Any:
    """The report of that, open and drawn."""
    return _opened(browser, story, tmp_path)


def _opened(browser: Any, story: Recording, folder: Path) -> Any:
    path = folder / "report.html"
    write_report(story, path)
    browser.get(path.as_uri())
    until = time.monotonic() + 30
    while not browser.execute_script("return document.documentElement.dataset.ready"):
        assert time.monotonic() < until, browser.get_log("browser")
        time.sleep(0.02)
    assert browser.get_log("browser") == []
    return browser


def _text(page: Any, name: str) -> str:
    return str(page.find_element("id", name).text)


def _inked(page: Any, name: str) -> int:
    """How many pixels of a canvas are drawn on."""
    script = """
        const c = document.getElementById(arguments[0]);
        const data = c.getContext("2d").getImageData(0, 0, c.width, c.height).data;
        let n = 0; for (let i = 3; i < data.length; i += 4) n += data[i] > 0; return n;"""
    return int(page.execute_script(script, name))


def test_it_opens_with_the_verdict_and_draws(page: Any, story: Recording) -> None:
    """Title, verdict, both canvases and the violated invariant are there."""
    assert _text(page, "title") == "a folio"
    assert "preserved-content" in _text(page, "verdict")
    assert "BROKEN" not in _text(page, "title")
    assert _inked(page, "map") > 10_000
    assert _inked(page, "bands") > 3_000
    assert "device" in _text(page, "invariants")
    assert _text(page, "event").startswith(f"event {len(story.events):,}".replace(",", ""))


def test_the_slider_moves_through_events_and_moments(page: Any, story: Recording) -> None:
    """Keys of the slider and buttons change event and moment."""
    slider = page.find_element("id", "slider")
    page.execute_script("arguments[0].focus()", slider)
    slider.send_keys("\ue011")  # Home
    assert _text(page, "event").startswith("event 1 of")
    assert story.events[0].symbol in _text(page, "event")
    slider.send_keys("\ue014")  # right
    assert _text(page, "event").startswith("event 2 of")
    assert slider.get_attribute("aria-valuetext") == _text(page, "event")
    page.find_element("id", "next").click()
    assert "moment 1" in _text(page, "moment")
    page.find_element("id", "previous").click()
    assert "moment 0" in _text(page, "moment")
    assert page.get_log("browser") == []


def test_an_address_and_a_click_show_the_right_page(page: Any, story: Recording) -> None:
    """The folio's page tells its owner, its writer and its history, however it is reached."""
    jump = next(moment for moment in story.moments if moment.stage == "jump")
    layer = jump.layers["preserved"]
    index = layer.owner_names().index("guest")
    phys, end = int(layer.start[index]), int(layer.end[index])
    box = page.find_element("id", "address")
    box.send_keys(f"{phys:#x}\n")
    assert _text(page, "chosen") == f"page {phys:#x}"
    assert "preserved (guest)" in _text(page, "place")
    assert "preserved-content" in _text(page, "place")
    assert "kho_preserve_folio" in _text(page, "place")
    ram = jump.layers["ram"]
    low, high = int(ram.start.min()), int(ram.end.max())
    canvas = page.find_element("id", "map")
    width = canvas.size["width"]
    x = 92 + ((phys + end) / 2 - low) / (high - low) * (width - 92) - width / 2
    actions = webdriver.ActionChains(page)
    actions.move_to_element_with_offset(canvas, round(x), 20).click().perform()
    shown = int(_text(page, "chosen").removeprefix("page "), 16)
    assert phys <= shown < end
    assert shown % 4096 == 0
    assert page.get_log("browser") == []


def test_zoom_goes_down_to_a_page_and_back(page: Any) -> None:
    """Plus and the keyboard zoom in; the whole is one button away."""
    whole = _text(page, "span")
    for _ in range(20):
        page.find_element("id", "in").click()
    assert "1K shown" in _text(page, "span")
    page.find_element("id", "map").send_keys("-")
    assert "2K shown" in _text(page, "span")
    page.find_element("id", "whole").click()
    assert _text(page, "span") == whole


def test_dark_and_light_differ(page: Any) -> None:
    """The button changes the colours, and back."""
    script = "return getComputedStyle(document.body).backgroundColor"
    before = page.execute_script(script)
    page.find_element("id", "theme").click()
    assert page.execute_script(script) != before
    page.find_element("id", "theme").click()
    assert page.execute_script(script) == before


def test_everything_that_is_operated_has_a_name(page: Any) -> None:
    """Buttons, fields and canvases say to a screen reader what they are."""
    script = """
        return [...document.querySelectorAll("button, input, select, canvas")].filter((it) =>
          !(it.getAttribute("aria-label") || it.textContent.trim() || it.closest("label")));"""
    assert page.execute_script(script) == []


def test_trees_open(page: Any) -> None:
    """The handover's root FDT can be browsed at the jump."""
    for _ in range(20):
        if "about to jump" in _text(page, "moment"):
            break
        page.find_element("id", "previous").click()
    trees = page.find_element("id", "trees")
    assert "root FDT" in trees.text
    assert "compatible" in trees.text
    closed = trees.find_elements("css selector", "details:not([open]) > summary")
    before = len(trees.text)
    closed[0].click()
    time.sleep(0.1)
    assert len(trees.text) > before
