"""After `forget` no file of the data or the runs holds the person, and everything still works."""

import csv
import html
import json
import shutil

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from pagellm import evaluate
from pagellm.data import dropped
from pagellm.data.shop import load
from pagellm.serving import export
from pagellm.serving.recommend import Config as Recommend
from pagellm.serving.recommend import run as recommend
from pagellm.serving.recommender import Ask, Recommender
from pagellm.serving.sources import Sources
from pagellm.stage.config import PageLLMError
from pagellm.stage.files import file_id, write_json
from pagellm.upkeep import forget

BELOW = "below-the-core"


@pytest.fixture
def root(sft_alone, tmp_path):
    """A run with pages, scores, embeddings and files of pages, and rows below the k-core."""
    for part in ("data", "runs"):
        shutil.copytree(sft_alone / part, tmp_path / part)
    shop = load(tmp_path / "data" / "synthetic")
    folder = tmp_path / "data" / "synthetic"
    rows = tuple(
        map(np.array, ([0, 0, 1], [0, 1, 0], [5.0, 4.0, 3.0], [1.0, 2.0, 3.0], [True] * 3))
    )
    dropped.write(dropped.table(0, rows, [BELOW, shop.user_ids[0]], shop.catalogue.ids[:2]), folder)
    # What the run says of its data, as if it had been made from these.
    made = tmp_path / "runs" / "base" / "sft" / "config.json"
    config = json.loads(made.read_text())
    config["inputs"]["data"] = file_id(folder / "source.json")
    write_json(made, config)
    common = places(tmp_path)
    evaluate.run(evaluate.Config(policies="sft", k=6, depth=20, n_boot=2, examples=0, **common))
    export.run(export.Config(policy="sft", out="rows", **common))
    pages = str(tmp_path / "runs" / "base" / "pages.parquet")
    ids = tmp_path / "runs" / "base" / "notes.csv"
    ids.write_text("user,stars\n" + "".join(f"{name},5\n" for name in shop.user_ids[:3]))
    (tmp_path / "runs" / "base" / "report.html").write_text(f"<p>user {shop.user_ids[0]}</p>")
    table = pa.table({"user_id": shop.user_ids, "rank": [1] * shop.n_users})
    pq.write_table(table, pages)
    return tmp_path


def places(root):
    return {"run": "base", "data": str(root / "data"), "runs": str(root / "runs"), "device": "cpu"}


def do(root, user, **more):
    told = places(root) | {"run": ""} | more
    return forget.run(forget.Config(user=user, **told))


def holding(root, user):
    """Files that hold the identifier: read as tables where they are tables, else by their bytes."""
    found = []
    for path in (p for p in root.rglob("*") if p.is_file()):
        if path.suffix == ".parquet":
            table = pq.read_table(path)
            cells = {str(c) for n in table.column_names for c in table[n].to_pylist()}
            for column in (c for c in table.columns if pa.types.is_dictionary(c.type)):
                cells |= {str(v) for chunk in column.chunks for v in chunk.dictionary.to_pylist()}
            named = user in cells
        else:
            named = user.encode() in path.read_bytes()
        if named:
            found.append(path.relative_to(root).as_posix())
    return found


def test_nothing_changes_until_yes_is_said(root, capsys):
    user = load(root / "data" / "synthetic").user_ids[0]
    before = {p: p.read_bytes() for p in root.rglob("*") if p.is_file()}
    found = do(root, user)
    assert {p: p.read_bytes() for p in root.rglob("*") if p.is_file()} == before
    out = capsys.readouterr().out
    assert "would go" in out and "--yes does it" in out and "training anew" in out
    said = {trace.path.name for trace in found}
    assert {"interactions.parquet", "users.parquet", "per_user.parquet", "rows"} <= said


