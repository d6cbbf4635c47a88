"""Measure `pagellm serve` under load: latency, pages a second, cost of each part, growth of memory.

Reads   data/<dataset>, runs/<run>/sft, runs/<run>/ppo, runs/<run>/reward
Prints  a row for each number of clients, with prompts that the service knows and with new ones;
        costs; one line of JSON

    make load                           python -m experiments.stress.load --dataset synthetic
    make load ARGS="--soak 10"          then ten minutes at 80% of the measured pages a second
    make load ARGS="--rows"             pages of rows: pagellm storefront cache must have run

With --rows `pagellm storefront serve` is measured: known are pages that are kept whole, new are
pages that are drawn from rows that are kept.

Needs the extras [serve] and [load]; the clients are locust's (clients.py). The service runs on
`cores` cores, and the clients on the others; if there are none, they share the service's cores.
Takes a minute and a half, plus the soak.
"""

import json
import os
import re
import select
import signal
import subprocess
import sys
import tempfile
import time
import urllib.request
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path
from typing import Protocol

import numpy as np

from pagellm.data.shop import load
from pagellm.serving.sources import Sources
from pagellm.stage import hints, randomness
from pagellm.stage.command import main
from pagellm.stage.config import PageLLMError, check
from pagellm.stage.run import commit, machine, versions

__all__ = ["Config", "drive", "needs", "parts", "run", "served", "times"]


COUNTED = "pagellm_storefront_page_seconds_count:"  # pages of rows, by where they came from
PARTS = ("prompt", "decode", "reward", "metrics")
RAMP = 1.0  # seconds at the start of a row that do not count
KNOWN = 256  # users whose prompts are cached before the rows of known prompts; all fit in the cache
NEW = 20_000  # bodies with a prompt of their own: more than fit in the cache


@dataclass(frozen=True, kw_only=True)
class Config(Sources):
    """Start the service, load it with locust, print latency and costs; then soak it, if asked."""

    clients: str = "1,8,32"  # numbers of concurrent clients, comma-separated; a row each
    seconds: float = 10.0  # length of a row
    rows: bool = False  # pages of rows, of pagellm storefront serve
    k: int = 20  # slots on a page; of a page of rows, as many as its layout has
    cores: int = 2  # CPU cores of the service
    threads: int = 0  # CPU threads of a batch, as in serve; 0: torch's choice
    soak: float = 0.0  # minutes of the soak; 0: none
    level: float = 0.8  # load of the soak: a share of the pages a second that the most clients got
    new: float = 0.2  # share of the soak's requests that have a new prompt; others are of all users

    def __post_init__(self):
        super().__post_init__()
        ok = all(word.isdigit() and int(word) > 0 for word in self.clients.split(","))
        check(
            self,
            clients=(ok, "numbers above 0, comma-separated"),
            seconds=(self.seconds > RAMP, f"above {RAMP:g}"),
            k=(self.k > 0, "1 or more"),
            cores=(self.cores > 0, "1 or more"),
            level=(self.level > 0, "above 0"),
            new=(0 <= self.new <= 1, "0 to 1"),
        )


@dataclass
class Service:
    """A `pagellm serve` in a process of its own, and its address."""

    url: str
    cores: list[int]
    others: list[int]
    path: str = "v1/page"  # where pages are asked for

    def get(self, path: str) -> bytes:
        with urllib.request.urlopen(self.url + path, timeout=60) as reply:
            return reply.read()

    def warm(self, some: list[str]) -> None:
        """Send every one of these bodies once, so that the service caches its prompt."""

        def ask(body: str) -> None:
            request = urllib.request.Request(
                self.url + self.path, body.encode(), {"content-type": "application/json"}
            )
            with urllib.request.urlopen(request, timeout=60) as reply:
                reply.read()

        with ThreadPoolExecutor(8) as pool:
            list(pool.map(ask, some))

    def meters(self) -> dict[str, float]:
        """Samples in /metrics: name, or name:label if it has one label, -> value."""
        from prometheus_client.parser import text_string_to_metric_families

        return {
            ":".join([s.name, *s.labels.values()]): s.value
            for family in text_string_to_metric_families(self.get("metrics").decode())
            for s in family.samples
        }


class Served(Protocol):
    """Sources that also say how many cores and threads the service has."""

    @property
    def cores(self) -> int: ...

    @property
    def threads(self) -> int: ...


