"""The page in the browser, in headless Chromium, at a desk and on a phone."""

import re
import shutil
import subprocess
import sys
from contextlib import contextmanager
from pathlib import Path

import pytest

from pagellm.serving import cards

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
    sync_api.expect.set_options(timeout=30_000)  # machines that run tests are busy
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
        cards = self.page.locator(f"#{policy} .card")
        return [cards.nth(i).get_attribute("data-item") for i in range(cards.count())]

    def energy(self, policy):
        """Of the order as it stands; numbers are off unless they are asked for."""
        self.page.locator("#numbers").check()
        text = self.page.locator(f"#{policy} .sums b").first.inner_text()
        return float(text.replace("−", "-"))

    def wide(self):
        """Pixels by which the page is wider than the window."""
        return self.page.evaluate("document.documentElement.scrollWidth - innerWidth")


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
    start, goal = (desk.page.locator("#ppo .photo").nth(i).bounding_box() for i in (5, 1))
    desk.page.mouse.move(start["x"] + 40, start["y"] + 40)
    desk.page.mouse.down()
    desk.page.mouse.move(goal["x"] + 40, goal["y"] + 40, steps=8)
    desk.page.mouse.up()
    text = desk.status("New order")
    after = before[:1] + [before[5]] + before[1:5] + before[6:]
    assert desk.items("ppo") == after and desk.items("ppo") != before
    assert f"energy {desk.energy('ppo'):.3f}" in text.replace("−", "-")
    desk.page.get_by_role("button", name="Put back").click()
    assert (
        desk.items("ppo") == before
        and desk.page.get_by_role("button", name="Put back").count() == 0
    )


def test_the_keyboard_moves_an_item_and_keeps_the_focus(desk):
    before = desk.items("sft")
    desk.page.locator("#sft .grip").nth(0).focus()
    for _ in range(2):
        desk.page.keyboard.press("ArrowRight")
        desk.status("New order")
    focus = desk.page.locator("#sft .grip:focus")
    expect(focus).to_have_attribute("aria-label", re.compile("now 3$"))
    assert desk.items("sft") == [*before[1:3], before[0], *before[3:]]
    row = [desk.page.locator("#sft .card").nth(i).bounding_box()["y"] for i in range(12)]
    columns = row.count(row[0])
    desk.page.keyboard.press("ArrowDown")  # the place below, whatever the number of columns
    expect(focus).to_have_attribute("aria-label", re.compile(f"now {3 + columns}$"))


def test_filters_and_history_change_the_pages(desk):
    first = desk.items("ppo")[0]
    desk.page.locator("#ppo .why summary").first.click()
    assert "Reward of this slot" not in desk.page.locator("#ppo .why").first.inner_text()
    desk.page.locator("#numbers").check()
    assert "Reward of this slot" in desk.page.locator("#ppo .why").first.inner_text()
    desk.page.locator("#ppo .why button").first.click()
    expect(desk.page.locator("#excluded li")).to_have_count(1)
    expect(desk.page.locator(f"[data-item={first}]")).to_have_count(0)
    desk.page.locator("#filters > summary").click()
    box, slots = desk.page.locator("#categories input").first, desk.page.locator("#ppo .card")
    box.check()
    expect(slots).not_to_have_count(20)
    assert desk.page.locator("#active").inner_text() == "(2 on)"
    box.uncheck()
    expect(slots).to_have_count(20)
    desk.page.fill("#user", "")
    desk.page.locator("#past > summary").click()
    typed = desk.items("ppo")[3]
    desk.page.fill("#find", typed)
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
    page.locator("#numbers").check()
    page.locator("#sft .why summary").first.click()
    shown = page.locator("main").inner_text()
    assert "reward of" not in shown.lower() and "page reward" not in shown and "✓" not in shown
    assert "Log-probability" in shown and page.locator("#go").inner_text() == "Write the page"
    assert "reward model" not in page.locator("#models").inner_text()
    before = screen.items("sft")
    page.locator("#sft .grip").nth(0).focus()
    page.keyboard.press("ArrowRight")
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
    assert phone.wide() == 0
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
        finger("touchMove", (x, start["y"] + 15 + share * (goal["y"] - start["y"])))
    finger("touchEnd")
    phone.status("New order")
    assert phone.items("sft") == [before[2], before[0], before[1], *before[3:]]
    assert phone.faults == []
    page.context.close()


def test_marks_say_what_moved_and_what_is_only_here(desk):
    left, right = desk.items("sft"), desk.items("ppo")
    for mine, other, policy in ((left, right, "sft"), (right, left, "ppo")):
        for at, item in enumerate(mine):
            words = desk.page.locator(f"#{policy} .card").nth(at).locator(".tags").inner_text()
            assert ("only here" in words) == (item not in other)
            up = other.index(item) - at if item in other else 0
            assert (f"▲ {up}" in words) == (up > 0) and (f"▼ {-up}" in words) == (up < 0)
    both = len(set(left) & set(right))
    assert f"{both} also on the other page" in desk.page.locator("#ppo .words").inner_text()
    desk.page.locator("#ppo .card").nth(0).hover()
    twins = desk.page.locator("#sft .card.twin")
    assert twins.count() == (right[0] in left)


