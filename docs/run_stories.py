"""Run the lines of docs/tutorial/stories.md as a reader types them, from a wheel, and time each.

    pip wheel --no-deps --wheel-dir dist .
    python docs/run_stories.py --wheel dist/pagellm-*.whl --folder /tmp/stories
    python docs/run_stories.py --wheel ... --folder ... --only "A shop engineer"

The folder must be empty or of an earlier call. It gets a made-up shop and, by the first lines of
the page, an environment of its own. Prints a table for each story: the line, seconds of the clock
and of processors. A line that fails ends it. A service is left running until it has written a page.
"""

import argparse
import os
import re
import resource
import shlex
import subprocess
import sys
import time
import urllib.error
import urllib.request
from pathlib import Path

STORIES = Path(__file__).resolve().parent / "tutorial" / "stories.md"
WHEEL = r"[\w./]*pagellm-[\d.]+-py3-none-any\.whl"

# The shop of the stories, written by the installed package: orders up to a day, an item table, and
# the orders of the next morning too.
SHOP = """
import csv, datetime, pathlib
from pagellm.data import synthetic

def write(name, users, items, seed, share):
    shop = synthetic.make(users, items, seed)
    rows = sorted(zip(shop.time.tolist(), shop.user.tolist(), shop.item.tolist()))
    rows = rows[: round(share * len(rows))]
    folder = pathlib.Path(name)
    folder.mkdir(exist_ok=True)
    with open(folder / "orders.csv", "w", newline="") as file:
        out = csv.writer(file)
        out.writerow(["customer_id", "product_id", "order_date"])
        for t, u, i in rows:
            day = datetime.datetime.fromtimestamp(t, datetime.UTC).date()
            out.writerow([shop.user_ids[u], shop.items[i].id, day])
    sold = {shop.items[i].id for _, _, i in rows}
    with open(folder / "items.csv", "w", newline="") as file:
        out = csv.writer(file)
        out.writerow(["product_id", "product_name", "brand", "category", "price"])
        for item in (item for item in shop.items if item.id in sold):
            path = " > ".join(item.paths[0])
            out.writerow([item.id, item.title, item.brand, path, item.price])
    print(f"{folder}: {len(rows):,} orders of {users:,} customers, {len(sold):,} items")

write("tonight", 2500, 600, 1, 0.92)
write("today", 2500, 600, 1, 1.0)
"""


def stories(text: str) -> dict[str, str]:
    """Heading -> text of each story; the part before the first heading is named "Install"."""
    parts = re.split(r"^## (.+)$", text, flags=re.MULTILINE)
    return {"Install": parts[0]} | dict(zip(parts[1::2], parts[2::2], strict=True))


def blocks(story: str, language: str) -> list[str]:
    """The fenced blocks of a language, in order."""
    pattern = rf"^```{language}[^\n]*\n(.*?)^```$"
    return re.findall(pattern, story, flags=re.MULTILINE | re.DOTALL)


def lines(story: str) -> list[str]:
    """The command lines of a story; those that end in a backslash go on."""
    text = "".join(blocks(story, "bash")).replace("\\\n", " ")
    return [line for line in text.splitlines() if line.strip() and not line.startswith("#")]


def answers(log: Path) -> bool:
    """Whether the service of the log has said its address, and writes a page there."""
    found = re.search(r"http://[\d.]+:\d+", log.read_text())
    if not found:
        return False
    body = urllib.request.Request(
        f"{found[0]}/v1/page", b'{"history": []}', {"content-type": "application/json"}
    )
    try:
        with urllib.request.urlopen(body, timeout=10) as reply:
            return reply.status == 200
    except urllib.error.URLError:
        return False


def serve(line: str, folder: Path, env: dict[str, str]) -> int:
    """Start a service, wait for a page, end it; -> its exit code, 0 if a page came."""
    log = folder / "serve.log"
    with log.open("w") as out:
        args = shlex.split(line)
        process = subprocess.Popen(args, cwd=folder, env=env, stdout=out, stderr=out)
    while process.poll() is None and not answers(log):
        time.sleep(0.2)
    code = process.poll()
    process.terminate()
    process.wait()
    return code or 0


def run(line: str, folder: Path, env: dict[str, str]) -> tuple[float, float]:
    """Run a line; -> seconds of the clock and of processors. Ends the program if it fails."""
    print(f"$ {line}", flush=True)
    began, before = time.perf_counter(), resource.getrusage(resource.RUSAGE_CHILDREN)
    if " serve " in f" {line} ":
        code = serve(line, folder, env)
    else:
        code = subprocess.run(["bash", "-c", line], cwd=folder, env=env).returncode
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    if code:
        sys.exit(f"{line}: exit code {code}")
    busy = after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime
    took = time.perf_counter() - began
    print(f"# {took:.0f} s, {busy:.0f} s of processors", flush=True)
    return took, busy


def tell(story: str, folder: Path, env: dict[str, str], wheel: Path) -> list[str]:
    """Run one story; -> rows of its table."""
    python = blocks(story, "python")
    (name,) = dict.fromkeys(re.findall(r"\b(\w+\.py)\b", story)) if python else [""]
    typed = lines(story)
    if python:
        (folder / name).write_text(python[0])
        if not any(name.removesuffix(".py") in line for line in typed):
            typed.append(f"python {name}")
    rows = []
    for line in typed:
        seconds, busy = run(re.sub(WHEEL, str(wheel), line), folder, env)
        rows.append(f"| `{line}` | {seconds:.0f} | {busy:.0f} |")
    return rows


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--wheel", type=Path, required=True)
    parser.add_argument("--folder", type=Path, required=True)
    parser.add_argument("--only", default="", help="stories whose heading begins so")
    args = parser.parse_args()
    folder, wheel = args.folder.resolve(), args.wheel.resolve()
    folder.mkdir(parents=True, exist_ok=True)
    env = {k: v for k, v in os.environ.items() if k not in ("PYTHONPATH", "VIRTUAL_ENV")}
    env["PATH"] = f"{folder / 'venv' / 'bin'}{os.pathsep}{env['PATH']}"
    tables = {}
    for heading, story in stories(STORIES.read_text(encoding="utf-8")).items():
        if heading == "Install":
            if (folder / "venv").exists():
                continue
        elif not heading.startswith(args.only):
            continue
        tables[heading] = tell(story, folder, env, wheel)
        if heading == "Install":
            subprocess.run(["python", "-c", SHOP], cwd=folder, env=env, check=True)
    for heading, rows in tables.items():
        print(f"\n{heading}\n\n| line | seconds | of a processor |\n|---|---|---|")
        print("\n".join(rows))
    return 0


if __name__ == "__main__":
    sys.exit(main())
