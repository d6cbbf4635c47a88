"""Malformed input: mutated lines of every format, odd shops and bombs, through readers and stages.

every_input(trials, 100_000)            what `torture --suites input` runs
"""

import gzip
import json
import random
import shutil
import signal
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any

from tqdm import tqdm

from experiments.stress.children import forked
from experiments.stress.trials import SMALL, VERBS, Trials, merged
from pagellm.data import prepare, synthetic
from pagellm.data.amazon import parse_item, parse_review
from pagellm.data.logs import ITEM_COLUMNS, LOG_COLUMNS, match, read_items, read_log
from pagellm.data.records import Tally, parsed
from pagellm.data.sequences import read_sequences
from pagellm.stage.command import main
from pagellm.stage.config import PageLLMError

__all__ = ["every_input", "fuzzed_line"]


PIECES = [
    b"\0",
    b"\xff",
    b"\xc3(",
    b"\xed\xa0\x80",
    b"\xe2\x80\xa8",
    b"\xe2\x80\xae",
    b"\xd0\xb0",
    b'"',
    b"'",
    b"\\",
    b",",
    b"\t",
    b"\r",
    b" ",
    b"",
    b"\xef\xbb\xbf",
    b"[" * 50,
    b"{" * 50,
    b"(" * 50,
    b"NaN",
    b"Infinity",
    b"-1",
    b"1e999",
    b"9" * 400,
    b"null",
    b"true",
    b"\\ud800",
    b"&lt;",
    b"&#0;",
    b"&#xD800;",
    b"<br>",
    b"__import__('os')",
]


LOG_FIELDS = ["user_id", "item_id", "rating", "timestamp", "summary", "text"]


ITEM_FIELDS = ["item_id", "title", "brand", "categories", "price", "description"]


VALUES: list[Any] = [
    None,
    True,
    -1,
    0,
    6,
    1e308,
    10**30,
    -(10**30),
    "",
    " ",
    "a\nb",
    "x" * 300,
    [],
    {},
    [[]],
    [None],
    {"a": {}},
    "5",
    "five",
    4.5,
    "\u0000",
    "\ud800",
    ["a", ["b"]],
]


def fuzzed_line(draw: random.Random, source: list[bytes]) -> bytes:
    """A line of the file with wrong bytes, structure or types, or spliced with another line.

    It never contains a line break.
    """
    line = draw.choice(source)
    for _ in range(draw.randint(1, 3)):
        kind = draw.randrange(6)
        at = draw.randrange(len(line) + 1)
        if kind == 0 and line:
            line = line[:at] + bytes([draw.randrange(256)]) + line[at + 1 :]
        elif kind == 1:
            line = line[:at] + draw.choice(PIECES) + line[at:]
        elif kind == 2:
            line = line[:at] + line[min(len(line), at + draw.randint(1, 30)) :]
        elif kind == 3:
            other = draw.choice(source)
            line = line[:at] + other[draw.randrange(len(other) + 1) :]
        elif kind == 4:
            line = line[:at]
        else:
            try:
                record = json.loads(line)
                record[draw.choice(list(record))] = draw.choice(VALUES)
                line = json.dumps(record).encode()
            except (ValueError, TypeError, IndexError, AttributeError):
                line = line[:at] + draw.choice(PIECES) * draw.randint(1, 5) + line[at:]
    return line.replace(b"\n", b" ")


def read_everything(spelling: str, name: str) -> int:
    """Read ./input as the file `name` of a format, print the counts, return 0 if they add up.

    A file that could mean two things is refused in words, which is right as well.
    """
    try:
        return counted(spelling, name)
    except PageLLMError as error:
        print(f"\nrefused: {error}")
        print(json.dumps({"refused": Path("input").read_bytes().count(b"\n")}))
        return 0