def test_the_band_has_the_categories_in_order_and_a_press_shows_one(desk):
    page = desk.page
    kinds = [x.inner_text() for x in page.locator("#ppo .card .kind").all()]
    assert page.locator("#ppo .band").get_attribute("aria-label").endswith(", ".join(kinds))
    colour = "node => getComputedStyle(node).backgroundColor"
    seen = [x.evaluate(colour) for x in page.locator("#ppo .band span").all()]
    assert len(set(zip(kinds, seen, strict=True))) == len(set(kinds)) == len(set(seen))
    button = page.locator("#ppo .legend button").first
    name = button.locator("bdi").inner_text()
    assert button.inner_text().endswith(f"×{kinds.count(name)}") and kinds.count(name) > 1
    button.focus()
    page.keyboard.press("Enter")
    assert page.locator("#ppo .card.on").count() == kinds.count(name)
    button.evaluate("node => node.dataset.old = ''")
    page.evaluate("user.dispatchEvent(new Event('input'))")  # what draws the pages anew
    expect(page.locator("[data-old]")).to_have_count(0)
    expect(button).to_be_focused()
    assert button.get_attribute("aria-pressed") == "true"
    page.keyboard.press("Space")
    assert page.locator(".card.on").count() == 0


def test_pictures_follow_from_title_and_category_alone(desk):
    """The same item has the same picture on both pages, and other items have others."""
    drawn = {}
    for item, svg in desk.page.locator("#pages .card").evaluate_all(
        "cards => cards.map(c => [c.dataset.item, c.querySelector('svg').innerHTML])"
    ):
        assert drawn.setdefault(item, svg) == svg
    assert len(set(drawn.values())) > 0.9 * len(drawn)


def test_a_link_reproduces_the_view(desk, chromium):
    page = desk.page
    page.locator("#interesting optgroup").first.wait_for(state="attached")
    groups = page.locator("#interesting optgroup").evaluate_all("x => x.map(y => y.label)")
    assert groups == ["Most changed", "Least served", "Newest"]
    box = page.locator("#interesting")
    box.select_option(index=3)
    expect(page.locator("#user")).to_have_value(box.input_value())
    desk.status("Written")
    page.locator("#ppo .why summary").first.click()
    page.locator("#ppo .why button").first.click()
    page.locator("#numbers").check()
    page.fill("#k", "12")
    expect(page.locator("#ppo .card")).to_have_count(12)
    page.locator("#ppo .grip").nth(0).focus()
    page.keyboard.press("ArrowRight")
    desk.status("New order")
    page.locator("#link").click()
    link = page.url
    other = chromium.new_context(viewport={"width": 900, "height": 900}).new_page()
    other.goto(link)
    expect(other.locator("#status")).to_contain_text("New order")
    same = "() => [user.value, k.value, document.body.className, excluded.innerText,"
    same += " ...[...document.querySelectorAll('.card')].map(c => c.innerText)]"
    assert other.evaluate(same) == page.evaluate(same)
    other.goto(re.sub("&order-ppo=[^&]*", "", link).replace("models=", "models=old"))
    expect(other.locator("#status")).to_contain_text("models have changed since this link")
    assert other.locator("#user").input_value() == page.locator("#user").input_value()
    other.context.close()


ODD = [
    {"title": "<img src=x onerror=alert(1)><b>bold</b>", "category": "<script>x</script>"},
    {"title": "كتاب الطبخ العربي الكامل 2026", "category": "كتب"},
    {"title": "long " * 90, "category": "A category whose name does not end " * 4},
    {"title": "Donaudampfschifffahrtsgesellschaftskapitän" * 4, "category": "x" * 90},
    {"title": "", "category": None},
    {"title": "日本語のタイトル", "category": "📚 books"},
]


@pytest.fixture
def odd(chromium, url):
    """A screen whose service gives odd words, no price and no reward; made up in the browser."""

    def give(width, scheme):
        page = chromium.new_context(
            viewport={"width": width, "height": 900}, color_scheme=scheme
        ).new_page()
        page.route("**/v1/page", lambda route: route.fulfill(json=odd_page()))
        page.route("**/v1/users/*", lambda route: route.fulfill(json={"history": odd_slots()}))
        page.goto(url)
        expect(page.locator("#status")).to_contain_text("Written")
        return page

    return give


def odd_slots():
    plain = {"price": None, "brand": None, "score": -1.0, "token_reward": 0.1, "similar": []}
    return [
        x | plain | {"item": f"I{i}" * 9, "held_out": False, "rating": 4} for i, x in enumerate(ODD)
    ]


def odd_page():
    return {
        "items": odd_slots(),
        "user": {"history": 6},
        "notes": ["<i>note</i>"],
        "latency_ms": 1.0,
        "unknown": {"user": False, "items": [], "categories": []},
        "policy": "sft",
        "energy": 0.0,
        "page_reward": 0.0,
        "ild": None,
        "entropy": None,
    }