def test_other_data_sets_that_know_the_person_are_named(root, capsys):
    """A shop that updates every day has a data set for each of the last days."""
    user = load(root / "data" / "synthetic").user_ids[0]
    do(root, user)
    out = capsys.readouterr().out
    assert "other data sets" not in out and "composed pages" not in out  # there are none
    for name in ("yesterday", "today", "elsewhere"):
        shutil.copytree(root / "data" / "synthetic", root / "data" / name)
    table = pa.table({"id": ["somebody else"]})
    pq.write_table(table, root / "data" / "elsewhere" / "users.parquet")
    (root / "data" / "elsewhere" / "dropped.parquet").unlink()
    do(root, user, yes=True)
    assert "know the person too: today, yesterday; give" in capsys.readouterr().out


def test_no_file_holds_the_person_and_the_run_goes_on(root):
    folder = root / "data" / "synthetic"
    user, other = load(folder).user_ids[:2]
    n_rows, held = len(load(folder).user), holding(root, user)
    assert len(held) >= 6
    do(root, user, yes=True)
    assert holding(root, user) == []
    shop = load(folder)  # every hash is right again
    assert shop.user_ids[:2] == ["<forgotten 0>", other] and not (shop.user == 0).any()
    assert n_rows > len(shop.user) and shop.n_users == 80
    scores = root / "runs" / "base" / "evaluate" / "sft" / "per_user.parquet"
    assert 0 not in pq.read_table(scores)["user"].to_pylist()
    assert len((root / "runs" / "base" / "notes.csv").read_text().splitlines()) == 3
    assert not (root / "runs" / "base" / "rows").exists()
    known = Recommender.load(Sources(**places(root)))
    first, second = known.answers([Ask(user=user), Ask(user=other)])
    assert not first["user"]["known"] and second["user"]["known"]
    out = root / "all.parquet"
    recommend(Recommend(all=True, out=str(out), k=6, **places(root)))
    assert "<forgotten 0>" not in pq.read_table(out)["user_id"].to_pylist()
    with pytest.raises(PageLLMError, match=f"knows no user '{user}'"):
        do(root, user, yes=True)


def test_lines_that_number_the_person_and_pages_made_ahead_go_too(root):
    """samples.jsonl of PPO and opinions.jsonl of the judge have numbers, the cache only hashes."""
    user = load(root / "data" / "synthetic").user_ids[0]
    run = root / "runs" / "base"
    (run / "samples.jsonl").write_text('{"user": 0, "page": [1]}\n{"user": 10, "page": [0]}\n')
    (run / "storefront" / "cache").mkdir(parents=True)
    (run / "storefront" / "cache" / "cache.sqlite").write_bytes(b"pages")
    do(root, user, yes=True, run="base")
    assert (run / "samples.jsonl").read_text() == '{"user": 10, "page": [0]}\n'
    assert not (run / "storefront" / "cache").exists()


def test_a_run_of_other_data_is_refused(root):
    """There the number is another person's."""
    user = load(root / "data" / "synthetic").user_ids[0]
    other = root / "runs" / "other"
    (other / "sft").mkdir(parents=True)
    write_json(other / "sft" / "config.json", {"config": {}, "inputs": {"data": "of others"}})
    (other / "samples.jsonl").write_text('{"user": 0}\n')
    with pytest.raises(PageLLMError, match="other was not made from .*its numbers"):
        do(root, user, yes=True, run="other")
    assert (other / "samples.jsonl").exists()
    assert not (root / "data" / "synthetic" / forget.JOURNAL).exists()


def test_somebody_below_the_k_core_is_forgotten_too(root):
    assert holding(root, BELOW)
    do(root, BELOW, yes=True)
    assert not holding(root, BELOW)
    load(root / "data" / "synthetic")


