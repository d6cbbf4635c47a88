"""Raw files come out of an S3 server, partitioned tables too, and pages go back there."""

import re
import shutil

import pyarrow as pa
import pyarrow.csv
import pyarrow.dataset
import pyarrow.fs
import pyarrow.parquet as pq
import pytest

from pagellm.data import prepare, stores, synthetic
from pagellm.data.shop import load
from pagellm.serving.recommend import Config as Recommend
from pagellm.serving.recommend import run as recommend
from pagellm.stage.config import PageLLMError

moto = pytest.importorskip("moto.server", reason="needs moto: pip install 'pagellm[dev]'")


@pytest.fixture(scope="module")
def log():
    reviews = list(synthetic.make(40, 30, 0).reviews())
    columns = {
        "user": [r.user for r in reviews],
        "item": [r.item for r in reviews],
        "rating": [float(r.rating) for r in reviews],
        "timestamp": [int(r.time) for r in reviews],
        "shop": ["north" if i % 3 else "south" for i in range(len(reviews))],
    }
    return pa.table(columns)


@pytest.fixture(scope="module")
def bucket(log):
    """-> a function from a path to an address in a bucket of a local S3 server."""
    server = moto.ThreadedMotoServer(port=0, verbose=False)
    server.start()
    host, port = server.get_host_and_port()
    more = f"?endpoint_override={host}:{port}&scheme=http&region=us-east-1"

    def address(path):
        return f"s3://akey:asecret@shop/{path}{more}"

    store, _ = pyarrow.fs.FileSystem.from_uri(address("x") + "&allow_bucket_creation=true")
    store.create_dir("shop")
    with store.open_output_stream("shop/exports/orders.csv") as file:
        pa.csv.write_csv(log.drop_columns("shop"), file)
    pyarrow.dataset.write_dataset(
        log,
        "shop/parted",
        format="parquet",
        filesystem=store,
        partitioning=["shop"],
        partitioning_flavor="hive",
    )
    yield address
    server.stop()


def prepared(raw, root, name="there"):
    prepare.run(prepare.Config(dataset=name, raw=raw, data=str(root)))
    return load(root / name)


def test_files_and_partitioned_tables_in_a_bucket_are_the_same_data(bucket, log, tmp_path, capsys):
    shop = prepared(bucket("exports"), tmp_path)
    out = capsys.readouterr().out
    assert "fetched 1 file from s3://shop/exports into" in out and "asecret" not in out
    parted = prepared(bucket("parted"), tmp_path, "parted")
    assert [len(shop.user), shop.user_ids] == [len(parted.user), parted.user_ids]
    kept = pq.read_table(tmp_path / "raw" / "parted" / "log.parquet")
    assert set(kept["shop"].to_pylist()) == {"north", "south"} and len(kept) == len(log)
    # Nothing is fetched again, and nothing that is there is taken for the bucket's.
    capsys.readouterr()
    prepared(bucket("exports"), tmp_path)
    assert "fetched" not in capsys.readouterr().out
    with pytest.raises(PageLLMError, match="holds files that are not from s3://shop/parted"):
        stores.fetch(bucket("parted"), tmp_path / "raw" / "there")


def test_a_partitioned_directory_on_this_machine_is_read_too(log, tmp_path):
    pyarrow.dataset.write_dataset(
        log,
        tmp_path / "parted",
        format="parquet",
        partitioning=["shop"],
        partitioning_flavor="hive",
    )
    users = prepared(str(tmp_path / "parted"), tmp_path).user_ids
    assert len(users) > 30
    # The place where raw files are looked for by themselves holds folders as well as files.
    (tmp_path / "parted").rename(tmp_path / "raw" / "mine")
    assert prepared("", tmp_path, "mine").user_ids == users
    assert (tmp_path / "raw" / "mine-joined" / "log.parquet").exists()
    prepared(str(tmp_path / "raw" / "mine"), tmp_path, "mine")  # the same place, named


def test_only_what_has_changed_is_fetched_again(tmp_path, monkeypatch):
    source, folder = tmp_path / "export", tmp_path / "raw"
    source.mkdir()
    for name in ("a.csv", "b.csv", "c.csv"):
        (source / name).write_text("user,item\nu,i\n")
    stores.fetch(str(source), folder)
    copied, copy = [], stores.pyarrow.fs.copy_files

    def noted(path, *words, **more):
        copied.append(path.rpartition("/")[2])
        copy(path, *words, **more)

    monkeypatch.setattr(stores.pyarrow.fs, "copy_files", noted)
    (source / "b.csv").write_text("user,item\nu,j\nu,k\n")
    (source / "c.csv").unlink()
    (folder / "a.csv").unlink()
    stores.fetch(str(source), folder)
    assert copied == ["a.csv", "b.csv"] and {p.name for p in folder.glob("*.csv")} == {*copied}
    assert (folder / "b.csv").read_text() == (source / "b.csv").read_text()
    (source / "d.csv").write_text("user,item\n")
    stores.fetch(str(source), folder)
    assert copied == ["a.csv", "b.csv", "d.csv"]


