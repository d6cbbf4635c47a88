"""Teacher, student and preference: what is kept to be learnt, that it is learnt, and kills."""

import json
import resource
import shutil
import signal
from contextlib import contextmanager
from itertools import groupby
from pathlib import Path

import numpy as np
import pytest
import torch

from experiments import storefront_bench, storefront_distil
from pagellm.model.vocab import Vocab
from pagellm.stage.command import main
from pagellm.stage.config import PageLLMError
from pagellm.stage.files import atomic_folder
from pagellm.storefront import ahead, prefer, show, student, teach
from pagellm.storefront.front import open_store
from pagellm.storefront.local import Local
from pagellm.storefront.page import page
from pagellm.storefront.prefer import answer_logp, preference_loss
from pagellm.storefront.prompts import keywords_question, tagged_line, theme_question
from pagellm.storefront.student import chosen_rows, clean_rows, example_of, without_copies
from pagellm.storefront.teach import appended, carried_on, part_of, read_traces
from tests.storefront.test_local import THEME, offered

TINY = {"size": "llama-mini", "words": 700, "epochs": 12, "batch": 16}


@pytest.fixture(scope="module")
def taught(made, tmp_path_factory):
    """Options of a run of its own with a teacher's traces and a student."""
    runs = tmp_path_factory.mktemp("taught")
    shutil.copytree(Path(made["runs"]) / "synthetic", runs / "synthetic")
    common = made | {"runs": str(runs)}
    teach.run(teach.Config(**common, people=24))
    student.run(student.Config(**common, **TINY))
    return common


def traces(common):
    return read_traces(Path(common["runs"]) / "synthetic/storefront/teach/traces.jsonl")


def row(task="keywords", words="milk bread", mission=0, **more):
    about = {"task": task, "part": "train", "prompt": f"{task}: {words}", "mission": mission}
    told = {"output": ["milk", "bread", "eggs"] if task == "keywords" else ["Milk and bread"]}
    scores = {"score": 1.0, "template": 0.9, "tp5": 1.0, "passes": True}
    other = {"output": ["soap", "mops", "bleach"], "score": 0.1, "tp5": 0.0, "passes": False}
    return about | told | scores | {"other": other} | more


def test_traces_say_what_was_asked_and_what_it_is_worth(taught):
    found = traces(taught)
    assert {one["task"] for one in found} == {"theme", "keywords"}
    for one in found:
        assert one["prompt"].startswith(f"{one['task']}: [") and one["teacher"] == "search/1"
        if one["task"] == "keywords":
            assert set(one["output"]) <= set(one["offered"]) and 3 <= len(one["output"]) <= 8
            assert one["score"] >= one["template"] > 0
        data = json.loads(one["prompt"].partition(": ")[2])
        assert "U0" not in json.dumps(data)  # no identifier
    shop_user = {one["user"]: one["part"] for one in found}
    assert len(shop_user) > 15 and set(shop_user.values()) <= {"train", "valid", "test"}


def test_damaged_traces_are_named_where_a_run_carries_on(tmp_path):
    path = tmp_path / "traces.jsonl"
    path.write_text('{"user": 4}\n{"user": 7}\n{"us')
    assert carried_on(path, [2, 4, 7]) == 2 and path.read_text() == '{"user": 4}\n'
    for text in ('{"user": 4}\n{"us\n', '{"user": 4}\n[]\n', '{"person": 4}\n', '{"user": 9}\n'):
        path.write_text(text)
        with pytest.raises(PageLLMError, match="traces.jsonl is damaged .*\n  Remove"):
            carried_on(path, [2, 4, 7])


def test_people_are_split_by_a_hash_of_who_they_are():
    parts = [part_of(f"U{n:07d}") for n in range(4000)]
    assert parts == [part_of(f"U{n:07d}") for n in range(4000)]
    shares = [parts.count(name) / 4000 for name in ("train", "valid", "test")]
    assert shares == pytest.approx([0.8, 0.1, 0.1], abs=0.02)


