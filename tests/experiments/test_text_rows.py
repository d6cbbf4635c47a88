"""Cold items: what is taken out, the map from texts to factors, and the study on a small shop."""

import shutil
from dataclasses import replace

import numpy as np
import pytest
import torch
from torch.testing import assert_close

from experiments import text_map, text_rows
from experiments.text_map import Practice, Ridge, World, fold_in, ndcg, subset, without
from experiments.text_rows import Config, Draw, cold_items, taken_out
from experiments.text_vectors import language, rotated, sentences, texts_of, words
from pagellm.data.shop import Rows
from pagellm.stage.config import PageLLMError
from pagellm.stage.files import write_json

ALS = {"alpha0": 0.03, "factors": 8, "nu": 1.0, "reg": 0.03}


@pytest.fixture(scope="module")
def small(served, tmp_path_factory):
    """Options of a study over the shop of `served`."""
    root = tmp_path_factory.mktemp("texts")
    write_json(
        root / "settings.json",
        {"ALS": {"settings": ALS}, "ALS+facts": {"settings": ALS}, "popularity": {"settings": {}}},
    )
    return {
        "dataset": "synthetic",
        "data": str(served / "data"),
        "runs": str(root / "runs"),
        "settings": str(root / "settings.json"),
        "language": f"ours={served / 'runs' / 'base' / 'pretrain'}",
        "draws": 2,
        "share": 0.25,
    }


def test_cold_items_keep_none_or_one_to_five_train_rows_and_nothing_else_moves(shop):
    cold = cold_items(shop, 0.25, 0)
    before = np.bincount(shop.csr("train").items, minlength=shop.n_items)
    assert cold.sum() == round(0.25 * (before > 0).sum()) and (before[cold] > 0).all()
    assert (cold != cold_items(shop, 0.25, 1)).any()
    for most in (0, 5):
        thin = taken_out(shop, cold, most, 0)
        after = np.bincount(thin.csr("train").items, minlength=shop.n_items)
        assert (after[~cold] == before[~cold]).all()
        if most:
            assert (after[cold] >= 1).all() and (after[cold] <= np.minimum(before[cold], 5)).all()
            assert len(set(after[cold])) > 1
        else:
            assert not after[cold].any()
        moved = thin.split != shop.split
        assert cold[shop.item[moved]].all() and shop.rows("train", None)[moved].all()
        assert (thin.rows("unused", None) == (moved | shop.rows("unused", None))).all()


def test_the_study_scores_picks_of_cold_items_alone_and_hides_what_was_taken_out(shop):
    draw = Draw.of(shop, Config(dataset="synthetic", share=0.3), 0, "none")
    held, test = draw.scorer.held, shop.csr("test")
    assert draw.cold[held.items].all()
    assert len(held.items) == draw.cold[test.items].sum() > 0
    mine = {u: set(held.of(u)[0].tolist()) for u in draw.scorer.users}

    def oracle(users):
        """1 for the picks, 2 for every train item and for every warm item of odd number."""
        score = torch.zeros(len(users), shop.n_items)
        for row, u in enumerate(users):
            score[row, list(mine[u])] = 1.0
            score[row, shop.csr("train", None).of(u)[0]] = 2.0
        return score

    found = draw.judge(oracle)
    assert (found["NDCG@100, cold"] == 1).all() and (found["NDCG@100, all"] == 1).all()
    worst = draw.judge(lambda users: torch.from_numpy(~draw.cold).float().expand(len(users), -1))
    assert worst["NDCG@100, all"].mean() < worst["NDCG@100, cold"].mean()


def test_ridge_is_the_least_of_its_loss_and_finds_planted_rows():
    rng = torch.Generator().manual_seed(0)
    x, true = torch.randn(300, 12, generator=rng), torch.randn(12, 5, generator=rng)
    y = 3.0 + x @ true + 0.1 * torch.randn(300, 5, generator=rng)
    ridge = Ridge(x[:200], y[:200])
    assert_close(ridge(x[200:], 1e-3), 3.0 + x[200:] @ true, atol=0.2, rtol=0.0)
    assert_close(ridge(x, 1e9), y[:200].mean(0).expand(300, -1), atol=1e-3, rtol=0.0)


