"""A short `make torture`: a few trials of each suite, by the same command.

The command forks, so it runs in a process of its own.
"""

import os
import random
import re
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from experiments.stress.malformed import fuzzed_line
from experiments.stress.silent import MUTATIONS, Result, clean, judge
from experiments.stress.torture import Config
from experiments.stress.trials import merged
from pagellm.stage.config import PageLLMError

ROOT = Path(__file__).parents[2]


def python(*words, seconds=1800):
    """Run a Python process; returns its exit code and its output."""
    ended = subprocess.run(
        [sys.executable, *words],
        cwd=ROOT,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        timeout=seconds,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
    )
    return ended.returncode, ended.stdout


@pytest.fixture(scope="module")
def counts():
    """What was tried, in a short run of all kinds of harm; nothing broke."""
    words = "--suites kill,signal,fault,ranks,input,silent,soak --seed 1 --moments 1 --inputs 3000"
    code, said = python(
        "-m",
        "experiments.stress.torture",
        *words.split(),
        "--minutes",
        "0.01",
        "--rounds",
        "5",
        "--mutations",
        "30",
    )
    assert code == 0 and "nothing broke" in said, said[-3000:]
    found = re.findall(r"^ +([0-9,]+)  (.+)$", said, re.MULTILINE)
    return {what: int(n.replace(",", "")) for n, what in found}


@pytest.mark.parametrize(
    "counted, least",
    [
        ("killed", 3),
        ("stopped by a signal", 3),
        ("faults", 40),
        ("ranks killed", 1),
        ("inputs", 3000),
        ("bombs", 8),
        ("odd shops: all stages", 1),
        ("odd shops: refused", 1),
        ("soak: rounds", 5),
        ("silent faults: nothing", 2),
        ("silent faults: named", 6),
        ("silent faults: refused", 2),
    ],
)
def test_nothing_breaks_of_all_that_was_tried(counts, counted, least):
    assert counts[counted] >= least, counts


def test_rows_read_are_kept_passed_over_or_broken(counts):
    parts = [counts.get(f"rows {what}", 0) for what in ("kept", "passed", "broken")]
    assert counts["rows read"] == sum(parts)
    assert counts["rows read"] + counts.get("rows refused", 0) > 2000


def test_a_job_ends_soon_after_one_of_its_processes(counts):
    assert counts["seconds until the job had ended"] < 60


NOTICE = """
import sys, tempfile
from pathlib import Path
from experiments.stress.silent import MUTATIONS, Result, clean, judge
from experiments.stress.trials import Trials
with tempfile.TemporaryDirectory() as root:
    trials = Trials(Path(root) / "bench", 0)
    folder = trials.trial("sft")
    assert trials.stage(folder, "sft", "--seed 1").code == 0
    trials.same(folder, "sft", "with another seed")
    (folder / "runs" / ".x.tmp").write_text("")
    trials.same(folder, "sft", "with something left behind")
    trials.expect(trials.stage(folder, "sft", "--seed 2").code == 0, "a changed seed was refused")
print(*trials.failures, sep="\\n")
"""


def test_it_would_notice():
    """The checks fail on other bytes, leftover files and a failing command."""
    code, said = python("-c", NOTICE)
    assert code == 0, said
    for words in ("model.pt", "left behind", "a changed seed was refused"):
        assert words in said


MIDLINE = """
import os, signal, sys, tempfile
from pathlib import Path
from tqdm import tqdm
from experiments.stress import children
children.TRIAL_SECONDS = 1
for _ in tqdm(range(1), "before"):
    pass

def die():
    tqdm.get_lock().acquire()
    os.kill(os.getpid(), signal.SIGKILL)

def hang():
    while True:
        pass

with tempfile.TemporaryDirectory() as folder:
    print("killed", children.forked(Path(folder), die).code, flush=True)
    for _ in tqdm(range(3), "after", mininterval=0):
        pass
    hung = children.forked(Path(folder), hang)
    print("hung", hung.code, "in hang" in hung.text)
"""


def test_a_trial_killed_while_it_draws_or_hanging_stops_nobody():
    """A killed child leaves no lock; a hanging one is shown and killed, even if signals are off."""
    # a shell's background jobs inherit ignored signals
    before = signal.signal(signal.SIGQUIT, signal.SIG_IGN)
    try:
        code, said = python("-c", MIDLINE, seconds=60)
    finally:
        signal.signal(signal.SIGQUIT, before)
    assert code == 0 and "killed -9" in said and "hung -9 True" in said, said


def test_fuzzed_lines_are_seeded_and_stay_lines():
    lines = [b'{"a": 1}', b"u i j k"]
    first, second = (
        [fuzzed_line(random.Random(seed), lines) for seed in range(300)] for _ in range(2)
    )
    assert first == second and len(set(first)) > 200 and not any(b"\n" in line for line in first)


def test_a_silent_fault_would_be_noticed(tmp_path):
    """Other tables without a new line, or with one about something else, are a silent fault."""
    before = Result([1, 2], "read log.csv\n2 rows")
    assert judge(before, Result([1, 2], "read log.csv\n3 rows"), ()) == "nothing"
    assert judge(before, Result([1], "read log.csv\n2 rows"), ("rows",)) == "silent"
    assert judge(before, Result([1], "read log.csv\n1 row"), ("price",)) == "silent"
    assert judge(before, Result([1], "read log.csv\n1 row"), ("1 ROW",)) == "named"
    assert judge(before, Result(None, "bad column x", True), ("column x",)) == "refused"
    assert judge(before, Result(None, "bad", True), ("column x",)) == "silent"


def test_clean_shops_are_of_every_form_and_each_mutation_changes_the_files():
    shops = [clean(random.Random(n)) for n in range(40)]
    assert {shop.form for shop in shops} == {"csv", "jsonl", "parquet"}
    assert {len(shop.log) for shop in shops} == {1, 2, 3}
    for name, change in MUTATIONS.items():
        changed = []
        for n in range(40):
            shop, draw = clean(random.Random(n)), random.Random(n)
            applies = change(shop, draw) is not None
            changed += [repr(shop) != repr(clean(random.Random(n)))] if applies else []
        assert any(changed), name


def test_options():
    assert merged("--a 1 --b 2", "--b 3") == ["--a", "1", "--b", "3"]
    with pytest.raises(PageLLMError, match="suites"):
        Config(suites="kil")
