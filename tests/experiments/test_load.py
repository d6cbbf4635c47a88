"""`make load` prints what its clients measured and what the service's /metrics counted."""

import json
from importlib.util import find_spec

import pytest
from hypothesis import given
from hypothesis import strategies as st

from experiments.stress import fuzz, load
from pagellm.stage.config import PageLLMError


def have(*modules):
    """Whether it is installed. Does not import it: locust patches sockets and threads for good."""
    return pytest.mark.skipif(
        None in map(find_spec, modules), reason="needs: pip install 'pagellm[serve,load]'"
    )


count = st.integers(1, 1000)
seconds = st.floats(0, 100)


@given(
    st.lists(
        st.tuples(st.floats(0, 60), st.floats(0.1, 1e4), st.sampled_from(["", "", "", "500"])),
        min_size=1,
    )
)
def test_times_count_what_ended_after_the_ramp(rows):
    kept = [row for row in rows if row[0] > load.RAMP]
    if not kept:
        with pytest.raises(PageLLMError, match="not one"):
            load.times(rows)
        return
    t = load.times(rows)
    fastest, slowest = min(row[1] for row in kept), max(row[1] for row in kept)
    assert t["requests"] == len(kept) and t["failed"] == sum(row[2] != "" for row in kept)
    assert fastest <= t["p50"] <= t["p95"] <= t["p99"] <= slowest
    assert t["pages_s"] * (max(row[0] for row in kept) - load.RAMP) == pytest.approx(
        len(kept) - t["failed"]
    )


@given(
    st.dictionaries(st.sampled_from(load.PARTS), seconds),
    seconds,
    count,
    count,
    count,
    st.integers(0, 1000),
    st.floats(0, 50),
)
def test_parts_times_pages_are_what_the_meters_grew_by(
    spent, cpu, batches, more, hits, misses, earlier
):
    pages = batches + more
    names = {f"pagellm_stage_seconds_sum:{name}": s for name, s in spent.items()} | {
        "process_cpu_seconds_total": cpu,
        "pagellm_batch_pages_sum": pages,
        "pagellm_batch_pages_count": batches,
        "pagellm_cache_hits": hits,
        "pagellm_cache_misses": misses,
    }
    before = dict.fromkeys(names, earlier)
    got = load.parts(before, {name: earlier + value for name, value in names.items()})
    for name in load.PARTS:
        assert got[name] * pages == pytest.approx(1e3 * spent.get(name, 0), abs=1e-4)
    assert got["cpu_ms"] * pages == pytest.approx(1e3 * cpu, abs=1e-4)
    assert got["batch"] * batches == pytest.approx(pages) and got["cached"] == pytest.approx(
        hits / (hits + misses)
    )


def test_growth_is_beside_the_cache():
    assert load.grown(
        {"rss_mb": [100, 200, 250, 300], "cache_mb": [0, 100, 150, 200]}
    ) == pytest.approx(0)
    assert load.grown(
        {"rss_mb": [100, 200, 250, 300], "cache_mb": [0, 100, 100, 100]}
    ) == pytest.approx(1)


def test_what_is_missing_is_named():
    with pytest.raises(PageLLMError, match="needs no_such_tool.*\n.*serve,load"):
        load.needs("no_such_tool")
    with pytest.raises(PageLLMError, match="clients='0,8'"):
        load.Config(clients="0,8")


def config(kind, root, **more):
    return kind(
        run="base", data=str(root / "data"), runs=str(root / "runs"), device="cpu", cores=1, **more
    )


@have("uvicorn")
def test_a_service_that_cannot_start_says_why(served):
    with (
        pytest.raises(PageLLMError, match="no PageLLM policy|no SFT policy"),
        load.served(
            load.Config(
                run="nothing", data=str(served / "data"), runs=str(served / "runs"), cores=1
            )
        ),
    ):
        pass


@have("locust", "uvicorn")
def test_rows_and_soak_against_a_real_service(served, capsys):
    load.run(config(load.Config, served, clients="2", seconds=2.0, k=6, soak=0.07))
    said = json.loads(capsys.readouterr().out.splitlines()[-1])
    known, new, mixed = said["rows"]
    assert (known["prompts"], new["prompts"], mixed["prompts"]) == ("known", "new", "mixed")
    assert known["cached"] > 0.95 > 0.6 > new["cached"]
    for row in (*said["rows"], said["soak"]):
        assert row["failed"] == 0 < row["pages_s"] and 0 < row["p50"] <= row["p95"] <= row["p99"]
        assert all(row[name] > 0 for name in (*load.PARTS, "cpu_ms"))
    assert said["soak"]["fault"] == 0 and said["soak"]["open_files"][3] > 0


@have("locust", "uvicorn")
def test_a_client_that_gets_another_page_counts_it_as_failed(served):
    with load.served(config(load.Config, served)) as service:
        for body, why in (('{"history": [], "k": 5}', "another number"), ("{}", "422")):
            got = load.drive(service, {"known": [body], "new": [body], "k": 6}, 1, 1.5)
            assert got["rows"] and all(why in bad for _, _, bad in got["rows"])


@have("schemathesis", "uvicorn")
def test_schemathesis_finds_no_fault(served, capfd):
    fuzz.run(config(fuzz.Config, served, cases=3))
    assert "0 of them with 5xx" in capfd.readouterr().out