def counted(spelling: str, name: str) -> int:
    """What read_everything prints and returns, for a file that can be read."""
    path, tally = Path("input"), Tally()
    is_items = name.startswith(("meta", "items"))
    records: Iterator
    if spelling == "sequences" and not is_items:
        records = read_sequences(path, tally, {})
    elif spelling in ("csv", "jsonl"):
        with open(path, encoding="utf-8", errors="replace") as file:
            first = file.readline().strip()
        names = first.split(",") if spelling == "csv" else ITEM_FIELDS if is_items else LOG_FIELDS
        columns = match(names, ITEM_COLUMNS if is_items else LOG_COLUMNS, {})
        records = (
            read_items(path, spelling, columns, tally)
            if is_items
            else read_log(path, spelling, columns, tally, {}, (1.0, 5.0))
        )
    else:
        records = parsed(path, parse_item if is_items else parse_review, tally)
    found = sum(1 for _ in records)
    print()
    passed, broken = tally.passed.total(), tally.broken.total()
    print(json.dumps({"read": tally.read, "kept": tally.kept, "passed": passed, "broken": broken}))
    adds_up = tally.read == tally.kept + passed + broken
    if spelling != "sequences" or is_items:  # a line of sequences holds several records
        adds_up = adds_up and found == tally.kept
    data = path.read_bytes() if path.stat().st_size < 1e7 else b""
    if data and spelling != "csv" and data[:2] != b"\x1f\x8b":  # a CSV record may span lines
        adds_up = adds_up and tally.read == data.count(b"\n") + (not data.endswith(b"\n"))
    return 0 if adds_up else 1


