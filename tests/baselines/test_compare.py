"""Baselines from data to table: which rows they see, what they mask, and the search of settings."""

import json

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from pagellm.baselines import compare
from pagellm.baselines.compare import climb, read_rows, run
from pagellm.data import prepare
from pagellm.data.shop import load
from pagellm.model.plain import GRIDS, PLAIN, Fitted, fit
from pagellm.stage.config import PageLLMError
from pagellm.stage.run import file_id

SETTINGS = {
    "popularity": {},
    "ItemKNN": {"neighbours": 10, "shrink": 2.0},
    "EASE": {"ridge": 20.0},
    "ALS": {"factors": 4, "alpha0": 0.1, "reg": 0.01, "nu": 0.5},
}


@pytest.fixture(scope="module")
def root(tmp_path_factory):
    root = tmp_path_factory.mktemp("baselines")
    prepare.run(prepare.Config(data=str(root / "data"), users=80, items=60))
    (root / "settings.json").write_text(
        json.dumps({name: {"settings": s} for name, s in SETTINGS.items()})
    )
    return root


def config(root, **more):
    return compare.Config(
        **{
            "data": str(root / "data"),
            "runs": str(root / "runs"),
            "n_boot": 20,
            "settings": str(root / "settings.json"),
            "models": ",".join(PLAIN),
            "rerank": "",
            "ranker": "never",
        }
        | more
    )


@pytest.fixture(scope="module")
def searched(root):
    made = config(root, run="searched", settings="", trials=3, refit=True)
    run(made)
    return made.stage("baselines")


def permuted(source, target, splits, seed=0):
    """Copy a data set; swap items among rows of `splits`, and the names of valid and test."""
    target.mkdir(parents=True)
    for path in source.iterdir():
        (target / path.name).write_bytes(path.read_bytes())
    shop, table = load(source), pq.read_table(source / "interactions.parquet")
    item, rng = shop.item.copy(), np.random.default_rng(seed)
    have = set(zip(shop.user.tolist(), item.tolist(), strict=True))
    rows = np.flatnonzero(np.isin(table["split"].to_pylist(), splits))
    moved = 0
    for _ in range(20 * len(rows)):
        a, b = rng.choice(rows, 2)
        (ua, ia), (ub, ib) = (shop.user[a], item[a]), (shop.user[b], item[b])
        if not {(ua, ib), (ub, ia)} & have:  # one row for each (user, item)
            have -= {(ua, ia), (ub, ib)}
            have |= {(ua, ib), (ub, ia)}
            item[a], item[b], moved = ib, ia, moved + 1
    assert moved > len(rows) / 2
    names = np.array(table["split"].to_pylist(), dtype=object)
    if splits == ["valid", "test"]:
        names = np.where(names == "valid", "test", np.where(names == "test", "valid", names))
    columns = {
        "item": pa.array(item, pa.int32()),
        "split": pa.array(names.tolist()).dictionary_encode(),
    }
    for name, column in columns.items():
        table = table.set_column(table.column_names.index(name), name, column)
    pq.write_table(table, target / "interactions.parquet")
    about = json.loads((target / "source.json").read_text())
    about["written"]["interactions.parquet"] = file_id(target / "interactions.parquet")
    (target / "source.json").write_text(json.dumps(about))


def artefacts(data, root, settings_file, name):
    """All that baselines learn from `data`, and their pages with train items masked, as bytes."""
    shop = load(data / "synthetic")
    found = {}
    for model, chosen in SETTINGS.items():
        fitted = fit(model, shop.csr("train"), shop.n_users, shop.n_items, chosen)
        found |= {
            f"{model} {what}": array.numpy().tobytes() for what, array in fitted.learned.items()
        }
    run(config(root, data=str(data), run=name, mask="train", settings=str(settings_file)))
    folder = root / "runs" / name / "baselines"
    return found | {
        str(path.relative_to(folder)): path.read_bytes()
        for path in [*folder.glob("*/pages.parquet"), folder / "settings.json"]
    }


