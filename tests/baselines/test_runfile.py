"""Run files: read in every format, corrected with a note, refused if they cannot be."""

import dataclasses
import json
import shutil
from decimal import Decimal

import numpy as np
import pyarrow as pa
import pyarrow.csv
import pyarrow.parquet as pq
import pytest

from pagellm.baselines import compare, runfile
from pagellm.data import prepare
from pagellm.data.shop import load
from pagellm.pages.ranked import Scorer, seen_rows
from pagellm.stage.config import PageLLMError


@pytest.fixture(scope="module")
def root(tmp_path_factory):
    """A shop of 60 users with its baselines, among them EASE."""
    root = tmp_path_factory.mktemp("runfile")
    prepare.run(prepare.Config(data=str(root / "data"), users=80, items=60))
    (root / "settings.json").write_text(
        json.dumps({"popularity": {"settings": {}}, "EASE": {"settings": {"ridge": 20.0}}})
    )
    compare.run(
        compare.Config(
            ranker="never",
            data=str(root / "data"),
            runs=str(root / "runs"),
            models="popularity,EASE",
            rerank="",
            settings=str(root / "settings.json"),
            n_boot=20,
        )
    )
    return root


@pytest.fixture(scope="module")
def shop(root):
    return load(root / "data" / "synthetic")


def everything(shop, seed=0):
    """Random scores of every user and item, seen or not: (user, item, score), in random order."""
    rng = np.random.default_rng(seed)
    code = rng.permutation(shop.n_users * shop.n_items)
    return (
        code // shop.n_items,
        code % shop.n_items,
        rng.standard_normal(len(code)).astype(np.float32),
    )


def write(path, user, item, score, name="score"):
    table = pa.table({"item": item, "user": user, name: score})
    if path.suffix == ".parquet":
        pq.write_table(table, path)
    else:
        options = pyarrow.csv.WriteOptions(delimiter="," if path.suffix == ".csv" else "\t")
        pyarrow.csv.write_csv(table, path, options)
    return path


def read(path, shop, depth=15, seed=0):
    users = Scorer(shop, "test").users
    return runfile.read_run(
        path, shop, users, seen_rows(shop, "test", "train+valid"), 10, depth, seed
    )


def test_every_spelling_reads_the_same(shop, tmp_path):
    user, item, score = everything(shop)
    ids = np.array(shop.user_ids)[user], np.array(shop.catalogue.ids)[item]
    rank = np.argsort(np.argsort(-score)) + 1
    files = [
        write(tmp_path / "a.parquet", user, item, score),
        write(tmp_path / "b.csv", user, item, score),
        write(tmp_path / "c.tsv", *ids, score),
        write(tmp_path / "d.parquet", *ids, rank, "rank"),
    ]
    first, notes = read(files[0], shop)
    for path in files[1:]:
        again, other = read(path, shop)
        np.testing.assert_array_equal(first.item, again.item)
        assert other == notes
    seen = seen_rows(shop, "test", "train+valid")
    grid = np.full((shop.n_users, shop.n_items), np.nan)
    grid[user, item] = score
    for u, row in zip(first.user, first.item, strict=True):
        grid[u, seen.of(u)[0]] = -np.inf
        np.testing.assert_array_equal(row, np.argsort(-grid[u])[:15])
    masked = seen.counts()[first.user].sum()
    assert (
        f"{len(user):,} rows read; {masked:,} masked items taken out, 0 users without a list"
        in notes
    )


def test_a_rank_goes_before_a_score(shop, tmp_path):
    """Our own pages.parquet has rank and score, and its scores need not fall from slot to slot."""
    user, item, score = everything(shop)
    rank = np.argsort(np.argsort(score)) + 1
    pq.write_table(
        pa.table({"user": user, "item": item, "score": score, "rank": rank}), tmp_path / "x.parquet"
    )
    other = read(write(tmp_path / "y.parquet", user, item, -score), shop)[0]
    np.testing.assert_array_equal(read(tmp_path / "x.parquet", shop)[0].item, other.item)


