"""Make docs/serve.png and docs/report.png anew: python docs/screenshots.py [--runs runs --run NAME]

Without --run it first makes a small run of its own, runs/screenshots, in about two minutes; what is
finished of it is not made again. Needs Chromium, `pip install playwright` and the extra [serve].
"""

import argparse
import re
import shutil
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

ROOT = Path(__file__).parents[1]
OWN = "screenshots"  # the run, and its data set's name below data/
WIDTH, SERVE, REPORT = 1280, 1180, 1100  # pixels: of both pictures, and their heights


def words(stage: str, *more: str) -> list[str]:
    """A command line of `pagellm`."""
    return [sys.executable, "-m", "pagellm", stage, *more]


def make_run(data: Path, runs: Path) -> None:
    """A small run of a made-up shop, with every stage."""
    where = [f"--data={data}", f"--runs={runs}", f"--run={OWN}", "--preset=none", "--device=cpu"]
    stages = {
        "pretrain": "--size nano --steps 150 --batch 16 --rating_batch 16 --words 500 --warmup 10",
        "sft": "--epochs 4 --batch 32 --eval_every 10",
        "reward": "--per_kind 1 --epochs 1 --batch 32",
        "ppo": "--epochs 1 --rollout 64 --minibatch 32 --micro 16 --eval_every 3 --min_steps 1 "
        "--critic_warmup 2 --lr 5e-4 --force --gate_users 40",
        "compose": "--networks 1",
        "evaluate": "--policies popularity,sft,ppo,compose --n_boot 300 --quiet",
        "baselines": "--models EASE,ALS --trials 2 --n_boot 300",
    }
    if not (data / "synthetic" / "source.json").exists():
        command = words("prepare", f"--data={data}", "--users=600", "--items=300")
        subprocess.run([*command, "--preset=none"], cwd=ROOT, check=True)
    for stage, options in stages.items():
        subprocess.run(words(stage, *where, *options.split()), cwd=ROOT, check=True)


@contextmanager
def serving(data: Path, runs: Path, run: str) -> Iterator[str]:
    """The address of a service over the run, test rows held out as in `evaluate`."""
    command = words("serve", f"--data={data}", f"--runs={runs}", f"--run={run}", "--device=cpu")
    process = subprocess.Popen(
        [*command, "--port=0", "--log=error", "--split=test"],
        cwd=ROOT,
        stdout=subprocess.PIPE,
        text=True,
    )
    try:
        assert process.stdout is not None
        found = re.search(r"http://[\d.:]+/", process.stdout.readline())
        if not found:
            raise SystemExit("the service did not start; its message stands above")
        yield found.group()
    finally:
        process.terminate()
        process.wait(timeout=30)


def shoot(address: str, report: Path) -> None:
    """Write both pictures."""
    from playwright.sync_api import expect, sync_playwright

    chromium = next(filter(None, map(shutil.which, ("chromium", "google-chrome"))), None)
    if chromium is None:
        raise SystemExit("no Chromium on the path; install it, e.g. apt-get install chromium")
    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=chromium, args=["--no-sandbox"])
        context = browser.new_context(
            viewport={"width": WIDTH, "height": SERVE}, color_scheme="light"
        )
        page = context.new_page()
        page.goto(address)
        expect(page.locator("#status")).to_contain_text("Written", timeout=30_000)
        if {"sft", "ppo"} <= set(
            page.locator("#left option").evaluate_all("x => x.map(y => y.value)")
        ):
            with page.expect_response("**/v1/interesting?left=sft&right=ppo", timeout=60_000):
                page.select_option("#left", "sft")
                page.select_option("#right", "ppo")
        expect(page.locator("#interesting optgroup").first).to_be_attached(timeout=60_000)
        page.select_option("#interesting", index=1)  # the most changed
        expect(page.locator("#pages")).not_to_have_attribute("aria-busy", "true")
        page.check("#numbers")
        page.mouse.move(0, 0)
        page.screenshot(path=ROOT / "docs" / "serve.png")
        page.set_viewport_size({"width": WIDTH, "height": REPORT})
        page.goto(report.as_uri())
        page.screenshot(path=ROOT / "docs" / "report.png")
        browser.close()


def main() -> None:
    """Read the options, make what is missing, take the pictures."""
    asked = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    asked.add_argument("--data", default="", help="data directory of the run; default: data")
    asked.add_argument("--runs", default="runs", help="directory of runs")
    asked.add_argument("--run", default="", help="a finished run; default: make a small one")
    given = asked.parse_args()
    runs, run = Path(given.runs).resolve(), given.run or OWN
    data = Path(given.data or ("data" if given.run else runs / OWN / "data")).resolve()
    if not given.run:
        make_run(data, runs)
    report = runs / run / "report.html"
    where = [f"--data={data}", f"--runs={runs}", f"--run={run}", "--device=cpu"]
    subprocess.run(words("report", *where, f"--out={report}"), cwd=ROOT, check=True)
    with serving(data, runs, run) as address:
        shoot(address, report)
    print("screenshots: docs/serve.png, docs/report.png")


if __name__ == "__main__":
    main()
