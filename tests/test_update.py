"""A run goes to newer data: rows stay with their ids, what is new gets rows, the rest is a run."""

import csv
import json
import shutil

import numpy as np
import pytest
import torch

import pagellm
from pagellm import evaluate, ppo, pretrain, reward, sft, update
from pagellm.data import prepare, synthetic
from pagellm.data.shop import Rows, load
from pagellm.model.als import als, transpose
from pagellm.model.fold import Words, by_words, crossed, fold_items, fold_users, thinned
from pagellm.model.policy import Policy
from pagellm.pages.truth import PageMaker
from pagellm.report import report
from pagellm.serving import promote, serve
from pagellm.serving.recommender import Ask, Recommender
from pagellm.serving.sources import Sources
from pagellm.stage.config import PageLLMError, help_text, parse
from pagellm.stage.files import read_json

NEW_ITEMS = 4  # of the later log; nobody of the earlier one has them


@pytest.fixture(scope="module")
def logs(tmp_path_factory):
    """A shop's log up to two days, and a run over the first: data/one, data/two, runs/base."""
    root = tmp_path_factory.mktemp("update")
    made = synthetic.make(70, 40, 0)
    rows = sorted((int(r.time), r.user, r.item, float(r.rating)) for r in made.reviews())
    late = {item.id for item in made.items[:NEW_ITEMS]}
    early = [r for r in rows if r[0] < rows[int(0.8 * len(rows))][0] and r[2] not in late]
    for name, some in (("one", early), ("two", rows)):
        raw = root / "raw" / name
        raw.mkdir(parents=True)
        with open(raw / "log.csv", "w", newline="") as file:
            csv.writer(file).writerows([("timestamp", "user", "item", "rating"), *some])
        with open(raw / "items.csv", "w", newline="") as file:
            facts = [(i.id, i.title, i.paths[0][-1]) for i in made.items]
            csv.writer(file).writerows([("item", "title", "category"), *facts])
        prepare.run(
            prepare.Config(dataset=name, raw=str(raw), data=str(root / "data"), split="temporal")
        )
    common = {"dataset": "one", "run": "base", "data": str(root / "data")}
    common |= {"runs": str(root / "runs"), "device": "cpu"}
    torch.set_num_threads(1)
    pretrain.run(pretrain.Config(size="nano", rows="als", pool=True, steps=0, words=300, **common))
    sft.run(sft.Config(epochs=1, batch=16, k=6, max_history=8, warmup=2, eval_every=9, **common))
    return root


def words(root, **more):
    told = {"from": "base", "data": root / "data" / "two", "runs": root / "runs"} | more
    return [f"--{name}={value}" for name, value in told.items()]


def do(root, **more):
    return update.run(parse(update.Config, words(root, **more), "pagellm update"))


@pytest.fixture(scope="module")
def updated(logs):
    do(logs, out="next", steps=2)
    return logs


@pytest.fixture(scope="module")
def paid(logs):
    """The run with a reward model and a PPO policy too: runs/paid, and runs/later by update."""
    shutil.copytree(logs / "runs" / "base", logs / "runs" / "paid")
    common = {"dataset": "one", "run": "paid", "data": str(logs / "data"), "device": "cpu"}
    common |= {"runs": str(logs / "runs")}
    reward.run(reward.Config(per_kind=1, batch=32, warmup=2, **common))
    few = {"epochs": 0.5, "rollout": 16, "minibatch": 8, "micro": 4, "min_steps": 1}
    ppo.run(ppo.Config(k=6, eval_every=2, force=True, select="last", **few, **common))
    do(logs, **{"from": "paid"}, out="later")
    return logs