def test_every_test_user_counts_and_equal_scores_are_shuffled(shop, tmp_path):
    user, item, _ = everything(shop)
    some = user != Scorer(shop, "test").users[0]
    path = write(tmp_path / "x.parquet", user[some], item[some], np.zeros(some.sum(), np.float32))
    ranked, notes = read(path, shop)
    assert (ranked.item[0] == -1).all() and "1 user without a list count with 0" in notes
    np.testing.assert_array_equal(ranked.item, read(path, shop)[0].item)
    assert (ranked.item != read(path, shop, seed=1)[0].item).any()
    assert abs(np.mean(np.diff(ranked.item[1:], axis=1) > 0) - 0.5) < 0.1  # a random order


def test_short_lists_and_strangers_are_reported(shop, tmp_path):
    user, item, score = everything(shop)
    some = item < shop.n_items // 6
    assert (
        f"{len(Scorer(shop, 'test').users)} lists shorter than 15"
        in read(write(tmp_path / "x.csv", user[some], item[some], score[some]), shop)[1]
    )


@pytest.mark.parametrize("depth", [12, 60])
def test_the_notes_hold_the_counts_of_a_plain_loop(shop, tmp_path, depth):
    """Lists of random lengths, some empty, some complete, some of users who are not asked for."""
    user, item, score = everything(shop)
    share = np.random.default_rng(1).choice([0.0, 0.2, 0.5, 1.0], shop.n_users)
    some = np.random.default_rng(2).random(len(user)) < share[user]
    user, item, score = user[some], item[some], score[some]
    users, seen = Scorer(shop, "test").users[::2], seen_rows(shop, "test", "train+valid")
    path = write(tmp_path / "x.parquet", user, item, score)
    ranked, notes = runfile.read_run(path, shop, users, seen, 10, depth)
    masked = missing = short = 0
    for u, slots in zip(users, ranked.slots, strict=True):
        given, gone = set(item[user == u].tolist()), set(seen.of(u)[0].tolist())
        masked += len(given & gone)
        missing += not given
        short += 0 < len(given) and len(given - gone) < min(depth, shop.n_items - len(gone))
        assert slots == min(10, len(given - gone))
    others = len(set(user.tolist()) - set(users.tolist()))
    assert masked and missing and short and others and (share[users] == 1).any()
    assert notes == (
        f"{len(user):,} rows read; {masked:,} masked items taken out, {missing:,} users without a "
        f"list count with 0, {others:,} users without held-out items left out, {short:,} lists "
        f"shorter than {depth}"
    )


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (
            lambda u, i, s: (u, i + 1, s),
            r"item '\d+' is not one of the shop's identifiers, nor are all numbers in 0..",
        ),
        (lambda u, i, s: (u, i, s * np.nan), "scores are not finite"),
        (
            lambda u, i, s: (np.append(u, u[0]), np.append(i, i[0]), np.append(s, s[0])),
            "repeats an item",
        ),
    ],
)
def test_broken_files_are_refused(shop, tmp_path, change, words):
    with pytest.raises(PageLLMError, match=words):
        read(write(tmp_path / "x.parquet", *change(*everything(shop))), shop)


