"""The page in the browser, in headless Chromium, at a desk and on a phone."""

import re
import shutil
import subprocess
import sys
from contextlib import contextmanager
from pathlib import Path

import pytest

pytest.importorskip("fastapi", reason="needs the extra: pip install 'pagellm[serve]'")
sync_api = pytest.importorskip("playwright.sync_api", reason="needs: pip install playwright")
expect = sync_api.expect
CHROMIUM = next(
    filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None
)
pytestmark = pytest.mark.skipif(
    CHROMIUM is None, reason="needs Chromium, e.g. apt-get install chromium"
)


@pytest.fixture(scope="module")
def url(served):
    """PPO, SFT and the reward model, test rows held out, as a researcher looks at them."""
    with serving(served, "--split", "test") as found:
        yield found


@pytest.fixture(scope="module")
def plain_url(sft_alone):
    """SFT alone."""
    with serving(sft_alone) as found:
        yield found


@contextmanager
def serving(root, *more):
    """A real service; yields its address."""
    command = [
        sys.executable,
        "-m",
        "pagellm",
        "serve",
        "--run",
        "base",
        "--data",
        str(root / "data"),
        "--runs",
        str(root / "runs"),
        "--device",
        "cpu",
        "--port",
        "0",
        "--log",
        "error",
        *more,
    ]
    process = subprocess.Popen(
        command, stdout=subprocess.PIPE, text=True, cwd=Path(__file__).parents[2]
    )
    yield re.search(r"http://[\d.:]+/", process.stdout.readline()).group()
    process.terminate()
    process.wait(timeout=30)


def test_the_page_asks_for_the_key_of_a_service_that_has_one(sft_alone, chromium):
    """Once, and again after a wrong one; the browser's tab keeps it."""
    key = "a-key-of-the-tests.1"
    with serving(sft_alone, "--api_key", key) as found:
        page = chromium.new_context().new_page()
        faults = []
        page.on("pageerror", lambda e: faults.append(str(e)))
        page.goto(found)
        box = page.locator("#key-value")
        box.fill("another key, which is wrong")
        box.press("Enter")
        expect(box).to_have_value("")
        box.fill(key)
        page.get_by_role("button", name="Send").click()
        expect(page.locator("#status")).to_contain_text("Written")
        page.reload()
        expect(page.locator("#status")).to_contain_text("Written")
        expect(box).not_to_be_visible()
        assert faults == []
        page.context.close()


@pytest.fixture(scope="module")
def chromium():
    with sync_api.sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=CHROMIUM, args=["--no-sandbox"])
        yield browser
        browser.close()


class Screen:
    """The page in a browser, after the first pages were written.

    faults  what the browser complains of        asked  what it loads
    """

    def __init__(self, chromium, url, **options):
        self.page = chromium.new_context(**options).new_page()
        self.faults, self.asked = [], []
        # The browser also notes a 4xx that the page handles; all other messages are faults.
        self.page.on(
            "console",
            lambda m: (
                self.faults.append(m.text)
                if m.type in ("error", "warning")
                and not m.text.startswith("Failed to load resource")
                else None
            ),
        )
        self.page.on("pageerror", lambda e: self.faults.append(str(e)))
        self.page.on("request", lambda r: self.asked.append(r.url))
        self.page.goto(url)
        self.status("Written")

    def status(self, text):
        """Wait until the status line holds `text`; return the line."""
        line = self.page.locator("#status")
        expect(line).to_contain_text(text)
        return line.inner_text()

    def items(self, policy):
        return [
            x.split(" · ")[-1]
            for x in self.page.locator(f"#{policy} .what small").all_inner_texts()
        ]

    def energy(self, policy):
        return float(self.page.locator(f"#{policy} .sums b").first.inner_text().replace("−", "-"))


@pytest.fixture
def desk(chromium, url):
    screen = Screen(chromium, url, viewport={"width": 1200, "height": 1400})
    yield screen
    assert screen.faults == []
    screen.page.context.close()


def test_two_pages_stand_side_by_side_and_nobody_else_is_asked(desk, url):
    assert len(desk.items("sft")) == len(desk.items("ppo")) == 20
    boxes = [desk.page.locator(f"#{policy}").bounding_box() for policy in ("sft", "ppo")]
    assert boxes[0]["y"] == boxes[1]["y"] and boxes[0]["x"] + boxes[0]["width"] <= boxes[1]["x"]
    assert all(x.startswith((url, "data:")) for x in desk.asked)


