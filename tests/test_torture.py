"""The short form of `make torture`: a few of each kind of harm, by the same code."""

import json
import random
import signal

import pytest

from experiments.torture import VERBS, Bench, Config, fuzzed_line, merged
from pagellm.config import PageLLMError


@pytest.fixture(scope="module")
def bench(tmp_path_factory):
    return Bench(tmp_path_factory.mktemp("torture") / "bench", seed=1)


@pytest.fixture(autouse=True)
def nothing_broke(request):
    yield
    if "bench" in request.fixturenames:
        bench = request.getfixturevalue("bench")
        broken, bench.failures = bench.failures, []
        assert not broken, "\n".join(broken)


@pytest.mark.parametrize("verb", VERBS)
def test_a_killed_stage_carries_on_and_ends_with_the_same_bytes(bench, verb):
    bench.kill(verb)
    assert bench.counts["killed"] + bench.counts["finished before"] > 0


@pytest.mark.parametrize("signum", [signal.SIGTERM, signal.SIGINT])
def test_a_signal_saves_first_and_says_how_to_go_on(bench, signum):
    bench.signal("pretrain", signum)


def test_a_signal_in_the_middle_leaves_a_checkpoint(bench):
    """save_every is far away, so the checkpoint can only come from the signal."""
    folder, place = bench.trial("sft"), bench.place(bench.root / "trial", "sft")
    more = "--save_every 1000 --epochs 200"
    ended = bench.stage(folder, "sft", more, signum=signal.SIGTERM, after=1.5)
    if ended.code == -signal.SIGTERM:
        pytest.skip("the child had not begun after 1.5 seconds: a very busy machine")
    assert ended.code == 143 and ended.text.count("stopped by SIGTERM") == 1, ended.text
    if (place / "log.jsonl").exists():      # training had begun
        step = json.loads((place / "log.jsonl").read_text().splitlines()[-1])["step"]
        assert (place / f"step-{step:08d}.pt").exists() and f"step {step}" in ended.text


@pytest.mark.parametrize("fault", ["full_disk", "no_rights", "lost_input", "two_at_once", "not_a_number",
                                   "little_memory"])
def test_faults_are_refused_in_one_message(bench, fault):
    getattr(bench, fault)()


def test_two_ranks(bench):
    bench.ranks()
    assert bench.counts["seconds until the job had ended"] < 60


def test_rubbish(bench):
    bench.input(5000)
    assert bench.counts["inputs"] >= 5000
    assert bench.counts["rows read"] == bench.counts["rows kept"] + bench.counts["rows broken"] > 4000


def test_the_bench_notices_a_difference(bench):
    """Or no other test here would mean anything."""
    folder = bench.trial("sft")
    assert bench.stage(folder, "sft", "--seed 1").code == 0
    bench.same(folder, "sft", "with another seed")
    (folder / "runs" / ".x.tmp").write_text("")
    bench.same(folder, "sft", "with something left behind")
    found, bench.failures = bench.failures, []
    assert len(found) == 3 and "model.pt" in found[0] and "left behind" in found[2]


def test_fuzzed_lines_are_seeded_and_stay_lines():
    lines = [b'{"a": 1}', b"u i j k"]
    first, second = ([fuzzed_line(random.Random(seed), lines) for seed in range(300)] for _ in range(2))
    assert first == second and len(set(first)) > 200 and not any(b"\n" in line for line in first)


def test_options():
    assert merged("--a 1 --b 2", "--b 3") == ["--a", "1", "--b", "3"]
    with pytest.raises(PageLLMError, match="suites"):
        Config(suites="kil")
