"""Curves in a tracker are those of the log; nothing is sent twice, and a new run replaces an old
one. What was written is opened with the tracker's own reader.
"""

import http.server
import json
import socket
import threading
import time

import pytest

from pagellm.report import track
from pagellm.stage.config import PageLLMError


def stage(path, rows, lr=0.1, timing=(), tail=""):
    """A stage's directory with a log."""
    path.mkdir(parents=True, exist_ok=True)
    made = {"config": {"dataset": "toys", "lr": lr}, "inputs": {"data": "ab"}}
    (path / "config.json").write_text(json.dumps(made))
    for name, lines in (("log", rows), ("timing", timing)):
        if lines:
            text = "".join(json.dumps(row) + "\n" for row in lines)
            (path / f"{name}.jsonl").write_text(text + tail)


def config(tmp_path, **more):
    return track.Config(run="base", runs=str(tmp_path), **more)


ROWS = [
    {"step": 1, "loss": 3.0, "learning": False, "alarms": ["x"], "gone": None},
    {"step": 2, "loss": 2.0, "learning": True, "alarms": [], "valid/NDCG@100": 0.25},
]


def scalars(folder):
    reader = pytest.importorskip(
        "tensorboard.backend.event_processing.event_accumulator",
        reason="needs the extra [tensorboard]",
    )
    found = reader.EventAccumulator(str(folder))
    found.Reload()
    return {
        name: [(event.step, round(event.value, 6)) for event in found.Scalars(name)]
        for name in found.Tags()["scalars"]
    }


def test_tensorboard_reads_back_what_the_log_says(tmp_path, capsys):
    folder = tmp_path / "base" / "tensorboard" / "sft"
    stage(tmp_path / "base" / "sft", ROWS[:1], timing=[{"step": 1, "seconds": 0.5}], tail='{"st')
    assert track.run(config(tmp_path)) == 3
    assert scalars(folder) == {
        "loss": [(1, 3.0)],
        "learning": [(1, 0.0)],
        "timing/seconds": [(1, 0.5)],
    }
    stage(tmp_path / "base" / "sft", ROWS)  # the log has grown
    assert track.run(config(tmp_path)) == 3
    assert track.run(config(tmp_path)) == 0
    found = scalars(folder)
    assert found["loss"] == [(1, 3.0), (2, 2.0)] and found["valid/NDCG@100"] == [(2, 0.25)]
    (tmp_path / "base" / "sft" / "timing.jsonl").unlink()
    stage(tmp_path / "base" / "sft", [{"step": 1, "loss": 9.0}], lr=0.2)  # made anew
    assert track.run(config(tmp_path)) == 1
    assert scalars(folder) == {"loss": [(1, 9.0)]}
    assert "tensorboard --logdir" in capsys.readouterr().out


@pytest.mark.filterwarnings("ignore")
def test_mlflow_reads_back_what_the_log_says(tmp_path, monkeypatch):
    pytest.importorskip("mlflow", reason="needs the extra [mlflow]")
    from mlflow.tracking import MlflowClient

    monkeypatch.setenv("MLFLOW_ALLOW_FILE_STORE", "true")
    uri = (tmp_path / "store").as_uri()
    stage(tmp_path / "base" / "sft", ROWS[:1])
    assert track.run(config(tmp_path, to="mlflow", uri=uri)) == 2
    stage(tmp_path / "base" / "sft", ROWS)
    (tmp_path / "base" / "sft" / "done").write_text("{}")
    assert track.run(config(tmp_path, to="mlflow", uri=uri)) == 3
    client = MlflowClient(uri)
    experiment = client.get_experiment_by_name("toys")
    (run,) = client.search_runs([experiment.experiment_id])
    assert run.info.run_name == "base/sft" and run.info.status == "FINISHED"
    assert run.data.params == {"dataset": "toys", "lr": "0.1"}
    history = client.get_metric_history(run.info.run_id, "loss")
    assert [(m.step, m.value) for m in history] == [(1, 3.0), (2, 2.0)]
    assert run.data.metrics["valid/NDCG_at_100"] == 0.25


def test_two_trackers_are_told_apart(tmp_path, monkeypatch):
    sent = []

    class Kept(track.TensorBoard):
        def __init__(self, *_):
            pass

        def options(self, values):
            pass

        def scalars(self, rows):
            sent.extend(rows)

        def close(self, finished):
            pass

    monkeypatch.setattr(track, "TensorBoard", Kept)
    monkeypatch.setattr(track, "MLflow", Kept)
    stage(tmp_path / "base" / "sft", ROWS)
    for to, uri in (("tensorboard", ""), ("mlflow", "a"), ("mlflow", "b"), ("mlflow", "a")):
        before = len(sent)
        track.send_new(config(tmp_path, to=to, uri=uri))
        assert len(sent) - before == (0 if (uri, before) == ("a", 6) else 2)