def test_folders_that_are_not_looked_into_are_named(tmp_path):
    (tmp_path / "raw" / "mine" / "orders").mkdir(parents=True)
    (tmp_path / "raw" / "mine" / "orders" / "log.csv").write_text("user,item\nu,i\n")
    with pytest.raises(PageLLMError, match=r"among the files of .*\n.*\n *orders/ \(a folder\)"):
        prepared("", tmp_path, "mine")


def test_partitions_stay_text_and_parts_that_differ_are_named(tmp_path, capsys):
    """user=007 is no 7; a column that some parts lack is empty there, not gone everywhere."""
    for user, more in (("007", {}), ("7", {"rating": [1.0, 5.0]})):
        folder = tmp_path / "parted" / f"user_id={user}"
        folder.mkdir(parents=True)
        pq.write_table(pa.table({"item_id": ["a", "b"]} | more), folder / "part-0.parquet")
    stores.fetch(str(tmp_path / "parted"), tmp_path / "raw")
    rows = pq.read_table(tmp_path / "raw" / "log.parquet").to_pylist()
    assert sorted((r["user_id"], r["item_id"], r["rating"]) for r in rows if r["rating"]) == [
        ("7", "a", 1.0),
        ("7", "b", 5.0),
    ]
    assert {r["user_id"] for r in rows} == {"007", "7"} and len(rows) == 4
    said = capsys.readouterr().out
    assert "column rating is not in 1 of 2 parts, such as user_id=007/part-0.parquet" in said


def test_files_of_one_name_in_several_folders_all_come(tmp_path, capsys):
    for day in ("day=1", "day=2"):
        (tmp_path / "parted" / day).mkdir(parents=True)
        (tmp_path / "parted" / day / "log.csv").write_text(f"user_id,item_id\n{day},a\n")
    stores.fetch(str(tmp_path / "parted"), tmp_path / "raw")
    texts = [path.read_text() for path in sorted((tmp_path / "raw").glob("*.csv"))]
    assert texts == [f"user_id,item_id\nday={n},a\n" for n in (1, 2)]
    assert "folders such as day=1 are read as columns of Parquet" in capsys.readouterr().out


def test_a_file_put_there_by_hand_is_never_removed(tmp_path, monkeypatch):
    """Nor is what an interrupted fetch has brought taken for such a file."""
    source, folder = tmp_path / "export", tmp_path / "raw"
    source.mkdir()
    for name in ("a.csv", "b.csv"):
        (source / name).write_text("user,item\nu,i\n")
    copy, done = stores.pyarrow.fs.copy_files, []

    def once(*words, **more):
        if done:
            raise KeyboardInterrupt
        done.append(copy(*words, **more))

    with monkeypatch.context() as patch:
        patch.setattr(stores.pyarrow.fs, "copy_files", once)
        with pytest.raises(KeyboardInterrupt):
            stores.fetch(str(source), folder)
    stores.fetch(str(source), folder)
    assert {p.name for p in folder.glob("*.csv")} == {"a.csv", "b.csv"}
    (folder / "mine.csv").write_text("user,item\n")
    (source / "c.csv").write_text("user,item\nu,i\n")
    with pytest.raises(PageLLMError, match="not from .*: mine.csv"):
        stores.fetch(str(source), folder)
    assert (folder / "mine.csv").exists() and (folder / "a.csv").exists()


def test_a_file_named_as_the_gathered_table_is_kept_beside_it(tmp_path):
    """Also a = in a file's own name is no partition."""
    (tmp_path / "parted" / "day=1").mkdir(parents=True)
    for name in ("day=1/part-0", "log", "items_v=2"):
        path = tmp_path / "parted" / f"{name}.parquet"
        pq.write_table(pa.table({"user_id": ["u"], "item_id": [path.stem]}), path)
    stores.fetch(str(tmp_path / "parted"), tmp_path / "raw")
    found = {
        p.name: pq.read_table(p)["item_id"].to_pylist() for p in tmp_path.glob("raw/*.parquet")
    }
    assert found == {
        "log.parquet": ["log"],
        "items_v=2.parquet": ["items_v=2"],
        "parts-log.parquet": ["part-0"],
    }


def test_everybodys_pages_go_to_a_folder_of_today_here_and_in_a_bucket(
    bucket, sft_alone, tmp_path, capsys
):
    shutil.copytree(sft_alone / "runs", tmp_path / "runs")
    told = {"run": "base", "data": str(sft_alone / "data"), "runs": str(tmp_path / "runs")}
    told |= {"all": True, "k": 4, "device": "cpu"}
    recommend(Recommend(out=f"{tmp_path}/pages/", **told))
    (local,) = (tmp_path / "pages").glob("date=20??-??-??/pages.parquet")
    recommend(Recommend(out=bucket("pages/"), **told))
    whole = tmp_path / "pages.parquet"  # an address without a host: no file is copied onto itself
    recommend(Recommend(out=f"file://{whole}", **told))
    assert pq.read_table(whole).equals(pq.read_table(local, partitioning=None))
    assert re.search(
        r"is at s3://shop/pages/date=20..-..-../pages.parquet", capsys.readouterr().out
    )
    store, _ = pyarrow.fs.FileSystem.from_uri(bucket("x"))
    sent = pyarrow.dataset.dataset("shop/pages", filesystem=store, partitioning="hive").to_table()
    here = pq.read_table(local, partitioning=None)
    assert sent.drop_columns("date").equals(here) and len(here) == 80 * 4
    recommend(Recommend(out=bucket("parts/"), pieces=True, part=30, **told))
    sent = pyarrow.dataset.dataset("shop/parts", filesystem=store, partitioning="hive")
    assert len(sent.files) == 3 and sent.to_table().drop_columns("date").equals(here)
    assert store.get_file_info(sent.files[0].rpartition("/")[0] + "/_SUCCESS").type.value == 2


