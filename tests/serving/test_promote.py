"""A run becomes the live one only if its pages are not worse; the one before can come back."""

import json
import os

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from pagellm.serving import promote
from pagellm.serving.promote import Config, run
from pagellm.stage.config import PageLLMError, parse


def make_run(runs, name, values, data="day-1", policy="ppo", evaluated=True):
    """A run directory as far as promote reads it: `values` is every user's NDCG@100."""
    folder = runs / name
    (folder / policy).mkdir(parents=True)
    (folder / policy / "done").write_text(json.dumps({"id": f"id-of-{name}"}))
    if evaluated:
        where = folder / "evaluate"
        (where / policy).mkdir(parents=True)
        config = {"policies": f"popularity,{policy}", "split": "test", "mask": "train+valid"}
        made = {"config": config, "inputs": {"data": data, policy: f"id-of-{name}"}}
        (where / "config.json").write_text(json.dumps(made))
        table = {"user": np.arange(len(values)), "NDCG@100": np.asarray(values, float)}
        table["redundancy"] = -table["NDCG@100"]
        pq.write_table(pa.table(table), where / policy / "per_user.parquet")
        (where / "done").write_text("{}")


@pytest.fixture
def runs(tmp_path):
    values = np.random.default_rng(0).uniform(0.2, 0.6, 200)
    make_run(tmp_path, "v1", values)
    make_run(tmp_path, "v2", values + 0.05)
    make_run(tmp_path, "v3", values - 0.05)
    return tmp_path


def do(runs, *words):
    return run(parse(Config, ["--runs", str(runs), *words], "pagellm promote"))


def live(runs):
    return os.readlink(runs / "live")


def test_a_better_run_becomes_live_a_worse_one_does_not(runs, capsys):
    assert do(runs, "v1") == "v1" == live(runs)
    assert do(runs, "v2") == "v2" == live(runs)
    assert "ahead: NDCG@100" in capsys.readouterr().out
    with pytest.raises(PageLLMError, match=r"v3 is behind v2, which stays live.*\n.*--force"):
        do(runs, "v3")
    assert live(runs) == "v2"
    assert do(runs, "v3", "--force") == "v3" == live(runs)
    assert capsys.readouterr().out.endswith("; v2 was live before\n")
    assert (runs / "live" / "ppo" / "done").exists()
    do(runs, "v3")
    assert "live already" in capsys.readouterr().out


def test_going_back_goes_to_the_run_before_and_then_to_the_one_before_that(runs):
    for name in ("v1", "v2", "v3"):
        do(runs, name, "--force")
    assert [do(runs, "--back"), do(runs, "--back")] == ["v2", "v1"]
    with pytest.raises(PageLLMError, match="no run was live before v1"):
        do(runs, "--back")
    lines = [json.loads(x) for x in (runs / "live.promotions.jsonl").read_text().splitlines()]
    assert [(x["from"], x["to"]) for x in lines] == [
        ("", "v1"), ("v1", "v2"), ("v2", "v3"), ("v3", "v2"), ("v2", "v1"),
    ]  # fmt: skip
    assert lines[1]["id"] == "id-of-v2" and lines[1]["policy"] == "ppo" and lines[1]["forced"]


def test_a_kill_between_the_line_and_the_link_changes_nothing(runs, monkeypatch):
    do(runs, "v1")
    do(runs, "v2")

    def killed(link, to):
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(promote, "move", killed)
        with pytest.raises(KeyboardInterrupt):
            do(runs, "v3", "--force")
    assert live(runs) == "v2" and do(runs, "--back") == "v1"


def test_runs_of_other_data_are_compared_by_their_means(runs, capsys):
    do(runs, "v1")
    make_run(runs, "next-day", [0.414] * 300, data="day-2")  # within 1%: level
    make_run(runs, "bad-day", [0.3] * 300, data="day-2")
    with pytest.raises(PageLLMError, match="scored on other data, so only the means"):
        do(runs, "bad-day")
    assert do(runs, "next-day") == "next-day"


def test_a_metric_of_which_less_is_better(runs):
    make_run(runs, "low", [0.9] * 200)  # redundancy -0.9: better
    do(runs, "v1")
    assert do(runs, "low", "--metric", "redundancy") == "low"
    with pytest.raises(PageLLMError, match="v1 is behind low"):
        do(runs, "v1", "--metric", "redundancy")


def test_what_cannot_be_promoted_is_refused(runs):
    make_run(runs, "blind", [], evaluated=False)
    (runs / "empty").mkdir()
    for words, message in (
        (["blind"], r"was not evaluated.*\n.*evaluate .*blind"),
        (["empty"], "holds no finished policy"),
        (["nowhere"], "holds no finished policy"),
        (["--back"], "no run was live before this one"),
        ([], "want a run, or --back"),
        (["v1", "--back"], "want a run, or --back"),
        (["../v1"], "want a name below"),
        (["live"], "is the name of the link"),
        (["v1", "--live", "v2"], "v2 is a run and no link"),
        (["v1", "v2"], "unexpected 'v2'"),
        (["v1", "--metric", "luck"], "it has NDCG@100, redundancy"),
    ):
        with pytest.raises(PageLLMError, match=message):
            do(runs, *words)
    assert not (runs / "live").exists()
    assert do(runs, "blind", "--force") == "blind"


def test_the_name_of_the_link_is_no_run(runs):
    for words in (["live"], ["live", "--force"], [f"{runs}/live/"], ["v1", "--live", "v1"]):
        with pytest.raises(PageLLMError, match="name of the link.*\n.*pagellm runs"):
            do(runs, *words)
    assert not (runs / "live").exists()
    do(runs, "v1", "--live", "staging")
    with pytest.raises(PageLLMError, match="staging is a link itself, to v1"):
        do(runs, "staging")


def test_a_run_is_known_by_its_directory_too(runs):
    """As a shell completes it."""
    assert do(runs, f"{runs}/v1/") == "v1" == live(runs)
