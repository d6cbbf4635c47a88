"""`import pagellm`: the calls of a notebook end in the same directories as the command line."""

import contextlib
import json
import math
import re
import shutil
import signal
import subprocess
import sys
from dataclasses import replace
from decimal import Decimal
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

import pagellm
from pagellm import python
from pagellm.data import arrow, synthetic
from pagellm.data.prepare import Config as Prepare
from pagellm.data.prepare import run as run_prepare
from pagellm.serving.filters import Filters
from pagellm.serving.recommender import Ask, Recommender
from pagellm.serving.sources import Sources
from pagellm.stage.command import Interrupted
from pagellm.stage.files import file_id

ROOT = Path(__file__).parent.parent
SMALL = {
    "pretrain": {"size": "nano", "steps": 4, "batch": 8, "words": 300, "warmup": 2},
    "sft": {"epochs": 1, "batch": 16, "k": 6, "max_history": 8, "warmup": 2, "eval_every": 9},
}
FEW = {"k": 6, "depth": 40, "n_boot": 20, "examples": 0}


@pytest.fixture(scope="module")
def tables():
    """A shop's log and item table, as columns."""
    made = synthetic.make(60, 40, 0)
    reviews = list(made.reviews())
    log = {
        "customer": [r.user for r in reviews],
        "sku": [r.item for r in reviews],
        "rating": [float(r.rating) for r in reviews],
        "time": [int(r.time) for r in reviews],
    }
    items = {
        "sku": [i.id for i in made.items],
        "title": [i.title for i in made.items],
        "category": [list(i.paths[0]) for i in made.items],
        "price": [float(i.price) for i in made.items],
    }
    return log, items


@pytest.fixture(scope="module")
def model(tables, tmp_path_factory):
    root = tmp_path_factory.mktemp("python")
    log, items = map(pa.table, tables)
    data = pagellm.prepare(
        log,
        items=items,
        dataset="autumn",
        data=root / "data",
        user_column="customer",
        item_column="sku",
    )
    return pagellm.fit(data, stages="sft", runs=root / "runs", device="cpu", **SMALL)


