"""Show a run's curves in TensorBoard or MLflow, while it trains or afterwards.

Reads   runs/<run>/<stage>/log.jsonl, timing.jsonl, config.json
Writes  runs/<run>/tensorboard/<stage>/, or MLflow's store; runs/<run>/track.json: what was sent

    pagellm track --run NAME --to tensorboard --follow      then: tensorboard --logdir runs
    pagellm track --run NAME --to mlflow --uri sqlite:///mlflow.db

It reads the logs that every stage writes anyway, and sends what is new; no stage depends on it. The
same command again sends nothing twice. A stage that was trained again replaces its old curves. To
add a tracker, write another `Writer`. Needs the extra [tensorboard] or [mlflow].
"""

import hashlib
import json
import os
import re
import shutil
import socket
import sys
import time
import urllib.parse
import urllib.request
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

from pagellm.data.stores import safe
from pagellm.stage import hints
from pagellm.stage.command import main
from pagellm.stage.config import PageLLMError, check
from pagellm.stage.files import read_json, write_json

__all__ = ["Config", "MLflow", "TensorBoard", "Writer", "run", "scalars_of", "send_new"]


FILES = {"log.jsonl": "", "timing.jsonl": "timing/"}  # file -> prefix of its names
MANY = 1000  # metrics in one request to MLflow
# MLflow itself asks seven times more, longer and longer, which takes four minutes. Who sets these
# in the environment has them.
PATIENCE = {"MLFLOW_HTTP_REQUEST_MAX_RETRIES": "2", "MLFLOW_HTTP_REQUEST_TIMEOUT": "20"}
CONNECT = 5.0  # seconds within which a server takes a connection


@dataclass(frozen=True, kw_only=True)
class Config:
    """Send the curves of a run's stages to TensorBoard or MLflow."""

    dataset: str = "synthetic"  # name of the data set, for the run's name where that is empty
    run: str = ""  # name of the run; empty: the data set's name
    runs: str = "runs"  # directory of runs
    to: str = "tensorboard"  # tensorboard or mlflow
    uri: str = ""  # mlflow: where its store is, such as sqlite:///mlflow.db or http://host:5000;
    # empty: as MLFLOW_TRACKING_URI says, else sqlite:///<runs>/mlflow.db
    follow: bool = False  # go on sending what the stages log, until Ctrl-C
    every: float = 2.0  # seconds between two looks at the logs, with --follow

    def __post_init__(self):
        check(
            self,
            to=(self.to in ("tensorboard", "mlflow"), "tensorboard or mlflow"),
            every=(0 < self.every < 3600, "seconds, above 0"),
            uri=(not self.uri or self.to == "mlflow", "nothing, or --to mlflow"),
        )

    @property
    def path(self) -> Path:
        """The run's directory."""
        return Path(self.runs) / (self.run or self.dataset)


class Writer(Protocol):
    """What a tracker has to do. One object writes the curves of one stage."""

    def options(self, values: dict[str, Any]) -> None:
        """The options that the stage was begun with; once, before its first curve."""

    def scalars(self, rows: list[tuple[int, dict[str, float]]]) -> None:
        """(step, name -> number) of some steps, rising."""

    def close(self, finished: bool) -> None:
        """Keep all that was handed over. finished: the stage is done, nothing more will come."""


class TensorBoard:
    """Event files in one directory; an earlier one of the same stage is added to.

    Raises PageLLMError where tensorboard is not installed.
    """

    def __init__(self, folder: Path, fresh: bool):
        try:
            from torch.utils.tensorboard import SummaryWriter
        except ImportError:
            raise PageLLMError(
                f"TensorBoard is not installed\n  Install it with: {hints.install('tensorboard')}"
            ) from None
        if fresh:
            shutil.rmtree(folder, ignore_errors=True)
        self.writer = SummaryWriter(log_dir=str(folder))

    def options(self, values: dict[str, Any]) -> None:
        lines = [f"| {name} | {value} |" for name, value in sorted(values.items())]
        self.writer.add_text("options", "\n".join(["| option | value |", "|---|---|", *lines]), 0)

    def scalars(self, rows: list[tuple[int, dict[str, float]]]) -> None:
        for step, values in rows:
            for name, value in values.items():
                self.writer.add_scalar(name, value, step)

    def close(self, finished: bool) -> None:
        self.writer.close()