def test_following_sends_what_comes_says_so_and_stops_by_ctrl_c(tmp_path, monkeypatch, capsys):
    pytest.importorskip("tensorboard", reason="needs the extra [tensorboard]")
    looks = []

    def sleep(seconds):
        """Between two looks: the run is not there, then it begins, then its log grows."""
        assert seconds == 0.5
        looks.append(seconds)
        if len(looks) == 4:
            raise KeyboardInterrupt
        if len(looks) > 1:
            stage(tmp_path / "base" / "sft", ROWS[: len(looks) - 1])

    monkeypatch.setattr(track.time, "sleep", sleep)
    with pytest.raises(KeyboardInterrupt):
        track.run(config(tmp_path, follow=True, every=0.5))
    assert scalars(tmp_path / "base" / "tensorboard" / "sft")["loss"] == [(1, 3.0), (2, 2.0)]
    said = capsys.readouterr().out
    assert f"following {tmp_path / 'base'}, which is not there yet; Ctrl+C ends" in said
    assert said.count("the curves of sft begin") == 1


def test_a_run_without_a_log_and_a_missing_tracker_are_said(tmp_path, monkeypatch):
    with pytest.raises(PageLLMError, match="no log in .*base"):
        track.run(config(tmp_path))
    stage(tmp_path / "base" / "sft", ROWS)
    monkeypatch.setitem(__import__("sys").modules, "torch.utils.tensorboard", None)
    with pytest.raises(PageLLMError, match=r"pagellm\[tensorboard\]"):
        track.run(config(tmp_path))
    monkeypatch.setitem(__import__("sys").modules, "mlflow.tracking", None)
    with pytest.raises(PageLLMError, match=r"pagellm\[mlflow\]"):
        track.run(config(tmp_path, to="mlflow", uri="x"))
    with pytest.raises(PageLLMError, match="to='wandb': want tensorboard or mlflow"):
        config(tmp_path, to="wandb")


def test_a_server_that_does_not_answer_is_said_at_once_and_its_password_is_not(
    tmp_path, monkeypatch
):
    pytest.importorskip("mlflow", reason="needs the extra [mlflow]")
    for name in track.PATIENCE:
        monkeypatch.delenv(name, raising=False)
    stage(tmp_path / "base" / "sft", ROWS)
    with socket.socket() as taken:  # a port that nobody listens on
        taken.bind(("127.0.0.1", 0))
        port, began = taken.getsockname()[1], time.perf_counter()
        dead = f"http://me:secret@127.0.0.1:{port}"
        with pytest.raises(PageLLMError, match="does not answer: .*\n.*mlflow server") as caught:
            track.run(config(tmp_path, to="mlflow", uri=dead))
        assert time.perf_counter() - began < 30 and "secret" not in str(caught.value)
    for wrong in ("http://no such host", "https://127.0.0.1:99999", "http://"):
        with pytest.raises(PageLLMError, match="does not answer"):
            track.check_answers(wrong)
    monkeypatch.setenv("http_proxy", "http://127.0.0.1:1")  # the proxy is the one to answer
    monkeypatch.delenv("no_proxy", raising=False)
    monkeypatch.delenv("NO_PROXY", raising=False)
    track.check_answers("http://mlflow.example")


def test_a_server_that_is_no_mlflow_is_said_within_seconds_and_the_environment_rules(
    tmp_path, monkeypatch
):
    pytest.importorskip("mlflow", reason="needs the extra [mlflow]")
    stage(tmp_path / "base" / "sft", ROWS)

    class Busy(http.server.BaseHTTPRequestHandler):
        def do_GET(self):
            asked.append(self.path)
            self.send_error(503)

        do_POST = do_GET

        def log_message(self, *_):
            pass

    asked: list[str] = []
    monkeypatch.setenv("MLFLOW_HTTP_REQUEST_MAX_RETRIES", "0")
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), Busy) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        uri = f"http://127.0.0.1:{server.server_port}"
        with pytest.raises(PageLLMError, match=f"MLflow at {uri}"):
            track.run(config(tmp_path, to="mlflow", uri=uri))
        server.shutdown()
    assert len(asked) == 1  # what the environment said, and not our two more


def test_a_store_s_password_is_not_kept(tmp_path, monkeypatch):
    stage(tmp_path / "base" / "sft", ROWS)

    class Kept:
        id = "1"

        def options(self, values):
            pass

        scalars = close = options

    monkeypatch.setattr(track, "writer_of", lambda *_: Kept())
    uri = "postgresql://me:secret@db/mlflow"
    asks = config(tmp_path, to="mlflow", uri=uri)
    assert track.send_new(asks) == 5 and track.send_new(asks) == 0
    note = tmp_path / "base" / "track.json"
    assert "secret" not in note.read_text()
    kept = json.loads(note.read_text())
    (place,) = kept.values()
    note.write_text(json.dumps({uri: place}))  # as earlier versions wrote it
    assert track.send_new(asks) == 0
