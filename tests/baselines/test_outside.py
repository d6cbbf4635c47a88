"""Outside libraries: their process reads prepared data and writes a run file that ours reads."""

import importlib.util
import json
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pyarrow.parquet as pq
import pytest

sparse = pytest.importorskip("scipy.sparse", reason="the dev extra is not installed")


from pagellm.baselines import outside, runfile  # noqa: E402
from pagellm.data import prepare  # noqa: E402
from pagellm.data.shop import load  # noqa: E402
from pagellm.pages import metrics  # noqa: E402
from pagellm.pages.ranked import Scorer, seen_rows  # noqa: E402
from tests.baselines.test_compare import permuted  # noqa: E402


@pytest.fixture(scope="module")
def shop(tmp_path_factory):
    root = tmp_path_factory.mktemp("outside")
    prepare.run(prepare.Config(data=str(root), users=80, items=60))
    return load(root / "synthetic")


PACKAGE = {
    "multivae": "cornac",
    "bpr": "implicit",
    "lightgcn": "torch_geometric",
    "sasrec": "rectools",
    "bert4rec": "rectools",
    "hstu": "rectools",
}


def test_it_reads_train_and_validation_positives_and_nothing_of_test(shop):
    split = outside.read(shop.path)
    assert set(split) == {"train", "valid", "train+valid"}
    for name, likes in split.items():
        keep = shop.rows(tuple(name.split("+")))
        dense = np.zeros((shop.n_users, shop.n_items), np.float32)
        dense[shop.user[keep], shop.item[keep]] = 1
        np.testing.assert_array_equal(likes.matrix.toarray(), dense)
        for mine, ours in zip(likes[1:], (shop.user, shop.item, shop.time), strict=True):
            # rows are ordered by user, then time, as sequences need them
            np.testing.assert_array_equal(mine, ours[keep])


def test_its_lists_are_the_best_unseen_and_its_ndcg_is_ours(shop):
    split = {name: likes.matrix for name, likes in outside.read(shop.path).items()}
    full = (
        np.random.default_rng(0).integers(5, size=(shop.n_users, shop.n_items)).astype(np.float32)
    )
    users = np.arange(shop.n_users)
    lists = list(outside.top(lambda some: full[some], split["train"], users, 30, seed=0))
    for user, items, scores in lists:
        unseen = np.setdiff1d(np.arange(shop.n_items), split["train"][user].indices)
        assert set(items) <= set(unseen) and len(set(items)) == len(items) == min(30, len(unseen))
        np.testing.assert_array_equal(scores, np.sort(full[user, unseen])[::-1][:30])
    want = [
        metrics.ndcg(split["valid"][user].indices.tolist(), items.tolist(), 20)
        for user, items, _ in lists
        if split["valid"][user].nnz
    ]
    assert outside.mean_ndcg(lists, split["valid"], 20) == pytest.approx(np.mean(want))


def test_equal_scores_are_shuffled_and_unknown_items_left_out(shop):
    """Equal scores are ranked at random, differently for every seed; -inf is never listed."""
    train = outside.read(shop.path)["train"].matrix
    equal, users = np.zeros((shop.n_users, shop.n_items), np.float32), np.arange(shop.n_users)
    equal[:, ::3] = -np.inf
    lists, other = (
        [items for _, items, _ in outside.top(lambda some: equal[some], train, users, 10, seed)]
        for seed in (0, 1)
    )
    assert all((items % 3).all() for items in lists)
    assert abs(np.mean(np.concatenate([np.diff(items) > 0 for items in lists])) - 0.5) < 0.1
    assert any((a != b).any() for a, b in zip(lists, other, strict=True))


