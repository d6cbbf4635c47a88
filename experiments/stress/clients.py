"""What locust's clients do: ask for pages, check them, record every time. Needs the extra [load].

experiments/stress/load.py starts them:

    PAGELLM_LOAD=plan.json locust -f experiments/stress/clients.py --headless --users 8 \\
        --run-time 10s --host http://...

Fields of the plan:

    known, new   bodies of requests. A client sends a random one of `known`, or the next one of
                 `new`, which starts again when all have been sent
    share_new    share of requests from `new`
    rate         pages a second of all clients together, arriving at random times; null: each client
                 asks again at once
    clients, k   number of clients; slots that a page must have, null: any but 0
    path         where pages are asked for, as v1/page
    out          file for [second it ended, milliseconds, failure or ""] of each request, and the
                 clients' CPU seconds
"""

import itertools
import json
import os
import random
import time
from pathlib import Path

from locust import FastHttpUser, events, task

__all__ = ["Asker"]


PLAN = json.loads(Path(os.environ["PAGELLM_LOAD"]).read_text())
NEW = itertools.cycle(PLAN["new"])
rows: list[tuple[float, float, str]] = []
began: dict[str, float] = {}


class Asker(FastHttpUser):
    network_timeout = connection_timeout = 30.0

    def on_start(self):
        self.due = time.perf_counter()

    def wait_time(self) -> float:
        if PLAN["rate"] is None:
            return 0.0
        self.due += random.expovariate(PLAN["rate"] / PLAN["clients"])
        return max(0.0, self.due - time.perf_counter())

    @task
    def page(self):
        body = next(NEW) if random.random() < PLAN["share_new"] else random.choice(PLAN["known"])
        with self.client.post(
            f"/{PLAN['path']}",
            data=body,
            headers={"content-type": "application/json"},
            catch_response=True,
        ) as reply:
            found = reply.content.count(b'"rank":') if reply.status_code == 200 else 0
            if reply.status_code == 200 and (found != PLAN["k"] if PLAN["k"] else not found):
                reply.failure("the page has another number of slots")


@events.test_start.add_listener
def begin(**_):
    began.update(wall=time.perf_counter(), cpu=time.process_time())


@events.request.add_listener
def note(response_time, exception, **_):
    rows.append((time.perf_counter() - began["wall"], response_time, str(exception or "")))


@events.user_error.add_listener
def broke(exception, **_):
    rows.append((time.perf_counter() - began["wall"], 0.0, f"a client broke: {exception}"))


@events.quit.add_listener
def keep(**_):
    Path(PLAN["out"]).write_text(
        json.dumps({"rows": rows, "cpu": time.process_time() - began["cpu"]})
    )