def test_held_out_rows_move_no_byte_of_what_is_trained(root, tmp_path):
    """Changing validation and test rows changes nothing fitted; changing train rows does."""
    source = root / "data" / "synthetic"
    permuted(source, tmp_path / "held" / "synthetic", ["valid", "test"])
    permuted(source, tmp_path / "train" / "synthetic", ["train"])
    chosen = root / "settings.json"
    before = artefacts(root / "data", tmp_path, chosen, "before")
    assert len(before) == 5 + 4 + 1
    held = artefacts(tmp_path / "held", tmp_path, chosen, "held")
    assert {name for name in before if before[name] != held[name]} == set()
    train = artefacts(tmp_path / "train", tmp_path, chosen, "train")
    assert {name for name in before if before[name] == train[name]} == {"settings.json"}


def test_test_rows_move_no_byte_of_a_search(root, tmp_path, searched):
    """Settings are chosen on validation: changing the items of test rows changes none."""
    permuted(root / "data" / "synthetic", tmp_path / "synthetic", ["test"])
    made = config(root, data=str(tmp_path), runs=str(tmp_path / "runs"), settings="", trials=3)
    run(made)
    for name in ("settings.json", "trials.json"):
        assert (made.stage("baselines") / name).read_bytes() == (searched / name).read_bytes()


def test_a_run_leaves_everything_that_its_docstring_names(searched, root, capsys):
    names = [*PLAIN, *(f"{name}, refit" for name in PLAIN)]
    rows, made = read_rows(searched)
    assert list(rows) == names and made["mask"] == "train+valid"
    results = json.loads((searched / "metrics.json").read_text())
    shop = load(root / "data" / "synthetic")
    seen = shop.csr(("train", "valid"), positive=None)
    for name in names:
        assert results[name]["NDCG@100"]["mean"] == pytest.approx(np.mean(rows[name]["NDCG@100"]))
        assert results[name]["NDCG@100"]["count"] == len(np.unique(shop.user[shop.rows("test")]))
        table = pq.read_table(searched / compare.slug(name) / "pages.parquet").to_pydict()
        for user, item in zip(table["user"], table["item"], strict=True):
            assert item not in seen.of(user)[0]
    split = json.loads((searched / "split.json").read_text())
    assert split["rows"]["test"]["positive"] == int(shop.rows("test").sum())
    assert split["id"] == compare.file_id(shop.path / "interactions.parquet")
    settings_found = json.loads((searched / "settings.json").read_text())
    assert all(settings_found[name]["settings"].keys() == GRIDS[name].keys() for name in PLAIN)
    run(config(root, run="searched", settings="", trials=3, refit=True))
    printed = capsys.readouterr().out
    assert "EASE, refit" in printed and f"{shop.n_users} users, all counted" in printed
    for table in ("table.md", "table.tex"):
        assert "EASE, refit" in (searched / table).read_text()


def test_refitting_sees_validation_rows_and_plain_fitting_does_not(searched, root):
    shop, chosen = (
        load(root / "data" / "synthetic"),
        json.loads((searched / "settings.json").read_text()),
    )
    for splits, name in ((("train",), "ease"), (("train", "valid"), "ease--refit")):
        fitted = fit(
            "EASE", shop.csr(splits), shop.n_users, shop.n_items, chosen["EASE"]["settings"]
        )
        table = pq.read_table(searched / name / "pages.parquet").to_pydict()
        score = fitted.score(np.array(table["user"]))
        got = score[np.arange(len(score)), table["item"]]
        np.testing.assert_allclose(got, table["score"], atol=1e-5)


def test_an_unfinished_search_carries_on(root, searched, monkeypatch):
    """A continued search does not repeat settings already tried, and ends with the same result."""
    made = config(root, run="again", settings="", trials=3, refit=True)
    folder = made.stage("baselines")
    folder.mkdir(parents=True)
    kept = dict(list(json.loads((searched / "trials.json").read_text()).items())[:-1])
    (folder / "trials.json").write_text(json.dumps(kept))
    calls, plain = [], compare.Workbench.validate
    monkeypatch.setattr(
        compare.Workbench, "validate", lambda self, f: calls.append(1) or plain(self, f)
    )
    run(made)
    assert len(calls) == 1
    for name in ("settings.json", "trials.json", "metrics.json"):
        assert (folder / name).read_bytes() == (searched / name).read_bytes()