def test_fold_in_is_the_least_of_what_it_says_and_stays_without_buyers():
    rng = np.random.default_rng(0)
    users = torch.from_numpy(rng.normal(size=(40, 6)).astype(np.float32))
    begin = torch.from_numpy(rng.normal(size=(3, 6)).astype(np.float32))
    rows = Rows(np.array([0, 2, 2, 5]), np.array([3, 9, 1, 4, 7]), np.full(5, np.nan, np.float32))
    settings = {"alpha0": 0.1, "factors": 6, "nu": 1.0, "reg": 0.2}
    world = World(rows, np.ones(3, bool), begin, settings, penalty=0.2)
    out = fold_in(world, users, begin, rows, 2.0)
    assert torch.equal(out[1], begin[1])
    for i in (0, 2):
        x = users[torch.from_numpy(rows.of(i)[0])].double()
        reg, b = 2.0 * float(world.ridge(rows, 40)[i]), begin[i].double()

        def loss(y, x=x, reg=reg, b=b):
            rest = 0.1 * (users.double() @ (y - b)).square().sum() + reg * (y - b).square().sum()
            return float((1 - x @ y).square().sum() + rest)

        best = loss(out[i].double())
        assert best < loss(b)
        for _ in range(20):
            step = 1e-3 * torch.from_numpy(rng.normal(size=6))
            assert best <= loss(out[i].double() + step) + 1e-9


def test_ndcg_counts_the_columns_that_are_there():
    picks = Rows(np.array([0, 2, 3]), np.array([0, 4, 2]), np.full(3, np.nan, np.float32))
    at = np.array([0, -1, 1, -1, -1])  # items 0 and 2 are there
    assert ndcg(torch.tensor([[2.0, 1.0], [2.0, 1.0]]), picks, at) == pytest.approx(
        (1 + 1 / np.log2(3)) / 2
    )
    alone = subset(picks, np.array([1]))
    assert alone.of(0)[0].tolist() == [2]
    rest = without(picks, np.array([True, False, False, False, False]))
    assert rest.counts().tolist() == [1, 1] and rest.items.tolist() == [4, 2]


def test_practice_chooses_a_firm_ridge_for_noise_and_a_loose_one_for_what_tells(shop, tmp_path):
    rows = shop.csr("train")
    world = World.fit(rows, shop.n_items, ALS, tmp_path / "factors.npy")
    again = World.fit(rows, shop.n_items, ALS, tmp_path / "factors.npy")
    assert torch.equal(world.items, again.items)
    practice = Practice(world, shop, 0, 0, 0)
    hidden = np.concatenate([mine for mine, _, _ in practice.parts])
    assert sorted(hidden) == np.flatnonzero(world.warm).tolist()
    told = world.items / world.items.norm(dim=1, keepdim=True).clamp_min(1e-9)
    strength, hold, _ = practice.choose(told)
    assert strength <= 3.0 and hold == text_map.HOLDS[0]
    few = Practice(world, shop, 3, 0, 0)
    assert all(
        (buyers.counts() <= 3).all() and (buyers.counts() > 0).all() for *_, buyers in few.parts
    )
    assert few.choose(told)[1] in text_map.HOLDS


def test_words_are_unit_rows_and_projections_keep_their_products(shop):
    table = torch.from_numpy(words(shop.catalogue, 10_000))
    norms = table.norm(dim=1)
    assert_close(norms[norms > 0], torch.ones(int((norms > 0).sum())))
    assert_close(rotated(table) @ rotated(table).T, table @ table.T, atol=1e-4, rtol=0.0)
    fewer = torch.from_numpy(words(shop.catalogue, 50))  # fewer than items and facts
    assert fewer.shape == (shop.n_items, 50)
    lost = (table @ table.T - fewer @ fewer.T).square().sum() / (table @ table.T).square().sum()
    assert lost < 0.05
    texts = texts_of(shop.catalogue)
    c = shop.catalogue
    assert all(c.title[i] in text and c.brand[i] in text for i, text in enumerate(texts))


def test_a_network_of_ours_gives_each_text_one_unit_row(served):
    stage = served / "runs" / "base" / "pretrain"
    texts = ["a drum", "", "another thing altogether, longer", "a drum"]
    rows = language(stage, texts, batch=2)
    assert np.allclose(np.linalg.norm(rows, axis=1), [1, 0, 1, 1], atol=1e-5)
    assert np.allclose(rows[0], rows[3], atol=0.02) and not np.allclose(rows[0], rows[2], atol=0.1)