def test_the_reward_model_and_ppos_policy_come_along(paid, capsys):
    """Known rows and all other weights stay; pages of both policies have rewards."""
    old, new = load(paid / "data" / "one"), load(paid / "data" / "two")
    number = {name: i for i, name in enumerate(old.catalogue.ids)}
    for stage in ("reward", "ppo"):
        was, now = (
            torch.load(paid / "runs" / run / stage / "model.pt", weights_only=True)
            for run in ("paid", "later")
        )
        assert len(now["weights"]["item"]) == new.n_items
        for at, name in enumerate(new.catalogue.ids):
            if name in number:
                assert torch.equal(now["weights"]["item"][at], was["weights"]["item"][number[name]])
        rows = ("item", "item_out", "user")
        for name in was["weights"]:
            assert name in rows or torch.equal(was["weights"][name], now["weights"][name])
        for name in was.get("heads", {}):
            assert torch.equal(was["heads"][name], now["heads"][name])
    told = {"dataset": "two", "run": "later", "runs": str(paid / "runs")}
    told |= {"data": str(paid / "data"), "device": "cpu"}
    known = Recommender.load(Sources(**told))
    for policy in ("ppo", "sft"):
        answers = known.answers([Ask(user=user, k=6, policy=policy) for user in new.user_ids[:4]])
        assert all(answer["page_reward"] is not None for answer in answers)
    assert "ppo" in known.choice_in_words()  # validation compares it with the others
    evaluate.run(evaluate.Config(k=6, depth=20, n_boot=2, examples=0, **told))
    capsys.readouterr()
    do(paid, **{"from": "paid"}, out="later")  # the same command again
    out = capsys.readouterr().out
    assert "the reward model and PPO's policy got rows" in out and "reward" in out
    report.run(report.Config(**{n: v for n, v in told.items() if n != "device"}))


def test_what_stays_behind_is_named_with_the_command_that_makes_it(paid, capsys):
    do(paid, **{"from": "paid"}, out="alone", carry="false")
    out = capsys.readouterr().out
    assert "PPO's policy of paid stays behind (--no-carry)" in out
    assert "pagellm ppo --dataset two --run alone" in out or "make ppo" in out
    assert not (paid / "runs" / "alone" / "ppo").exists()


def test_rows_go_with_their_ids_and_new_items_can_be_on_pages(updated):
    old, new = load(updated / "data" / "one"), load(updated / "data" / "two")
    before = Policy.load(updated / "runs" / "base" / "sft")
    state = torch.load(updated / "runs" / "next" / "update" / "model.pt", weights_only=True)
    for name, mine, theirs in (
        ("item", new.catalogue.ids, old.catalogue.ids),
        ("user", new.user_ids, old.user_ids),
    ):
        rows, was = state["weights"][name], getattr(before.model, name)
        assert len(rows) == len(mine) > len(theirs) or name == "user"
        for number, identity in enumerate(mine):
            if identity in theirs:
                assert torch.equal(rows[number], was[theirs.index(identity)])
            else:
                assert rows[number].abs().sum() > 0
    trunk = [n for n in state["weights"] if n.startswith("h.")]
    kept = dict(before.model.named_parameters())
    assert trunk and all(torch.equal(state["weights"][n], kept[n]) for n in trunk)
    config = Sources(
        dataset="two", run="next", data=str(updated / "data"), runs=str(updated / "runs")
    )
    known = Recommender.load(config)
    found = known.answers([Ask(user=user, k=20) for user in new.user_ids])
    shown = {slot["item"] for answer in found for slot in answer["items"]}
    assert shown & (set(new.catalogue.ids) - set(old.catalogue.ids))


def test_the_fit_begins_at_the_rows_and_is_an_sft_like_any_other(updated, capsys):
    made = read_json(updated / "runs" / "next" / "sft" / "config.json")
    assert made["config"]["updated"] and made["config"]["fresh"] == 0.5
    assert made["config"]["lr"] == pytest.approx(0.3 * sft.Config().lr)
    lines = (updated / "runs" / "next" / "sft" / "log.jsonl").read_text().splitlines()
    assert [json.loads(line)["step"] for line in lines] == [0, 1, 2]
    assert not (updated / "runs" / "next" / "compose").exists()
    do(updated, out="next", steps=2)  # the same command again
    assert "sft: already done" in capsys.readouterr().out


def test_another_update_goes_on_from_it_at_the_same_rate(updated, tmp_path):
    shutil.copytree(updated / "runs" / "next", tmp_path / "runs" / "next")
    shutil.copytree(updated / "data", tmp_path / "data")
    raw = tmp_path / "raw"
    shutil.copytree(updated / "raw" / "two", raw)
    with open(raw / "log.csv", "a") as file:
        file.writelines(f"2000000000,stranger,{i},5.0\n" for i in load_ids(updated)[:8])
    prepare.run(
        prepare.Config(dataset="three", raw=str(raw), data=str(tmp_path / "data"), split="temporal")
    )
    # The older data are looked for where the run was made.
    path = tmp_path / "runs" / "next" / "sft" / "config.json"
    path.write_text(path.read_text().replace(str(updated), str(tmp_path)))
    model = pagellm.load("next", runs=tmp_path / "runs", data=tmp_path / "data")
    third = model.update(pagellm.Data("three", str(tmp_path / "data")), run="third")
    config = read_json(third.path / "sft" / "config.json")["config"]
    assert config["lr"] == pytest.approx(0.3 * sft.Config().lr) and config["epochs"] == 0
    assert third.pages(users=["stranger"], k=4)["item"].to_pylist()