def test_numbers_that_could_be_both_must_be_named(shop, tmp_path):
    """A shop's own identifiers may be numbers in another order; their leading zeros are kept."""
    users, items = ([str(i) for i in range(n)][::-1] for n in (shop.n_users, shop.n_items))
    numeric = dataclasses.replace(
        shop, user_ids=users, catalogue=dataclasses.replace(shop.catalogue, ids=items)
    )
    user, item, score = everything(shop)
    path, seen = (
        write(tmp_path / "x.csv", user, item, score),
        seen_rows(shop, "test", "train+valid"),
    )
    users = Scorer(shop, "test").users
    with pytest.raises(PageLLMError, match="--ids shop or --ids dense"):
        runfile.read_run(path, numeric, users, seen, 10, 15)
    dense, own = (
        runfile.read_run(path, numeric, users, seen, 10, 15, ids=ids)[0]
        for ids in ("dense", "shop")
    )
    np.testing.assert_array_equal(dense.item, read(path, shop)[0].item)
    other = write(tmp_path / "y.parquet", shop.n_users - 1 - user, shop.n_items - 1 - item, score)
    np.testing.assert_array_equal(own.item, read(other, shop)[0].item)
    padded = dataclasses.replace(shop.catalogue, ids=[f"{i:05d}" for i in range(shop.n_items)])
    path = write(tmp_path / "z.csv", user, np.array(padded.ids)[item], score)
    again = runfile.read_run(
        path, dataclasses.replace(shop, catalogue=padded), users, seen, 10, 15
    )[0]
    np.testing.assert_array_equal(again.item, dense.item)
    with pytest.raises(PageLLMError, match="is not in 0.."):
        runfile.read_run(path, shop, users, seen, 10, 15, ids="dense")


def test_files_of_another_kind_are_refused(shop, tmp_path):
    pq.write_table(pa.table({"user": [0], "product": [1]}), tmp_path / "x.parquet")
    with pytest.raises(
        PageLLMError, match="columns user, product; want user, item, and score or rank"
    ):
        read(tmp_path / "x.parquet", shop)
    (tmp_path / "y.parquet").write_text("nothing of the kind")
    with pytest.raises(PageLLMError, match="cannot be read"):
        read(tmp_path / "y.parquet", shop)


def config(root, path, **more):
    return runfile.Config(
        data=str(root / "data"), runs=str(root / "runs"), file=str(path), n_boot=20, **more
    )


def test_a_run_files_row_stands_beside_the_baselines(root, shop, capsys):
    """The pages that EASE wrote, given as a run file, get EASE's scores."""
    path = root / "runs" / "synthetic" / "baselines" / "ease" / "pages.parquet"
    result = runfile.run(config(root, path, name="Their EASE"))["Their EASE"]
    mine = json.loads((root / "runs" / "synthetic" / "baselines" / "metrics.json").read_text())[
        "EASE"
    ]
    assert result == mine
    text = capsys.readouterr().out
    assert (
        "| Their EASE |" in text
        and "| popularity |" in text
        and "(+0.0000 [+0.0000, +0.0000], d +0.00)" in text
    )
    assert "columns user, item, rank; left over: score, page, user_id, item_id" in text
    assert "ranks decide; the scores beside them are not read" in text
    assert "column user is read as the numbers of interactions.parquet" in text
    runfile.run(config(root, path, name="Their EASE"))
    assert capsys.readouterr().out == text
    with pytest.raises(PageLLMError, match="another name than 'EASE'"):
        runfile.run(config(root, path, name="EASE"))
    with pytest.raises(PageLLMError, match="want the same mask"):
        runfile.run(config(root, path, name="x", mask="train"))
    with pytest.raises(PageLLMError, match="was made with depth=100, rows"):
        runfile.run(config(root, path, name="x", depth=50))
    with pytest.raises(
        PageLLMError, match="was made with k=20, rows popularity, EASE; want the same mask, k"
    ):
        runfile.run(config(root, path, name="x", k=10))


def test_baselines_of_another_split_are_refused(root, tmp_path):
    """Baselines made on an earlier split of the data are refused."""
    shutil.copytree(root / "runs", tmp_path / "runs")
    prepare.run(prepare.Config(data=str(tmp_path / "data"), users=80, items=60, seed=1))
    path = root / "runs" / "synthetic" / "baselines" / "ease" / "pages.parquet"
    with pytest.raises(PageLLMError, match="was made on another split than .*synthetic holds now"):
        runfile.run(config(tmp_path, path, name="x"))