def test_dragging_an_item_moves_it_and_scores_the_new_order(desk):
    before = desk.items("ppo")
    start, goal = (desk.page.locator("#ppo .grip").nth(i).bounding_box() for i in (5, 1))
    desk.page.mouse.move(start["x"] + 9, start["y"] + 9)
    desk.page.mouse.down()
    desk.page.mouse.move(goal["x"] + 9, goal["y"] + 5, steps=8)
    desk.page.mouse.up()
    text = desk.status("New order")
    after = before[:1] + [before[5]] + before[1:5] + before[6:]
    assert desk.items("ppo") == after and desk.items("ppo") != before
    assert f"energy {desk.page.locator('#ppo .sums b').first.inner_text()}" in text
    desk.page.get_by_role("button", name="Put back").click()
    assert (
        desk.items("ppo") == before
        and desk.page.get_by_role("button", name="Put back").count() == 0
    )


def test_the_keyboard_moves_an_item_and_keeps_the_focus(desk):
    before = desk.items("sft")
    desk.page.locator("#sft .grip").nth(0).focus()
    for _ in range(2):
        desk.page.keyboard.press("ArrowDown")
        desk.status("New order")
    expect(desk.page.locator("#sft .grip:focus")).to_have_attribute(
        "aria-label", re.compile("now 3$")
    )
    assert desk.items("sft") == [*before[1:3], before[0], *before[3:]]


def test_filters_and_history_change_the_pages(desk):
    first = desk.items("ppo")[0]
    desk.page.locator("#ppo .why summary").first.click()
    assert "Reward of this slot" in desk.page.locator("#ppo .why").first.inner_text()
    desk.page.locator("#ppo .why button").first.click()
    expect(desk.page.locator("#excluded li")).to_have_count(1)
    expect(desk.page.locator(".what small", has_text=first)).to_have_count(0)
    desk.page.locator("#filters > summary").click()
    box, slots = desk.page.locator("#categories input").first, desk.page.locator("#ppo ol > li")
    box.check()
    expect(slots).not_to_have_count(20)
    assert desk.page.locator("#active").inner_text() == "(2 on)"
    box.uncheck()
    expect(slots).to_have_count(20)
    desk.page.fill("#user", "")
    desk.page.fill("#find", desk.items("ppo")[3])
    typed = desk.items("ppo")[3]
    desk.page.click("#add")
    expect(desk.page.locator("#history li")).to_have_count(1)
    desk.status("history of 1.")
    assert typed not in desk.items("ppo") + desk.items("sft")
    desk.page.fill("#user", "<b>nobody</b>")
    desk.status("has not met")


def test_sft_alone_is_one_column_without_rewards(chromium, plain_url):
    screen = Screen(chromium, plain_url, viewport={"width": 1200, "height": 1400})
    page = screen.page
    assert len(screen.items("sft")) == 20 and screen.items("ppo") == []
    expect(page.locator("#ppo")).to_be_hidden()
    assert page.locator("#sft").bounding_box()["width"] > 1000
    assert page.locator(".worth").count() == page.locator(".tag").count() == 0
    page.locator("#sft .why summary").first.click()
    shown = page.locator("main").inner_text()
    assert "reward of" not in shown.lower() and "page reward" not in shown and "✓" not in shown
    assert "Log-probability" in shown and page.locator("#go").inner_text() == "Write the page"
    assert "reward model" not in page.locator("#models").inner_text()
    before = screen.items("sft")
    page.locator("#sft .grip").nth(0).focus()
    page.keyboard.press("ArrowDown")
    assert "reward" not in screen.status("New order: energy")
    assert screen.items("sft") == [before[1], before[0], *before[2:]]
    assert screen.faults == []
    page.context.close()


def test_mistakes_are_said_not_thrown(desk):
    desk.page.fill("#k", "0")
    desk.status("That did not work: k:")


def test_it_fits_a_phone_and_works_by_touch(chromium, url):
    phone = Screen(
        chromium,
        url,
        viewport={"width": 360, "height": 740},
        has_touch=True,
        is_mobile=True,
        color_scheme="dark",
    )
    page = phone.page
    assert page.evaluate("document.documentElement.scrollWidth") <= 360
    boxes = [page.locator(f"#{policy}").bounding_box() for policy in ("sft", "ppo")]
    assert boxes[0]["x"] == boxes[1]["x"]
    before = phone.items("sft")
    page.locator("#sft h2").scroll_into_view_if_needed()
    page.locator("#sft .grip").nth(2).scroll_into_view_if_needed()
    start, goal = (page.locator("#sft .grip").nth(i).bounding_box() for i in (2, 0))
    assert min(start["width"], start["height"]) >= 40
    touch = page.context.new_cdp_session(page)

    def finger(kind, *points):
        touch.send(
            "Input.dispatchTouchEvent",
            {"type": kind, "touchPoints": [{"x": x, "y": y} for x, y in points]},
        )

    x = start["x"] + 15
    finger("touchStart", (x, start["y"] + 15))
    for share in (0.3, 0.6, 1.0):
        finger("touchMove", (x, start["y"] + 15 + share * (goal["y"] + 4 - start["y"] - 15)))
    finger("touchEnd")
    phone.status("New order")
    assert phone.items("sft") == [before[2], before[0], before[1], *before[3:]]
    assert phone.faults == []
    page.context.close()
