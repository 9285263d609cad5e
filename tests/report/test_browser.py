"""The pages in a real browser: no error, keys, pointing at pictures, dark mode, phones."""

import io
import shutil

import numpy as np
import pytest
from PIL import Image as Picture

from regkit.report.page import cohort_page, pair_page

pytestmark = [pytest.mark.browser, pytest.mark.filterwarnings("ignore::ResourceWarning")]
NAMES = ("chromium", "chromium-browser", "google-chrome", "google-chrome-stable")


@pytest.fixture(scope="module")
def browser():
    """Chromium as the system has it."""
    driver = pytest.importorskip("playwright.sync_api", reason="playwright is not installed")
    program = next((path for name in NAMES if (path := shutil.which(name))), None)
    if program is None:
        pytest.skip("no Chromium on this machine")
    with driver.sync_playwright() as play:
        running = play.chromium.launch(executable_path=program, args=["--no-sandbox"])
        yield running
        running.close()


@pytest.fixture
def opened(browser, evaluation, views, record, pictures, tmp_path):
    """Opens one of the pages; fails at the end if the page complained or asked for anything outside itself."""
    texts = {"cohort": cohort_page(evaluation, views), "pair": pair_page(record, pictures["good"])}
    contexts, complaints = [], []

    def visit(name: str, **options):
        file = tmp_path / f"{name}.html"
        file.write_text(texts[name], encoding="utf-8")
        context = browser.new_context(**{"viewport": {"width": 1280, "height": 900}, **options})
        contexts.append(context)
        page = context.new_page()
        page.on("console", lambda message: complaints.append(message.text))
        page.on("pageerror", lambda error: complaints.append(str(error)))
        page.on("request", lambda request: None if request.url.startswith(("file:", "data:")) else complaints.append(request.url))
        page.goto(file.as_uri())
        return page

    yield visit
    for context in contexts:
        context.close()
    assert complaints == []


def shown(page, number: int = 0) -> str:
    return page.locator(".viewer").nth(number).get_attribute("data-show")


def test_keys_choose_what_is_shown(opened):
    page = opened("pair")
    assert shown(page) == "after"
    for key, state in (("1", "fixed"), ("2", "moved"), ("3", "before"), ("4", "after"), ("5", "checker")):
        page.keyboard.press(key)
        assert shown(page) == state
        assert page.locator(".modes [aria-pressed=true]").count() == 1
    page.keyboard.press("c")
    assert page.locator(".line-fixed").first.is_hidden()
    page.keyboard.press("c")
    assert page.locator(".line-fixed").first.is_visible()
    page.keyboard.press("a")
    assert page.locator(".arrows-after").first.is_hidden()


def test_f_flickers_and_stops(opened):
    page = opened("pair")
    page.keyboard.press("f")
    states = set()
    for _ in range(20):
        states.add(shown(page))
        page.wait_for_timeout(50)
    assert states == {"fixed", "moved"}
    page.keyboard.press("f")
    page.wait_for_timeout(300)
    assert shown(page) == "after"


def test_who_wants_less_motion_flickers_by_hand(opened):
    page = opened("pair", reduced_motion="reduce")
    page.keyboard.press("f")
    page.wait_for_timeout(600)
    assert shown(page) == "fixed"
    page.keyboard.down(" ")
    assert shown(page) == "moved"
    page.keyboard.up(" ")
    assert shown(page) == "fixed"


def test_pointing_and_space_show_the_other_scan(opened):
    page = opened("pair")
    page.keyboard.press("1")
    page.locator(".stage").first.hover()
    assert shown(page) == "moved"
    page.mouse.move(2, 2)
    assert shown(page) == "fixed"
    page.locator(".viewer").focus()
    page.keyboard.down(" ")
    assert shown(page) == "moved"
    page.keyboard.up(" ")
    assert shown(page) == "fixed"


def test_a_finger_shows_the_other_scan(opened):
    page = opened("pair", has_touch=True, viewport={"width": 375, "height": 800})
    stage = page.locator(".stage").first
    stage.dispatch_event("pointerdown", {"pointerType": "touch"})
    assert shown(page) == "before"
    stage.dispatch_event("pointerup", {"pointerType": "touch"})
    assert shown(page) == "after"