def test_a_file_made_from_the_test_rows_is_stopped(root, shop, tmp_path):
    user, item, score = everything(shop)
    test = set((shop.user * shop.n_items + shop.item)[shop.rows("test")].tolist())
    score += 10 * np.isin(user * shop.n_items + item, list(test))
    with pytest.raises(
        PageLLMError, match="oracle: NDCG@100 1.0000 misses less than 1/3 of what EASE's"
    ):
        runfile.run(config(root, write(tmp_path / "x.parquet", user, item, score), name="oracle"))


def test_wrong_options_say_what_is_wanted(tmp_path):
    with pytest.raises(PageLLMError, match="name="):
        runfile.Config(file=__file__)
    with pytest.raises(PageLLMError, match="file="):
        runfile.Config(name="x", file=str(tmp_path / "nothing"))


@pytest.mark.parametrize("scale", [2.0**40, 1_700_000_000 * 10**9])
def test_scores_keep_every_digit_of_the_file(shop, tmp_path, scale):
    """Large scores one apart, such as times: the same lists as from small ones, in every format."""
    user, item, _ = everything(shop)
    small = np.argsort(np.argsort(np.random.default_rng(1).random(len(user))))
    large = small + int(scale)
    wanted = read(write(tmp_path / "a.parquet", user, item, small), shop)[0].item
    for path in (tmp_path / "b.parquet", tmp_path / "b.csv"):
        np.testing.assert_array_equal(read(write(path, user, item, large), shop)[0].item, wanted)
    tiny = write(tmp_path / "c.parquet", user, item, 1 + small * 1e-9)
    np.testing.assert_array_equal(read(tiny, shop)[0].item, wanted)


@pytest.mark.parametrize("name", ["score", "rank"])
def test_text_where_a_number_should_be_is_named(shop, tmp_path, name):
    user, item, _ = everything(shop)
    path = write(tmp_path / "x.csv", user, item, ["12 pts"] * len(user), name)
    with pytest.raises(PageLLMError, match=rf"x\.csv: column {name} is not numbers: '12 pts'"):
        read(path, shop)


def test_ids_that_lost_their_zeros_are_not_taken_for_row_numbers(shop, tmp_path):
    """Shop ids 0001, 0002 ...: "1" fits as a row number, and is another user's."""
    padded = dataclasses.replace(shop, user_ids=[f"{n + 1:04d}" for n in range(shop.n_users)])
    user, item, score = everything(shop)
    some = user < shop.n_users - 1
    path = write(tmp_path / "x.csv", user[some] + 1, item[some], score[some])
    users, seen = Scorer(shop, "test").users, seen_rows(shop, "test", "train+valid")
    with pytest.raises(PageLLMError, match=r"column user: '\d+' is not .*'0\d+' is; were zeros"):
        runfile.read_run(path, padded, users, seen, 10, 15)
    runfile.read_run(path, padded, users, seen, 10, 15, ids="dense")


def test_a_run_file_without_rows_is_named(shop, tmp_path):
    (tmp_path / "x.csv").write_text("user,item,score\n")
    with pytest.raises(PageLLMError, match=r"x\.csv has no rows"):
        read(tmp_path / "x.csv", shop)


def test_decimals_are_ordered_by_all_their_digits(shop, tmp_path):
    """Scores that differ in the 25th digit order the lists as their places do."""
    user, item, _ = everything(shop)
    place = np.random.default_rng(0).permutation(len(user))
    exact = [Decimal(1) + Decimal(int(n)).scaleb(-25) for n in place]
    found = []
    for name, score in (("exact", exact), ("whole", place)):
        table = {"user": user, "item": item, "score": pa.array(score)}
        pq.write_table(pa.table(table), tmp_path / f"{name}.parquet")
        found.append(read(tmp_path / f"{name}.parquet", shop)[0].item)
    assert (found[0] == found[1]).all()
