"""Files in deploy/: the linter passes, and every option, meter and path that they name exists."""

import configparser
import dataclasses
import importlib
import json
import os
import re
import shlex
import shutil
import socket
import subprocess
import sys
import time
from pathlib import Path
from types import SimpleNamespace

import pytest

yaml = pytest.importorskip("yaml", reason="needs pyyaml: pip install 'pagellm[dev]'")
pytest.importorskip("uvicorn", reason="needs the extra: pip install 'pagellm[serve]'")

from pagellm.__main__ import VERBS  # noqa: E402
from pagellm.serving.cache import Cache  # noqa: E402
from pagellm.serving.meters import Meters  # noqa: E402
from pagellm.serving.serve import Config  # noqa: E402
from pagellm.stage.config import parse  # noqa: E402

ROOT = Path(__file__).parents[1]
DEPLOY = ROOT / "deploy"
FIELDS = {Config.ENVIRONMENT + f.name.upper() for f in dataclasses.fields(Config)}
DOCKERFILE = (DEPLOY / "Dockerfile").read_text()


def test_the_dockerfile_passes_its_linter():
    beside = Path(sys.executable).with_name("hadolint")
    linter = str(beside) if beside.exists() else shutil.which("hadolint")
    if linter is None:
        pytest.skip("needs hadolint: pip install 'pagellm[dev]'")
    done = subprocess.run([linter, str(DEPLOY / "Dockerfile")], capture_output=True, text=True)
    assert (done.returncode, done.stdout) == (0, "")


def test_the_image_copies_what_there_is_and_leaves_data_and_runs_out():
    kept = (DEPLOY / "Dockerfile.dockerignore").read_text().split()
    for line in re.findall(r"^COPY (?!--from)(.*) \S+$", DOCKERFILE, flags=re.MULTILINE):
        for name in line.split():
            assert (ROOT / name).exists() and f"!{name}" in kept, name
    assert kept[0] == "*" and not {"!data", "!runs", "!.venv"} & set(kept)


def test_every_variable_is_an_option_of_serve():
    named = set(re.findall(r"PAGELLM_[A-Z_]+", DOCKERFILE))
    compose = yaml.safe_load((DEPLOY / "compose.yaml").read_text())
    named |= set(compose["services"]["pagellm"]["environment"])
    named |= set(re.findall(r"PAGELLM_[A-Z_]+", (DEPLOY / "pagellm.service").read_text()))
    assert len(named) > 3 and named <= FIELDS
    assert compose["services"]["pagellm"]["build"]["dockerfile"] == "deploy/Dockerfile"


def test_the_image_listens_where_its_ports_and_prometheus_say(monkeypatch):
    for name, value in re.findall(r"(PAGELLM_[A-Z]+)=(\S+)", DOCKERFILE.partition("\nENV ")[2]):
        monkeypatch.setenv(name, value.rstrip(","))
    made = parse(Config, [], "pagellm serve")
    assert (made.host, made.port) == ("0.0.0.0", 8000)
    prometheus = yaml.safe_load((DEPLOY / "prometheus.yml").read_text())
    (job,) = prometheus["scrape_configs"]
    assert job["static_configs"][0]["targets"] == [f"pagellm:{made.port}"]
    for file in prometheus["rule_files"]:
        assert (DEPLOY / file).exists()


def test_the_image_is_healthy_once_it_serves_and_not_before(served):
    """Its own command and variables, over data and runs that it may only read."""
    text = DOCKERFILE.replace("\\\n", "")
    (check,) = re.findall(r"^HEALTHCHECK.* CMD (\[.*\])$", text, re.M)
    python, *words = json.loads(check)
    entry, verb = (json.loads(x) for x in re.findall(r"^(?:ENTRYPOINT|CMD) (\[.*\])$", text, re.M))
    assert python == "python" and entry == ["pagellm"]
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = str(free.getsockname()[1])
    env = os.environ | {"PAGELLM_HOST": "127.0.0.1", "PAGELLM_PORT": port, "PAGELLM_RUN": "base"}
    env |= {"PAGELLM_DATASET": "synthetic", "PAGELLM_API_KEY": "k" * 20}
    env["PYTHONPATH"] = str(ROOT)

    def healthy():
        asked = subprocess.run([sys.executable, *words], env=env, stderr=subprocess.DEVNULL)
        return asked.returncode == 0

    assert not healthy()
    command = [sys.executable, "-m", "pagellm", *verb]
    with subprocess.Popen(command, cwd=served, env=env, stderr=subprocess.PIPE, text=True) as made:
        try:
            end = time.monotonic() + 240
            while not (good := healthy()) and made.poll() is None and time.monotonic() < end:
                time.sleep(0.2)
        finally:
            made.terminate()
            said = made.communicate()[1]
    assert good, said


def test_a_share_is_a_sum_over_a_sum():
    """Series with unlike labels divide to nothing, and one label's share of itself is 1."""
    rules = yaml.safe_load((DEPLOY / "alerts.yml").read_text())["groups"][0]["rules"]
    told = [rule["expr"] for rule in rules]
    text = (ROOT / "docs" / "how-to" / "run-as-a-service.md").read_text()
    told += re.findall(r"^\|[^|]*\| `([^`|]*)` \|", text, flags=re.MULTILINE)
    shares = [side.strip() for expr in told if "/ " in expr for side in expr.split("/ ")]
    assert len(shares) > 10
    assert all(side.startswith("sum(") for side in shares)