def test_labels_are_cleaned_by_gates_fit_worth_copies_and_missions():
    good = [row(words=f"a{n} b{n} c{n} d{n} e{n} f{n}") for n in range(3)]
    assert clean_rows(good) == good
    assert clean_rows([row(passes=False), row(tp5=0.6), row(score=0.5)]) == []
    assert clean_rows([row(), row(), row(task="theme")]) == [row(task="theme"), row()]
    many = [row(words=f"a{n} b{n} c{n} d{n} e{n} f{n}", mission=n % 2) for n in range(500)]
    assert len(clean_rows(many)) == 400  # 200 a mission
    near = row(words="a b c d e f g h i j k l m n o p q r s t u v w x y z")
    nearer = row(words="a b c d e f g h i j k l m n o p q r s t u v w x y zz")
    assert without_copies([near, nearer]) == [near]


def test_raw_labels_are_as_many_as_clean_ones_and_swapped_ones_are_found_out():
    rows = [row(words=f"a{n} b{n} c{n} d{n} e{n} f{n}") for n in range(200)]
    clean, raw = (chosen_rows(rows, labels, 0.15, 0) for labels in ("clean", "raw"))
    assert len(clean) == len(raw) and 150 < len(clean) < 190
    assert all(one["output"] != one["other"]["output"] for one in clean)
    wrong = np.mean([one["output"] == one["other"]["output"] for one in raw])
    assert 0.05 < wrong < 0.3
    with pytest.raises(PageLLMError, match="teach --people 0"):
        chosen_rows([row(passes=False)], "clean", 0.0, 0)


def test_only_the_answer_is_learnt():
    vocab = Vocab.train([row()["prompt"], "milk bread eggs"] * 3, 0, 0, size=400)
    one = example_of(vocab, row(), 512)
    asked = [*vocab.words(row()["prompt"]), *vocab.words("\n")]
    assert one.ids[: len(asked)] == asked and not any(one.mask[: len(asked)])
    told = [token for token, counts in zip(one.ids, one.mask, strict=True) if counts]
    assert vocab.decode(told) == "milk\nbread\neggs\n\n"
    title = example_of(vocab, row("theme"), 512)
    assert vocab.decode(title.ids).endswith("Milk and bread\n")


def test_the_student_learns(taught):
    """It writes held-out answers better than by the odds of its vocabulary, and valid rows."""
    done = json.loads(
        (Path(taught["runs"]) / "synthetic/storefront/student-clean/done").read_text()
    )
    assert done["valid_loss"] is None or done["valid_loss"] < np.log(700) - 2
    log = (Path(taught["runs"]) / "synthetic/storefront/student-clean/log.jsonl").read_text()
    loss = [json.loads(line)["loss"] for line in log.splitlines()]
    assert loss[-1] < 0.6 * loss[0]


def test_a_page_by_the_student(taught):
    folder = Path(taught["runs"]) / "synthetic/storefront/student-clean/model"
    store = open_store(show.Config(**taught, writer="lm", weights=str(folder)))
    local = store.front.writer.asked
    assert local.taught and local.gamma == 2.0 and local.name.startswith("lm model ")
    found = page(store.front, store.known.context(store.shop.user_ids[1]), store.layout)
    generated = [one for one in found.rows if one.source == "generated"]
    assert generated and found.models["themes"] == local.name
    for one in generated:
        assert all(k.text in store.front.corpus.number for k in one.keywords)
        # Where the gates are against a title of so small a student, the page says so.
        assert one.theme.source == local.name or any("instead" in note for note in found.fallbacks)


def test_rows_written_side_by_side_are_those_of_each_alone(taught, tmp_path):
    folder = Path(taught["runs"]) / "synthetic/storefront/student-clean/model"
    options = taught | {"writer": "lm", "weights": str(folder)}
    kept = options | {"answers": str(tmp_path / "answers.jsonl")}
    found = []
    for given, micro in ((options, 1), (options, 4), (kept, 7)):
        made = ahead.open_ahead(ahead.Config(**given, micro=micro))
        people = made.people()[:7]
        found.append(made.written(people, made.store.layout, micro))
        made.cache.close()
    assert [rows_of_each(one) for one in found[1:]] == [rows_of_each(found[0])] * 2
    assert any(row.theme.source.startswith("lm ") for rows, _ in found[0] for row in rows)
    assert (tmp_path / "answers.jsonl").read_text().count("\n") > 7


