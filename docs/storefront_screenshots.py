"""Make docs/storefront.png and docs/storefront-phone.png anew, from a storefront that is built.

    python docs/storefront_screenshots.py [--dataset complete_journey] [--user 000001]

`pagellm storefront cache` should have run. Needs the extra [serve], playwright and Chromium.
"""

import argparse
import re
import shutil
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent


def shoot(address: str, user: str) -> None:
    """At a desk with one row open, and on a phone in the dark."""
    from playwright.sync_api import expect, sync_playwright

    chromium = next(filter(None, map(shutil.which, ("chromium", "google-chrome"))), None)
    if chromium is None:
        raise SystemExit("no Chromium on the path; install it, e.g. apt-get install chromium")
    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=chromium, args=["--no-sandbox"])
        for name, width, height, scheme in (
            ("storefront", 1280, 1000, "light"),
            ("storefront-phone", 360, 740, "dark"),
        ):
            size = {"width": width, "height": height}
            page = browser.new_context(viewport=size, color_scheme=scheme).new_page()
            page.goto(address + "storefront")
            expect(page.locator("#status")).to_contain_text("rows, ", timeout=60_000)
            if user:
                page.locator("#user").fill(user)
                page.wait_for_timeout(1000)
                expect(page.locator("#status")).to_contain_text("rows, ", timeout=60_000)
            if width > 1000:
                page.locator("#themed h3 button").nth(1).click()
            page.screenshot(path=ROOT / "docs" / f"{name}.png")
        browser.close()


def main() -> None:
    """Start the service, take the pictures, stop it."""
    asked = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    asked.add_argument("--dataset", default="complete_journey")
    asked.add_argument("--user", default="", help="whose page; default: the first user's")
    given = asked.parse_args()
    command = [sys.executable, "-m", "pagellm", "storefront", "serve", "--port=0", "--log=error"]
    process = subprocess.Popen(
        [*command, f"--dataset={given.dataset}"], stdout=subprocess.PIPE, text=True, cwd=ROOT
    )
    try:
        found = re.search(r"http://[\d.:]+/", process.stdout.readline())
        if found is None:
            raise SystemExit("the service did not start; its message stands above")
        shoot(found.group(), given.user)
    finally:
        process.terminate()
        process.wait(timeout=30)
    print("screenshots: docs/storefront.png, docs/storefront-phone.png")


if __name__ == "__main__":
    main()
