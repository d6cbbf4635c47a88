"""Several processes read what one reads: the same bytes, counts and messages."""

import gzip
import itertools
import json
import os
import signal
import subprocess
import sys
import time

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import assume, given, settings
from hypothesis import strategies as st

from pagellm.data import parallel, prepare, records, synthetic
from pagellm.data.packed import is_plain
from pagellm.data.records import Span, lines
from pagellm.stage.config import PageLLMError


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """One shop's log in three Parquet parts and in three JSON lines parts, some lines broken."""
    folder = tmp_path_factory.mktemp("parts")
    shop = synthetic.make(60, 40, seed=0)
    rows = list(synthetic.log_rows(shop))
    for name in ("parquet", "jsonl"):
        (folder / name).mkdir()
    for part, some in enumerate(np.array_split(np.arange(len(rows)), 3)):
        mine = [rows[i] for i in some]
        pq.write_table(pa.Table.from_pylist(mine), folder / "parquet" / f"part-{part}.parquet")
        lines = [json.dumps(row) for row in mine]
        lines.insert(5, "{broken")
        (folder / "jsonl" / f"part-{part}.jsonl").write_text("\n".join(lines) + "\n")
    return folder


@pytest.mark.parametrize("spelling", ["parquet", "jsonl"])
def test_the_number_of_processes_moves_no_byte(folder, spelling):
    made = []
    for processes in (1, 3):
        data = folder / f"{spelling}-{processes}"
        path = prepare.run(
            prepare.Config(
                dataset="shop",
                raw=str(folder / spelling),
                data=str(data),
                k_core=2,
                processes=processes,
            )
        )
        assert sorted(p.name for p in data.iterdir()) == ["shop"]
        made.append({p.name: p.read_bytes() for p in path.iterdir()})
    assert made[0] == made[1] and "interactions.parquet" in made[0]
    lines = json.loads(made[0]["source.json"])["counts"]["lines"]
    assert lines["read"] == lines["kept"] + sum(lines["broken"].values())
    assert lines["broken"] == ({"bad JSON": 3} if spelling == "jsonl" else {})


@pytest.mark.parametrize("processes", [1, 2])
def test_too_many_broken_lines_stop_either_way(folder, processes, tmp_path, capsys):
    for part in range(2):
        (tmp_path / f"part-{part}.jsonl").write_text(
            '{"user_id": "u", "item_id": "i"}\n' + "{broken\n" * 30
        )
    with pytest.raises(
        PageLLMError, match="60 of 62 review lines are broken .60 bad JSON.*\n.*part-0.jsonl:2"
    ):
        prepare.run(
            prepare.Config(
                dataset="shop", raw=str(tmp_path), data=str(tmp_path / "data"), processes=processes
            )
        )
    assert not list((tmp_path / "data").iterdir())


