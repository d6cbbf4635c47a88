"""A judge reports; only one that people agree with turns themes off, and a server may fail."""

import csv
import json
import shutil
from pathlib import Path

import numpy as np
import pytest

from pagellm.stage.config import PageLLMError
from pagellm.storefront import ahead, judge, label
from pagellm.storefront.ahead import open_ahead
from pagellm.storefront.judge import Config, Http, Rules, trust
from pagellm.storefront.missions import Missions
from tests.storefront.test_remote import Model, said

MISSIONS = Missions(
    np.array([0, 0, 1, 2]), ["Milk", "Tea, loose", "Soap"], np.array([0, 0, 1]),
    np.array([0, 0, 0, 1]), 2,
)  # fmt: skip


@pytest.fixture(scope="module")
def kept(made, tmp_path_factory):
    """The rows of everybody are in the cache."""
    root = tmp_path_factory.mktemp("judged")
    shutil.copytree(f"{made['runs']}/synthetic", root / "synthetic")
    ahead.run(ahead.Config(people=5, **made | {"runs": str(root)}))
    return root


@pytest.fixture
def places(made, kept, tmp_path):
    shutil.copytree(kept / "synthetic", tmp_path / "synthetic")
    return made | {"runs": str(tmp_path)}


def folder(places):
    return Path(places["runs"]) / "synthetic" / "storefront"


def verdict(body):
    """What an honest model says: everything fits."""
    data = json.loads(body["messages"][1]["content"])
    return said(json.dumps({"fits": [True] * len(data["items"])}))


def test_rules_go_by_the_mission_of_most_categories():
    rules = Rules(MISSIONS)
    assert rules.fits("any", "Milk, Tea, loose, Soap", [0, 2, 3]) == [True, True, False]
    assert rules.fits("any", "Soap", [0, 3]) == [False, True]
    assert rules.fits("any", "Cheese", [0]) is None


def test_kappa_is_that_of_people_and_judge_and_ties_are_left_out():
    ids = {name: at for at, name in enumerate(("a", "b", "c", "d"))}
    labels = [{"pair": ("t", name), "fits": fits, "rater": rater}
              for name, fits, rater in (("a", True, "x"), ("b", True, "x"), ("b", False, "y"),
                                        ("c", False, "x"), ("d", False, "x"))]  # fmt: skip
    n, k = trust(Rules(MISSIONS), labels, {"t": "Milk"}, ids)
    # a agrees, c does not, d agrees; b is a tie
    assert n == 3 and k == pytest.approx(0.4)
    assert trust(Rules(MISSIONS), labels[:1], {"t": "Milk"}, ids) == (1, 0.0)


def test_a_judge_that_nobody_vouches_for_reports_and_stops_nothing(places, capsys):
    found = judge.run(Config(rows=30, **places))
    lines = (folder(places) / "judge" / "verdicts.jsonl").read_text().splitlines()
    assert found["rows"] == len(lines) == 30 and not found["trusted"]
    assert found["lower"] <= found["fitting"] / 30 <= found["upper"]
    assert "reports and stops nothing" in capsys.readouterr().out
    assert not (folder(places) / "off.json").exists()
    users = open_ahead(ahead.Config(**places)).store.shop.user_ids
    text = "".join(path.read_text() for path in (folder(places) / "judge").iterdir())
    assert not any(f'"{user}"' in text for user in users)
    assert {"title", "items", "fits", "passes"} <= set(json.loads(lines[0]))


