"""Cold start: which rows are removed, which stay, and what the study reports."""

import dataclasses
import json

import numpy as np
import pyarrow.parquet as pq
import pytest

from experiments import coldstart
from experiments.coldstart import drops, groups, thin
from pagellm.data import prepare
from pagellm.data.shop import load
from pagellm.stage.config import PageLLMError


@pytest.fixture(scope="module")
def root(tmp_path_factory):
    root = tmp_path_factory.mktemp("coldstart")
    prepare.run(prepare.Config(data=str(root / "data"), users=80, items=60))
    return root


def pairs(shop, keep):
    return set(zip(shop.user[keep].tolist(), shop.item[keep].tolist(), strict=True))


def test_half_of_every_users_train_rows_stays_and_nothing_else_moves(root, tmp_path):
    full = load(root / "data" / "synthetic")
    thin(full.path, tmp_path / "half", 0.5, 0)
    half = load(tmp_path / "half")
    for split in ("valid", "test"):
        assert pairs(half, half.rows(split, None)) == pairs(full, full.rows(split, None))
    before, after = full.csr("train").counts(), half.csr("train").counts()
    np.testing.assert_array_equal(after, np.ceil(before / 2))
    was, now = (pairs(s, s.rows("train", None)) for s in (full, half))
    gone = pairs(half, half.rows("unused", None))
    assert now | gone == was and not now & gone
    np.testing.assert_array_equal(half.item, full.item)
    reviews = set(zip(*half.reviews()[:2], strict=True))
    assert reviews <= now and reviews == set(zip(*full.reviews()[:2], strict=True)) & now
    assert half.catalogue.title == full.catalogue.title and half.truth is not None


def test_a_draw_depends_on_its_seed_and_is_made_once(root, tmp_path):
    source = root / "data" / "synthetic"
    for name, seed in (("a", 0), ("b", 0), ("c", 1)):
        thin(source, tmp_path / name, 0.5, seed)
    a, b, c = ((tmp_path / name / "interactions.parquet").read_bytes() for name in "abc")
    assert a == b != c
    thin(source, tmp_path / "a", 0.5, 0)
    with pytest.raises(PageLLMError, match="thinned differently"):
        thin(source, tmp_path / "a", 0.4, 0)


def test_groups_cut_the_users_at_their_train_rows(root):
    shop = load(root / "data" / "synthetic")
    users, count = np.arange(shop.n_users), shop.csr("train").counts()
    found = groups(shop, users, (4, 16))
    assert list(found) == ["all", "0–4", "5–16", "17+"] and found["all"].all()
    assert (sum(found[name].astype(int) for name in ("0–4", "5–16", "17+")) == 1).all()
    np.testing.assert_array_equal(found["5–16"], (count >= 5) & (count <= 16))


def test_drops_are_relative_to_full_and_paired():
    base = np.random.default_rng(0).random(50)
    full = {m: base for m in coldstart.METRICS}
    half = {m: 0.8 * base for m in coldstart.METRICS}
    few = np.arange(50) < 10
    records = drops(
        {"x": ([full, full], [half, half])}, {"all": few | True, "few": few, "nobody": few & False}
    )
    assert {r["users"] for r in records} == {"all", "few"} and len(records) == 6
    for record in records:
        mine = base[few] if record["users"] == "few" else base
        assert record["drop"] == pytest.approx(20) and record["full"] == pytest.approx(mine.mean())
        assert record["low"] <= record["difference"] == pytest.approx(-0.2 * mine.mean())
        assert record["count"] == len(mine) and record["difference"] <= record["high"] < 0


SMALL = {
    "pretrain": "--size nano --steps 4 --batch 8 --rating_batch 8 --words 300 --warmup 2",
    "sft": "--epochs 1 --batch 16 --eval_every 4 --max_history 8 --warmup 2 --k 6",
    "evaluate": "--k 6 --depth 40 --n_boot 20",
    "baselines": "--n_boot 20",
}


def test_the_study_compares_full_and_half_for_baselines_and_ours(root, tmp_path, capsys):
    (tmp_path / "settings.json").write_text(
        json.dumps({"popularity": {"settings": {}}, "EASE": {"settings": {"ridge": 20.0}}})
    )
    config = coldstart.Config(
        data=str(root / "data"),
        runs=str(tmp_path / "runs"),
        seeds=2,
        models="popularity,EASE",
        settings=str(tmp_path / "settings.json"),
        policies="sft",
        bins="10,20",
        **SMALL,
    )
    records = coldstart.run(config)
    assert {r["variant"] for r in records} == {"popularity", "EASE", 'SFT = "w/o reward"'}
    capsys.readouterr()
    assert coldstart.run(config) == records  # done already: nothing is trained again
    assert "| EASE | all (" in capsys.readouterr().out
    folder = tmp_path / "runs" / "coldstart"
    assert pq.read_table(folder / "synthetic.parquet").num_rows == len(records)
    full, half = (load(root / "data" / name) for name in ("synthetic", "synthetic-half-s1"))
    pages = pq.read_table(
        folder / "synthetic-half-s1" / "baselines" / "ease" / "pages.parquet"
    ).to_pydict()
    # EASE's own pages, given as run files of another library, make EASE's row.
    files = "+".join(
        str(folder / name / "baselines" / "ease" / "pages.parquet")
        for name in ("synthetic", "synthetic-half-s0", "synthetic-half-s1")
    )
    again = coldstart.run(dataclasses.replace(config, run_files=f"theirs={files}"))
    same = [{**r, "variant": "theirs"} for r in again if r["variant"] == "EASE"]
    assert [r for r in again if r["variant"] == "theirs"] == same and len(same) > 3
    with pytest.raises(PageLLMError, match="no run file"):
        coldstart.run(dataclasses.replace(config, run_files="theirs=a+b+c"))
    taken = pairs(half, half.rows(("train", "valid", "unused"), None))
    assert taken == pairs(full, full.rows(("train", "valid"), None))
    assert not set(zip(pages["user"], pages["item"], strict=True)) & taken
    ours = json.loads((folder / "synthetic-half-s1-s1" / "evaluate" / "config.json").read_text())
    assert ours["config"]["mask"] == coldstart.MASK


def test_what_the_study_sets_cannot_be_set(root):
    for stage, option in (
        ("baselines", "--seed 3"),
        ("evaluate", "--mask train"),
        ("sft", "--run x"),
    ):
        with pytest.raises(PageLLMError, match=f"--{stage} must not set {option[2:].split()[0]}"):
            coldstart.run(coldstart.Config(data=str(root / "data"), **{stage: option}))


def test_wrong_options_say_what_is_wanted():
    for bad in (
        {"share": 1.0},
        {"policies": "sft,gpt"},
        {"bins": "8,4"},
        {"bins": "a"},
        {"seeds": 0},
        {"run_files": "x=a+b"},
    ):
        with pytest.raises(PageLLMError, match=f"{next(iter(bad))}="):
            dataclasses.replace(coldstart.Config(), **bad)