def test_every_meter_of_the_alarms_exists():
    service = SimpleNamespace(
        waiting=lambda: 0, cache=Cache(0), recommender=SimpleNamespace(hashes={"ppo": "x"})
    )
    meters = Meters(service)
    meters.requests.labels("/v1/page", "POST", "200").inc()
    meters.seconds.labels("/v1/page").observe(0.1)
    answer = {
        "unknown": {"user": True, "items": ["?"], "categories": []},
        "policy": "ppo",
        "user": {"known": False},
        "items": [{"item": "a"}],
        "page_reward": 0.5,
    }
    meters.count_page(answer, 2)
    there = set(re.findall(r"^(pagellm_\w+)", meters.text().decode(), flags=re.MULTILINE))
    groups = yaml.safe_load((DEPLOY / "alerts.yml").read_text())["groups"]
    rules = [rule for group in groups for rule in group["rules"]]
    assert len(rules) > 5
    for rule in rules:
        assert set(re.findall(r"pagellm_\w+", rule["expr"])) <= there, rule["alert"]
        assert rule["annotations"]["summary"].endswith(".") or "?" in rule["annotations"]["summary"]


def test_the_systemd_unit_starts_serve():
    (command,) = re.findall(r"^ExecStart=(.*)$", (DEPLOY / "pagellm.service").read_text(), re.M)
    program, verb, *words = shlex.split(command)
    assert program.endswith("/pagellm") and verb == "serve"
    made = parse(Config, words, "pagellm serve")
    assert (made.run, made.dataset) == ("live", "auto")


@pytest.fixture
def shop(tmp_path):
    """A directory with a live run of some day and a `pagellm` that writes down what it is told."""
    for day in ("2026-01-01", "2026-01-02"):
        (tmp_path / "data" / day).mkdir(parents=True)
        (tmp_path / "runs" / day).mkdir(parents=True)
    (tmp_path / "runs" / "live").symlink_to("2026-01-02")
    program = tmp_path / "bin" / "pagellm"
    program.parent.mkdir()
    program.write_text(
        '#!/bin/sh\necho "$@" >> told\n[ "$1" != "$FAILS" ] || exit 2\n'
        '[ "$1" != prepare ] || mkdir -p data/$3 runs/$3\n'
        '[ "$1" != promote ] || ln -sfn "$2" runs/live\n'
    )
    program.chmod(0o755)
    return tmp_path


def daily(shop, **more):
    script = re.findall(r"^ExecStart=(.*)$", (DEPLOY / "pagellm-daily.service").read_text(), re.M)
    (words,) = (shlex.split(line) for line in script)
    words = [w.replace("/srv/shop", str(DEPLOY)) for w in words]
    path = {"PATH": f"{shop / 'bin'}:/usr/bin:/bin"}
    return subprocess.run(words, cwd=shop, env=path | more, capture_output=True, text=True)


def test_the_daily_script_says_what_every_command_takes(shop):
    assert daily(shop, KEEP="2").returncode == 0
    told = [line.split() for line in (shop / "told").read_text().splitlines()]
    assert [words[0] for words in told] == ["prepare", "update", "evaluate", "promote", "doctor"]
    for verb, *words in told:
        module = importlib.import_module(VERBS[verb])
        made = parse(module.Config, words, f"pagellm {verb}")
        if verb == "update":
            assert (made.source_run, made.steps) == ("2026-01-02", 50) and made.run == words[5]
    day = (shop / "runs" / "live").readlink().name
    assert {p.name for p in (shop / "data").iterdir()} == {"2026-01-02", day}  # the oldest went
    done = daily(shop)  # the same day again
    assert "live already" in done.stdout and len((shop / "told").read_text().splitlines()) == 5


def test_old_days_without_a_run_go_too_and_today_never(shop):
    (shop / "runs" / "2026-01-01").rmdir()  # that day failed before it had a run
    done = daily(shop, KEEP="0")
    assert done.returncode == 0, done.stderr
    day = (shop / "runs" / "live").readlink().name
    assert {p.name for p in (shop / "data").iterdir()} == {"2026-01-02", day}
    assert (shop / "runs" / day).exists()


def test_the_daily_script_wants_a_live_run(shop):
    (shop / "runs" / "live").unlink()
    done = daily(shop)
    assert done.returncode == 2 and "pagellm promote RUN" in done.stderr
    assert not (shop / "told").exists()


@pytest.mark.parametrize("verb", ["prepare", "update", "evaluate", "promote"])
def test_a_step_that_fails_leaves_yesterdays_run_live(shop, verb):
    assert daily(shop, FAILS=verb).returncode == 2
    assert (shop / "runs" / "live").readlink().name == "2026-01-02"
    assert (shop / "data" / "2026-01-01").exists()


def test_systemd_takes_the_units(tmp_path):
    timer = configparser.ConfigParser()
    timer.read(DEPLOY / "pagellm-daily.timer")
    assert timer["Install"]["WantedBy"] == "timers.target"
    for path in (p for p in DEPLOY.iterdir() if p.suffix in (".service", ".timer")):
        text = path.read_text().replace("/srv/shop/venv/bin/pagellm", "/bin/true")
        (tmp_path / path.name).write_text(text.replace("User=shop", "User=root"))
    if shutil.which("systemd-analyze"):  # a part of systemd, which containers lack
        names = sorted(str(p) for p in tmp_path.iterdir())
        done = subprocess.run(["systemd-analyze", "verify", *names], capture_output=True, text=True)
        assert done.returncode == 0 and not done.stderr, done.stderr
        calendar = ["systemd-analyze", "calendar", timer["Timer"]["OnCalendar"]]
        assert "Next elapse" in subprocess.run(calendar, capture_output=True, text=True).stdout
