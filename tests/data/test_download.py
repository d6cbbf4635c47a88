"""Downloads against a server on this machine that cuts, lies and refuses as servers do."""

import gzip
import http.server
import threading

import pytest

from pagellm.data import download as module
from pagellm.data.download import (
    CATEGORIES,
    SHORT_NAMES,
    SOURCES,
    Config,
    download,
    fetch,
    official,
    run,
)
from pagellm.stage.config import PageLLMError

BODY = gzip.compress(bytes(range(256)) * 400, compresslevel=0)


class Server(http.server.BaseHTTPRequestHandler):
    """Serves /NAME.gz. `plan` says how to answer each request.

    "ok", "cut", "ignore range", "wrong piece", or the number of a status.
    """

    files: dict[str, bytes]
    plan: list
    asked: list

    def do_GET(self):
        step = self.plan.pop(0) if self.plan else "ok"
        wanted = self.headers.get("Range")
        self.asked.append((self.path, wanted))
        body = self.files.get(self.path)
        if isinstance(step, int) or body is None:
            self.send_error(step if isinstance(step, int) else 404)
            return
        start = (
            int(wanted.removeprefix("bytes=").removesuffix("-"))
            if wanted and step != "ignore range"
            else 0
        )
        if wanted and start >= len(body):
            self.send_response(416)
            self.send_header("Content-Range", f"bytes */{len(body)}")
            self.send_header("Content-Length", "0")
            self.end_headers()
            return
        if step == "wrong piece" and start:
            start += 7
        part = body[start:]
        self.send_response(206 if start else 200)
        if start:
            self.send_header("Content-Range", f"bytes {start}-{len(body) - 1}/{len(body)}")
        if step != "no length":
            self.send_header("Content-Length", str(len(part)))
        self.end_headers()
        self.wfile.write(part[: len(part) // 2] if step == "cut" else part)

    def log_message(self, *args):
        pass


@pytest.fixture
def server():
    handler = type("Handler", (Server,), {"files": {"/x.gz": BODY}, "plan": [], "asked": []})
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), handler) as running:
        threading.Thread(target=running.serve_forever, args=(0.01,), daemon=True).start()
        handler.url = f"http://127.0.0.1:{running.server_port}"
        yield handler
        running.shutdown()


@pytest.mark.parametrize(
    "plan",
    [
        ["ok"],
        ["no length"],
        ["cut", "ok"],
        ["cut", "cut", "ok"],
        ["cut", "ignore range"],
        ["cut", "wrong piece", "ok"],
        ["cut", "cut", "cut", "ok"],
    ],
)
def test_a_file_arrives_whole_however_often_it_is_cut(server, tmp_path, plan):
    server.plan += plan
    fetch(f"{server.url}/x.gz", tmp_path / "x.gz")
    assert (tmp_path / "x.gz").read_bytes() == BODY and list(tmp_path.iterdir()) == [
        tmp_path / "x.gz"
    ]
    assert len(server.asked) == len(plan)


def test_a_cut_download_goes_on_where_it_stopped(server, tmp_path):
    server.plan += ["cut"] * module.ATTEMPTS
    with pytest.raises(PageLLMError, match=r"(?s)x\.gz.*cut.*x\.gz\.part is kept.*put x\.gz into"):
        fetch(f"{server.url}/x.gz", tmp_path / "x.gz")
    have = (tmp_path / "x.gz.part").stat().st_size
    assert 0 < have < len(BODY) and not (tmp_path / "x.gz").exists()
    fetch(f"{server.url}/x.gz", tmp_path / "x.gz")
    assert (
        server.asked[-1] == ("/x.gz", f"bytes={have}-") and (tmp_path / "x.gz").read_bytes() == BODY
    )


def test_a_file_that_is_there_is_not_asked_for(server, tmp_path):
    (tmp_path / "x.gz").write_bytes(b"mine")
    fetch(f"{server.url}/x.gz", tmp_path / "x.gz")
    assert not server.asked and (tmp_path / "x.gz").read_bytes() == b"mine"


@pytest.mark.parametrize("extra, asked", [(b"", 1), (b"too much", 2)])
def test_a_part_as_long_as_the_file_or_longer(server, tmp_path, extra, asked):
    (tmp_path / "x.gz.part").write_bytes(BODY + extra)
    fetch(f"{server.url}/x.gz", tmp_path / "x.gz")
    assert (tmp_path / "x.gz").read_bytes() == BODY and len(server.asked) == asked


