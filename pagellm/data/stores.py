"""Raw files in an object store, partitioned tables, and pages that go back there.

    pagellm prepare --dataset mine --raw s3://bucket/exports
    pagellm recommend --dataset mine --all --out s3://bucket/pages/

An address is what pyarrow.fs takes: s3://, gs://, abfs://, hdfs://, with its options behind a
question mark: s3://bucket/path?endpoint_override=minio:9000&scheme=http. Credentials come from the
environment or the machine's role, as every tool of that store finds them.

Files are fetched into data/raw/<dataset> and read there, so that they cannot change while they are
read and hashed. A file whose size and time are as before is not fetched again. A table that is
partitioned into folders (day=2026-11-30/part-0.parquet), here or in a store, becomes one file, with
the partitions as columns. Tables side by side (orders/day=..., items/shop=...) become a file each.
"""

import re
import time
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.fs
import pyarrow.parquet as pq

from pagellm.stage.config import PageLLMError
from pagellm.stage.files import atomic, read_json, write_json
from pagellm.stage.hints import counted

__all__ = ["fetch", "is_remote", "partition_of", "safe", "send", "wants_fetching"]

NOTE = ".fetched.json"  # hidden, so that it is no raw file
TABLE = "log.parquet"  # what a partitioned table becomes that lies in no folder of its own


def is_remote(name: str) -> bool:
    """Whether a name is an address and no path. Raises PageLLMError for a mistyped address."""
    if re.match(r"[a-z][a-z0-9+.-]+://", name):
        return True
    if found := re.match(r"(?i)(s3a?|gs|gcs|abfss?|hdfs):/*", name):
        scheme = found[1].lower().removesuffix("a")
        raise PageLLMError(
            f"{safe(name)} looks like an address, and is none\n"
            f"  Want {scheme}:// in lower case and with two slashes: {scheme}://bucket/path"
        )
    return False


def safe(uri: str) -> str:
    """An address, or a text with addresses, without the keys and secrets that it may hold.

    A secret may hold / ? # and @ as they are, so all between :// and the last @ goes where a colon
    stands in it. A path with a colon and an @ is then cut too short, which harms nobody.
    """
    uri = re.sub(r"(://)[^/@\s]*:\S*@", r"\1", uri)
    return re.sub(r"(://)[^/@\s]*@", r"\1", uri.partition("?")[0])


def wants_fetching(name: str) -> bool:
    """Whether raw files are elsewhere, or lie in folders of partitions."""
    if not name or is_remote(name):
        return bool(name)
    path = Path(name).expanduser()
    if not path.is_dir():
        return False
    inside = [path, *(p for p in path.iterdir() if p.is_dir())]
    return any("=" in p.name for folder in inside for p in folder.iterdir() if p.is_dir())


def opened(uri: str) -> tuple[pyarrow.fs.FileSystem, str]:
    """The file system of an address or path, and the path within it.

    Raises PageLLMError for a scheme that pyarrow does not know, or cannot load.
    """
    try:
        if not is_remote(uri):
            return pyarrow.fs.LocalFileSystem(), str(Path(uri).expanduser().absolute())
        return pyarrow.fs.FileSystem.from_uri(uri)
    except (pa.ArrowException, OSError) as error:
        raise PageLLMError(
            f"{safe(uri)} cannot be opened: {first_line(error, uri)}\n"
            "  Want s3://, gs://, abfs:// or hdfs:// (which needs Java), or a path."
        ) from None


def first_line(error: BaseException, uri: str) -> str:
    """The first line of an error's text, without the secrets of the address."""
    text = str(error).splitlines()[0] if str(error) else type(error).__name__
    hidden = uri.partition("://")[2].rpartition("@")[0]
    for part in sorted({hidden, *re.split(r"[:/?#@]", hidden)} - {""}, key=len, reverse=True):
        text = text.replace(part, "***")
    return safe(text)


def failed(uri: str, what: str, error: BaseException) -> PageLLMError:
    """An error of the store in words."""
    return PageLLMError(
        f"{safe(uri)} cannot be {what}: {first_line(error, uri)}\n"
        "  Check the address and the credentials: AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY, "
        "AWS_REGION, or what that store's own tools take."
    )


def fetch(uri: str, folder: Path) -> Path:
    """Bring the files at an address into a folder; returns the folder.

    Raises PageLLMError if there are none, if they cannot be read, or if the folder holds others.
    """
    store, root = opened(uri)
    try:
        found = store.get_file_info(root.rstrip("/"))
        if found.type == pyarrow.fs.FileType.File:
            files = [found]
        else:
            files = store.get_file_info(pyarrow.fs.FileSelector(root.rstrip("/"), recursive=True))
    except (pa.ArrowException, OSError) as error:
        raise failed(uri, "read", error) from None
    files = [f for f in files if f.type == pyarrow.fs.FileType.File and f.size]
    if not files:
        raise PageLLMError(f"{safe(uri)} holds no files")
    now = {f.path: [f.size, str(f.mtime)] for f in sorted(files, key=lambda f: f.path)}
    note = folder / NOTE
    before: dict[str, Any] = read_json(note) if note.exists() else {}
    others = [p for p in folder.iterdir() if p.name != NOTE] if folder.is_dir() else []
    mine = before.get("names", []) if before.get("from") == safe(uri) else []
    if foreign := [p.name for p in others if p.name not in mine]:
        raise PageLLMError(
            f"{folder} holds files that are not from {safe(uri)}, which would be fetched there: "
            f"{', '.join(sorted(foreign)[:5])}\n"
            "  Move them away, or choose another --dataset name."
        )
    folder.mkdir(parents=True, exist_ok=True)
    if before.get("files") == now and all((folder / n).exists() for n in before["names"]):
        return folder
    inside = {f.path: f.path[len(root) :].rpartition("/")[0] for f in files}  # its folders
    parts = [f for f in files if "=" in inside[f.path] and f.path.endswith(".parquet")]
    alone = [f for f in files if f not in parts]
    names = own_names([f.path for f in alone], root)
    tables = parted_tables(parts, inside, names)
    whole = list(tables)
    # A file that is as it was fetched stays; a table is gathered anew from all of its parts.
    known = before.get("files", {})
    same = {name for f, name in zip(alone, names, strict=True) if known.get(f.path) == now[f.path]}
    for path in others:
        if path.name not in same:
            path.unlink()
    # Known before the first file is there: a fetch that was interrupted leaves no file of unknown
    # origin.
    write_json(note, {"from": safe(uri), "files": {}, "names": names + whole})
    try:
        for f, name in zip(alone, names, strict=True):
            if name in same and (folder / name).exists():
                continue
            with atomic(folder / name) as beside:
                pyarrow.fs.copy_files(f.path, str(beside.absolute()), source_filesystem=store)
        for name, some in tables.items():
            gathered(store, root, some, folder / name)
    except (pa.ArrowException, OSError) as error:
        raise failed(uri, "fetched", error) from None
    names += whole
    write_json(note, {"from": safe(uri), "files": now, "names": names})
    print(f"fetched {counted(len(files), 'file')} from {safe(uri)} into {folder}", flush=True)
    return folder


