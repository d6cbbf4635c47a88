"""Approximate search: nearly what exact search finds, on rows of every length. An index that does
not belong to the export beside it is refused.
"""

import numpy as np
import pytest

from pagellm.serving import export, search
from pagellm.serving.embeddings import Embeddings
from pagellm.stage.config import PageLLMError

faiss = pytest.importorskip("faiss", reason="needs the extra [search]")


def drawn(n: int, d: int = 16):
    rng = np.random.default_rng(0)
    # lengths matter to h.e, not to cosine
    rows = rng.normal(size=(n, d)) * rng.uniform(0.5, 1.5, size=(n, 1))
    return rows.astype(np.float32), rng.normal(size=(50, d)).astype(np.float32)


def test_exact_is_the_sorted_product():
    rows, h = drawn(300)
    for k in (1, 10, 300):
        assert np.array_equal(
            search.exact(rows, h, k, block=7), np.argsort(-(h @ rows.T), axis=1)[:, :k]
        )


def test_the_graph_finds_nearly_what_exact_search_finds_and_says_the_same_scores():
    rows, h = drawn(3000)
    index = search.Index.build(rows, [f"i{n}" for n in range(3000)])
    true = search.exact(rows, h, 20)
    found = [index.places(h, 20, looked)[0] for looked in (20, 400)]
    recall = [
        np.mean([len(np.intersect1d(a, b)) for a, b in zip(place, true, strict=True)]) / 20
        for place in found
    ]
    assert recall[0] < recall[1] and recall[1] > 0.99
    ids, score = index.query(h, 20, 400)
    place, _ = index.places(h, 20, 400)
    assert ids[0, 0] == f"i{place[0, 0]}" and (np.diff(score, axis=1) <= 0).all()
    assert score == pytest.approx(np.take_along_axis(h @ rows.T, place, 1), abs=2e-2)


def test_more_items_than_there_are():
    rows, h = drawn(5)
    ids, score = search.Index.build(rows, list("abcde")).query(h, 8)
    assert (
        (ids[:, 5:] == "").all()
        and np.isneginf(score[:, 5:]).all()
        and set(ids[0, :5]) == set("abcde")
    )
    with pytest.raises(PageLLMError, match=r"wants \(B, 16\)"):
        search.Index.build(rows, list("abcde")).query(h[:, :3], 2)
    with pytest.raises(PageLLMError, match="5 rows and 2 ids"):
        search.Index.build(rows, list("ab"))


def test_exact_search_needs_numpy_alone_and_says_where_items_end(monkeypatch):
    monkeypatch.setitem(__import__("sys").modules, "faiss", None)
    rows, h = drawn(5)
    ids, score = search.Exact(rows, list("abcde")).query(h, 8)
    order = np.argsort(-(h @ rows.T), axis=1)
    assert (ids[:, :5] == np.array(list("abcde"), dtype=object)[order]).all()
    assert score[:, :5] == pytest.approx(np.take_along_axis(h @ rows.T, order, 1), rel=1e-5)
    assert (ids[:, 5:] == "").all() and np.isneginf(score[:, 5:]).all()
    with pytest.raises(PageLLMError, match=r"want \(B, 16\)"):
        search.Exact(rows, list("abcde")).query(h[:, :3], 2)
    with pytest.raises(PageLLMError, match="5 rows and 2 ids"):
        search.Exact(rows, list("ab"))


def test_grown_keeps_the_real_rows_first():
    rows, _ = drawn(40)
    more = search.grown(rows, 3)
    assert more.shape == (120, 16) and np.array_equal(more[:40], rows)
    assert np.abs(more[40:80] - rows).max() < 0.1 * rows.std(0).max() * 6 and not np.array_equal(
        more[40:80], more[80:]
    )


def test_the_command_measures_keeps_and_refuses(served, capsys):
    base = {
        "run": "search",
        "data": str(served / "data"),
        "runs": str(served / "runs"),
        "device": "cpu",
    }
    with pytest.raises(PageLLMError, match="sft\n  Make it with: make export .*RUN=search"):
        search.run(search.Config(**base, policy="sft", k=10))
    export.run(export.Config(**base, source_run="base", policy="sft"))
    folder = served / "runs" / "search" / "export-sft"
    with pytest.raises(PageLLMError, match="make search"):
        search.Index.open(folder)
    (alone,) = search.run(search.Config(**base, policy="sft", k=10, users=30))
    assert alone["search"] == "exact" and not list(folder.glob("*.hnsw"))
    records = search.run(
        search.Config(**base, policy="sft", index="hnsw", k=10, search="10,50", users=30)
    )
    assert [r["search"] for r in records] == ["exact", "HNSW, 10 looked at", "HNSW, 50 looked at"]
    assert (
        records[2]["recall"] > 0.95
        and records[0]["recall"] == 1
        and "recall@10" in capsys.readouterr().out
    )
    assert records[1]["bytes"] == (folder / "item_token.hnsw").stat().st_size
    rows = Embeddings(folder)
    h, index = rows.matrix("user_content")[:4], search.Index.open(folder)
    ids, score = index.query(h, 3, 60)
    plain, products = search.Exact.open(folder).query(h, 3)
    assert (plain == ids).all() and products == pytest.approx(score, abs=1e-3)
    assert score[0, 0] == pytest.approx(rows.dot(list(rows.users)[0], [ids[0, 0]])[0], abs=1e-2)
    with pytest.raises(PageLLMError, match="k=999"):
        search.run(search.Config(**base, policy="sft", k=999))
    with open(folder / "item_token.hnsw", "ab") as file:
        file.write(b"x")
    with pytest.raises(PageLLMError, match="damaged or not of the rows"):
        search.Index.open(folder)