def rows_of_each(written):
    return [(ahead.rows_bytes(rows), decisions) for rows, decisions in written]


def test_the_bench_counts_keywords_as_they_are_written(taught, capsys):
    folder = Path(taught["runs"]) / "synthetic/storefront/student-clean/model"
    lm = {"writer": "lm", "weights": str(folder), "people": 3, "parts": "keywords"}
    bench = storefront_bench
    for micro in (1, 5):
        found = bench.run(bench.Config(**taught, **lm, micro=micro))["keywords"]
        assert found["keywords"] > 30 and found["valid"] == found["find"] == 1.0
    free = bench.run(bench.Config(**taught, **lm, keywords="free"))["keywords"]
    assert free["valid"] < 1.0 or free["keywords"] < found["keywords"]
    assert "find an item in stock" in capsys.readouterr().out
    with pytest.raises(PageLLMError, match="want --writer lm"):
        bench.run(bench.Config(**taught, parts="keywords"))


def test_only_a_network_here_writes_side_by_side():
    with pytest.raises(PageLLMError, match="above 1 with writer=lm alone"):
        ahead.Config(micro=2)
    with pytest.raises(PageLLMError, match="micro=0"):
        ahead.Config(writer="lm", weights="x", micro=0)


def test_it_is_asked_as_it_was_taught(taught):
    folder = Path(taught["runs"]) / "synthetic/storefront/student-clean/model"
    store = open_store(show.Config(**taught))
    local = Local.load(folder, store.front.corpus)
    question = theme_question(THEME, [("Milk", 4)], ["Buy it again"])
    line = tagged_line(question)
    assert line == (
        'theme: ["browse", ["Milk", "Cereal", "Coffee"], [["Milk", 4]], ["Buy it again"]]'
    )
    assert local.prompt(question) == [*local.vocab.words(line), *local.vocab.words("\n")]
    asked = keywords_question(THEME, offered())
    assert "offered" not in tagged_line(asked) and offered()[0] not in tagged_line(asked)


def test_drawn_answers_are_keywords_on_offer_none_twice(taught):
    folder = Path(taught["runs"]) / "synthetic/storefront/student-clean/model"
    store = open_store(show.Config(**taught))
    local = Local.load(folder, store.front.corpus)
    texts = list(store.front.corpus.text[:30])
    question = keywords_question(THEME, texts)
    drawn = local.drawn(question, np.random.default_rng(0), 6, 0.8)
    assert drawn == local.drawn(question, np.random.default_rng(0), 6, 0.8)
    for said in drawn:
        assert 3 <= len(said) <= 8 and len(set(said)) == len(said) and set(said) <= set(texts)
    assert len({tuple(said) for said in drawn}) > 1


def test_the_preference_loss_of_the_golden_values():
    loss = preference_loss(torch.tensor([0.5]), torch.tensor([-0.3]), beta=0.1)
    assert float(loss) == pytest.approx(0.65395, abs=1e-5)


def test_the_log_probability_of_an_answer_is_that_of_its_tokens(taught):
    folder = Path(taught["runs"]) / "synthetic/storefront/student-clean/model"
    store = open_store(show.Config(**taught))
    local = Local.load(folder, store.front.corpus)
    rows = [one for one in traces(taught) if one["task"] == "keywords"][:2]
    examples = [example_of(local.vocab, one, 512) for one in rows]
    found = answer_logp(local.model, local.vocab, examples)
    for example, total in zip(examples, found.tolist(), strict=True):
        with torch.no_grad():
            hidden = local.model(torch.tensor([example.ids]))
            logp = torch.log_softmax(local.model.word_logits(hidden)[0], -1)
        own = [
            float(logp[at - 1, token])
            for at, (token, counts) in enumerate(zip(example.ids, example.mask, strict=True))
            if counts
        ]
        assert total == pytest.approx(sum(own), rel=1e-4)


