"""Files for other tools say what evaluate wrote, in the shop's own ids, and read back the same."""

import json
import shutil

import numpy as np
import pytest

from pagellm.data import prepare
from pagellm.data.shop import load
from pagellm.pages.ranked import Scorer, popularity_pages, score_row, seen_rows
from pagellm.serving import exchange, export
from pagellm.stage.config import PageLLMError
from pagellm.stage.files import file_id


@pytest.fixture
def run(shop, tmp_path):
    """A run with a finished evaluation of popularity, and a Config without its format."""
    folder = tmp_path / "runs" / "base" / "evaluate"
    shutil.copytree(shop.path, tmp_path / "data" / "synthetic")
    scorer, seen = Scorer(shop, "test"), seen_rows(shop, "test", "train+valid")
    pages = popularity_pages(shop, scorer.users, seen, 6, 30)
    score_row(folder / "popularity", "popularity", pages, scorer, seen, 6, n_boot=10)
    data = file_id(shop.path / "source.json")
    made = {"config": {"split": "test"}, "inputs": {"data": data}}
    (folder / "config.json").write_text(json.dumps(made))
    (folder / "done").write_text("{}")
    return {"run": "base", "data": str(tmp_path / "data"), "runs": str(tmp_path / "runs")}


def test_trec_files_hold_every_rank_and_every_held_out_item(run, shop, tmp_path, capsys):
    export.run(export.Config(format="trec", **run))
    assert "qrels.txt, popularity.run" in capsys.readouterr().out
    folder = tmp_path / "runs" / "base" / "trec"
    held, ids = shop.csr("test"), shop.catalogue.ids
    lines = [line.split() for line in (folder / "qrels.txt").read_text().splitlines()]
    assert {(u, i) for u, zero, i, one in lines if (zero, one) == ("0", "1")} == {
        (shop.user_ids[u], ids[i]) for u in range(shop.n_users) for i in held.of(u)[0]
    }
    pages = exchange.evaluated(tmp_path / "runs" / "base" / "evaluate", shop)["popularity"]
    lines = [line.split() for line in (folder / "popularity.run").read_text().splitlines()]
    at = 0
    for user, row in zip(pages.user, pages.item, strict=True):
        for rank, item in enumerate((i for i in row if i >= 0), 1):
            u, q0, i, r, score, tag = lines[at]
            assert (u, q0, i, int(r), tag) == (
                *(shop.user_ids[user], "Q0", ids[item], rank, "popularity"),
            )
            assert rank == 1 or float(score) < float(lines[at - 1][4])
            at += 1
    assert at == len(lines)


def test_recbole_files_are_the_same_data_when_prepared_again(run, shop, tmp_path):
    export.run(export.Config(format="recbole", **run))
    folder = tmp_path / "runs" / "base" / "recbole" / "synthetic"
    heading = (folder / "synthetic.train.inter").read_text().splitlines()[0]
    assert heading == "user_id:token\titem_id:token\trating:float\ttimestamp:float"
    heading = (folder / "synthetic.item").read_text().splitlines()[0]
    assert heading.startswith("item_id:token\ttitle:token_seq")
    prepare.run(
        prepare.Config(dataset="again", raw=str(folder), split="given", data=str(tmp_path / "data"))
    )
    again = load(tmp_path / "data" / "again")

    def rows(of, split):
        keep = of.rows(split)
        users = [of.user_ids[u] for u in of.user[keep]]
        items = [of.catalogue.ids[i] for i in of.item[keep]]
        return sorted(zip(users, items, of.rating[keep].tolist(), of.time[keep], strict=True))

    for split in ("train", "valid", "test"):
        assert rows(again, split) == rows(shop, split)
    price = dict(zip(shop.catalogue.ids, shop.catalogue.price.tolist(), strict=True))
    want = np.array([price[i] for i in again.catalogue.ids])
    np.testing.assert_allclose(again.catalogue.price, want, rtol=1e-5)


def test_blanks_in_identifiers_are_written_as_in_addresses(tmp_path):
    runs = {"a": {"u 1": {"x y": 2, "z": 1}}}
    files = exchange.write_trec(tmp_path, {"u 1": {"z": 1}}, runs)
    assert files[0].read_text() == "u%201 0 z 1\n"
    assert files[1].read_text() == "u%201 Q0 x%20y 1 2 a\nu%201 Q0 z 2 1 a\n"
    with pytest.raises(PageLLMError, match="differ only in blanks"):
        exchange.write_trec(tmp_path, {"u": {"a b": 1, "a%20b": 1}}, {})


def test_what_is_missing_or_of_other_data_is_said(run, tmp_path):
    with pytest.raises(PageLLMError, match="has no pages of ppo; there are popularity"):
        export.run(export.Config(format="trec", policy="ppo", **run))
    made = tmp_path / "runs" / "base" / "evaluate" / "config.json"
    made.write_text(json.dumps({"config": {"split": "test"}, "inputs": {"data": "other"}}))
    with pytest.raises(PageLLMError, match="made from other data"):
        export.run(export.Config(format="ranx", **run))
    shutil.rmtree(made.parent)
    with pytest.raises(PageLLMError, match="no evaluation in"):
        export.run(export.Config(format="ranx", **run))


def test_composed_pages_go_out_by_their_name(run, tmp_path, capsys):
    folder = tmp_path / "runs" / "base" / "evaluate"
    shutil.copytree(folder / "popularity", folder / "compose")
    export.run(export.Config(format="trec", policy="compose", **run))
    assert "qrels.txt, compose.run" in capsys.readouterr().out
    assert not (tmp_path / "runs" / "base" / "trec" / "popularity.run").exists()
    with pytest.raises(PageLLMError, match="has no pages of sft; there are compose, popularity"):
        export.run(export.Config(format="ranx", policy="sft", **run))
    with pytest.raises(PageLLMError, match="policy='compose': want ppo, sft"):
        export.Config(policy="compose", **run)
    with pytest.raises(PageLLMError, match="a policy that was evaluated"):
        export.Config(format="trec", policy="nobody", **run)