# Every text whose contrast to what stands behind it is below 4.5, the ratio that WCAG 2 asks for.
CONTRAST = """() => {
  const probe = document.createElement("canvas").getContext("2d", {willReadFrequently: true});
  const rgb = (css) => {
    probe.clearRect(0, 0, 1, 1);
    probe.fillStyle = css;
    probe.fillRect(0, 0, 1, 1);
    return [...probe.getImageData(0, 0, 1, 1).data];
  };
  const light = (css) => rgb(css).slice(0, 3).map(x => x / 255)
    .map(x => x <= .03928 ? x / 12.92 : ((x + .055) / 1.055) ** 2.4)
    .reduce((sum, x, i) => sum + x * [.2126, .7152, .0722][i], 0);
  const behind = (node) => {
    const css = getComputedStyle(node).backgroundColor;
    return rgb(css)[3] === 255 ? css : behind(node.parentElement);
  };
  const told = (node) => [...node.childNodes].some(x => x.nodeType === 3 && x.data.trim())
    && node.checkVisibility() && !node.closest("noscript, datalist, select, .heard, .skip");
  return [...document.querySelectorAll("body *")].filter(told).map(node => {
    const [a, b] = [getComputedStyle(node).color, behind(node)].map(light).sort((x, y) => y - x);
    return [node.innerText.slice(0, 40), (a + .05) / (b + .05)];
  }).filter(([, ratio]) => ratio < 4.5);
}"""


@pytest.mark.parametrize("width, scheme", [(360, "dark"), (768, "light"), (1280, "dark")])
def test_odd_titles_stay_text_and_fit(odd, width, scheme):
    page = odd(width, scheme)
    for fold in ("#past", "#filters"):
        page.locator(f"{fold} > summary").click()
    page.locator("#numbers").check()
    assert page.locator("main b:text('bold'), main img, main script").count() == 0
    assert page.evaluate("document.documentElement.scrollWidth - innerWidth") == 0
    titles = page.locator("#sft .card .title")
    assert titles.nth(0).inner_text() == ODD[0]["title"]
    assert titles.nth(1).evaluate("x => getComputedStyle(x).direction") == "rtl"
    assert titles.nth(4).inner_text() == "I4" * 9
    heights = [x.bounding_box()["height"] for x in titles.all()]
    assert max(heights) < 80  # three lines
    assert page.evaluate(CONTRAST) == []
    page.context.close()


def test_contrast_and_names_of_the_controls(desk):
    page = desk.page
    page.emulate_media(color_scheme="light")
    page.locator("#numbers").check()
    assert page.evaluate(CONTRAST) == []
    page.emulate_media(forced_colors="active")  # the band keeps its colours where pages lose theirs
    fields = page.locator("#ppo .band span")
    seen = {x.evaluate("x => getComputedStyle(x).backgroundColor") for x in fields.all()}
    assert len(seen) > 5
    page.emulate_media(forced_colors="none")
    nameless = page.locator("button, select, input:not([type=checkbox])").evaluate_all(
        "all => all.filter(x => x.checkVisibility() && !(x.ariaLabel || x.innerText.trim()"
        " || x.labels?.[0]?.innerText.trim())).map(x => x.outerHTML)"
    )
    assert nameless == []
    page.keyboard.press("Tab")
    page.locator(".skip").focus()
    expect(page.locator(".skip")).to_be_in_viewport()
    page.keyboard.press("Enter")
    expect(page.locator("#pages")).to_be_focused()
    page.keyboard.press("Tab")
    assert page.evaluate("document.activeElement.closest('#pages') !== null")
    ring = page.evaluate("getComputedStyle(document.activeElement).outlineStyle")
    assert ring == "solid"


# The rules of JupyterLab and of nbconvert's pages that meet the cards.
NOTEBOOK = """
.jp ol:not(.list-inline), .jp ul:not(.list-inline) { padding-left: 2em; margin: 1em 0; }
.jp h3 { font-weight: 500; line-height: 1; margin: 1em 0 .5em; }
"""


@pytest.mark.parametrize("width, beside", [(1280, 6), (360, 2)])
def test_a_notebooks_own_rules_do_not_move_the_cards(chromium, width, beside):
    rows = [{"user": "u", "item": f"i{n}", "category": f"C{n}", "rank": n} for n in range(1, 7)]
    page = chromium.new_context(viewport={"width": width, "height": 800}).new_page()
    page.set_content(
        f'<style>{NOTEBOOK}</style><div class="jp">{cards.of(rows)._repr_html_()}</div>'
    )
    boxes = [card.bounding_box() for card in page.locator("li").all()]
    band, rank = (page.locator(name).first.bounding_box() for name in (".band", ".rank"))
    assert boxes[0]["x"] == band["x"]  # the cards begin where the band does
    assert len({box["x"] for box in boxes}) == beside
    assert rank["width"] == pytest.approx(rank["height"], abs=0.5)  # a round badge
    page.context.close()