def test_preference_needs_two_people_to_judge_by(taught, monkeypatch):
    with pytest.raises(PageLLMError, match="valid_people.*2 or more"):
        prefer.Config(valid_people=1)
    store = open_store(show.Config(**taught))
    for n in (0, 1):
        part = dict.fromkeys(store.shop.user_ids, "train")
        part |= dict.fromkeys(store.shop.user_ids[:n], "valid")
        monkeypatch.setattr(prefer, "part_of", part.get)
        with pytest.raises(PageLLMError, match=f"{n} pe.* kept apart to judge by"):
            prefer.parts_of(store, prefer.Config(**taught))


def test_preference_is_kept_only_where_it_pays(taught):
    done = prefer.run(
        prefer.Config(**taught, people=8, valid_people=4, samples=3, temperature=2.0, lr=1e-4)
    )
    folder = Path(taught["runs"]) / "synthetic/storefront"
    pairs = read_traces(folder / "prefer/pairs/pairs.jsonl")
    assert done["pairs"] == len(pairs) > 0
    assert all(one["score"][0] > one["score"][1] for one in pairs)
    before, after = (
        (folder / name / "model/model.safetensors").read_bytes()
        for name in ("student-clean", "prefer")
    )
    assert done["kept"] == (done["gain"]["low"] > 0) == (before != after)


@contextmanager
def files_up_to(size):
    """No file may grow beyond so many bytes, as on a full disk: a write ends halfway."""
    was, handler = resource.getrlimit(resource.RLIMIT_FSIZE), signal.getsignal(signal.SIGXFSZ)
    signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, was[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, was)
        signal.signal(signal.SIGXFSZ, handler)


def own_run(taught, folder, *names):
    """Options of a run that has these stages of `taught`, and its directory."""
    for name in names:
        source = Path(taught["runs"]) / "synthetic/storefront" / name
        shutil.copytree(source, folder / "synthetic/storefront" / name)
    return taught | {"runs": str(folder)}, folder / "synthetic/storefront"


def half_written(folder):
    return [path.name for path in folder.rglob("*") if ".tmp" in path.name]


def test_lines_that_a_full_disk_does_not_take_are_named_also_when_the_file_is_closed(tmp_path):
    for flushed in (True, False):
        path = tmp_path / f"{flushed}.jsonl"
        with pytest.raises(PageLLMError, match="jsonl cannot be written.*\n.*carries on"):
            with files_up_to(1500), appended(path) as file:
                file.write("x" * 5000)
                if flushed:
                    file.flush()
        assert path.stat().st_size <= 1500


def test_a_directory_is_replaced_whole_or_not_at_all(tmp_path):
    path = tmp_path / "model"
    with atomic_folder(path) as beside:
        (beside / "a").write_text("old")
    with pytest.raises(OSError), files_up_to(1500), atomic_folder(path) as beside:
        (beside / "a").write_text("new")
        (beside / "b").write_text("x" * 5000)
    assert (path / "a").read_text() == "old" and not half_written(tmp_path)
    with atomic_folder(path) as beside:
        (beside / "b").write_text("new")
    assert [one.name for one in path.iterdir()] == ["b"] and not half_written(tmp_path)


