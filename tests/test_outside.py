"""Outside libraries: their process reads our tables and writes a run file that ours takes in."""

import json
import subprocess
import sys
from pathlib import Path

import numpy as np
import pyarrow.parquet as pq
import pytest

from pagellm import metrics
from pagellm.data import prepare
from pagellm.data.shop import load
from pagellm.evaluate import seen_rows
from pagellm.policy import Scorer

sparse = pytest.importorskip("scipy.sparse", reason="the dev extra is not installed")
from experiments import outside, runfile  # noqa: E402


@pytest.fixture(scope="module")
def shop(tmp_path_factory):
    root = tmp_path_factory.mktemp("outside")
    prepare.run(prepare.Config(data=str(root), users=80, items=60))
    return load(root / "synthetic")


def test_it_reads_train_and_validation_positives_and_nothing_of_test(shop):
    split = outside.read(shop.path)
    assert set(split) == {"train", "valid"}
    for name, matrix in split.items():
        keep = shop.rows(name)
        dense = np.zeros((shop.n_users, shop.n_items), np.float32)
        dense[shop.user[keep], shop.item[keep]] = 1
        np.testing.assert_array_equal(matrix.toarray(), dense)


def test_its_lists_are_the_best_unseen_and_its_ndcg_is_ours(shop):
    split = outside.read(shop.path)
    full = np.random.default_rng(0).integers(5, size=(shop.n_users, shop.n_items)).astype(np.float32)
    users = np.flatnonzero(np.diff(split["valid"].indptr))
    lists = list(outside.top(lambda some: full[some], split["train"], users, 30, seed=0))
    for user, items, scores in lists:
        unseen = np.setdiff1d(np.arange(shop.n_items), split["train"][user].indices)
        assert set(items) <= set(unseen) and len(set(items)) == len(items) == min(30, len(unseen))
        np.testing.assert_array_equal(scores, np.sort(full[user, unseen])[::-1][:30])
    want = [metrics.ndcg(split["valid"][user].indices.tolist(), items.tolist(), 100) for user, items, _ in lists]
    assert outside.mean_ndcg(lists, split["valid"]) == pytest.approx(np.mean(want))


@pytest.mark.parametrize(("model", "library"), [("bpr", "implicit"), ("multivae", "cornac")])
def test_a_librarys_run_file_is_taken_in(shop, tmp_path, model, library):
    pytest.importorskip(library, reason="the outside library is not installed")
    script, out = Path(outside.__file__), tmp_path / "runs" / "x.parquet"
    command = [sys.executable, str(script), "--data", str(shop.path), "--model", model, "--out", str(out),
               "--minutes", "0", "--refit"]
    subprocess.run(command, check=True, cwd=tmp_path, capture_output=True)
    about = json.loads(out.with_suffix(".json").read_text())
    assert len(about["tried"]) == 1 and about["settings"].keys() == outside.GRIDS[model].keys() and about["refit"]
    users = Scorer(shop, "test").users
    ranked, notes = runfile.read_run(out, shop, users, seen_rows(shop, "test", "train+valid"), 10, 15)
    assert "0 users without a list" in notes and (ranked.item[:, 0] >= 0).all()
    assert pq.read_table(out).column_names == ["user", "item", "score"]


def test_missing_data_are_named(tmp_path, capsys):
    assert outside.main(["--data", str(tmp_path / "toys"), "--model", "bpr", "--out", str(tmp_path / "x.parquet")]) == 2
    assert "make prepare DATASET=toys" in capsys.readouterr().err