@pytest.mark.parametrize("at", ["interactions.parquet", "users.parquet", "source.json"])
def test_a_kill_is_mended_by_the_same_command(root, monkeypatch, at):
    user = load(root / "data" / "synthetic").user_ids[0]
    real = forget.atomic

    def dies(path):
        if path.name == at:
            raise KeyboardInterrupt
        return real(path)

    monkeypatch.setattr(forget, "atomic", dies)
    monkeypatch.setattr(
        forget, "write_json", lambda p, v: dies(p) if p.name == at else write_json(p, v)
    )
    with pytest.raises(KeyboardInterrupt):
        do(root, user, yes=True)
    monkeypatch.undo()
    journal = root / "data" / "synthetic" / forget.JOURNAL
    assert journal.exists()
    with pytest.raises(PageLLMError, match="forgetting another person was begun"):
        do(root, "U0", yes=True)
    do(root, user, yes=True)
    assert holding(root, user) == [] and not journal.exists()
    config = Sources(**places(root))
    made = json.loads((root / "runs" / "base" / "sft" / "config.json").read_text())
    assert made["inputs"]["data"] == file_id(config.data_dir / "source.json")


def test_numbers_that_look_like_the_identifier_are_no_person():
    assert not forget.names({"users": 12, "of": [12]}, "12")
    assert forget.names({"users": ["12"]}, "12") and forget.names(["<user_12>"], "12")
    assert forget.line_names("a,12,3\n", ",", "12")
    assert not forget.line_names("a,120,3\n", ",", "12")
    assert forget.line_names("12 Q0 i1 1 0.5 run\n", " ", "12")


@pytest.mark.parametrize(
    "name, text, left",
    [
        # The cell's second line is of u2, and so is the row of which it is a part.
        (
            "a.csv",
            'user,note\nu1,"one\ntwo"\nu2,"a\nb, c"\nu3,x\n',
            'user,note\nu1,"one\ntwo"\nu3,x\n',
        ),
        ("a.csv", 'note,user\r\n"b\r\n",u2\r\n"c\r\nd",u3\r\n', 'note,user\r\n"c\r\nd",u3\r\n'),
        ("a.csv", 'user;note\nu2;"a\nb"\nu3;1,2,3\n', "user;note\nu3;1,2,3\n"),
        # A quote that is no quoting: two lines, one of them of u2.
        ("a.tsv", 'u1\t"Great\nu2\tfine"\nu3\tok\n', "u3\tok\n"),
        ("a.csv", "user,note\nu1,a\u2028u2,b\nu2,c\u2028d\n", "user,note\nu1,a\u2028u2,b\n"),
        (
            "a.jsonl",
            '{"user": "u1", "t": "\u2028"}\n{"user": "u2"}\n',
            '{"user": "u1", "t": "\u2028"}\n',
        ),
    ],
)
def test_records_go_as_a_whole_and_the_others_stay_to_the_byte(tmp_path, name, text, left):
    path = tmp_path / name
    path.write_bytes(text.encode() + b"caf\xe9,u9\n")
    n = forget.lines_without(path, "u2", 7, yes=False)
    assert n and path.read_bytes() == text.encode() + b"caf\xe9,u9\n"
    assert forget.lines_without(path, "u2", 7, yes=True) == n
    assert path.read_bytes() == left.encode() + b"caf\xe9,u9\n"


@pytest.mark.parametrize("user", ['a"b', "josé", "a,b", "x & y"])
def test_identifiers_with_letters_that_files_escape_are_found(tmp_path, user):
    """In JSON, in quoted cells and in HTML they are spelled in another way."""
    json_file, lines, table, page = (
        tmp_path / f"f{s}" for s in (".json", ".jsonl", ".csv", ".html")
    )
    json_file.write_text(json.dumps([user]))
    lines.write_text(json.dumps({"user": user}) + "\n" + json.dumps({"user": "other"}) + "\n")
    with table.open("w", newline="") as file:
        csv.writer(file).writerows([["user"], [user], ["other"]])
    page.write_text(f"<p>user {html.escape(user)}</p>")
    assert forget.whole_names(json_file, user) and forget.whole_names(page, user)
    for path in (lines, table):
        assert forget.lines_without(path, user, 1, yes=True) == 1
        assert "other" in path.read_text()