def test_a_model_fitted_to_test_rows_is_stopped(root, monkeypatch):
    """A recommender that knows the test items is refused; EASE beside it is honest but weakened."""
    plain = compare.fit

    def leaky(name, rows, n_users, n_items, chosen, seed, gram, *_):
        if name == "ALS":
            rows = load(root / "data" / "synthetic").csr("test")
            chosen = chosen | {"factors": 32, "alpha0": 0.001, "reg": 0.0003}
        elif name == "EASE":
            fitted = plain(name, rows, n_users, n_items, chosen, seed, gram)
            return Fitted(lambda users: -fitted.score(users), fitted.learned)
        return plain(name, rows, n_users, n_items, chosen, seed, gram)

    monkeypatch.setattr(compare, "fit", leaky)
    made = config(root, run="leak", models="EASE,ALS")
    with pytest.raises(PageLLMError, match="ALS: .* times EASE's .*: suspected leak"):
        run(made)
    assert not (made.stage("baselines") / "done").exists()


@settings(deadline=None, max_examples=60)
@given(
    st.lists(st.integers(1, 6), min_size=0, max_size=3), st.integers(0, 10**6), st.integers(1, 40)
)
def test_climb_keeps_its_budget_and_ends_on_a_peak(sizes, seed, trials):
    """The result is the best value tried; if trials are left, no neighbour is better."""
    grid = {f"x{i}": tuple(range(n)) for i, n in enumerate(sizes)}
    surface = np.random.default_rng(seed).random(sizes or 1)
    tried = []

    def value(chosen):
        tried.append(tuple(chosen.values()))
        return float(surface[tried[-1] or 0])

    chosen, best, tries = climb(grid, value, trials)
    assert tries == len(tried) == len(set(tried)) <= trials
    assert (
        best
        == max(float(surface[t or 0]) for t in tried)
        == float(surface[tuple(chosen.values()) or 0])
    )
    if tries < trials:
        for i, n in enumerate(sizes):
            for step in (-1, 1):
                to = list(chosen.values())
                to[i] += step
                assert not 0 <= to[i] < n or surface[tuple(to)] <= best


def test_wrong_options_say_what_is_wanted(root, tmp_path):
    for bad in (
        {"models": "EASE,SLIM"},
        {"mask": "valid"},
        {"versus": "EASE, refit"},
        {"settings": "nowhere.json"},
        {"trials": 0},
    ):
        with pytest.raises(PageLLMError, match=f"{next(iter(bad))}="):
            compare.Config(**bad)
    (tmp_path / "half.json").write_text(json.dumps({"EASE": {"settings": {"ridge": 1.0}}}))
    with pytest.raises(PageLLMError, match="has no settings of popularity"):
        run(config(root, run="half", settings=str(tmp_path / "half.json")))


def test_a_shop_that_is_not_there_leaves_no_run_behind(root):
    missing = config(root, dataset="nowhere")
    with pytest.raises(PageLLMError, match="make prepare"):
        run(missing)
    assert not missing.stage("baselines").exists()


def test_every_model_is_there_re_ranked_at_the_strength_that_validation_allows(root):
    made = config(root, run="varied", models="EASE,ALS,ALS+facts,ALS+ratings", rerank="mmr,dpp")
    results, folder = run(made), made.stage("baselines")
    strengths = json.loads((folder / "strengths.json").read_text())
    assert sorted(strengths) == sorted(
        f"{name} + {method}" for name in made.models.split(",") for method in ("mmr", "dpp")
    )
    frontier = pq.read_table(folder / "frontier.parquet").to_pylist()
    for label, strength in strengths.items():
        base, method = label.split(" + ")
        assert {"base": base, "method": method, "strength": strength}.items() <= next(
            r
            for r in frontier
            if (r["base"], r["method"], r["strength"]) == (base, method, strength)
        ).items()
        if strength == 0:
            assert results[f"{base} + {method.upper()}"] == results[base]
    assert "as it is" in (folder / "table.txt").read_text()


def test_settings_of_als_serve_the_models_that_are_built_on_it(root):
    found = compare.stored(root / "settings.json", ["ALS", "ALS+facts", "ALS+ratings"])
    assert found["ALS+facts"]["settings"] == SETTINGS["ALS"]
    assert found["ALS+ratings"]["settings"] == SETTINGS["ALS"] | compare.RATED