def test_a_failed_case_has_no_moved_scan(opened):
    page = opened("cohort")
    viewer = page.locator("#case-1 .viewer")
    assert viewer.get_attribute("data-show") == "before"
    assert viewer.locator("[data-mode=moved]").last.is_disabled()
    viewer.locator("[data-mode=checker]").click()
    assert viewer.get_attribute("data-show") == "checker"
    viewer.focus()
    page.keyboard.press("2")
    assert viewer.get_attribute("data-show") == "checker"


def test_going_through_the_cases(opened):
    page = opened("cohort")
    here = ".case.here"
    page.keyboard.press("j")
    assert page.locator(here).get_attribute("id") == "case-1"
    for _ in range(11):
        page.keyboard.press("j")
    assert page.locator(here).get_attribute("id") == "case-12"
    assert page.locator(here).get_attribute("open") is not None
    page.keyboard.press("k")
    assert page.locator(here).get_attribute("id") == "case-11"
    page.keyboard.press("?")
    assert page.locator("dialog").is_visible()
    page.keyboard.press("Escape")
    assert page.locator("dialog").is_hidden()


def test_the_worst_is_one_click_away(opened):
    page = opened("cohort", reduced_motion="reduce")
    page.locator(".worst").click()
    assert page.locator("#case-1 .stage").first.is_visible()
    assert page.evaluate("document.activeElement.closest('.case').id") == "case-1"


def test_the_filter_leaves_what_it_names(opened):
    page = opened("cohort")
    page.keyboard.press("/")
    page.keyboard.type("hands other")
    assert page.locator(".case:visible").count() == 7
    assert page.locator("#count").inner_text() == "7 of 28 cases"
    page.locator("#filter").fill("failed")
    assert page.locator(".case:visible").count() == 1


@pytest.mark.parametrize("name", ["cohort", "pair"])
def test_dark_mode_differs(opened, name):
    colours = [opened(name, color_scheme=scheme).evaluate("getComputedStyle(document.documentElement).backgroundColor")
               for scheme in ("light", "dark")]
    assert colours[0] != colours[1]


@pytest.mark.parametrize("name", ["cohort", "pair"])
def test_nothing_overflows_on_a_phone(opened, name):
    page = opened(name, viewport={"width": 375, "height": 800})
    page.evaluate("document.querySelectorAll('details').forEach((one) => { one.open = true; })")
    assert page.evaluate("document.documentElement.scrollWidth") <= 375


@pytest.mark.parametrize("name", ["cohort", "pair"])
def test_every_control_has_a_name_and_is_reached_by_tab(opened, name):
    page = opened(name)
    nameless = page.evaluate("""[...document.querySelectorAll('button, a, input, [role=img], [role=region], [role=group]')].filter(
        (one) => !(one.textContent.trim() || one.getAttribute('aria-label') || one.labels?.length)).map((one) => one.outerHTML)""")
    assert nameless == []
    page.keyboard.press("Tab")
    outline = page.evaluate("getComputedStyle(document.activeElement).outlineStyle")
    assert outline == "solid"


def test_both_scans_at_once_are_grey_where_they_agree(opened):
    """What the style sheet mixes is what overlay.png shows: fixed in red and blue, moved in green."""
    page = opened("pair", viewport={"width": 1280, "height": 1400})
    page.keyboard.press("c")
    page.keyboard.press("a")
    stage = page.locator(".stage").first
    colours = np.asarray(Picture.open(io.BytesIO(stage.screenshot())).convert("RGB")).astype(int)[30:-30, 30:-30]
    inner = colours[colours.shape[0] // 3: 2 * colours.shape[0] // 3, colours.shape[1] // 3: 2 * colours.shape[1] // 3]
    assert np.ptp(inner, -1).mean() < 6 and inner.max() > 100
    page.keyboard.press("3")
    colours = np.asarray(Picture.open(io.BytesIO(stage.screenshot())).convert("RGB")).astype(int)
    assert np.ptp(colours, -1).mean() > 15