@contextmanager
def served(config: Served):
    """Start the service on a free local port, and stop it at the end.

    config  a Sources with cores and threads, k if pages may be long, and rows if it may be the
            storefront's service
    Raises PageLLMError with the service's output if it does not start.
    """
    every = sorted(os.sched_getaffinity(0))
    mine = every[: config.cores]
    if len(mine) < config.cores:
        raise PageLLMError(f"cores={config.cores}: this process may use {len(mine)}")
    names = ["dataset", "run", "data", "runs", "split", "device"]
    rows = getattr(config, "rows", False)
    if not rows:
        names += ["source_run", "reward_run", "threads"]
    options = {name: getattr(config, name) for name in names}
    if not rows:
        options["max_k"] = max(100, getattr(config, "k", 0))
    command = [
        sys.executable,
        "-m",
        "pagellm",
        *(("storefront", "serve") if rows else ("serve",)),
        "--port=0",
        "--reload=0",
        *(f"--{name}={value}" for name, value in options.items() if value != ""),
    ]
    with tempfile.TemporaryFile("w+") as log:
        process = subprocess.Popen(
            command,
            stdout=subprocess.PIPE,
            stderr=log,
            text=True,
            preexec_fn=lambda: os.sched_setaffinity(0, mine),
        )
        output = process.stdout
        assert output is not None  # it is a pipe
        try:
            ready, _, _ = select.select([output], [], [], 300)
            said = re.search(r"http://[\d.:]+/", output.readline() if ready else "")
            if said is None:
                process.kill()
                process.wait()
                log.seek(0)
                raise PageLLMError(f"the service did not start\n  {log.read().strip()[-2000:]}")
            path = "v1/storefront" if rows else "v1/page"
            service = Service(said.group(), mine, every[config.cores :], path)
            for _ in range(100):
                if json.loads(service.get("readyz"))["status"] == "ready":
                    break
                time.sleep(0.1)
            yield service
        finally:
            process.send_signal(signal.SIGTERM)
            try:
                process.wait(timeout=60)
            except subprocess.TimeoutExpired:
                process.kill()
                process.wait()
            output.close()


def needs(*modules: str) -> None:
    """Raise PageLLMError if one of these modules, or what reads /metrics, is not installed."""
    for module in (*modules, "prometheus_client"):
        if find_spec(module) is None:
            raise PageLLMError(
                f"this needs {module}, which is not installed here\n"
                f"  Install it with: {hints.install('serve,load', 'load')}"
            )