def every_input(trials: Trials, lines: int) -> None:
    """Mutated lines through every reader, directories of them through prepare, and bombs."""
    shop = synthetic.make(30, 20, seed=1)
    sources = {}
    for spelling in ("amazon2014", "amazon2018", "amazon2023", "sequences", "csv", "jsonl"):
        folder = trials.root / "spellings" / spelling
        synthetic.write(shop, folder, spelling, compress=False)
        sources[spelling] = {
            path.name: path.read_bytes().split(b"\n")[:-1] for path in sorted(folder.iterdir())
        }
    bar = tqdm(total=lines, desc="inputs", unit="line", mininterval=1.0)
    while trials.counts["inputs"] < lines:
        spelling = trials.random.choice(list(sources))
        name, source = trials.random.choice(list(sources[spelling].items()))
        header = source[:1] if spelling == "csv" else []
        batch = [fuzzed_line(trials.random, source[len(header) :]) for _ in range(1000)]
        folder = trials.root / "fuzz"
        shutil.rmtree(folder, ignore_errors=True)
        folder.mkdir()
        (folder / "input").write_bytes(b"\n".join(header + batch) + b"\n")
        ended = forked(
            folder,
            partial(read_everything, spelling, name),
            arm=lambda: signal.alarm(60),
        )
        trials.counts["inputs"] += len(batch)
        bar.update(len(batch))
        trials.expect(
            ended.code == 0 and ended.peak_mb < 2000,
            f"{spelling} {name}: exit {ended.code}, {ended.peak_mb:.0f} MB",
            ended,
        )
        if ended.code:
            keep = trials.root / f"failed-{len(trials.failures)}"
            keep.write_bytes((folder / "input").read_bytes())
        else:
            for what, number in json.loads(ended.text.splitlines()[-1]).items():
                trials.counts[f"rows {what}"] += number
    bar.close()
    directories(trials, sources, max(3, lines // 5000))
    odd_shops(trials, all_ratings=lines >= 50_000)
    bombs(trials, large=lines >= 50_000)


def directories(trials: Trials, sources: dict, count: int) -> None:
    """prepare directories in which some or all lines are malformed: success or one message."""
    for _ in range(count):
        folder = trials.root / "fuzz"
        shutil.rmtree(folder, ignore_errors=True)
        (folder / "raw").mkdir(parents=True)
        spelling = trials.random.choice(list(sources))
        share = trials.random.choice([0.0, 0.005, 0.3, 1.0])
        for name, source in sources[spelling].items():
            rows = [
                line if trials.random.random() >= share else fuzzed_line(trials.random, source)
                for line in source
            ]
            (folder / "raw" / name).write_bytes(b"\n".join(rows))
        options = ["--dataset", "shop", "--raw", "raw"]
        if trials.random.random() < 0.5:
            options += ["--max_broken", "1"]
        ended = forked(
            folder,
            partial(main, prepare.Config, prepare.run, "pagellm.prepare", options),
            arm=lambda: signal.alarm(60),
        )
        trials.counts["directories prepared" if ended.code == 0 else "directories refused"] += 1
        trials.expect(
            ended.code in (0, 2) and "Traceback" not in ended.text,
            f"prepare: exit {ended.code}",
            ended,
        )
        left = [p.name for p in (folder / "data").glob(".*")] if (folder / "data").exists() else []
        trials.expect(not left, f"prepare left {left}")


def odd_shops(trials: Trials, all_ratings: bool) -> None:
    """Run extreme shops through all stages: each ends, or stops with one clear message."""
    rows = {
        "nothing": [],
        "one user, one item": [("u", "i")],
        "one user": [("u", f"i{n}") for n in range(30)],
        "one item": [(f"u{n}", "i") for n in range(30)],
        "everybody has everything": [(f"u{n}", f"i{m}") for n in range(12) for m in range(9)],
        "two of each": [(f"u{n}", f"i{m}") for n in range(2) for m in range(2)],
        "ids that look alike": [
            (u, i) for u in ("a", "\u0430", "A", "a ", "\u212b", "\u00c5") for i in "xyzvw"
        ],
    }
    kinds = ("", "5", "mixed")
    for n, (name, pairs) in enumerate(rows.items()):
        for ratings in kinds if all_ratings else kinds[n % 3 : n % 3 + 1]:
            folder = trials.root / "fuzz"
            shutil.rmtree(folder, ignore_errors=True)
            (folder / "raw").mkdir(parents=True)
            lines = ["user_id,item_id" + (",rating" if ratings else "")]
            lines += [
                f"{u},{i}" + (f",{ratings if ratings == '5' else 1 + n % 5}" if ratings else "")
                for n, (u, i) in enumerate(pairs)
            ]
            (folder / "raw" / "log.csv").write_text("\n".join(lines) + "\n")
            for verb, module in VERBS.items():
                words = merged(SMALL[verb], "--dataset odd")
                if verb == "prepare":
                    words = ["--dataset", "odd", "--raw", "raw", "--k_core", "0"]
                ended = forked(
                    folder,
                    partial(main, module.Config, module.run, f"pagellm {verb}", words),
                    arm=lambda: signal.alarm(120),
                )
                trials.expect(
                    ended.code in (0, 2) and "Traceback" not in ended.text,
                    f"{name}, ratings {ratings or 'none'}: {verb} exit {ended.code}",
                    ended,
                )
                if ended.code:
                    break
            trials.counts["odd shops: all stages" if ended.code == 0 else "odd shops: refused"] += 1


def bombs(trials: Trials, large: bool) -> None:
    """A gigabyte of zeros in a megabyte of gzip, a line of 100 MB, very deep brackets."""

    def bomb(write: Callable) -> None:
        folder = trials.root / "fuzz"
        shutil.rmtree(folder, ignore_errors=True)
        folder.mkdir()
        write(folder / "input")
        ended = forked(
            folder,
            lambda: read_everything("amazon2018", "reviews"),
            arm=lambda: signal.alarm(120),
        )
        trials.counts["bombs"] += 1
        trials.expect(
            ended.code == 0 and ended.peak_mb < 1500,
            f"bomb: exit {ended.code}, {ended.peak_mb:.0f} MB",
            ended,
        )

    def zeros(path: Path) -> None:
        with gzip.open(path, "wb", compresslevel=1) as file:
            for _ in range(1024):
                file.write(bytes(1 << 20))

    if large:
        bomb(zeros)
        bomb(lambda path: path.write_bytes(b'{"reviewerID": "' + b"a" * 100_000_000 + b'"}\n'))
    for piece in (
        b"[",
        b'{"a":',
        b"{'a': (",
        b"-",
        b"{'a': " + b"-" * 1000,
        b'"\\u',
        b"\xff\xfe",
        b"{'a':not ",
    ):
        many = piece * (900_000 // len(piece))
        bomb(lambda path, many=many: path.write_bytes(b"{'b': " + many + b"\n" + many))
