"""Pages in the terminal and in files: interrupted, resumed and shared runs end the same."""

import math
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from pagellm.pages.ranked import read_pages
from pagellm.serving import recommend
from pagellm.serving.recommend import Config, parse_history
from pagellm.serving.recommender import Ask, Recommender
from pagellm.stage import dist
from pagellm.stage.config import PageLLMError


def cut_short(monkeypatch, options) -> list:
    """Run recommend until its third part, where the plug is pulled; returns the parts made."""
    plain, made = recommend.file_rows, []

    def unplugged(recommender, options, users):
        if len(made) == 2:
            raise KeyboardInterrupt
        made.append(users)
        return plain(recommender, options, users)

    with monkeypatch.context() as m:
        m.setattr(recommend, "file_rows", unplugged)
        with pytest.raises(KeyboardInterrupt):
            recommend.run(options)
    return made


def config(root, **more):
    return Config(
        run="base", data=str(root / "data"), runs=str(root / "runs"), device="cpu", **more
    )


def test_histories_from_the_command_line():
    assert parse_history("a:5,b:3.5")[1] == ("b", 3.5)
    ((name, rating),) = parse_history("a")
    assert name == "a" and math.isnan(rating)
    assert parse_history("a:b:4") == (("a:b", 4.0),)
    ((name, rating),) = parse_history("a:2", known={"a:2": 0})
    assert name == "a:2" and math.isnan(rating)
    assert parse_history("17850.0:5") == (("17850", 5.0),)  # as prepare keeps it
    assert parse_history('"red, large":5,b:3') == (("red, large", 5.0), ("b", 3.0))
    for wrong in ("a:6", "a:0", "a:x", "a:", ":3", "", "a,,b", "a:inf"):
        with pytest.raises(PageLLMError, match="rating from 1 to 5"):
            parse_history(wrong)


def test_a_page_in_the_terminal(served, rec, capsys):
    item = rec.shop.catalogue.ids[0]
    recommend.run(
        config(served, user=rec.shop.user_ids[0], history=f"{item}:5,what", k=4, categories="Nope")
    )
    text = capsys.readouterr().out
    assert (
        "unknown items: what" in text
        and "unknown categories: Nope" in text
        and "0 of 4 slots" in text
    )
    recommend.run(config(served, user="never met", k=4))
    text = capsys.readouterr().out
    assert "has not met" in text and len(re.findall(r"^ +\d+  ", text, re.M)) == 4


@pytest.mark.parametrize(
    "wrong",
    [
        {},
        {"user": "a", "all": True, "out": "x"},
        {"all": True},
        {"out": "x", "user": "a"},
        {"user": "a", "k": 0},
        {"user": "a", "mode": "best"},
        {"user": "a", "policy": "x"},
        {"user": "a", "price_min": 5.0, "price_max": 1.0},
        {"user": "a", "k": 5, "depth": 3},
        {"user": "a", "split": "train"},
    ],
)
def test_options_that_cannot_be(served, wrong):
    with pytest.raises(PageLLMError):
        config(served, **wrong)


def rows(path):
    return pq.read_table(path).sort_by([("user", "ascending"), ("rank", "ascending")]).to_pydict()