def bodies(config: Config) -> tuple[list[str], list[str]]:
    """Bodies of requests: one for every user, in seeded random order; NEW that no cache knows."""
    shop = load(config.data_dir)
    users = randomness.rng(config.seed, "load", "users").permutation(shop.n_users)
    if config.rows:
        asked = [{"user": shop.user_ids[u]} for u in users]
        drawn = [{**asked[n % len(asked)], "explore": 1.0, "seed": n} for n in range(NEW)]
        return [json.dumps(body) for body in asked], [json.dumps(body) for body in drawn]
    pairs = randomness.rng(config.seed, "load", "new").choice(
        shop.n_users * shop.n_items, size=min(NEW, shop.n_users * shop.n_items), replace=False
    )
    return (
        [json.dumps({"user": shop.user_ids[u], "k": config.k}) for u in users],
        [
            json.dumps(
                {
                    "user": shop.user_ids[p // shop.n_items],
                    "k": config.k,
                    "history": [{"item": shop.catalogue.ids[p % shop.n_items], "rating": 5}],
                }
            )
            for p in pairs
        ],
    )


def drive(service: Service, plan: dict, clients: int, seconds: float, watch=lambda: None) -> dict:
    """Let locust's clients ask for pages.

    watch    called at most once a second meanwhile
    returns  {"rows": [second it ended, ms, failure or ""], "cpu": CPU seconds of the clients}
    """
    with tempfile.TemporaryDirectory() as folder:
        plan = {
            "rate": None,
            "share_new": 0.0,
            "path": service.path,
            **plan,
            "clients": clients,
            "out": f"{folder}/out.json",
        }
        Path(folder, "plan.json").write_text(json.dumps(plan))
        env = {name: value for name, value in os.environ.items() if not name.startswith("LOCUST_")}
        command = [
            sys.executable,
            "-m",
            "locust",
            "-f",
            str(Path(__file__).with_name("clients.py")),
            "--headless",
            "--users",
            str(clients),
            "--spawn-rate",
            str(clients),
            "--run-time",
            f"{seconds + RAMP:.0f}s",
            "--host",
            service.url.rstrip("/"),
            "--only-summary",
            "--exit-code-on-error",
            "0",
        ]
        with open(f"{folder}/log", "w+") as log:
            process = subprocess.Popen(
                command,
                env=env | {"PAGELLM_LOAD": f"{folder}/plan.json"},
                stdout=log,
                stderr=log,
                cwd=folder,
                preexec_fn=lambda: os.sched_setaffinity(0, service.others or service.cores),
            )
            try:
                while process.poll() is None:
                    watch()
                    time.sleep(min(1.0, seconds / 10))
            finally:
                process.kill()
                process.wait()
            if not Path(plan["out"]).exists():
                log.seek(0)
                raise PageLLMError(f"locust gave up\n  {log.read().strip()[-2000:]}")
        return json.loads(Path(plan["out"]).read_text())


def times(rows: list, start: float = RAMP) -> dict:
    """Pages a second, latency in ms and failures of the requests that ended after `start` seconds.

    rows  [second it ended, ms, failure or ""]
    Raises PageLLMError if there are none.
    """
    kept = [(end, ms, bad) for end, ms, bad in rows if end > start]
    if not kept:
        raise PageLLMError("not one request was answered in time; take more --seconds")
    ms = np.array([row[1] for row in kept])
    bad = [row[2] for row in kept if row[2]]
    return {
        "pages_s": (len(kept) - len(bad)) / (max(row[0] for row in kept) - start),
        **{f"p{p}": float(np.percentile(ms, p)) for p in (50, 95, 99)},
        "requests": len(kept),
        "failed": len(bad),
        "first_failure": bad[0] if bad else "",
    }


def parts(before: dict[str, float], after: dict[str, float]) -> dict:
    """What happened between two readings of /metrics.

    Milliseconds a page for each part and for the service's CPU, pages in a batch, and the share of
    look-ups that the cache answered.
    """

    def grown(name: str) -> float:
        return after.get(name, 0.0) - before.get(name, 0.0)

    pages = sum(map(grown, (n for n in after if n.startswith(COUNTED))))
    pages = max(1.0, grown("pagellm_batch_pages_sum") + pages)
    hits, misses = (
        grown(f"pagellm_cache_{name}") + grown(f"pagellm_storefront_cache_{name}")
        for name in ("hits", "misses")
    )
    return {
        **{name: 1e3 * grown(f"pagellm_stage_seconds_sum:{name}") / pages for name in PARTS},
        "cpu_ms": 1e3 * grown("process_cpu_seconds_total") / pages,
        "batch": pages / max(1.0, grown("pagellm_batch_pages_count")),
        "cached": hits / max(1.0, hits + misses),
    }


def row(service: Service, name: str, plan: dict, clients: int, seconds: float) -> dict:
    before = service.meters()
    got = drive(service, plan, clients, seconds)
    out = {
        "prompts": name,
        "clients": clients,
        **times(got["rows"]),
        **parts(before, service.meters()),
    }
    out["client_cpu_ms"] = 1e3 * got["cpu"] / max(1, len(got["rows"]))
    out["rest"] = 1e3 * max(end for end, *_ in got["rows"]) / len(got["rows"]) - sum(
        out[name] for name in PARTS
    )
    if out["failed"]:
        raise PageLLMError(
            f"{out['failed']} of {out['requests']} requests failed; the first: "
            f"{out['first_failure']}"
        )
    return out


def soak(service: Service, config: Config, plan: dict, rate: float) -> dict:
    """Ask for `rate` pages a second for `config.soak` minutes; record memory and open files.

    Growth compares the last quarter of the time with the second, because the first fills the cache.
    """
    seen: list[tuple[float, float, float, float]] = []
    began = time.perf_counter()

    def watch() -> None:
        now = time.perf_counter() - began
        if not seen or now - seen[-1][0] > config.soak:
            m = service.meters()
            seen.append(
                (
                    now,
                    m["process_resident_memory_bytes"] / 1e6,
                    m.get("pagellm_cache_bytes", 0.0) / 1e6,
                    m["process_open_fds"],
                )
            )

    before = service.meters()
    got = drive(
        service, plan | {"rate": rate, "share_new": config.new}, 64, 60 * config.soak, watch
    )
    after = service.meters()
    at = np.array(seen)
    quarters = [at[part] for part in np.array_split(np.arange(len(at)), 4)]
    faults = {name: after[f"pagellm_events_total:{name}"] for name in ("fault", "timeout", "busy")}
    names = ("rss_mb", "cache_mb", "open_files")
    return {
        "minutes": config.soak,
        "rate": rate,
        **times(got["rows"]),
        **parts(before, after),
        **faults,
        **{
            name: [round(float(q[:, i + 1].mean()), 1) for q in quarters]
            for i, name in enumerate(names)
        },
        "rss_first_mb": round(float(at[0, 1]), 1),
        "rss_last_mb": round(float(at[-1, 1]), 1),
    }


def table(rows: list[dict]) -> str:
    lines = [
        f"{'prompts':<8}{'clients':>8}{'pages/s':>9}"
        f"{'p50 ms':>8}{'p95 ms':>8}{'p99 ms':>8}{'failed':>8}"
        f"{'batch':>7}{'cached':>8}"
    ]
    lines += [
        f"{r['prompts']:<8}{r['clients']:>8}{r['pages_s']:>9.1f}"
        f"{r['p50']:>8.1f}{r['p95']:>8.1f}{r['p99']:>8.1f}"
        f"{r['failed']:>8}{r['batch']:>7.1f}{r['cached']:>8.0%}"
        for r in rows
    ]
    lines += [
        "",
        f"ms a page: {PARTS[0]:<7}"
        + "".join(f"{name:>9}" for name in (*PARTS[1:], "rest"))
        + "   CPU: service  clients",
    ]
    lines += [
        f"{r['prompts']:<8}{r['clients']:>2}"
        + "".join(f"{r[name]:>9.2f}" for name in (*PARTS, "rest"))
        + f"{r['cpu_ms']:>15.2f}{r['client_cpu_ms']:>9.2f}"
        for r in rows
    ]
    return "\n".join(
        [
            *lines,
            "",
            "rest: of a second divided by its pages, what the four parts leave: HTTP, JSON, "
            "waiting, and the clients where they share the cores",
        ]
    )


def run(config: Config) -> dict:
    """Print the rows, the soak and one line of JSON; return what the line holds.

    Raises PageLLMError if a request fails, or memory grows in a soak.
    """
    needs("locust")
    known, new = bodies(config)
    slots = None if config.rows else config.k
    rows = []
    with served(config) as service:
        where = "on cores of their own" if service.others else "on the same cores"
        print(
            f"service on {config.cores} cores, pages of {slots or 'rows'}, "
            f"{config.seconds:g} s a row; locust's clients {where}\n"
            f"{machine(config.device)}; torch {versions()['torch']}; commit "
            f"{commit() or 'unknown'}\n"
        )
        for clients in map(int, config.clients.split(",")):
            service.warm(known[:KNOWN])
            for name, share in (("known", 0.0), ("new", 1.0)):
                plan = {"known": known[:KNOWN], "new": new, "share_new": share, "k": slots}
                rows.append(row(service, name, plan, clients, config.seconds))
                new = new[rows[-1]["requests"] :] + new[: rows[-1]["requests"]]
        mixed = {"known": known, "new": new, "share_new": config.new, "k": slots}
        if config.soak:
            rows.append(
                row(
                    service,
                    "mixed",
                    mixed,
                    max(map(int, config.clients.split(","))),
                    config.seconds,
                )
            )
        print(table(rows), flush=True)
        result = {
            "machine": machine(config.device),
            "versions": versions(),
            "commit": commit(),
            "k": config.k,
            "cores": config.cores,
            "clients_apart": bool(service.others),
            "rows": rows,
        }
        if config.soak:
            result["soak"] = s = soak(service, config, mixed, config.level * rows[-1]["pages_s"])
            print(
                "\n"
                f"soak: {s['minutes']:g} minutes at {s['rate']:.1f} pages/s ({config.level:.0%}), "
                f"{config.new:.0%} new prompts: {s['requests']:,} requests, {s['failed']} failed, "
                f"p50 {s['p50']:.1f}, p95 {s['p95']:.1f}, p99 {s['p99']:.1f} ms\n"
                f"by quarters: memory {s['rss_mb']} MB, of it cache {s['cache_mb']} MB, open files "
                f"{s['open_files']}; first {s['rss_first_mb']} and last {s['rss_last_mb']} MB"
            )
    print(json.dumps(result))
    if config.soak and s["failed"]:
        raise PageLLMError(
            f"{s['failed']} of {s['requests']} requests failed; the first: {s['first_failure']}"
        )
    if config.soak and grown(s) > 0.05:
        raise PageLLMError(
            f"memory grew by {grown(s):.0%} between the second and the last quarter, beside the "
            "cache"
        )
    return result


def grown(s: dict) -> float:
    """Share by which memory, without the cache, grew from a soak's second quarter to its last."""
    rest = [rss - cache for rss, cache in zip(s["rss_mb"], s["cache_mb"], strict=True)]
    return rest[3] / rest[1] - 1


if __name__ == "__main__":
    sys.exit(main(Config, run, "experiments.stress.load"))