def load_ids(root):
    return load(root / "data" / "two").catalogue.ids


def test_it_is_evaluated_and_promoted_and_a_link_leads_to_its_data(updated):
    served = Sources(dataset="auto", run="next", runs=str(updated / "runs"))
    assert served.data_dir == updated / "data" / "two"
    promote.run(promote.Config(run="next", runs=str(updated / "runs"), force=True))
    live = Sources(dataset="auto", run="live", runs=str(updated / "runs"))
    assert Recommender.load(live).shop.n_items == load(updated / "data" / "two").n_items
    (updated / "runs" / "live").unlink()
    with pytest.raises(PageLLMError, match="has no policy"):
        Sources(dataset="auto", run="gone", runs=str(updated / "runs")).data_dir  # noqa: B018
    with pytest.raises(PageLLMError, match="want a run, for dataset=auto"):
        Sources(dataset="auto")


@pytest.mark.parametrize(
    ("more", "says"),
    [
        ({"from": ""}, "the run to bring up to date: --from RUN"),
        ({"from": "nobody"}, r"no run nobody in .*pagellm runs"),
        ({"out": "base"}, "another run than --from"),
        ({"data": "nowhere"}, "no prepared data of the name nowhere\n.*prepare .*nowhere"),
    ],
)
def test_what_makes_no_sense_is_told(logs, more, says):
    with pytest.raises(PageLLMError, match=says):
        do(logs, **more)


def test_the_same_data_other_splits_and_other_shops_are_refused(logs, tmp_path):
    with pytest.raises(PageLLMError, match="data that base was made from: nothing new"):
        do(logs, data=logs / "data" / "one", out="x")
    raw = str(logs / "raw" / "two")
    prepare.run(prepare.Config(dataset="by_chance", raw=raw, data=str(tmp_path)))
    with pytest.raises(PageLLMError, match="split by temporal, .*by_chance by random.*\n.*--split"):
        do(logs, data=tmp_path / "by_chance", out="x")
    rows = list(csv.reader((logs / "raw" / "two" / "log.csv").read_text().splitlines()))
    other = tmp_path / "other"
    other.mkdir()
    with open(other / "log.csv", "w", newline="") as file:
        renamed = ([at, user, f"other {item}", stars] for at, user, item, stars in rows[1:])
        csv.writer(file).writerows([rows[0], *renamed])
    prepare.run(
        prepare.Config(dataset="others", raw=str(other), data=str(tmp_path), split="temporal")
    )
    with pytest.raises(PageLLMError, match="shares 0 items with"):
        do(logs, data=tmp_path / "others", out="x")
    shutil.copytree(logs / "runs" / "base", tmp_path / "runs" / "base")
    (tmp_path / "runs" / "live").symlink_to("base")
    with pytest.raises(PageLLMError, match="are one directory"):
        do(logs, out="base", **{"runs": tmp_path / "runs", "from": "live"})
    (tmp_path / "runs" / "other").mkdir()
    (tmp_path / "runs" / "staging").symlink_to("other")
    with pytest.raises(PageLLMError, match="staging is a link to other"):
        do(logs, out="staging", runs=tmp_path / "runs")
    assert not any((tmp_path / "runs" / "other").iterdir())
    (tmp_path / "runs" / "base" / "sft" / "done").unlink()
    with pytest.raises(PageLLMError, match="no SFT policy in .*begun, not finished"):
        do(logs, runs=tmp_path / "runs", out="x")


def test_held_out_rows_that_were_learnt_from_are_counted(logs):
    old = load(logs / "data" / "one")
    found = update.change(old, old)
    assert found.rows == found.leaked == len(found.fresh) == 0
    turned = type(old)(**{**vars(old), "split": np.where(old.split == 0, 2, 0).astype(np.int8)})
    assert update.change(old, turned).leaked == int(old.rows("train").sum())


def test_help_names_the_options_as_they_are_typed():
    text = help_text(update.Config, "pagellm update")
    assert "--from str" in text and "--out str" in text and "--source_run" not in text


