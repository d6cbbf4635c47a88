"""The page of rows in headless Chromium, at a desk and on a phone."""

import shutil
import threading
import time

import pytest

for name in ("fastapi", "uvicorn"):
    pytest.importorskip(name, reason="needs the extra: pip install 'pagellm[serve]'")
sync_api = pytest.importorskip("playwright.sync_api", reason="needs: pip install playwright")
expect = sync_api.expect
CHROMIUM = next(
    filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None
)
pytestmark = pytest.mark.skipif(
    CHROMIUM is None, reason="needs Chromium, e.g. apt-get install chromium"
)


@pytest.fixture(scope="module")
def url(made, tmp_path_factory):
    """A service in a thread of this process; what it needs is made in its first requests."""
    import uvicorn

    from pagellm.serving.http_options import address, listen
    from pagellm.storefront.api import make_app
    from pagellm.storefront.serve import Config, FrontService

    root = tmp_path_factory.mktemp("browser")
    shutil.copytree(f"{made['runs']}/synthetic", root / "synthetic")
    service = FrontService(Config(**made | {"runs": str(root)}, live=True, reload=0))
    sock = listen("127.0.0.1", 0)
    server = uvicorn.Server(uvicorn.Config(make_app(service), log_config=None))
    thread = threading.Thread(target=server.run, kwargs={"sockets": [sock]})
    thread.start()
    while not server.started:
        time.sleep(0.01)
    yield address(sock)
    server.should_exit = True
    thread.join()
    sock.close()


@pytest.fixture(scope="module")
def chromium():
    expect.set_options(timeout=30_000)  # machines that run tests are busy
    with sync_api.sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=CHROMIUM, args=["--no-sandbox"])
        yield browser
        browser.close()


@pytest.fixture
def screen(chromium, url, request):
    """The page after the first rows were drawn; no message of the browser may be a fault."""
    width = getattr(request, "param", 1280)
    page = chromium.new_context(viewport={"width": width, "height": 900}).new_page()
    faults, asked = [], []
    page.on("console", lambda m: faults.append(m.text) if m.type in ("error", "warning") else None)
    page.on("pageerror", lambda e: faults.append(str(e)))
    page.on("request", lambda r: asked.append(r.url))
    page.goto(url)  # leads to /storefront
    drawn(page)
    yield page
    assert faults == [] and all(a.startswith((url, "data:")) for a in asked)
    page.context.close()


def drawn(page):
    expect(page.locator("#status")).to_contain_text("rows, ", timeout=20_000)


def titles(page, column):
    return page.locator(f"#{column} h3 button").evaluate_all(
        "nodes => nodes.map(x => x.firstChild.textContent)"
    )


def test_rows_stand_beside_the_static_page_and_another_user_has_others(screen):
    assert len(titles(screen, "themed")) == len(titles(screen, "plain")) == 6
    boxes = [screen.locator(f"#{name}").bounding_box() for name in ("themed", "plain")]
    assert boxes[0]["y"] == boxes[1]["y"] and boxes[0]["x"] + boxes[0]["width"] <= boxes[1]["x"]
    before = screen.locator("#themed .shelf").all_inner_texts()
    users = screen.locator("#users option").evaluate_all("nodes => nodes.map(x => x.value)")
    screen.locator("#user").fill(users[5])
    expect(screen.locator("#themed .shelf").first).not_to_have_text(before[0])
    screen.locator("#user").fill("nobody known by this name")
    expect(screen.locator("#notes")).to_contain_text("not known")


def test_a_row_is_opened_by_the_keyboard_and_says_why(screen):
    button = screen.locator("#themed h3 button").first
    expect(button).to_have_attribute("aria-expanded", "false")
    button.focus()
    screen.keyboard.press("Enter")
    expect(button).to_have_attribute("aria-expanded", "true")
    why = screen.locator("#themed .why").first
    expect(why).to_contain_text("Writer template/1")
    assert why.locator(".keys li").count() > 0
    rows = why.locator("tbody tr").count()
    assert rows == screen.locator("#themed .shelf").first.locator("li").count() > 0
    assert why.locator("svg").count() >= rows
    screen.keyboard.press("Enter")
    expect(why).to_be_hidden()
    screen.keyboard.press("Tab")  # the shelf itself, which arrow keys scroll
    expect(screen.locator("#themed .shelf").first).to_be_focused()


def test_a_row_of_one_s_own_is_told_why_not(screen):
    screen.locator("#own-title").fill("Cheapest weight loss")
    screen.locator("#own-names").fill("no such category")
    screen.keyboard.press("Enter")
    said = screen.locator("#own-said")
    expect(said).to_contain_text("It does not pass.")
    expect(said).to_contain_text("rule claims")
    expect(said).not_to_contain_text("0.00 against 0.00")
    expect(said).to_contain_text("no category or keyword is called no such category")


@pytest.mark.parametrize("screen", [360], indirect=True)
def test_on_a_phone_nothing_is_wider_than_the_screen(screen):
    screen.locator("#themed h3 button").first.click()
    assert screen.locator("html").evaluate("x => x.scrollWidth") <= 360
    boxes = [screen.locator(f"#{name}").bounding_box() for name in ("themed", "plain")]
    assert boxes[0]["y"] < boxes[1]["y"]  # one below the other
    # A title has the whole width to itself: what it does not leave goes below it.
    title = screen.locator("#themed h3 button").nth(1)
    title.evaluate("x => { x.firstChild.textContent = 'Dry mix desserts and more' }")
    box, tag = title.bounding_box(), title.locator(".tag").bounding_box()
    assert box["height"] < 60 and tag["y"] > box["y"] + 16
    for box in screen.locator("button:visible, input:visible").evaluate_all(
        "nodes => nodes.map(x => x.getBoundingClientRect().height)"
    ):
        assert box >= 24