def own_names(paths: list[str], root: str) -> list[str]:
    """A file name for each path, none of them twice: where folders hold files of one name, the
    folders' names stand before it. Prints which folders look like partitions that are not read."""
    names = [Path(path).name for path in paths]
    inside = [path[len(root) :].strip("/").replace("/", "-") for path in paths]
    lost = sorted({part for name in inside for part in name.split("-")[:-1] if "=" in part})
    if lost:
        print(
            f"  folders such as {lost[0]} are read as columns of Parquet files only; the others "
            "are read without them",
            flush=True,
        )
    return [
        long if names.count(name) > 1 else name for name, long in zip(names, inside, strict=True)
    ]


def parted_tables(parts: list, inside: dict[str, str], taken: list[str]) -> dict[str, list]:
    """File name -> parts of each partitioned table; no name is in `taken`.

    parts   files of partitions
    inside  path of a file -> its folders below the address

    One table are the parts below one folder whose first partition has one key: orders/day=1 and
    items/shop=2 are two tables, and so are day=1 and shop=2.
    """
    found: dict[tuple[str, str], list] = {}
    for part in parts:
        above, _, rest = f"/{inside[part.path].strip('/')}".partition("=")
        home, _, key = above.rpartition("/")
        found.setdefault((home.strip("/"), key), []).append(part)
    homes = [home for home, _ in found]
    tables: dict[str, list] = {}
    for (home, key), some in found.items():
        name = home.replace("/", "-")
        if homes.count(home) > 1:
            name = f"{name}-{key}".strip("-")
        name = f"{name}.parquet" if name else TABLE
        while name in taken or name in tables:
            name = f"parts-{name}"
        tables[name] = some
    return tables


def gathered(store: pyarrow.fs.FileSystem, root: str, parts: list, target: Path) -> None:
    """Write one file of all parts of a partitioned table, partitions as columns.

    A partition's value stays text, as identifiers do: user=007 is no 7. Columns that some parts
    lack are empty there, and named on the screen.
    """
    from pyarrow import dataset  # here, since it looks for pandas at once

    paths = [f.path for f in parts]
    inside = {path: path[len(root) :].strip("/") for path in paths}
    folders = [part for path in inside.values() for part in path.split("/")[:-1] if "=" in part]
    found = {path: pq.read_schema(path, filesystem=store).remove_metadata() for path in paths}
    every = pa.unify_schemas(list(found.values()), promote_options="permissive")
    for name in every.names:
        if lacking := [path for path in paths if name not in found[path].names]:
            print(
                f"  column {name} is not in {len(lacking):,} of {len(paths):,} parts, such as "
                f"{inside[lacking[0]]}",
                flush=True,
            )
    keys = dict.fromkeys(part.partition("=")[0] for part in folders)
    texts = pa.schema([(key, pa.string()) for key in keys if key not in every.names])
    table = dataset.dataset(
        paths,
        schema=pa.unify_schemas([every, texts]),
        filesystem=store,
        format="parquet",
        partitioning=dataset.partitioning(texts, flavor="hive"),
        partition_base_dir=root,
    )
    with atomic(target) as beside, pq.ParquetWriter(beside, table.schema) as out:
        for batch in table.to_batches():
            out.write_batch(batch)


def partition_of(out: str, file: str = "pages.parquet") -> str:
    """Where today's pages go: below a name that ends in /, a folder named by the date.

    file  its name in that folder; "": the folder itself
    """
    name, mark, more = out.partition("?") if is_remote(out) else (out, "", "")
    if not name.endswith("/"):
        return out
    day = f"{name}date={time.strftime('%Y-%m-%d')}"
    return f"{day}/{file}".rstrip("/") + mark + more


def send(path: Path, uri: str) -> None:
    """Copy a file to an address; who reads there sees the old file or the new one, never a part.

    Raises PageLLMError if it cannot be written.
    """
    store, target = opened(uri)
    # A bucket shows a file when all of it is there; a disk shows each part.
    disk = store.type_name == "local"
    home, _, name = target.rpartition("/")
    beside = f"{home}/.{name}.tmp" if disk else target
    try:
        pyarrow.fs.copy_files(str(path.absolute()), beside, destination_filesystem=store)
        if disk:
            store.move(beside, target)
    except (pa.ArrowException, OSError) as error:
        raise failed(uri, "written", error) from None