def test_the_import_takes_less_than_50_ms_and_no_torch():
    code = (
        "import sys, time; at = time.process_time(); import pagellm; "
        "print(time.process_time() - at); heavy = {'torch', 'numpy', 'pyarrow'} & set(sys.modules)"
        "; assert not heavy, heavy; assert 'fit' in dir(pagellm)"
    )
    took = [
        float(
            subprocess.run(
                [sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True
            ).stdout
        )
        for _ in range(3)
    ]
    assert min(took) < 0.05


def test_preparing_a_table_needs_no_torch(tmp_path):
    log = {"user": [f"u{u}" for u in range(6) for _ in range(6)], "item": [*range(6)] * 6}
    code = f"import sys, pagellm; pagellm.prepare({log!r}, k_core=2)"
    code += "; assert 'torch' not in sys.modules"
    env = {"PYTHONPATH": str(ROOT)}
    subprocess.run([sys.executable, "-c", code], cwd=tmp_path, env=env, check=True)
    assert (tmp_path / "data" / "shop" / "source.json").exists()


@pytest.mark.parametrize("library", ["pandas", "polars", "duckdb"])
def test_every_library_s_table_becomes_the_same_data(tables, model, library, tmp_path, capsys):
    other = pytest.importorskip(library, reason="needs the extra [dev]")
    log, items = map(pa.table, tables)
    if library == "pandas":
        log, items = (other.DataFrame.from_arrow(t) for t in (log, items))
    elif library == "polars":
        log, items = (other.from_arrow(t) for t in (log, items))
        log = log.with_columns(other.col("customer").cast(other.Categorical))
    else:
        log, items = other.sql("select * from log"), other.sql("select * from items")
    columns = {"user_column": "customer", "item_column": "sku"}
    data = pagellm.prepare(log, items=items, dataset="autumn", data=tmp_path, **columns)
    for name in ("interactions.parquet", "items.parquet", "users.parquet"):
        assert file_id(data.path / name) == file_id(model.data.path / name), name
    assert "users" in repr(data)
    again = pagellm.prepare(log, items=items, dataset="autumn", data=tmp_path, **columns)
    assert again == data and "already prepared" in capsys.readouterr().out


def test_a_path_is_read_as_the_command_line_reads_it(tables, model, tmp_path):
    log, items = map(pa.table, tables)
    pq.write_table(log, tmp_path / "orders.parquet")
    pq.write_table(items, tmp_path / "things.parquet")
    columns = {"user_column": "customer", "item_column": "sku"}
    data = pagellm.prepare(
        tmp_path / "orders.parquet",
        items=tmp_path / "things.parquet",
        dataset="autumn",
        data=tmp_path / "data",
        **columns,
    )
    whole = pagellm.prepare(tmp_path, dataset="whole", data=tmp_path / "data", **columns)
    for name in ("interactions.parquet", "items.parquet"):
        assert file_id(data.path / name) == file_id(model.data.path / name)
        assert file_id(whole.path / name) == file_id(model.data.path / name)


def test_another_table_under_the_same_name_is_refused_and_a_failed_call_is_not_held_against_it(
    tables, tmp_path
):
    log, items = tables
    with pytest.raises(pagellm.PageLLMError, match="not interactions"):
        pagellm.prepare({"a": [1]}, items=items, dataset="x", data=tmp_path)
    columns = {"user_column": "customer", "item_column": "sku"}
    pagellm.prepare(log, dataset="x", data=tmp_path, **columns)  # no items this time
    assert not (tmp_path / "raw" / "x" / "items.parquet").exists()
    with pytest.raises(pagellm.PageLLMError, match="x was prepared without an item table"):
        pagellm.prepare(log, items=items, dataset="x", data=tmp_path, **columns)
    pagellm.prepare(log, dataset="x", data=tmp_path, **columns)  # as before
    fewer = {name: values[:50] for name, values in log.items()}
    with pytest.raises(pagellm.PageLLMError, match="holds another table"):
        pagellm.prepare(fewer, dataset="x", data=tmp_path, **columns)
    own = tmp_path / "raw" / "mine" / "log.parquet"
    own.parent.mkdir()
    pq.write_table(pa.table(fewer), own)
    with pytest.raises(pagellm.PageLLMError, match="holds another table"):
        pagellm.prepare(log, dataset="mine", data=tmp_path, **columns)


def prepare_elsewhere():
    return pagellm.prepare(dataset="x", raw="elsewhere")


@pytest.mark.parametrize(
    ("said", "call"),
    [
        ("int is no table", lambda: pagellm.prepare(3)),
        ("items= without a table", lambda: pagellm.prepare(items={"item": [1]})),
        ("want a table here too", lambda: pagellm.prepare({"user": [1]}, items="a.csv")),
        ("want a path here too", lambda: pagellm.prepare(ROOT, items={"item": [1]})),
        ("no such file", lambda: pagellm.prepare("nowhere.csv")),
        ("made-up shop", lambda: pagellm.prepare({"user": [1]}, dataset="synthetic")),
        ("leave it out", lambda: pagellm.prepare(ROOT, raw="elsewhere")),
        ("no option k_cores; did you mean k_core", lambda: pagellm.prepare(k_cores=3)),
        ("no stage 'stf'", lambda: pagellm.fit("autumn", stages="stf")),
        ("sft={'epochs': 2}", lambda: pagellm.fit("autumn", epochs=2)),
        ("did you mean device", lambda: pagellm.fit("autumn", devices="cpu")),
        ("want the stage's options", lambda: pagellm.fit("autumn", sft=3)),
        ("sft: no option epoch; did you mean epochs", lambda: pagellm.fit("x", sft={"epoch": 1})),
        (
            "ppo: clip='high': want a number",
            lambda: pagellm.fit("x", stages="ppo", ppo={"clip": "high"}),
        ),
        (
            "no prepared data in data/nothing\n  Make it with: "
            "pagellm.prepare(table, dataset='nothing')",
            lambda: pagellm.fit("nothing", stages="sft"),
        ),
        ("no raw files: elsewhere .*\n.* say where with table", prepare_elsewhere),
        ("no run 'nothing' in runs", lambda: pagellm.load("nothing")),
    ],
)
def test_errors_say_what_to_do(said, call, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(pagellm.PageLLMError, match=re.sub(r"([()])", r"\\\1", said)):
        call()
    assert not list(tmp_path.iterdir())  # nothing begun


def test_a_number_of_items_is_that_of_the_made_up_shop(tmp_path):
    data = pagellm.prepare(users=60, items=40, data=tmp_path)
    assert data.dataset == "synthetic" and data.source["config"]["items"] == 40


def test_minutes_are_those_of_tune_and_of_fit(model, monkeypatch):
    """Without stages the command fit does it all; with stages tune comes first, once."""
    from pagellm import pipeline, sft, tune

    ran = []
    monkeypatch.setattr(pipeline, "run", lambda config: ran.append(("fit", config)))
    monkeypatch.setattr(tune, "run", lambda config: ran.append(("tune", config)))
    monkeypatch.setattr(sft, "run", lambda config: ran.append(("sft", config)))
    monkeypatch.setattr("pagellm.pretrain.run", lambda config: ran.append(("pretrain", config)))
    told = {"runs": model.runs, "device": "cpu", "seed": 3}
    assert pagellm.fit(model.data, minutes=2.5, **told).run == "autumn"
    pagellm.fit(model.data, minutes=4, stages="sft", sft={"epochs": 2}, **told)
    assert [name for name, _ in ran] == ["fit", "tune", "pretrain", "sft"]
    assert [config.minutes for _, config in ran[:2]] == [2.5, 4]
    assert all(c.seed == 3 and c.data == str(model.data.data) for _, c in ran)
    assert ran[3][1].epochs == 2
    (model.path / "preset").mkdir()
    try:
        pagellm.fit(model.data, minutes=4, stages="sft", **told)
    finally:
        (model.path / "preset").rmdir()
    assert [name for name, _ in ran[4:]] == ["pretrain", "sft"]
    with pytest.raises(pagellm.PageLLMError, match="sft: chosen within minutes=5"):
        pagellm.fit(model.data, minutes=5, sft={"epochs": 1})


def test_a_stage_runs_behind_all_that_its_options_make_it_read(model, monkeypatch):
    ran: list[str] = []
    monkeypatch.setattr(python, "run_verb", lambda verb, module, options: ran.append(verb))
    told = {"runs": model.runs, "device": "cpu", "run": "none-yet"}

    def order(stages, **options):
        ran.clear()
        with contextlib.suppress(pagellm.PageLLMError):  # nothing was trained that could be loaded
            pagellm.fit(model.data, stages=stages, **told, **options)
        return ran

    assert order("ppo") == ["pretrain", "sft", "reward", "ppo"]
    paid = {"item_reward": "outcome"}
    assert order("ppo", ppo=paid) == ["pretrain", "sft", "reward", "compose", "ppo"]
    assert order("ppo", ppo=paid | {"w_page": 0}) == ["pretrain", "sft", "compose", "ppo"]


def test_the_run_is_that_of_the_command_line_and_is_not_made_twice(model, capsys):
    config = json.loads((model.path / "sft" / "config.json").read_text())["config"]
    assert (config["epochs"], config["max_history"], config["device"]) == (1, 8, "cpu")
    before = (model.path / "sft" / "done").stat().st_mtime_ns
    again = pagellm.fit(model.data, stages="sft", runs=model.runs, device="cpu", **SMALL)
    assert again == model and capsys.readouterr().out.count("already done") == 2
    assert (model.path / "sft" / "done").stat().st_mtime_ns == before
    assert pagellm.load(model.path) == pagellm.load(model.run, runs=model.runs)
    other = SMALL["sft"] | {"epochs": 2}
    with pytest.raises(pagellm.PageLLMError, match="was made with epochs=1"):
        pagellm.fit(model.data, stages="sft", runs=model.runs, **SMALL | {"sft": other})
    with pytest.raises(pagellm.PageLLMError, match="ppo: options of a stage that is not run"):
        pagellm.fit(model.data, stages="sft", runs=model.runs, **SMALL, ppo={"kl_coef": 0.1})


def test_pages_are_those_of_recommend(model):
    there = Recommender.load(Sources(**model.common(), device="cpu"))
    users = there.shop.user_ids[:3]
    table = model.pages(users=pa.array([*users, users[0]]), k=4, price_max=40.0)
    assert table.column_names == [
        *("user", "known", "rank", "item", "title", "category", "price", "score", "reward")
    ]
    answers = there.answers([Ask(user=u, k=4, filters=Filters(price_max=40.0)) for u in users])
    want = [
        (a["user"]["id"], s["rank"], s["item"], s["score"]) for a in answers for s in a["items"]
    ]
    rows = table.to_pylist()
    assert [(r["user"], r["rank"], r["item"], r["score"]) for r in rows] == want
    assert all(r["known"] and r["price"] <= 40 and r["reward"] is None for r in rows)


def test_everybody_has_a_page_also_those_below_the_k_core(model, tmp_path):
    everybody = model.pages(k=3, batch=7)
    names = model.recommender.shop.user_ids
    assert everybody["user"].to_pylist() == [u for u in names for _ in range(3)]
    shutil.copytree(model.data.path, tmp_path / "autumn")
    item = everybody["item"][0].as_py()
    pq.write_table(
        pa.table({"user_id": ["late"], "item_id": [item], "rating": [5.0]}),
        tmp_path / "autumn" / "dropped.parquet",
    )
    other = pagellm.load(model.path, data=tmp_path, device="cpu").pages(k=3)
    assert other["user"].to_pylist()[-3:] == ["late"] * 3
    assert other["known"].to_pylist()[-3:] == [False] * 3
    assert item not in other["item"].to_pylist()[-3:]


def test_histories_of_any_form_are_the_same_and_unknown_ids_are_printed(model, capsys):
    a, b = model.recommender.shop.catalogue.ids[:2]
    listed = model.pages(history=[a, (b, 5), "nothing"], k=3)
    assert "unknown items: nothing" in capsys.readouterr().out
    named = model.pages(history={"new": [a, (b, 5.0)]}, k=3)
    table = pa.table({"user": ["new", "new"], "item": [a, b], "rating": [None, 5.0]})
    assert model.pages(history=table, k=3).equals(named)
    assert listed["user"].null_count == 3 and listed["item"].equals(named["item"])
    assert not {a, b} & set(named["item"].to_pylist())
    known = model.recommender.shop.user_ids[0]
    longer = model.pages(users=known, history=[a, b], k=3)
    assert longer["known"].to_pylist() == [True] * 3
    assert not {a, b} & set(longer["item"].to_pylist())


def test_ids_of_any_type_are_read_as_prepare_reads_them(model, capsys):
    """A column of whole numbers with a gap comes as floats: 7.0 is 7 in a log and here."""
    assert python.ids_of(np.array([7.0, 8.0])) == python.ids_of([7, "8"]) == ("7", "8")
    assert python.ids_of(7) == python.ids_of(np.int64(7)) == python.ids_of("7") == ("7",)
    assert python.events_of([np.float64(7), (np.int64(8), 5), "007"])[1:] == (
        ("8", 5.0),
        ("007", pytest.approx(math.nan, nan_ok=True)),
    )
    table = pa.table({"user": [1.0, 1.0], "item": [2.0, 3.0]})
    assert list(python.histories_of(table)) == ["1"]
    for wrong in ([None], [float("nan")], ["NULL"]):
        with pytest.raises(pagellm.PageLLMError, match="is no id: no id"):
            python.ids_of(wrong)
    with pytest.raises(pagellm.PageLLMError, match="None is no user"):
        python.histories_of(pa.table({"user": ["a", None], "item": ["b", "c"]}))
    known = model.recommender.shop.user_ids[0]
    model.pages(users=[known, "nobody"], k=2)
    assert "pages: unknown users: nobody\n" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("said", "options"),
    [
        ("want greedy, beam", {"mode": "best"}),
        ("not served here", {"policy": "ppo", "users": "x"}),
        ("k=0", {"k": 0}),
        ("k=2.5: want a whole number", {"k": 2.5}),
        ("batch='8': want a whole number", {"batch": "8"}),
        ("new_items=None: want a whole number", {"new_items": None}),
        ("price_max='cheap': want a number", {"price_max": "cheap"}),
        ("price_max=-1: want prices", {"price_max": -1}),
        ("price_min=5, price_max=2: want prices", {"price_min": 5, "price_max": 2}),
        ("give one column", {"users": pa.table({"user": ["a"]})}),
        ("x has rating good; want 1 to 5", {"history": [("x", "good")]}),
        ("want an item id, or", {"history": [("x", 5, "2024-01-01")]}),
        ("history=7: want a list", {"history": 7}),
        ("rating 7; want 1 to 5", {"history": [("x", 7)]}),
        ("want a list of item ids", {"history": "x"}),
        ("one history for 2 users", {"history": ["x"], "users": ["a", "b"]}),
        ("no column item", {"history": pa.table({"user": ["a"], "sku": ["b"]})}),
    ],
)
def test_what_pages_refuse(model, said, options):
    with pytest.raises(pagellm.PageLLMError, match=said):
        model.pages(**options)


def test_short_pages_are_said(model, capsys):
    table = model.pages(users=model.recommender.shop.user_ids[0], in_stock=[], k=3)
    assert len(table) == 0 and "1 of 1 pages are short" in capsys.readouterr().out


def test_the_scores_are_those_that_evaluate_wrote(model):
    quick = {"models": "EASE", "trials": 1, "settings": "none", "k": 6, "depth": 40, "n_boot": 20}
    scores = model.evaluate("EASE", baselines=quick, **FEW)
    written = json.loads((model.path / "evaluate" / "metrics.json").read_text())
    rows = scores.to_pylist()
    assert {r["policy"] for r in rows} == {"popularity", "sft"}
    for row in rows:
        found = written[row["policy"]][row["metric"]]
        assert all(row[n] == found[n] for n in ("mean", "low", "high", "count"))
        assert row["low"] <= row["mean"] <= row["high"] or np.isnan(row["mean"])
    plain = json.loads((Path(model.runs) / "autumn" / "baselines" / "metrics.json").read_text())
    ours = next(r for r in rows if (r["policy"], r["metric"]) == ("sft", "NDCG@100"))
    assert ours["versus"] == "EASE" and ours["direction"] == "up"
    gap = ours["mean"] - plain["EASE"]["NDCG@100"]["mean"]
    assert ours["difference"] == pytest.approx(gap)
    assert ours["difference_low"] <= ours["difference"] <= ours["difference_high"]
    own = model.evaluate("popularity", **FEW).to_pylist()
    assert all(r["difference"] == 0 for r in own if r["policy"] == "popularity")
    with pytest.raises(pagellm.PageLLMError, match="versus='ALS': no such row.*EASE"):
        model.evaluate("ALS", **FEW)
    with pytest.raises(pagellm.PageLLMError, match="test rows alone"):
        model.evaluate("EASE", split="valid", **FEW)


def test_ctrl_c_says_what_is_kept_and_faults_are_errors_to_correct():
    with pytest.raises(KeyboardInterrupt, match="nothing is half-written. The same call"):
        with python.as_a_command("sft", Prepare):
            signal.raise_signal(signal.SIGINT)
    with pytest.raises(KeyboardInterrupt, match="sft: x holds the checkpoint of step 3"):
        with python.as_a_command("sft", Prepare):
            raise Interrupted(signal.SIGINT, "x holds the checkpoint of step 3")
    with pytest.raises(pagellm.PageLLMError, match="sft: the disk is full"):
        with python.as_a_command("sft", Prepare):
            raise OSError(28, "No space left on device")
    with pytest.raises(ZeroDivisionError), python.as_a_command("sft", Prepare):
        1 / 0  # noqa: B018


def test_the_command_line_goes_on_from_a_table(tables, tmp_path, capsys):
    columns = {"user_column": "customer", "item_column": "sku"}
    data = pagellm.prepare(pa.table(tables[0]), dataset="x", data=tmp_path, **columns)
    run_prepare(Prepare(dataset="x", data=str(tmp_path), **columns))
    assert f"{data.path} is already prepared" in capsys.readouterr().out


def test_types_that_parquet_has_not_are_turned_into_those_that_it_has():
    views = pa.array(["a", "b"], pa.string_view())
    table = pa.table(
        {
            "view": views,
            "kind": pa.DictionaryArray.from_arrays(pa.array([1, 0], pa.uint32()), views),
            "tags": pa.array([["a"], None], pa.large_list(pa.string_view())),
            "price": pa.array([1, None], pa.decimal128(5, 2)),
            "score": pa.array([1.0, float("nan")]),
        }
    )
    found = arrow.storable(table)
    assert found.to_pydict() == {
        "view": ["a", "b"],
        "kind": ["b", "a"],
        "tags": [["a"], None],
        "price": [1.0, None],
        "score": [1.0, None],
    }
    digits = [Decimal("12345678901234567890"), None]
    wide = pa.table({"user": pa.array(digits, pa.decimal256(20, 0))})
    assert arrow.storable(wide)["user"].to_pylist() == digits  # ids keep all their digits
    with pytest.raises(pagellm.PageLLMError, match="two columns are named a"):
        arrow.storable(pa.Table.from_arrays([views, views], names=["a", "a"]))


def test_a_wrong_name_to_compare_with_costs_no_pages(model, monkeypatch):
    from pagellm import evaluate

    monkeypatch.setattr(evaluate, "run", lambda config: pytest.fail("pages were made"))
    with pytest.raises(pagellm.PageLLMError, match="versus='EAES': no such row(?s:.*)mean 'EASE'"):
        model.evaluate("EAES", **FEW)


def test_a_row_of_models_of_ones_own_is_what_the_others_are_compared_with(model, monkeypatch):
    from pagellm.baselines import compare

    def seen(config):
        raise pagellm.PageLLMError(f"{config.models} versus {config.versus}")

    monkeypatch.setattr(compare, "run", seen)
    elsewhere = replace(model, runs=str(model.path / "none"))
    with pytest.raises(pagellm.PageLLMError, match="ALS versus ALS"):
        elsewhere.plain_row("ALS", {"models": "ALS"}, "train+valid")