def filled(places, wrong=0.0):
    """Pairs that somebody judged as the rules would, but for a share of them."""
    label.run(label.Config(pairs=240, **places))
    path, out = folder(places) / "label" / "labels.csv", folder(places) / "filled.csv"
    opened = open_ahead(ahead.Config(**places))
    rules, number = Rules(opened.store.front.missions), opened.store.front.catalogue.ids
    with open(path, newline="", encoding="utf-8") as file:
        lines = list(csv.DictReader(file))
    with open(out, "w", newline="", encoding="utf-8") as file:
        writer = csv.DictWriter(file, lines[0])
        writer.writeheader()
        for at, line in enumerate(lines):
            fits = rules.fits("", line["about"], [number.index(line["item"])])[0]
            fits ^= at < wrong * len(lines)
            writer.writerow(line | {"fits": int(fits), "rater": "ann"})
    return str(out)


def test_a_trusted_judge_that_likes_too_few_rows_turns_themes_off(places, monkeypatch, capsys):
    labels = filled(places)
    found = judge.run(Config(rows=200, labels=labels, **places))
    assert found["trusted"] and found["labels"] >= 200 and found["kappa"] == pytest.approx(1.0)
    assert not (folder(places) / "off.json").exists()  # the rows are good
    honest, calls = judge.judged, []

    def harsh(*given):
        calls.append(honest(*given))
        return [line | {"passes": at % 10 < 7} for at, line in enumerate(calls[-1])]

    monkeypatch.setattr(judge, "judged", harsh)
    judge.run(Config(rows=150, labels=labels, **places))
    assert "too few to stop themes by" in capsys.readouterr().out
    assert not (folder(places) / "off.json").exists()
    judge.run(Config(rows=200, **places))
    assert not (folder(places) / "off.json").exists()  # without labels it stops nothing
    judge.run(Config(rows=200, labels=labels, **places))
    assert "rows fit their themes" in (folder(places) / "off.json").read_text()
    assert open_ahead(ahead.Config(**places)).switch.is_off()


def test_a_judge_that_people_disagree_with_is_not_trusted(places):
    found = judge.run(Config(rows=20, labels=filled(places, wrong=0.5), **places))
    assert found["labels"] >= 200 and found["kappa"] < 0.6 and not found["trusted"]


def test_a_model_judges_and_is_told_no_person(places):
    with Model(verdict) as model:
        options = {"backend": "http", "judge_url": model.url, "judge_model": "m"}
        found = judge.run(Config(rows=6, **options, **places))
    assert found["fitting"] == 6 and found["judge"].startswith("http m ")
    users = open_ahead(ahead.Config(**places)).store.shop.user_ids
    assert not any(user in json.dumps(body) for body in model.seen for user in users)


@pytest.mark.parametrize(
    "answer",
    [
        '{"fits": [true]}',
        '{"fits": "all of them"}',
        '{"fits": [1, 1, 1, 1, 1]}',
        "They all fit.",
        '{"fits": [true, true',
    ],
)
def test_an_answer_of_no_use_is_no_verdict(answer):
    with Model(lambda body: said(answer)) as model:
        asked = Http(model.server(retries=2).chat, ["a", "b", "c", "d", "e"])
        assert asked.fits("Row", "Milk", range(5)) is None
    assert len(model.seen) == 2


def test_a_dead_server_ends_the_command_and_stops_nothing(places):
    with Model(lambda body: 500) as model:
        options = {"backend": "http", "judge_url": model.url, "judge_model": "m", "retries": 0}
        with pytest.raises(PageLLMError, match="gave no verdict"):
            judge.run(Config(rows=6, **options, **places))
    assert not (folder(places) / "judge").exists()
    assert not (folder(places) / "off.json").exists()


def test_wrong_options_are_refused():
    for options in ({"backend": "people"}, {"backend": "http"}, {"judge_url": "http://x"},
                    {"rows": 0}):  # fmt: skip
        with pytest.raises(PageLLMError):
            Config(**options)


def test_without_rows_there_is_nothing_to_judge(made, tmp_path):
    shutil.copytree(f"{made['runs']}/synthetic", tmp_path / "synthetic")
    with pytest.raises(PageLLMError, match="Make rows first"):
        judge.run(Config(**made | {"runs": str(tmp_path)}))
