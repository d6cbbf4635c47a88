"""A query on a real Postgres server becomes a data set, through ADBC and Arrow's streams."""

import os
import shutil
import socket
import subprocess
import tempfile
from pathlib import Path

import pytest

import pagellm
from pagellm.data import synthetic
from pagellm.data.shop import load

BIN = next(iter(sorted(Path("/usr/lib/postgresql").glob("*/bin/initdb"))), None)


@pytest.fixture(scope="module")
def address():
    """A server of its own, with a table `orders`; -> its address."""
    pytest.importorskip("adbc_driver_postgresql", reason="postgres: no adbc-driver-postgresql")
    if BIN is None:
        pytest.skip("postgres: no server; apt install postgresql")
    # pytest's own directories are closed to other users, and a server does not run as root
    root = Path(tempfile.mkdtemp(prefix="postgres-"))
    as_owner: list[str] = []
    if os.geteuid() == 0:
        shutil.chown(root, "postgres", "postgres")
        as_owner = ["setpriv", "--reuid=postgres", "--regid=postgres", "--clear-groups"]
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]

    def do(name, *words):
        command = [*as_owner, str(BIN.with_name(name)), *words]
        subprocess.run(command, check=True, cwd=root, stdout=subprocess.DEVNULL)

    do("initdb", "-D", "db", "-U", "shop", "-A", "trust", "--no-sync")
    more = f"-p {port} -k {root} -c listen_addresses=127.0.0.1 -c fsync=off"
    do("pg_ctl", "-D", "db", "-w", "-l", "log", "-o", more, "start")
    try:
        yield f"postgresql://shop@127.0.0.1:{port}/postgres"
    finally:
        do("pg_ctl", "-D", "db", "-m", "immediate", "stop")
        shutil.rmtree(root)


def test_a_query_is_a_table_of_prepare(address, tmp_path):
    from adbc_driver_postgresql import dbapi

    rows = [(r.user, r.item, r.rating, int(r.time)) for r in synthetic.make(40, 30, 0).reviews()]
    with dbapi.connect(address) as connection, connection.cursor() as cursor:
        cursor.execute("create table orders (customer text, sku text, stars float8, at bigint)")
        cursor.executemany("insert into orders values ($1, $2, $3, $4)", rows)
        connection.commit()
        cursor.execute(
            'select customer as "user", sku as item, stars as rating, at as timestamp from orders'
        )
        data = pagellm.prepare(cursor.fetch_arrow(), dataset="fromdb", data=tmp_path)
    shop = load(data.path)
    assert shop.n_users > 30 and set(shop.user_ids) <= {user for user, *_ in rows}