@pytest.mark.parametrize("model", outside.GRIDS)
def test_draws_are_the_whole_grid_once_and_begin_in_its_middle(model):
    grid = outside.GRIDS[model]
    drawn = outside.draws(grid, seed=0)
    assert drawn[0] == {name: values[len(values) // 2] for name, values in grid.items()}
    assert (
        len(drawn)
        == np.prod([len(values) for values in grid.values()])
        == len({json.dumps(d) for d in drawn})
    )
    again = outside.draws(grid, seed=1)
    assert drawn != again and sorted(map(str, drawn)) == sorted(map(str, again))


def learning(shop, hits):
    """Run a Watch on a model whose lists hit hits[e] validation items in epoch e.

    Returns its answers and the Watch.
    """
    split = outside.read(shop.path)
    held, looked = split["valid"].matrix.toarray(), []

    def scorer(value):
        looked.append(value)
        return lambda users: value * held[users] - np.arange(shop.n_items) / shop.n_items

    watch = outside.Watch(split["train"], split["valid"].matrix, 20, 0, np.inf)
    answers = []
    for epoch, value in enumerate(hits, 1):
        watch.again = 0.0  # scoring is cheap: do it in every epoch
        answers.append(watch(epoch, lambda value=value: scorer(value)))
    return answers, watch, looked


def test_a_watch_keeps_the_best_epoch_and_stops_where_no_more_is_gained(shop):
    answers, watch, _ = learning(shop, [0.1, 0.9, 2.0, 0.5, 0.5, 0.5, 0.5])
    # three scores without a gain, and 6 >= 1.5 * 3 epochs
    assert watch.epochs == 3 and answers == [False] * 5 + [True, True]
    assert (
        watch.value == outside.mean_ndcg(watch.lists, outside.read(shop.path)["valid"].matrix) > 0.9
    )


def test_a_watch_looks_seldom_and_at_the_deadline_and_once_where_epochs_are_given(shop):
    split, looks = outside.read(shop.path), []

    def scorer():
        looks.append(1)
        return lambda users: np.zeros((len(users), shop.n_items))

    watch = outside.Watch(split["train"], split["valid"].matrix, 20, 0, np.inf)
    assert not watch(1, scorer) and not watch(2, scorer) and len(looks) == 1  # scored just before
    watch.deadline = 0.0
    assert watch(3, scorer) and len(looks) == 2
    given = outside.Watch(split["train"], split["valid"].matrix, 20, 0, 0.0, epochs=3)
    assert (
        [given(n, scorer) for n in (1, 2, 3)] == [False, False, True]
        and len(looks) == 3
        and given.epochs == 3
    )


def together(train, seed, depth, after, *, power):
    """A small model in place of a library's: it scores items numbered next to the user's own."""
    beside = (train.matrix.T @ train.matrix).toarray() ** power
    after(1, lambda: lambda users: train.matrix[users] @ beside)


def written(data, out, *more):
    assert (
        outside.main(
            ["--data", str(data), "--model", "bpr", "--out", str(out), "--minutes", "1", *more]
        )
        == 0
    )
    return out.read_bytes()


def test_test_rows_move_no_byte_and_with_given_settings_no_held_out_row_does(
    shop, tmp_path, monkeypatch
):
    """Changing validation and test rows leaves the run file as it is; train rows change it."""
    monkeypatch.setitem(outside.FIT, "bpr", together)
    monkeypatch.setitem(outside.GRIDS, "bpr", {"power": (0.5, 1.0, 2.0)})
    for name, splits in (("test", ["test"]), ("held", ["valid", "test"]), ("train", ["train"])):
        permuted(shop.path, tmp_path / name, splits)
    before = written(shop.path, tmp_path / "a.parquet")
    assert written(tmp_path / "test", tmp_path / "b.parquet") == before
    assert (tmp_path / "a.json").read_text() == (tmp_path / "b.json").read_text()
    assert len(json.loads((tmp_path / "a.json").read_text())["trials"]) == 3
    given = ["--settings", str(tmp_path / "a.json")]
    assert written(shop.path, tmp_path / "c.parquet", *given) == before
    assert written(tmp_path / "held", tmp_path / "d.parquet", *given) == before
    assert written(tmp_path / "train", tmp_path / "e.parquet", *given) != before
    assert written(tmp_path / "held", tmp_path / "f.parquet", *given, "--refit") != before


def test_fixed_settings_are_held_and_unknown_ones_named(shop, tmp_path, monkeypatch, capsys):
    monkeypatch.setitem(outside.FIT, "bpr", together)
    monkeypatch.setitem(outside.GRIDS, "bpr", {"power": (0.5, 1.0, 2.0)})
    written(shop.path, tmp_path / "a.parquet", "--fix", "power=3e0")
    about = json.loads((tmp_path / "a.json").read_text())["BPR"]
    assert (
        about["settings"] == {"power": 3.0}
        and about["tried"] == 1
        and about["grid"] == {"power": "3.0"}
    )
    command = ["--data", str(shop.path), "--model", "bpr", "--out", str(tmp_path / "b.parquet")]
    assert outside.main([*command, "--fix", "strength=1", "loss=softmax"]) == 2
    said = capsys.readouterr().err
    assert (
        "--fix names" in said and "Its own: power" in said and not (tmp_path / "b.parquet").exists()
    )
    for wrong, why in (
        (["--fix", "power"], "want NAME=VALUE"),
        (["--fix", "2=2"], "want NAME=VALUE"),
        (["--fix", "power=1", "--settings", str(tmp_path / "a.json")], "leave one out"),
    ):
        with pytest.raises(SystemExit):
            outside.main([*command, *wrong])
        assert why in capsys.readouterr().err


# RecTools wants an older NumPy. Its models are tested where this variable names a Python that has
# it.
RECTOOLS = os.environ.get("PAGELLM_RECTOOLS", "")
TESTED = {m: library for m, library in PACKAGE.items() if library != "rectools" or RECTOOLS}


# Each fit has a process of its own, forked from one that has imported the library: importing takes
# most of the time.
FIT = """
import importlib, json, os, sys
sys.path.insert(0, sys.argv[1])
import outside
for name in json.loads(sys.argv[3]):
    importlib.import_module(name)
for words in json.loads(sys.argv[2]):
    child = os.fork()
    if child == 0:
        code = 1
        try:
            code = outside.main(words)
        finally:
            os._exit(code)
    assert os.waitpid(child, 0)[1] == 0, words
"""


@pytest.fixture(scope="module")
def fitted(shop, tmp_path_factory):
    """model -> a directory with x.parquet, again.parquet (the same settings) and refit.parquet."""
    root, found = tmp_path_factory.mktemp("fitted"), {}
    for python in {sys.executable, RECTOOLS} - {""}:
        runs, names = [], ["pandas", "torch"]
        for model, library in TESTED.items():
            if (library == "rectools") != (python == RECTOOLS):
                continue
            if library != "rectools" and importlib.util.find_spec(library) is None:
                continue
            names.append("rectools.models" if library == "rectools" else library)
            folder = found[model] = root / model
            words = ["--data", str(shop.path), "--model", model, "--minutes", "0", "--out"]
            given = ["--settings", str(folder / "x.json")]
            runs += [
                [*words, str(folder / "x.parquet")],
                [*words, str(folder / "again.parquet"), *given],
                [*words, str(folder / "refit.parquet"), *given, "--refit"],
            ]
        subprocess.run(
            [python, "-c", FIT, str(Path(outside.__file__).parent)]
            + [json.dumps(runs), json.dumps(names)],
            check=True,
            cwd=root,
            capture_output=True,
        )
    return found


@pytest.mark.parametrize(("model", "library"), TESTED.items())
def test_a_librarys_run_file_is_taken_in(shop, fitted, model, library):
    """Also: settings of an earlier search give that run file again, to the byte."""
    if model not in fitted:
        pytest.skip(f"needs the outside library {library}")
    out = fitted[model] / "x.parquet"
    about = json.loads(out.with_suffix(".json").read_text())
    row = outside.LIBRARY[model][0]
    assert about[row]["tried"] == 1 and about[row]["settings"].keys() == outside.GRIDS[model].keys()
    users, seen = Scorer(shop, "test").users, seen_rows(shop, "test", "train+valid")
    ranked, notes = runfile.read_run(out, shop, users, seen, 10, 15)
    assert "0 users without a list" in notes and (ranked.item[:, 0] >= 0).all()
    table, train = pq.read_table(out), outside.read(shop.path)["train"].matrix
    assert table.column_names == ["user", "item", "score"]
    assert not np.asarray(train[table["user"].to_numpy(), table["item"].to_numpy()]).any()
    assert (fitted[model] / "again.parquet").read_bytes() == out.read_bytes()
    refit = fitted[model] / "refit.parquet"
    assert json.loads(refit.with_suffix(".json").read_text())["refit"]
    assert refit.read_bytes() != out.read_bytes()


@pytest.mark.parametrize("model", outside.GRIDS)
def test_a_missing_library_is_one_message_that_says_what_to_install(
    shop, tmp_path, capsys, monkeypatch, model
):
    for name in (PACKAGE[model], "pandas"):  # importing them fails, as if not installed
        for loaded in (name, *(other for other in sys.modules if other.startswith(f"{name}."))):
            monkeypatch.setitem(sys.modules, loaded, None)
    assert (
        outside.main(
            ["--data", str(shop.path), "--model", model, "--out", str(tmp_path / "x.parquet")]
        )
        == 2
    )
    said = capsys.readouterr().err
    assert (
        outside.LIBRARY[model][2] in said
        and len(said.splitlines()) == 3
        and "Traceback" not in said
    )
    assert outside.LIBRARY[model][2] in outside.__doc__


def test_missing_data_are_named(tmp_path, capsys):
    assert (
        outside.main(
            [
                "--data",
                str(tmp_path / "toys"),
                "--model",
                "bpr",
                "--out",
                str(tmp_path / "x.parquet"),
            ]
        )
        == 2
    )
    assert "make prepare DATASET=toys" in capsys.readouterr().err


def test_settings_of_another_model_are_refused(shop, tmp_path, capsys):
    (tmp_path / "x.json").write_text(json.dumps({"SASRec": {"settings": {}, "epochs": 3}}))
    assert (
        outside.main(
            [
                "--data",
                str(shop.path),
                "--model",
                "bpr",
                "--out",
                str(tmp_path / "x.parquet"),
                "--settings",
                str(tmp_path / "x.json"),
            ]
        )
        == 2
    )
    assert "has no settings of BPR" in capsys.readouterr().err