def test_a_published_encoder_gives_the_mean_of_its_states(tmp_path):
    transformers = pytest.importorskip(
        "transformers", reason="compare with transformers: pip install -e '.[dev]'"
    )
    torch.manual_seed(0)
    (tmp_path / "vocab.txt").write_text("[PAD]\n[UNK]\n[CLS]\n[SEP]\n[MASK]\nred\ndrum\nstick\n")
    config = transformers.BertConfig(
        vocab_size=8,
        hidden_size=16,
        num_hidden_layers=1,
        num_attention_heads=2,
        intermediate_size=32,
    )
    transformers.BertModel(config).save_pretrained(tmp_path)
    transformers.BertTokenizerFast(str(tmp_path / "vocab.txt")).save_pretrained(tmp_path)
    texts = ["red drum", "", "stick", "red red red drum"]
    rows = sentences(tmp_path, texts, batch=4)
    alone = sentences(tmp_path, texts[:1])
    assert rows.shape == (4, 16) and np.allclose(rows[0], alone[0], atol=0.02)
    assert np.allclose(np.linalg.norm(rows, axis=1), [1, 0, 1, 1], atol=1e-5)


def test_the_study_writes_every_row_once_and_carries_on(small, monkeypatch, capsys):
    records = text_rows.run(Config(**small))
    out = capsys.readouterr().out
    assert "no rows of --minilm: not given" in out and "ours: strength" in out
    rows = {r["variant"] for r in records if r["mode"] == "none"}
    assert rows >= {"no text", "words", "ours", "words + ours", "cosine: ours", "ALS+facts, ours"}
    assert {r["variant"] for r in records if r["mode"] == "few"} == rows | {"ALS"}
    at = {(r["mode"], r["variant"], r["metric"]): r for r in records}
    for mode in ("none", "few"):
        ceiling = at[mode, "ceiling: ALS", "NDCG@100, cold"]["mean"]
        assert ceiling > at[mode, "no text", "NDCG@100, cold"]["mean"]
        assert at[mode, "words", "NDCG@100, cold"]["difference"] == 0.0

    def never(*args, **kwargs):
        raise AssertionError("made again")

    for module, name in ((text_rows.plain, "fit"), (World, "fit"), (Draw, "judge")):
        monkeypatch.setattr(module, name, never)
    assert text_rows.run(Config(**small)) == records
    monkeypatch.undo()
    with pytest.raises(PageLLMError, match="made otherwise"):
        text_rows.run(Config(**small | {"share": 0.5}))


def test_the_map_of_another_shop_ranks_items_that_it_never_met(small, served, tmp_path):
    shutil.copytree(served / "data" / "synthetic", tmp_path / "data" / "here")
    shutil.copytree(served / "data" / "synthetic", tmp_path / "data" / "there")
    crossing = small | {"dataset": "here", "source": "there", "data": str(tmp_path / "data")}
    records = text_rows.run(Config(**crossing | {"runs": str(tmp_path / "runs")}))
    mean = {r["variant"]: r["mean"] for r in records if r["metric"] == "NDCG@100"}
    assert {"map: words", "map: ours", "cosine: words", "knows this shop: ALS"} <= set(mean)
    # There is what here is, so its map must be as good as factors of this shop.
    assert abs(mean["map: words"] - mean["knows this shop: ALS"]) < 0.1
    assert mean["map: words"] > mean["knows this shop: popularity"] + 0.05
    assert (tmp_path / "runs" / "text_rows" / "there-to-here.md").exists()


def test_wrong_options_are_refused(small, tmp_path):
    for wrong, says in (
        ({"language": "ours"}, "NAME=STAGE"),
        ({"modes": "some"}, "none, few or both"),
        ({"source": "synthetic"}, "another than dataset"),
        ({"share": 1.0}, "between 0 and 1"),
    ):
        with pytest.raises(PageLLMError, match=says):
            replace(Config(**small), **wrong)
    with pytest.raises(PageLLMError, match="no settings of ALS"):
        text_rows.run(Config(**small | {"settings": str(tmp_path / "x.json"), "study": "other"}))
    with pytest.raises(PageLLMError, match="for MiniLM"):
        text_rows.run(Config(**small | {"minilm": str(tmp_path)}))
