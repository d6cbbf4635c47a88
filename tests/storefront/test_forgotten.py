"""Who is forgotten is in no cache, trace, pair or decision of the storefront, which goes on."""

import json
import shutil

import pyarrow.parquet as pq
import pytest

from pagellm.data.shop import load
from pagellm.storefront import ahead, show, teach
from pagellm.storefront.ahead import open_ahead
from pagellm.upkeep import forget


@pytest.fixture
def places(made, tmp_path):
    for part in ("data", "runs"):
        shutil.copytree(made[part], tmp_path / part)
    return made | {"data": str(tmp_path / "data"), "runs": str(tmp_path / "runs")}


def lines(path):
    return [json.loads(line) for line in path.read_text().splitlines()]


def test_the_person_is_gone_everywhere_and_others_keep_their_pages(places, tmp_path, capsys):
    folder = tmp_path / "runs" / "synthetic" / "storefront"
    teach.run(teach.Config(people=3, **places))
    number = lines(folder / "teach" / "traces.jsonl")[0]["user"]
    user = load(tmp_path / "data" / "synthetic").user_ids[number]
    ahead.run(ahead.Config(people=10, **places))
    (folder / "prefer" / "pairs").mkdir(parents=True)
    pairs = folder / "prefer" / "pairs" / "pairs.jsonl"
    pairs.write_text(f'{{"user": {number}, "better": []}}\n{{"user": 9999, "better": []}}\n')

    was = open_ahead(ahead.Config(**places))
    other = next(c for c in was.people() if c.bucket.startswith("user:") and c.user != user)
    before = was.page(other, was.store.layout)[0]
    was.cache.close()

    forget.run(forget.Config(user=user, yes=True, **(places | {"run": ""})))

    assert all(line["user"] != number for line in lines(folder / "teach" / "traces.jsonl"))
    assert [line["user"] for line in lines(pairs)] == [9999]
    assert not (folder / "cache").exists()
    for name in ("pages", "placements"):
        users = pq.read_table(folder / "evaluate" / f"{name}.parquet")["user"].to_pylist()
        assert users and number not in users
    assert "user" not in pq.read_table(folder / "evaluate" / "decisions.parquet").column_names
    for path in (p for p in folder.rglob("*") if p.is_file()):
        assert user.encode() not in path.read_bytes(), path

    now = open_ahead(ahead.Config(**places))
    assert user not in now.store.known.number
    assert all("forgotten" not in str(context.user) for context in now.people())
    assert not len(now.store.known.context(user).item)
    after = now.page(now.store.known.context(other.user), now.store.layout)[0]
    assert [row.theme.title for row in after.rows]  # static until the cache is filled anew
    ahead.run(ahead.Config(**places))
    after = now.page(now.store.known.context(other.user), now.store.layout)[0]
    assert after.items().tolist() == before.items().tolist()
    now.cache.close()
    capsys.readouterr()
    show.run(show.Config(**places))
    assert "forgotten" not in capsys.readouterr().out