def test_everybodys_pages_whole_resumed_and_shared_are_the_same(
    served, rec, tmp_path, monkeypatch, capsys
):
    def options(name, **more):
        return config(served, all=True, out=str(tmp_path / name), k=6, part=16, depth=10, **more)

    recommend.run(options("whole.parquet"))
    whole = rows(tmp_path / "whole.parquet")
    assert "pages/s" in capsys.readouterr().out
    ranked = read_pages(tmp_path / "whole.parquet", rec.shop)
    assert (
        len(ranked.user) == rec.shop.n_users
        and (ranked.slots == 6).all()
        and ranked.item.shape[1] == 10
    )
    assert whole["user_id"] == [rec.shop.user_ids[u] for u in whole["user"]]
    assert whole["item_id"] == [rec.shop.catalogue.ids[i] for i in whole["item"]]

    plain, made = recommend.file_rows, cut_short(monkeypatch, options("cut.parquet"))
    assert not (tmp_path / "cut.parquet").exists() and len(made) == 2
    with pytest.raises(PageLLMError, match="another mode"):
        recommend.run(options("cut.parquet", mode="one_shot"))
    made.clear()
    with monkeypatch.context() as m:
        m.setattr(recommend, "file_rows", lambda *a: made.append(a[2]) or plain(*a))
        recommend.run(options("cut.parquet"))
        left = len(made)
        recommend.run(options("cut.parquet"))
    assert rows(tmp_path / "cut.parquet") == whole
    assert left == len(made) == -(-rec.shop.n_users // 16) - 2

    monkeypatch.setattr(dist, "world", lambda: 2)
    for rank in (1, 0):
        assert not (tmp_path / "shared.parquet").exists()
        monkeypatch.setattr(dist, "rank", lambda rank=rank: rank)
        recommend.run(options("shared.parquet"))
    assert rows(tmp_path / "shared.parquet") == whole and not list(tmp_path.glob("*.parts"))
    with pytest.raises(PageLLMError, match="another"):
        recommend.run(options("shared.parquet", exclude=rec.shop.catalogue.ids[0]))


def test_two_processes_write_the_file_that_one_writes(served, tmp_path):
    """NPROC=2 make recommend: two real processes, started as the Makefile starts them."""
    common = {
        "run": "base",
        "data": str(served / "data"),
        "runs": str(served / "runs"),
        "device": "cpu",
        "k": 6,
        "part": 16,
    }
    recommend.run(recommend.Config(all=True, out=str(tmp_path / "one.parquet"), **common))
    done = subprocess.run(
        [
            sys.executable,
            "-m",
            "torch.distributed.run",
            "--standalone",
            "--nproc_per_node",
            "2",
            "-m",
            "--",
            "pagellm.serving.recommend",
            "--all",
            "--out",
            str(tmp_path / "two.parquet"),
            *(f"--{name}={value}" for name, value in common.items()),
        ],
        env={**os.environ, "PYTHONPATH": str(Path(__file__).parents[2]), "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        timeout=150,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    assert (tmp_path / "two.parquet").read_bytes() == (tmp_path / "one.parquet").read_bytes()
    assert not list(tmp_path.glob("*.parts"))


def test_a_process_that_comes_when_all_is_joined_ends_in_peace(tmp_path, monkeypatch):
    """The other one may clear the folder away between any two steps of this one."""
    out, parts = tmp_path / "pages.parquet", tmp_path / "pages.parquet.parts"

    def gone(lock):
        raise FileNotFoundError(lock.lock_file)

    monkeypatch.setattr(recommend.FileLock, "acquire", gone)
    with pytest.raises(FileNotFoundError):
        recommend.join(out, parts, [parts / "part-0"], {}, 1)
    out.write_bytes(b"")
    recommend.join(out, parts, [parts / "part-0"], {}, 1)


def test_sft_alone_has_pages_in_the_terminal_and_in_files(sft_alone, rec, tmp_path, capsys):
    recommend.run(config(sft_alone, user=rec.shop.user_ids[0], k=4))
    text = capsys.readouterr().out
    assert re.match("recommend: sft [0-9a-f]{16}, no reward model; no rows held out", text)
    assert len(re.findall(r"^ +\d+  ", text, re.M)) == 4 and "page reward" not in text
    recommend.run(config(sft_alone, all=True, out=str(tmp_path / "p.parquet"), k=4))
    assert "no rows held out" in capsys.readouterr().out
    assert len(rows(tmp_path / "p.parquet")["rank"]) == 4 * rec.shop.n_users
    with pytest.raises(PageLLMError, match="make ppo"):
        recommend.run(config(sft_alone, user="x", policy="ppo"))


def test_everybodys_pages_hold_nothing_that_their_users_have(served, rec, tmp_path):
    """The default; a researcher holds rows out, and then pages may hold them."""

    def owned(**more):
        out = tmp_path / f"{len(more)}.parquet"
        recommend.run(config(served, all=True, out=str(out), k=12, **more))
        table, have = (
            rows(out),
            set(zip(rec.shop.user.tolist(), rec.shop.item.tolist(), strict=True)),
        )
        return sum(pair in have for pair in zip(table["user"], table["item"], strict=True))

    assert owned() == 0 < owned(split="test")


def test_users_below_the_k_core_have_pages_from_their_histories(served, rec, tmp_path, capsys):
    """dropped.parquet in the data: one row an event, oldest first; the column `known` says whom
    the model has met."""
    root, items = tmp_path / "copy", rec.shop.catalogue.ids
    shutil.copytree(served, root)
    dropped = {"new": [(items[3], 5.0), (items[8], None)], "odd": [("gone", 5.0), (items[1], 1.0)]}
    table = pa.table(
        {
            "user_id": [u for u, events in dropped.items() for _ in events],
            "item_id": [item for events in dropped.values() for item, _ in events],
            "rating": [rating for events in dropped.values() for _, rating in events],
        }
    )
    pq.write_table(table, root / "data" / "synthetic" / "dropped.parquet")
    recommend.run(config(root, all=True, out=str(tmp_path / "p.parquet"), k=6, part=16))
    found = rows(tmp_path / "p.parquet")
    assert {u for u, known in zip(found["user_id"], found["known"], strict=True) if known} == set(
        rec.shop.user_ids
    )
    r = Recommender.load(config(root, user="x"))
    stranger = Recommender.load(config(served, user="x"))
    for user, history in (
        ("new", ((items[3], 5.0), (items[8], math.nan))),
        ("odd", ((items[1], 1.0),)),
    ):
        # one page and everybody's are the same, and that of a stranger with this history
        (want,) = stranger.answers([Ask(user=user, history=history, k=6)])
        (alone,) = r.answers([Ask(user=user, k=6)])
        assert alone == want
        mine = [n for n, name in enumerate(found["user_id"]) if name == user]
        assert [found["item_id"][n] for n in mine] == [s["item"] for s in want["items"]]
        assert not any(found["known"][n] or found["user"][n] is not None for n in mine)
    said = capsys.readouterr().out
    n = rec.shop.n_users
    assert f"2 of {n + 2} users of the log are below the k-core" in said
    assert f"1 of {len(items) + 1} items of the log are below the k-core" in said and "gone" in said
    recommend.run(config(root, user="new", k=6))
    assert "new is below the k-core" in capsys.readouterr().out


def test_data_of_before_say_who_has_no_page(served, rec, tmp_path, capsys):
    """Data that an earlier version prepared hold no dropped.parquet."""
    root = tmp_path / "copy"
    shutil.copytree(served, root)
    (root / "data" / "synthetic" / "dropped.parquet").unlink()
    recommend.run(config(root, all=True, out=str(tmp_path / "p.parquet"), k=6))
    said = capsys.readouterr().out
    assert "items of the log are below the k-core and have no page" in said


def test_what_is_wrong_for_everybody_is_said_once(served, rec, tmp_path, capsys):
    """Ids of a recall list that nobody knows exclude nothing: the screen says so."""
    recall = tmp_path / "recall.txt"
    recall.write_text(f"\ufeff{rec.shop.catalogue.ids[0]}\nwith,comma\n", encoding="utf-8")
    recommend.run(
        config(
            served,
            all=True,
            out=str(tmp_path / "p.parquet"),
            k=6,
            exclude=f"@{recall}",
            in_stock=",".join([*rec.shop.catalogue.ids[:4], "no such"]),
            categories="|".join(["Nope", *rec.members]),
        )
    )
    said = capsys.readouterr().out
    assert "unknown items: 1 of the 2 of --exclude, with,comma" in said
    assert "unknown items: 1 of the 5 of --in_stock, no such" in said
    assert "unknown categories: 1 of the" in said and "Nope" in said
    n = rec.shop.n_users
    assert f"{n} of {n} pages have fewer than 6 slots" in said  # 3 items are left
    assert rec.shop.catalogue.ids[0] not in rows(tmp_path / "p.parquet")["item_id"]
    assert len(rec.left_out.items) == 60 - rec.shop.n_items > 0
    assert f"{60 - rec.shop.n_items} of 60 items of the log are below the k-core" in said
    with pytest.raises(PageLLMError, match="another exclude"):
        recall.write_text("other")
        recommend.run(
            config(
                served,
                all=True,
                out=str(tmp_path / "p.parquet"),
                k=6,
                exclude=f"@{recall}",
                in_stock=",".join([*rec.shop.catalogue.ids[:4], "no such"]),
                categories="|".join(["Nope", *rec.members]),
            )
        )


def test_filters_hold_in_the_file_too(served, rec, tmp_path):
    (tmp_path / "stock").write_text("\n".join(rec.shop.catalogue.ids[:9]))
    recommend.run(
        config(
            served,
            all=True,
            out=str(tmp_path / "p.parquet"),
            k=6,
            in_stock=f"@{tmp_path / 'stock'}",
        )
    )
    assert set(rows(tmp_path / "p.parquet")["item_id"]) <= set(rec.shop.catalogue.ids[:9])
    with pytest.raises(PageLLMError, match="cannot be read"):
        recommend.run(config(served, user="x", in_stock=f"@{tmp_path / 'nothing'}"))


def test_pages_of_shortlists(served, rec, tmp_path):
    """Shortlists of all that is legal change nothing; short ones hold the best of the first slot,
    and every filter.
    """
    fewest = min(len(rec.past(u, ())[2]) for u in range(rec.shop.n_users))
    size = rec.shop.n_items - fewest
    some = "|".join(sorted(rec.members)[:3])
    tables = {}
    for name, more in (
        ("all", {}),
        ("wide", {"candidates": size}),
        ("one_shot", {"mode": "one_shot"}),
        ("narrow", {"candidates": 6}),
        ("filtered", {"candidates": 9, "categories": some}),
        ("beam", {"candidates": 6, "mode": "beam"}),
    ):
        out = tmp_path / f"{name}.parquet"
        depth = 0 if name in ("narrow", "beam") else 8
        recommend.run(
            config(served, all=True, k=4, depth=depth, out=str(out), split="test", **more)
        )
        tables[name] = rows(out)
    assert size < rec.shop.n_items and fewest > 0
    for name in ("user", "rank", "item", "page", "known"):
        assert tables["all"][name] == tables["wide"][name], name
    assert tables["all"]["score"] == pytest.approx(tables["wide"]["score"], abs=1e-4)

    def pages(name, most=4):
        table, found = tables[name], {}
        for user, rank, item in zip(table["user"], table["rank"], table["item"], strict=True):
            if rank <= most:
                found.setdefault(user, set()).add(item)
        return found

    first = pages("one_shot", 6)
    for name in ("narrow", "beam"):
        for user, page in pages(name).items():
            assert len(page) == 4 and page <= first[user], name
    held = rec.shop.catalogue.categories
    assert tables["filtered"]["item"]
    assert all(set(held[i]) & set(some.split("|")) for i in tables["filtered"]["item"])
    with pytest.raises(PageLLMError, match="another candidates"):
        recommend.run(
            config(
                served,
                all=True,
                k=4,
                out=str(tmp_path / "beam.parquet"),
                split="test",
                mode="beam",
                candidates=7,
            )
        )


def test_pieces_are_carried_on_part_by_part_and_read_as_one_table(
    served, rec, tmp_path, monkeypatch, capsys
):
    """Two processes write a folder of parts; what is there is not written again."""

    def options(name, **more):
        return config(served, all=True, out=str(tmp_path / name), k=6, part=16, **more)

    recommend.run(options("whole.parquet"))
    folder = tmp_path / "pages"
    cut_short(monkeypatch, options("pages", pieces=True))
    before = {path.name: path.stat().st_mtime_ns for path in folder.glob("part-*")}
    assert len(before) == 2 and not (folder / "_SUCCESS").exists()
    with pytest.raises(PageLLMError, match="another mode"):
        recommend.run(options("pages", pieces=True, mode="one_shot"))
    monkeypatch.setattr(dist, "world", lambda: 2)
    for rank in (1, 0):
        assert not (folder / "_SUCCESS").exists()
        monkeypatch.setattr(dist, "rank", lambda rank=rank: rank)
        recommend.run(options("pages", pieces=True))
    assert (folder / "_SUCCESS").exists()
    assert before.items() <= {p.name: p.stat().st_mtime_ns for p in folder.glob("part-*")}.items()
    assert rows(folder) == rows(tmp_path / "whole.parquet")
    assert len(list(folder.glob("part-*.parquet"))) == -(-rec.shop.n_users // 16)
    capsys.readouterr()
    recommend.run(options("pages", pieces=True))
    assert "already there" in capsys.readouterr().out
    with pytest.raises(PageLLMError, match="another exclude"):
        recommend.run(options("pages", pieces=True, exclude=rec.shop.catalogue.ids[0]))


def test_pages_take_the_place_of_nothing_else(served, tmp_path):
    mine = tmp_path / "orders.data"
    mine.write_text("user,item\n")
    with pytest.raises(PageLLMError, match="does not say what it was made from"):
        recommend.run(config(served, all=True, out=str(mine)))
    assert mine.read_text() == "user,item\n"


@pytest.mark.parametrize("name", ["pages.csv", "s3://bucket/pages.CSV?scheme=http", "pages.jsonl"])
def test_a_name_for_another_kind_of_table_is_refused(served, name):
    with pytest.raises(PageLLMError, match="(?s)written as Parquet, not as .*write_csv"):
        config(served, all=True, out=name)


def test_pieces_want_a_directory_of_their_own(served, tmp_path):
    (tmp_path / "mine.txt").write_text("mine")
    (tmp_path / "file").write_text("a file")
    for more, wanted in (
        ({"all": True, "out": str(tmp_path), "pieces": True}, "holds files that are no parts"),
        ({"all": True, "out": str(tmp_path / "file"), "pieces": True}, "is a file"),
        ({"all": True, "out": str(tmp_path)}, "add --pieces"),
        ({"user": "a", "pieces": True}, "goes with --all"),
    ):
        with pytest.raises(PageLLMError, match=wanted):
            recommend.run(config(served, **more))
    assert (tmp_path / "mine.txt").read_text() == "mine"