def check_answers(uri: str) -> None:
    """Raise PageLLMError if no server takes connections at an http address; within seconds.

    An address that is reached through a proxy is not tried.
    """
    parts = urllib.parse.urlsplit(uri)
    if parts.scheme not in ("http", "https"):
        return
    host = parts.hostname or ""
    if parts.scheme in urllib.request.getproxies() and not urllib.request.proxy_bypass(host):
        return
    try:
        port = parts.port or (443 if parts.scheme == "https" else 80)
        socket.create_connection((host, port), CONNECT).close()
    except (OSError, ValueError, UnicodeError) as error:
        said = getattr(error, "strerror", None) or str(error)
        raise PageLLMError(
            f"MLflow at {safe(uri)} does not answer: {said}\n"
            "  Start it with: mlflow server --port 5000; or check --uri (MLFLOW_TRACKING_URI)."
        ) from None


@contextmanager
def mlflow_errors(uri: str) -> Iterator[None]:
    """An error of MLflow's client in words. What was noted as sent is not sent again."""
    from mlflow.exceptions import MlflowException

    try:
        yield
    except MlflowException as error:
        said = str(error).replace(uri, safe(uri))
        raise PageLLMError(f"MLflow at {safe(uri)}: {said}") from error


class MLflow:
    """One run of MLflow for each stage, in the experiment of the data set.

    name  of a new run     id  of an earlier one, which is added to; empty: a new one
    Raises PageLLMError where mlflow is not installed, or its store cannot be used.
    """

    def __init__(self, uri: str, experiment: str, name: str, id: str = ""):
        try:
            from mlflow.tracking import MlflowClient
        except ImportError:
            raise PageLLMError(
                f"MLflow is not installed\n  Install it with: {hints.install('mlflow')}"
            ) from None
        check_answers(uri)
        for variable, value in PATIENCE.items():
            os.environ.setdefault(variable, value)
        self.uri = uri
        with mlflow_errors(uri):
            self.client = MlflowClient(tracking_uri=uri)
            found = self.client.get_experiment_by_name(experiment)
            where = found.experiment_id if found else self.client.create_experiment(experiment)
            self.id = id or self.client.create_run(where, run_name=name).info.run_id

    def options(self, values: dict[str, Any]) -> None:
        with mlflow_errors(self.uri):
            for name, value in sorted(values.items()):
                self.client.log_param(self.id, name, str(value)[:500])

    def scalars(self, rows: list[tuple[int, dict[str, float]]]) -> None:
        from mlflow.entities import Metric

        now = int(time.time() * 1000)
        metrics = [
            Metric(plain_name(name), value, now, step)
            for step, values in rows
            for name, value in values.items()
        ]
        with mlflow_errors(self.uri):
            for at in range(0, len(metrics), MANY):
                self.client.log_batch(self.id, metrics=metrics[at : at + MANY])

    def close(self, finished: bool) -> None:
        with mlflow_errors(self.uri):
            if finished:
                self.client.set_terminated(self.id)


def plain_name(name: str) -> str:
    """A name that MLflow takes: "valid/NDCG@100" becomes "valid/NDCG_at_100"."""
    return re.sub(r"[^\w./ -]", "_", name.replace("@", "_at_"))


def scalars_of(row: dict[str, Any], before: str = "") -> dict[str, float]:
    """The numbers of a line of a log by name; switches count 0 or 1.

    before  prefix of each name
    """
    return {
        before + name: float(value)
        for name, value in row.items()
        if name != "step" and isinstance(value, int | float)
    }