def low_rank(seed=0, users=300, items=120, rank=6, each=12):
    """Who chose what, of people with tastes of a few dimensions: Rows, and the tastes."""
    rng = np.random.default_rng(seed)
    taste, kind = rng.normal(size=(users, rank)), rng.normal(size=(items, rank))
    chosen = np.argsort(-(taste @ kind.T + rng.normal(size=(users, items))), 1)[:, :each]
    n = np.arange(users + 1) * each
    return Rows(n, chosen.ravel().astype(np.int64), np.full(users * each, np.nan, np.float32))


def test_an_item_folded_in_comes_close_to_the_row_that_training_would_have_found():
    rows = low_rank()
    X, Y = als(rows, 300, 120, 8, 0.1, 0.03, 1.0)
    new = np.arange(0, 120, 10)
    old_item = np.full(120, -1)
    known = np.setdiff1d(np.arange(120), new)
    old_item[known] = np.arange(len(known))
    group = [np.arange(120)]
    items = fold_items([Y[known], 2 * Y[known]], old_item, rows, group)
    assert torch.equal(items.tables[0][known], Y[known])
    assert items.bought[new].all() and not items.bought[known].any()
    level = Y[known].mean(0)
    close = torch.cosine_similarity(items.tables[0][new] - level, Y[new] - level)
    assert close.mean() > 0.9 and items.cosine > 0.85
    assert torch.allclose(items.tables[1][new], 2 * items.tables[0][new], atol=0.01)
    strangers = np.arange(0, 300, 10)
    old_user = np.full(300, -1)
    met = np.setdiff1d(np.arange(300), strangers)
    old_user[met] = np.arange(len(met))
    users = fold_users(X[met], old_user, rows, items.space)
    level = X[met].mean(0)
    close = torch.cosine_similarity(users.rows[strangers] - level, X[strangers] - level)
    assert close.mean() > 0.9 and torch.equal(users.rows[met], X[met])


def test_words_are_compared_by_tf_idf():
    """As by hand: weights log(N / items of the word), rows of length 1, a rare word tells more."""
    groups = [np.array([0, 1, 2]), np.array([0, 1]), np.array([2, 3])]
    words, every = Words(groups, 5), np.arange(5)
    rare, common = np.log(5 / 2), np.log(5 / 3)
    table = np.zeros((5, 3))
    table[[0, 1, 2], 0], table[[0, 1], 1], table[[2, 3], 2] = common, rare, rare
    table /= np.maximum(np.linalg.norm(table, axis=1, keepdims=True), 1e-9)
    assert np.allclose(words.dots(every, every), table @ table.T, atol=1e-6)
    assert np.allclose(words.dots(every[3:], every[:2]), (table @ table.T)[3:, :2], atol=1e-6)
    assert not Words([], 5).dots(every, every).any()


def test_a_ridge_by_words_is_that_of_the_words_themselves():
    """The dual solution equals the primal one; what a part is told has not seen the part."""
    torch.manual_seed(0)
    x, y, new = torch.randn(40, 6).double(), torch.randn(40, 3).double(), torch.randn(5, 6).double()
    said = by_words(x @ x.T, y, new @ x.T, 0.7)
    weight = torch.linalg.solve(x.T @ x + 0.7 * torch.eye(6), x.T @ (y - y.mean(0)))
    assert torch.allclose(said, y.mean(0) + new @ weight, atol=1e-6)
    part = np.arange(40) % 3
    apart = crossed(x @ x.T, y, part, 0.7)
    changed = y.clone()
    changed[part == 1] += 100.0
    again = crossed(x @ x.T, changed, part, 0.7)
    assert torch.equal(apart[part == 1], again[part == 1])
    assert not torch.allclose(apart[part == 0], again[part == 0])


def test_a_new_item_begins_where_its_words_are_and_moves_towards_its_buyers():
    """Tastes that words tell: without buyers the row is near, with a few of them nearer."""
    rng = np.random.default_rng(0)
    users, items, rank = 400, 160, 6
    word = rng.integers(0, 20, (items, 3))
    kind = rng.normal(size=(20, rank))[word].sum(1) + 0.7 * rng.normal(size=(items, rank))
    taste = rng.normal(size=(users, rank))
    chosen = np.argsort(-(taste @ kind.T + rng.normal(size=(users, items))), 1)[:, :12]
    whole = Rows(
        np.arange(users + 1) * 12,
        chosen.ravel().astype(np.int64),
        np.full(users * 12, np.nan, np.float32),
    )
    _, Y = als(whole, users, items, rank, 0.01, 0.03, 1.0)
    new, groups = np.arange(0, items, 8), [np.flatnonzero((word == w).any(1)) for w in range(20)]
    known = np.setdiff1d(np.arange(items), new)
    old_item = np.full(items, -1)
    old_item[known] = np.arange(len(known))
    level, near = Y[known].mean(0), {}
    for name, facts, most in (("words", groups, 0), ("both", groups, 3), ("buyers", [], 3)):
        cut = np.full(items, users)
        cut[new] = most
        rows = transpose(thinned(transpose(whole, items), cut, rng), users)
        found = fold_items([Y[known]], old_item, rows, facts)
        gone = torch.cosine_similarity(found.tables[0][new] - level, Y[new] - level)
        near[name] = float(gone.mean())
    assert near["words"] > 0.5 and near["buyers"] > 0.3
    assert near["both"] > max(near["words"], near["buyers"]) + 0.03, near


