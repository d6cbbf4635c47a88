"""Several processes read what one reads: the same bytes, the same counts, the same message for the same fault."""

import json

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from pagellm.config import PageLLMError
from pagellm.data import prepare, synthetic


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
        path = prepare.run(prepare.Config(dataset="shop", raw=str(folder / spelling), data=str(data), k_core=2,
                                          processes=processes))
        assert sorted(p.name for p in data.iterdir()) == ["shop"]
        made.append({p.name: p.read_bytes() for p in path.iterdir()})
    assert made[0] == made[1] and "interactions.parquet" in made[0]
    lines = json.loads(made[0]["source.json"])["counts"]["lines"]
    assert lines["read"] == lines["kept"] + sum(lines["broken"].values())
    assert lines["broken"] == ({"bad JSON": 3} if spelling == "jsonl" else {})


@pytest.mark.parametrize("processes", [1, 2])
def test_too_many_broken_lines_stop_either_way(folder, processes, tmp_path, capsys):
    for part in range(2):
        (tmp_path / f"part-{part}.jsonl").write_text('{"user_id": "u", "item_id": "i"}\n' + "{broken\n" * 30)
    with pytest.raises(PageLLMError, match="60 of 62 review lines are broken .60 bad JSON.*\n.*part-0.jsonl:2"):
        prepare.run(prepare.Config(dataset="shop", raw=str(tmp_path), data=str(tmp_path / "data"),
                                   processes=processes))
    assert not list((tmp_path / "data").iterdir())


def test_a_damaged_part_is_named(folder, tmp_path):
    for part in ("part-0", "part-1"):
        (tmp_path / f"{part}.parquet").write_bytes((folder / "parquet" / f"{part}.parquet").read_bytes())
    data = bytearray((tmp_path / "part-1.parquet").read_bytes())
    data[4: len(data) // 2] = bytes(len(data) // 2 - 4)
    (tmp_path / "part-1.parquet").write_bytes(data)
    with pytest.raises(PageLLMError, match="part-1.parquet"):
        prepare.run(prepare.Config(dataset="shop", raw=str(tmp_path), data=str(tmp_path / "data"), processes=2))