def test_a_fixed_address_takes_the_pages_of_every_day(bucket, sft_alone, tmp_path, capsys):
    """What lies on this machine of the pages of before neither hinders nor stays."""
    shutil.copytree(sft_alone / "runs", tmp_path / "runs")
    told = {"run": "base", "data": str(sft_alone / "data"), "runs": str(tmp_path / "runs")}
    store, _ = pyarrow.fs.FileSystem.from_uri(bucket("x"))
    for address, read in (
        (bucket("fixed.parquet"), lambda: pq.read_table("shop/fixed.parquet", filesystem=store)),
        (f"file://{tmp_path}/f.parquet", lambda: pq.read_table(tmp_path / "f.parquet")),
    ):
        for k in (4, 3, 3):
            recommend(Recommend(out=address, k=k, all=True, device="cpu", **told))
            assert len(read()) == 80 * k
        assert "is already there" in capsys.readouterr().out  # the third: sent again, as it is
        assert len(list((tmp_path / "runs" / "base" / "recommend").rglob("f*.parquet"))) <= 2
    assert not list(tmp_path.glob(".*.tmp"))


def test_tables_side_by_side_become_a_file_each(bucket, log, tmp_path):
    """A log by day and an item table by shop: in folders of their own, or only by their keys."""
    items = sorted(set(log["item"].to_pylist()))
    catalogue = pa.table({"item": items, "title": [f"Title {i}" for i in items]})
    for orders, cards in (("orders/", "items/"), ("", "")):
        root = tmp_path / "from" / f"export{len(orders)}"
        for shop in ("north", "south"):
            folder = root / f"{orders}shop={shop}"
            folder.mkdir(parents=True)
            rows = log.filter(pa.compute.equal(log["shop"], shop)).drop_columns("shop")
            pq.write_table(rows, folder / "part-0.parquet")
        for n in (0, 1):
            folder = root / f"{cards}bucket={n}"
            folder.mkdir(parents=True)
            pq.write_table(catalogue.slice(n * 15, 15), folder / "part-0.parquet")
        shop = prepared(str(root), tmp_path, root.name)
        assert shop.catalogue.title[0].startswith("Title ")
        names = {path.name for path in (tmp_path / "raw" / root.name).glob("*.parquet")}
        assert names == (
            {"orders.parquet", "items.parquet"} if orders else {"shop.parquet", "bucket.parquet"}
        )


@pytest.mark.parametrize("secret", ["a/b", "a?b", "a#b", "a@b", "a+b", "12/cd"])
def test_no_secret_is_told_whatever_letters_it_holds(secret, tmp_path, capsys):
    address = f"s3://AKIA:{secret}@bucket/exports?endpoint_override=127.0.0.1:1&region=us-east-1"
    assert stores.safe(address) == "s3://bucket/exports"
    with pytest.raises(PageLLMError) as error:
        stores.fetch(address, tmp_path)
    said = str(error.value) + capsys.readouterr().out
    assert secret not in said.replace("://", "") and "AKIA" not in said


def test_what_cannot_be_reached_is_told_without_secrets(bucket, tmp_path):
    with pytest.raises(PageLLMError, match="s3://shop/nothing cannot be read"):
        stores.fetch(bucket("nothing"), tmp_path)
    with pytest.raises(PageLLMError, match=r"cannot be opened.*\n.*Want s3://"):
        stores.fetch("ftp://host/x", tmp_path)
    away = bucket("pages.parquet").replace("shop/", "nobody/")
    (tmp_path / "x").write_text("x")
    with pytest.raises(PageLLMError, match="cannot be written") as error:
        stores.send(tmp_path / "x", away)
    assert "asecret" not in str(error.value)
    assert stores.safe("s3://a:b@bucket/p?secret=c") == "s3://bucket/p"


@pytest.mark.parametrize("name", ["s3:/shop/orders", "S3://shop/orders", "GS:/x/y/", "hdfs:x"])
def test_a_mistyped_address_is_no_path(name, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(PageLLMError, match="looks like an address.*\n.*two slashes"):
        prepare.run(prepare.Config(dataset="x", raw=name, data="data"))
    with pytest.raises(PageLLMError, match="looks like an address"):
        recommend(Recommend(all=True, out=name))
    assert not list(tmp_path.iterdir())
    assert not any(map(stores.is_remote, ("c:/orders", "orders", "s3/orders", "./s3:/orders")))