def test_an_item_that_nobody_has_gets_its_row_from_its_category():
    """Two tastes, two categories: the new item lands on its category's side."""
    half = 30
    rng = np.random.default_rng(0)
    chosen = [rng.permutation(half)[:8] + half * (user % 2) for user in range(200)]
    rows = Rows(
        np.arange(201) * 8,
        np.concatenate(chosen).astype(np.int64),
        np.full(1600, np.nan, np.float32),
    )
    _, Y = als(rows, 200, 2 * half, 4, 0.1, 0.03, 1.0)
    old_item = np.append(np.arange(2 * half), -1)
    wide = [np.append(np.arange(half), 2 * half), np.arange(half, 2 * half)]
    items = fold_items([Y], old_item, rows, wide)
    sides = [Y[:half].mean(0), Y[half:].mean(0)]
    near = [torch.cosine_similarity(items.tables[0][-1], side, dim=0) for side in sides]
    assert near[0] > near[1] and not items.bought.any()


def test_composed_pages_are_made_anew_if_the_run_has_them(updated, monkeypatch, capsys):
    folder, asked = updated / "runs" / "base" / "compose", []
    monkeypatch.setattr(update.compose, "run", asked.append)  # seconds; tests/test_compose.py
    folder.mkdir()
    told = {"config": {"policy": "ppo", "networks": 1, "k": 6, "source_run": "elsewhere"}}
    (folder / "config.json").write_text(json.dumps(told))
    (folder / "done").write_text("{}")
    try:
        do(updated, out="next", steps=2)
        do(updated, out="next", steps=2, compose=False)
    finally:
        shutil.rmtree(folder)
    assert capsys.readouterr().out.count("composed pages of base are made anew") == 1
    (config,) = asked
    assert (config.networks, config.policy, config.source_run) == (1, "sft", "")
    assert config.data_dir == updated / "data" / "two" and config.run == "next"


def test_a_share_of_every_batch_has_new_rows(updated):
    new = load(updated / "data" / "two")
    made = read_json(updated / "runs" / "next" / "sft" / "config.json")["config"]
    config = sft.Config(**made | {"batch": 10, "fresh": 0.3})
    policy = Policy.load(updated / "runs" / "next" / "sft")
    batches = sft.PageBatches(config, policy, PageMaker(new), new)
    fresh = batches.maker.users[:5]
    torch.save({"fresh": torch.from_numpy(fresh)}, updated / "model.pt")
    batches.mix(updated)
    drawn = [batches.maker.users[batches.drawn_users(step)[1]] for step in range(5)]
    for users in drawn[::2]:  # 5 users in batches of 3: 3, 2, 3, 2
        assert np.isin(users, fresh).sum() == 3 and len(set(users.tolist())) == 10
    assert set(fresh) <= set(np.concatenate(drawn).tolist())


def test_a_service_that_follows_the_link_goes_from_one_days_data_to_the_nexts(updated):
    runs, live = updated / "runs", updated / "runs" / "followed"
    live.symlink_to("base")
    service = serve.Service(
        serve.Config(dataset="auto", run="followed", runs=str(runs), device="cpu", reload=0.0)
    )
    one, two = load(updated / "data" / "one"), load(updated / "data" / "two")
    assert service.recommender.shop.n_items == one.n_items
    assert not service.take_new_weights()
    promote.move(live, "next")
    assert service.take_new_weights() and service.recommender.shop.n_items == two.n_items
    added = sorted(set(two.catalogue.ids) - set(one.catalogue.ids))
    (answer,) = service.recommender.answers([Ask(page=(added[0],))])
    assert answer["unknown"]["items"] == []
    live.unlink()