@pytest.mark.parametrize(
    "body", [b"<html>not found</html>", BODY[:-20], BODY[:500] + b"\x00\x01" + BODY[502:], b""]
)
def test_what_is_no_whole_gzip_file_does_not_stay(server, tmp_path, body):
    server.files["/x.gz"] = body
    with pytest.raises(PageLLMError, match="gzip"):
        fetch(f"{server.url}/x.gz", tmp_path / "x.gz")
    assert not list(tmp_path.iterdir())


def test_a_part_of_another_file_is_found_out(server, tmp_path):
    (tmp_path / "x.gz.part").write_bytes(b"\x55" * 100)
    with pytest.raises(PageLLMError, match="gzip"):
        fetch(f"{server.url}/x.gz", tmp_path / "x.gz")
    fetch(f"{server.url}/x.gz", tmp_path / "x.gz")
    assert (tmp_path / "x.gz").read_bytes() == BODY


@pytest.mark.parametrize("status", [404, 403, 500])
def test_a_refusal_names_the_file_and_where_to_put_it(server, tmp_path, status):
    server.plan += [status]
    with pytest.raises(
        PageLLMError, match=rf"(?s)/x\.gz: the server says {status} .*put x\.gz into {tmp_path}"
    ):
        fetch(f"{server.url}/x.gz", tmp_path / "x.gz")
    assert not list(tmp_path.iterdir())


def test_offline_says_which_file_to_put_where(tmp_path):
    with pytest.raises(
        PageLLMError,
        match=rf"(?s)cannot fetch x\.gz: .*http://127\.0\.0\.1:9/x\.gz.*into {tmp_path}",
    ):
        fetch("http://127.0.0.1:9/x.gz", tmp_path / "x.gz")
    assert not list(tmp_path.iterdir())


def test_both_files_of_a_category_come_metadata_first(server, tmp_path, monkeypatch):
    monkeypatch.setitem(
        SOURCES, "2014", (f"{server.url}/reviews_{{}}_5.json.gz", f"{server.url}/meta_{{}}.json.gz")
    )
    server.files |= {
        "/reviews_Toys_and_Games_5.json.gz": BODY,
        "/meta_Toys_and_Games.json.gz": BODY,
    }
    paths = run(Config(dataset="toys", data=str(tmp_path)))
    assert paths == [
        tmp_path / "raw" / "toys" / name
        for name in ("reviews_Toys_and_Games_5.json.gz", "meta_Toys_and_Games.json.gz")
    ]
    assert all(path.read_bytes() == BODY for path in paths)
    assert [path for path, _ in server.asked] == [
        "/meta_Toys_and_Games.json.gz",
        "/reviews_Toys_and_Games_5.json.gz",
    ]
    assert (
        download("Toys_and_Games", "2014", tmp_path / "raw" / "toys") == paths
        and len(server.asked) == 2
    )


def test_official_names():
    assert official("toys") == ("Toys_and_Games", "2014") and official("toys", "2023") == (
        "Toys_and_Games",
        "2023",
    )
    assert official("instruments") == ("Musical_Instruments", "2018")
    assert official("Video_Games") == ("Video_Games", "2018") and official("Baby") == (
        "Baby",
        "2014",
    )
    assert official("Baby_Products") == ("Baby_Products", "2023") and official("myshop") is None
    with pytest.raises(PageLLMError, match="release 2014 has no Luxury_Beauty; there is 2018"):
        official("luxury", "2014")
    for category, release in SHORT_NAMES.values():
        assert category in CATEGORIES[release]
    assert [len(CATEGORIES[release]) for release in SOURCES] == [24, 29, 34]
    for reviews, metadata in SOURCES.values():
        assert (
            reviews.startswith("https://")
            and metadata.startswith("https://")
            and "{}" in reviews
            and "{}" in metadata
        )


def test_a_name_without_official_files():
    with pytest.raises(PageLLMError, match="'myshop' has no official files; there are toys"):
        run(Config(dataset="myshop"))
    with pytest.raises(PageLLMError, match="release='2019'"):
        Config(dataset="toys", release="2019")
