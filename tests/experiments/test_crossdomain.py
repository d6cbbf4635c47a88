"""Across domains: cuts share nothing, rows are predicted from words, a policy moves to a shop."""

import numpy as np
import pytest

from experiments import crossdomain
from experiments.crossdomain import cut, halves, moved, predict_rows, ridge, words_of
from pagellm.data.shop import load
from pagellm.model.policy import Policy
from pagellm.stage.config import PageLLMError


@pytest.fixture(scope="module")
def shop(served):
    return load(served / "data" / "synthetic")


def test_the_halves_share_no_user_no_item_no_department(shop, tmp_path):
    parts = []
    for name, (users, items) in zip("ab", halves(shop, 0), strict=True):
        cut(shop.path, tmp_path / name, users, items, {"side": name})
        parts.append(load(tmp_path / name))
    a, b = parts
    assert not set(a.user_ids) & set(b.user_ids) and not set(a.catalogue.ids) & set(b.catalogue.ids)
    assert not {c[0] for c in a.catalogue.categories} & {c[0] for c in b.catalogue.categories}
    for part in parts:
        assert part.n_users > 20 and part.n_items > 15 and (part.csr("train").counts() > 0).all()
        rows = {
            (part.user_ids[u], part.catalogue.ids[i]): (s, r)
            for u, i, s, r in zip(part.user, part.item, part.split, part.rating, strict=True)
        }
        whole = {
            (shop.user_ids[u], shop.catalogue.ids[i]): (s, r)
            for u, i, s, r in zip(shop.user, shop.item, shop.split, shop.rating, strict=True)
        }
        assert rows.items() <= whole.items()
        users, items, text = part.reviews()
        assert len(text) and {(u, i) for u, i in zip(users, items, strict=True)} <= set(
            zip(
                part.user[part.rows("train", None)],
                part.item[part.rows("train", None)],
                strict=True,
            )
        )
        i, u = part.catalogue.ids[0], part.user_ids[0]
        assert part.truth[0, 0] == shop.truth[shop.user_ids.index(u), shop.catalogue.ids.index(i)]
        assert part.catalogue.title[0] == shop.catalogue.title[shop.catalogue.ids.index(i)]


def test_another_cut_of_the_same_name_is_refused(shop, tmp_path):
    (users, items), other = halves(shop, 0)
    for _ in range(2):
        cut(shop.path, tmp_path / "a", users, items, {"seed": 0})
    with pytest.raises(PageLLMError, match="cut differently"):
        cut(shop.path, tmp_path / "a", *other, {"seed": 1})
    with pytest.raises(PageLLMError, match="nothing of"):
        cut(shop.path, tmp_path / "b", users & ~users, items, {"seed": 0})


def test_ridge_is_the_least_of_its_loss():
    rng = np.random.default_rng(0)
    x, y = rng.normal(size=(30, 50)), rng.normal(size=(30, 4))
    mx, w, my = ridge(x, y, 2.0)

    def loss(w):
        return (((y - my) - (x - mx) @ w) ** 2).sum() + 2.0 * (w**2).sum()

    assert all(loss(w) < loss(w + 1e-3 * rng.normal(size=w.shape)) for _ in range(20))


def test_rows_that_words_explain_are_found_for_items_never_seen():
    rng = np.random.default_rng(0)
    x, true = rng.normal(size=(400, 12)), rng.normal(size=(12, 6))
    rows = x @ true + 0.05 * rng.normal(size=(400, 6))
    made, fit = predict_rows(x[:300], rows[:300], x[300:], 0)
    assert fit > 0.95 and np.corrcoef(made.ravel(), rows[300:].ravel())[0, 1] > 0.97
    _, chance = predict_rows(x[:300], rng.normal(size=(300, 6)), x[300:], 0)
    assert abs(chance) < 0.3


def test_words_are_of_unit_length_and_blank_without_text(shop, served):
    policy = Policy.load(served / "runs" / "base" / "sft")
    x = words_of(shop, policy.vocab)
    assert x.shape == (shop.n_items, policy.vocab.n_words)
    assert np.linalg.norm(x, axis=1) == pytest.approx(1, abs=1e-5)
    shop.catalogue.title[0], was = "", shop.catalogue.title[0]
    c = shop.catalogue
    try:
        c.brand[0], brand, c.categories[0], names = "", c.brand[0], (), c.categories[0]
        assert not words_of(shop, policy.vocab)[0].any()
    finally:
        c.title[0], c.brand[0], c.categories[0] = was, brand, names


def test_a_policy_moved_to_its_own_shop_writes_its_own_pages(shop, served):
    policy = Policy.load(served / "runs" / "base" / "sft")
    users, train, seen = np.arange(20), shop.csr("train"), shop.csr("train", positive=None)
    away = moved(policy, shop, policy.model.item.detach().numpy())
    own = Policy(policy.model, policy.vocab, away.style)
    a, b = (p.rank(users, train, seen, 6, 20) for p in (own, away))
    assert np.array_equal(a.item, b.item)
    c = moved(policy, shop, policy.model.item.detach().numpy()[::-1].copy()).rank(
        users, train, seen, 6, 20
    )
    assert not np.array_equal(a.item, c.item)


def test_the_study_runs_and_refuses_what_it_sets_itself(served, tmp_path, capsys):
    import shutil

    shutil.copytree(served / "data", tmp_path / "data")
    base = {
        "data": str(tmp_path / "data"),
        "runs": str(tmp_path / "runs"),
        "seeds": 2,
        "pretrain": "--size nano --steps 4 --batch 8 --words 300 --device cpu",
        "sft": "--epochs 1 --batch 16 --max_history 8 --k 6 --device cpu",
    }
    records = crossdomain.run(crossdomain.Config(**base))
    assert {r["variant"] for r in records} == {
        "popularity",
        "content kNN",
        "rows: words",
        "rows: states",
        "rows: shuffled",
        "trained there",
    }
    assert {r["seeds"] for r in records} == {
        2
    } and "cosine of predicted and trained rows" in capsys.readouterr().out
    assert (tmp_path / "runs" / "crossdomain" / "synthetic-to-other-half.parquet").exists()
    # presets hold this option; the study sets the same
    agreed = base | {"sft": base["sft"] + " --no-use_user"}
    assert crossdomain.run(crossdomain.Config(**agreed)) == records
    with pytest.raises(PageLLMError, match="--sft must not set seed"):
        crossdomain.run(crossdomain.Config(**base | {"sft": "--seed 3"}))
    with pytest.raises(PageLLMError, match="target='synthetic'"):
        crossdomain.Config(target="synthetic")
