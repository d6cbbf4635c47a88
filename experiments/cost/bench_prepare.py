"""How fast and in how much memory `prepare` reads a large review file.

    python -m experiments.cost.bench_prepare --lines 5000000        minutes; 4 GB of temporary disk
    python -m experiments.cost.bench_prepare --processes 2 --spelling 2023

Writes a review file with texts of realistic length and prepares it in a child process. Prints lines
a second, the processor time of all its processes and of the first alone (while the first works, the
others mostly wait), the peak memory of the largest, then one line of JSON.
"""

import json
import os
import platform
import random
import resource
import subprocess
import sys
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path

from tqdm import tqdm

from pagellm.stage.command import main
from pagellm.stage.config import check

__all__ = ["Config", "run", "write_reviews"]


CHILD = """
import resource, sys
from pagellm.stage.command import main
from pagellm.data import prepare
told = sys.argv.pop()
code = main(prepare.Config, prepare.run, "pagellm prepare")
used = resource.getrusage(resource.RUSAGE_SELF)
open(told, "w").write(str(used.ru_utime + used.ru_stime))
sys.exit(code)
"""
SENTENCES = 2000  # number of different sentences that texts are made of
LINE = {
    "2014": '{{"reviewerID": "A{user:012d}", "asin": "B{item:09d}", "reviewerName": "J. Doe", '
    '"helpful": [0, 2], "reviewText": "{text}", "overall": {rating}.0, "summary": "{title}", '
    '"unixReviewTime": {time}, "reviewTime": "02 28, 2014"}}\n',
    "2018": '{{"overall": {rating}.0, "verified": true, "reviewerID": "A{user:012d}", '
    '"asin": "B{item:09d}", "reviewText": "{text}", "summary": "{title}", '
    '"unixReviewTime": {time}}}\n',
    "2023": '{{"rating": {rating}.0, "title": "{title}", "text": "{text}", "images": [], '
    '"asin": "B{item:09d}", "parent_asin": "B{item:09d}", "user_id": "A{user:027d}", '
    '"timestamp": {time}923, "helpful_vote": 0, "verified_purchase": true}}\n',
}


@dataclass(frozen=True, kw_only=True)
class Config:
    """Generate a review file, prepare it, report speed and peak memory."""

    lines: int = 200_000  # number of review lines to generate
    characters: int = 450  # mean length of a review text
    folder: str = ""  # directory for the file; empty: the system's temporary directory
    seed: int = 0  # seed of the generated file
    spelling: str = "2018"  # release whose format the lines have: 2014, 2018 or 2023
    processes: int = 1  # processes of prepare

    def __post_init__(self):
        check(
            self,
            spelling=(self.spelling in LINE, ", ".join(LINE)),
            processes=(self.processes >= 0, "0 or more"),
            lines=(self.lines >= 1000, "1000 or more"),
            characters=(self.characters >= 1, "1 or more"),
        )


def write_reviews(path: Path, config: Config) -> None:
    """Write a review file: about 10 reviews a user and 50 an item, both skewed.

    Texts' lengths follow an exponential distribution, as those of real reviews do.
    """
    draw = random.Random(config.seed)
    words = (
        "great the sound of this pedal is not what I expected but works with my old amplifier and "
        "a little &#34;patience&#34; price quality"
    ).split()
    sentences = [
        " ".join(draw.choices(words, k=draw.randint(4, 20))) + ". " for _ in range(SENTENCES)
    ]
    mean = sum(map(len, sentences)) / SENTENCES
    line = LINE[config.spelling]
    users, items = max(50, config.lines // 10), max(20, config.lines // 50)
    with open(path, "w", encoding="utf-8") as file:
        for _ in tqdm(range(config.lines), desc="  writing", unit=" lines", unit_scale=True):
            length = 1 + int(draw.expovariate(mean / config.characters))
            text = "".join(draw.choices(sentences, k=length))
            user, item = int(users * draw.random() ** 1.5), int(items * draw.random() ** 2)
            rating, day = (
                draw.choices((1, 2, 3, 4, 5), (5, 5, 10, 20, 60))[0],
                draw.randint(12_000, 17_700),
            )
            file.write(
                line.format(
                    rating=rating,
                    user=user,
                    item=item,
                    text=text,
                    title=text[:30],
                    time=86_400 * day,
                )
            )


def run(config: Config) -> dict:
    """Print and return lines, bytes, seconds, processor seconds, lines a second, peak MiB.

    first_seconds   processor seconds of the first process, without those that read for it
    """
    with tempfile.TemporaryDirectory(dir=config.folder or None) as folder:
        raw = Path(folder) / "raw" / "bench"
        raw.mkdir(parents=True)
        write_reviews(raw / "bench_5.json", config)
        started = time.perf_counter()
        told = Path(folder) / "first"
        command = [
            sys.executable,
            "-c",
            CHILD,
            "--dataset",
            "bench",
            "--data",
            folder,
            "--processes",
            str(config.processes),
            str(told),
        ]
        subprocess.run(command, check=True, env={**os.environ, "OMP_NUM_THREADS": "1"})
        seconds = time.perf_counter() - started
        # The largest resident set of any child; KiB on Linux, bytes on a Mac.
        used = resource.getrusage(resource.RUSAGE_CHILDREN)
        peak = used.ru_maxrss / (1 << 20 if sys.platform == "darwin" else 1 << 10)
        size, first = (raw / "bench_5.json").stat().st_size, float(told.read_text())
    busy = used.ru_utime + used.ru_stime
    result = {
        "bench": "prepare",
        "lines": config.lines,
        "spelling": config.spelling,
        "processes": config.processes,
        "bytes": size,
        "seconds": round(seconds, 1),
        "processor_seconds": round(busy, 1),
        "first_seconds": round(first, 1),
        "lines_per_second": round(config.lines / seconds),
        "peak_mib": round(peak),
        "python": platform.python_version(),
        "cpus": os.cpu_count(),
    }
    print(
        f"{config.lines:,} lines, {size / 1e9:.2f} GB: {seconds:.1f} s ({busy:.1f} of processors, "
        f"{first:.1f} of the first), "
        f"{result['lines_per_second']:,} lines/s, peak {peak:,.0f} MiB"
    )
    print(json.dumps(result))
    return result


if __name__ == "__main__":
    raise SystemExit(main(Config, run, "experiments.cost.bench_prepare"))