def test_a_teacher_on_a_full_disk_stops_with_a_message_and_carries_on(taught, tmp_path, capsys):
    common, folder = own_run(taught, tmp_path, "build", "tune")
    path = folder / "teach/traces.jsonl"
    whole = (Path(taught["runs"]) / "synthetic/storefront/teach/traces.jsonl").read_bytes()
    argv = [f"--{name}={value}" for name, value in common.items()] + ["--people=24"]
    with files_up_to(len(whole) // 2):
        assert main(teach.Config, teach.run, "teach", argv) == 2
    said = capsys.readouterr().err
    assert "cannot be written" in said and "carries on" in said and "Traceback" not in said
    assert not (folder / "teach/done").exists() and 0 < path.stat().st_size <= len(whole) // 2
    assert main(teach.Config, teach.run, "teach", argv) == 0
    assert path.read_bytes() == whole and not half_written(folder)


def test_a_student_on_a_full_disk_leaves_no_half_written_model(taught, tmp_path, capsys):
    common, folder = own_run(taught, tmp_path, "build", "tune", "teach")
    options = common | TINY | {"save_every": 1000, "epochs": 1}
    argv = [f"--{name}={value}" for name, value in options.items()]
    weights = "student-clean/model/model.safetensors"
    size = (Path(taught["runs"]) / "synthetic/storefront" / weights).stat().st_size
    with files_up_to(size // 2):
        assert main(student.Config, student.run, "student", argv) == 2
    said = capsys.readouterr().err
    assert "too large" in said and "Traceback" not in said
    assert not (folder / "student-clean/model").exists() and not half_written(folder)
    assert main(student.Config, student.run, "student", argv) == 0
    assert (folder / weights).stat().st_size == size


def test_preference_on_a_full_disk_keeps_its_pairs_and_leaves_no_half_model(
    taught, tmp_path, capsys
):
    common, folder = own_run(taught, tmp_path, "build", "tune", "teach", "student-clean")
    options = common | {"people": 4, "valid_people": 2, "samples": 3, "temperature": 2.0}
    argv = [f"--{name}={value}" for name, value in options.items()]
    with files_up_to(1500):  # not even the first person's pairs
        assert main(prefer.Config, prefer.run, "prefer", argv) == 2
    said = capsys.readouterr().err
    assert "pairs.jsonl cannot be written" in said and "carries on" in said
    with files_up_to(100_000):  # the pairs, but no weights
        assert main(prefer.Config, prefer.run, "prefer", argv) == 2
    said = capsys.readouterr().err
    assert "too large" in said and "Traceback" not in said
    assert not (folder / "prefer/model").exists() and not half_written(folder)
    assert not (folder / "prefer/done").exists()
    assert main(prefer.Config, prefer.run, "prefer", argv) == 0
    sizes = [folder / name / "model/model.safetensors" for name in ("prefer", "student-clean")]
    assert len({path.stat().st_size for path in sizes}) == 1
    users = [one["user"] for one in read_traces(folder / "prefer/pairs/pairs.jsonl")]
    assert [user for user, _ in groupby(users)] == list(dict.fromkeys(users))  # none twice


def test_the_cost_of_the_golden_values():
    calls = [(620, 48)] * 3 + [(880, 40)] * 5
    assert storefront_distil.usd(calls) == pytest.approx(0.0011454, abs=1e-9)
    assert storefront_distil.usd(calls, 3600.0, 2) == pytest.approx((0.0011454 + 0.04) / 2)


def test_all_writers_stand_in_one_table(taught, capsys):
    found = storefront_distil.run(storefront_distil.Config(**taught, people=3, n_boot=50))
    assert {"template", "search (teacher)", "student, clean labels"} <= set(found)
    teacher, plain = found["search (teacher)"], found["template"]
    assert teacher["ratio"]["mean"] == 1 and plain["ratio"]["mean"] < 1
    assert teacher["less template"]["J"]["low"] > 0 and plain["less template"]["J"]["mean"] == 0
    student_row = found["student, clean labels"]["means"]
    assert student_row["valid"] == 1 and student_row["zero"] == 0 and student_row["tokens"] > 0
    assert plain["means"]["tokens"] == teacher["means"]["tokens"] == 0
    said = capsys.readouterr().out
    assert "less template's" in said and "of the teacher's time" in said


def test_a_table_without_a_student_is_refused(made):
    with pytest.raises(PageLLMError, match="pagellm storefront student"):
        storefront_distil.run(storefront_distil.Config(**made, people=1))


def test_what_is_missing_is_said(made, tmp_path):
    common = made | {"runs": str(tmp_path)}
    with pytest.raises(PageLLMError, match="storefront.build"):
        teach.run(teach.Config(**common))
    with pytest.raises(PageLLMError, match="storefront.teach"):
        student.run(student.Config(**common))
    with pytest.raises(PageLLMError, match="storefront.student"):
        prefer.run(prefer.Config(**common))
    broken = tmp_path / "traces.jsonl"
    broken.write_text('{"task": "theme"}\nhalf')
    with pytest.raises(PageLLMError, match="is damaged"):
        read_traces(broken)