def test_a_damaged_part_is_named(folder, tmp_path):
    for part in ("part-0", "part-1"):
        (tmp_path / f"{part}.parquet").write_bytes(
            (folder / "parquet" / f"{part}.parquet").read_bytes()
        )
    data = bytearray((tmp_path / "part-1.parquet").read_bytes())
    data[4 : len(data) // 2] = bytes(len(data) // 2 - 4)
    (tmp_path / "part-1.parquet").write_bytes(data)
    with pytest.raises(PageLLMError, match="part-1.parquet"):
        prepare.run(
            prepare.Config(
                dataset="shop", raw=str(tmp_path), data=str(tmp_path / "data"), processes=2
            )
        )


@settings(deadline=None, max_examples=150)
@given(
    st.lists(
        st.sampled_from(["{}", "", "é\U0001f600", "a\rb", "\ufeff", "nul\0", "x" * 9, "long" * 4]),
        max_size=8,
    ),
    st.sampled_from(["\n", "\r\n"]),
    st.booleans(),
    st.lists(st.integers(0, 90), max_size=4),
    st.integers(1, 20),
)
def test_parts_of_a_file_are_its_lines_wherever_it_is_cut(
    tmp_path_factory, content, end, last, cuts, first
):
    """Wherever a file is cut, even within a character, every line is read once and in order."""
    path = tmp_path_factory.getbasetemp() / "cut"
    data = (end.join(content) + end * last).encode()
    path.write_bytes(data)
    assume(is_plain(path))  # a file of CR line ends is never cut
    edges = [0, *sorted(min(cut, len(data)) for cut in cuts), None]
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(records, "FIRST_READ", first)
        patch.setattr(records, "LINE_LIMIT", 12)
        whole = list(lines(path))
        found = [line for a, b in itertools.pairwise(edges) for line in lines(path, Span(a, b))]
    plain = [
        None if len(line) > 12 else line.rstrip(b"\r")
        for line in data.removeprefix(b"\xef\xbb\xbf").split(b"\n")
    ]
    assert found == whole == (plain[:-1] if not data or data.endswith(b"\n") else plain)


def test_only_plain_files_of_lines_are_cut(tmp_path):
    text = b'{"user_id": "u", "item_id": "i"}\n' * 100
    for name, data in (
        ("plain.jsonl", text),
        ("packed.jsonl", gzip.compress(text)),
        ("none.jsonl", b""),
        ("log.csv", b"user,item\n" + b"u,i\n" * 900),
    ):
        (tmp_path / name).write_bytes(data)

    def spans(name, by_line=True):
        return records.spans(tmp_path / name, 1_000, by_line)

    assert spans("plain.jsonl") == [Span(0, 1100), Span(1100, 2200), Span(2200, None)]
    assert (
        spans("packed.jsonl") == spans("none.jsonl") == spans("log.csv", False) == [Span(0, None)]
    )


def review_files(folder, spelling):
    """A shop's reviews in two plain files, an empty one and a packed one, with odd lines."""
    shop = synthetic.make(60, 40, seed=0)
    rows = [
        {
            "user_id": r.user,
            "parent_asin": r.item,
            "rating": r.rating,
            "timestamp": 1000 * r.time,
            "title": "é ☃",
            "text": f"{r.text} &#34;\U0001f600",
        }
        if spelling == "2023"
        else {
            "reviewerID": r.user,
            "asin": r.item,
            "overall": r.rating,
            "unixReviewTime": r.time,
            "reviewText": r.text,
        }
        for r in shop.reviews()
    ]
    written = [json.dumps(row, ensure_ascii=n % 3 == 0).encode() for n, row in enumerate(rows)]
    written += written[:40]  # duplicates in another file
    files = [written[: len(written) // 2], written[len(written) // 2 : -100], [], written[-100:]]
    for n in (0, 1, 3):
        files[n][20:20] = [b"{broken", b"", b'{"nul": "\0"}', b"\xff", b"[1]"]
    end = [b"\n", b"\r\n", b"\n", b"\n"]
    data = [end[n].join(some) for n, some in enumerate(files)]
    data[0] = b"\xef\xbb\xbf" + data[0]
    data[3] = gzip.compress(data[3] + b"\n")
    folder.mkdir()
    for n, content in enumerate(data):
        (folder / f"part-{n}.json").write_bytes(content)


@pytest.mark.parametrize("spelling, several", [("2014", 5), ("2023", 2)])
def test_pieces_of_files_move_no_byte_and_no_line_number(
    tmp_path, monkeypatch, capsys, spelling, several
):
    """The result is the same with more processes than files, and files cut at any byte.

    The files hold broken lines, NUL, a byte order mark, CRLF, no last line end, or nothing.
    """
    review_files(tmp_path / "raw", spelling)
    monkeypatch.setattr(parallel, "PIECE", 7_001)
    names = ",".join(f"part-{n}.json" for n in (0, 1, 3))
    made = []
    for processes in (1, several):
        data = tmp_path / f"by-{processes}"
        path = prepare.run(
            prepare.Config(
                dataset="shop",
                raw=str(tmp_path / "raw"),
                data=str(data),
                k_core=2,
                review_files=names,
                max_broken=0.1,
                processes=processes,
            )
        )
        assert sorted(p.name for p in data.iterdir()) == ["shop"]
        made.append(
            (
                {p.name: p.read_bytes() for p in path.iterdir()},
                capsys.readouterr().out.replace(str(data), ""),
            )
        )
    assert made[0] == made[1]
    source, said = json.loads(made[0][0]["source.json"]), made[0][1]
    assert source["counts"]["lines"]["broken"] == {
        "NUL byte": 3,
        "bad JSON": 3,
        "empty line": 3,
        "not UTF-8": 3,
        "not an object": 3,
    }
    assert "part-0.json:21: bad JSON" in said and "part-0.json:25" in said
    assert source["counts"]["duplicates"] >= 40


def test_examples_carry_the_line_of_their_file(tmp_path, monkeypatch):
    """Also where they stand in a later piece of it."""
    good = b'{"reviewerID": "u", "asin": "i"}\n'
    monkeypatch.setattr(parallel, "PIECE", 1_000)
    for part in range(2):
        (tmp_path / f"part-{part}.json").write_bytes(good * 150 + b"{broken\n" + good * 50)
    said = []
    for processes in (1, 3):
        with pytest.raises(PageLLMError) as caught:
            prepare.run(
                prepare.Config(
                    dataset="shop",
                    raw=str(tmp_path),
                    data=str(tmp_path / f"{processes}"),
                    max_broken=0.0,
                    processes=processes,
                )
            )
        said.append(str(caught.value))
    assert (
        said[0] == said[1]
        and "part-0.json:151: bad JSON" in said[0]
        and "part-1.json:151: bad JSON" in said[0]
    )


def test_of_two_damaged_files_the_first_is_named(tmp_path):
    line = b'{"user_id": "u", "item_id": "i"}\n'
    for part in range(3):
        packed = gzip.compress(line * [100, 100_000, 10_000][part])
        (tmp_path / f"part-{part}.jsonl").write_bytes(packed[: len(packed) - 9] if part else packed)
    with pytest.raises(PageLLMError, match="part-1.jsonl is damaged"):
        prepare.run(
            prepare.Config(
                dataset="shop", raw=str(tmp_path), data=str(tmp_path / "data"), processes=3
            )
        )
    assert not list((tmp_path / "data").iterdir())


def test_a_process_that_dies_is_a_plain_message(folder, tmp_path, monkeypatch):
    monkeypatch.setattr(parallel, "work", os._exit)  # called wrongly: an error before its first job
    with pytest.raises(PageLLMError, match="process that read raw files died"):
        prepare.run(
            prepare.Config(
                dataset="shop", raw=str(folder / "jsonl"), data=str(tmp_path), processes=2
            )
        )
    assert not list(tmp_path.iterdir())


def children(pid):
    done = subprocess.run(["ps", "-o", "pid=", "--ppid", str(pid)], capture_output=True, text=True)
    return [int(word) for word in done.stdout.split()]


@pytest.mark.parametrize("signum", [signal.SIGKILL, signal.SIGTERM])
def test_what_is_killed_leaves_neither_files_nor_processes(tmp_path, signum):
    (tmp_path / "raw").mkdir()
    for part in range(2):
        with open(tmp_path / "raw" / f"part-{part}.jsonl", "w") as file:
            file.writelines(
                f'{{"user_id": "u{n % 999}", "item_id": "i{n % 99}"}}\n' for n in range(400_000)
            )
    command = [
        sys.executable,
        "-m",
        "pagellm.data.prepare",
        "--dataset",
        "shop",
        "--raw",
        str(tmp_path / "raw"),
        "--data",
        str(tmp_path / "data"),
        "--processes",
        "2",
    ]
    process = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    await_(lambda: len(list(tmp_path.glob("data/.shop.*.tmp/part-*.texts"))) == 2)
    mine = children(process.pid)
    assert len(mine) >= 2
    process.send_signal(signum)
    process.wait()
    await_(lambda: not list((tmp_path / "data").iterdir()))
    await_(lambda: not any(map(prepare.is_running, map(str, mine))))


def await_(condition, seconds=120):
    until = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < until, "not in time"
        time.sleep(0.05)