def read_rows(path: Path, after: int) -> list[dict[str, Any]]:
    """The whole lines of a log with a step above `after`. A line that is half written waits."""
    rows = []
    for line in path.read_text(encoding="utf-8").splitlines(keepends=True):
        if not line.endswith("\n"):
            break
        row = json.loads(line)
        if row["step"] > after:
            rows.append(row)
    return rows


def begun_as(folder: Path) -> str:
    """16 hex digits of the options and inputs of a stage, which tell one run of it from another."""
    made = read_json(folder / "config.json")
    text = json.dumps([made["config"], made["inputs"]], sort_keys=True)
    return hashlib.sha256(text.encode()).hexdigest()[:16]


def writer_of(config: Config, stage: str, uri: str, id: str, fresh: bool) -> "TensorBoard | MLflow":
    """The writer of one stage's curves. fresh: earlier curves are of another run of the stage."""
    if config.to == "tensorboard":
        return TensorBoard(config.path / "tensorboard" / stage, fresh)
    made = read_json(config.path / stage / "config.json")["config"]
    return MLflow(uri, made.get("dataset", ""), f"{config.path.name}/{stage}", id)


def uri_of(config: Config) -> str:
    """MLflow's store."""
    named = config.uri or os.environ.get("MLFLOW_TRACKING_URI", "")
    return named or f"sqlite:///{(Path(config.runs) / 'mlflow.db').absolute()}"


def send_new(config: Config, tell: bool = False) -> int:
    """Send what the logs hold beyond what track.json says was sent; -> how many numbers.

    tell  say which stage's curves begin
    """
    note, total = config.path / "track.json", 0
    uri = uri_of(config) if config.to == "mlflow" else ""
    sent = read_json(note) if note.exists() else {}
    before = sent.pop(uri or config.to, {})
    place = sent.setdefault(safe(uri) or config.to, before)  # no password is kept
    for log in sorted(config.path.glob("*/log.jsonl")):
        stage = log.parent.name
        known, begun = place.get(stage, {}), begun_as(log.parent)
        fresh = known.get("begun") != begun
        steps = {} if fresh else dict(known["steps"])
        new = {
            name: read_rows(log.parent / name, steps.get(name, -1))
            for name in FILES
            if (log.parent / name).exists()
        }
        if not any(new.values()):
            continue
        writer = writer_of(config, stage, uri, "" if fresh else known["id"], fresh)
        if fresh:
            writer.options(read_json(log.parent / "config.json")["config"])
            if tell:
                print(f"track: the curves of {stage} begin", flush=True)
        for name, rows in new.items():
            found = [(row["step"], scalars_of(row, FILES[name])) for row in rows]
            writer.scalars(found)
            total += sum(len(values) for _, values in found)
            if rows:
                steps[name] = rows[-1]["step"]
        writer.close((log.parent / "done").exists())
        place[stage] = {"begun": begun, "id": getattr(writer, "id", ""), "steps": steps}
        write_json(note, sent)
    return total


def run(config: Config) -> int:
    """Send the curves; -> how many numbers were sent. With `follow` it ends by Ctrl-C only.

    Raises PageLLMError where the run has no log, or the tracker is not installed.
    """
    if not config.follow and not any(config.path.glob("*/log.jsonl")):
        raise PageLLMError(
            f"no log in {config.path}\n  `pagellm runs` lists what is there; with --follow this "
            "command waits for one."
        )
    total = send_new(config)
    shown = f"tensorboard --logdir {config.runs}"
    if config.to == "mlflow":
        shown = safe(uri_of(config))
    print(f"track: {total:,} numbers of {config.path} sent; see them: {shown}", flush=True)
    if config.follow:
        there = "" if config.path.is_dir() else ", which is not there yet"
        print(f"track: following {config.path}{there}; Ctrl+C ends", flush=True)
    while config.follow:
        time.sleep(config.every)
        total += send_new(config, tell=True)
    return total


if __name__ == "__main__":
    sys.exit(main(Config, run, "pagellm track"))
