"""The case study: hits equal those counted by hand, rewards add up, unknown users are refused."""

import re
import shutil

import numpy as np
import pytest

from pagellm import evaluate
from pagellm.report import casestudy, findings, measure
from pagellm.serving.recommender import Ask
from pagellm.stage.config import PageLLMError


@pytest.fixture(scope="module")
def root(served, tmp_path_factory):
    """The small shop's runs, evaluated with pages of six slots."""
    root = tmp_path_factory.mktemp("case")
    shutil.copytree(served, root, dirs_exist_ok=True)
    # another test of the session may have left one
    shutil.rmtree(root / "runs" / "base" / "evaluate", ignore_errors=True)
    evaluate.run(
        evaluate.Config(
            run="base",
            data=str(root / "data"),
            runs=str(root / "runs"),
            device="cpu",
            k=6,
            depth=30,
            n_boot=20,
            quiet=True,
        )
    )
    return root


def config(root, **more):
    return casestudy.Config(
        **{"run": "base", "data": str(root / "data"), "runs": str(root / "runs"), "device": "cpu"}
        | more
    )


@pytest.fixture(scope="module")
def found(root):
    return findings.read(str(root / "runs"), "base", str(root / "data"))


def test_hits_are_those_counted_by_hand(found):
    c = found.shop.catalogue
    for name in ("sft", "ppo"):
        pages, got = found.pages[name], casestudy.counts(found, name)
        for row, user in enumerate(pages.user):
            held = found.scorer.held.of(user)[0].tolist()
            page = pages.item[row, : pages.slots[row]].tolist()
            rest = [i for i in page if i not in held]
            assert got[:, row].tolist() == [
                len(page) - len(rest),
                sum(c.leaf[i] in {c.leaf[j] for j in held} for i in rest),
                sum(c.brand[i] in {c.brand[j] for j in held} for i in rest),
            ]
        assert got.sum(1).min() > 0


def test_unknown_brands_and_empty_slots_hit_nothing(found):
    pages = found.pages["sft"]
    group = np.full(found.shop.n_items, -1)
    item = measure.page_items(pages, 6)
    assert not measure.shared(pages.user, item, found.scorer, group).any()
    assert not measure.shared(
        pages.user, np.full_like(item, -1), found.scorer, np.zeros_like(group)
    ).any()
    assert measure.shared(pages.user, item, found.scorer, np.zeros_like(group))[item >= 0].all()


def test_the_trace_ends_in_the_mean():
    token = np.array([[0.5, -1.0, 2.0], [3.0, 1.0, np.nan]])
    assert measure.trace(token) == pytest.approx(
        np.array([[0.5, -0.5, 1.5], [3.0, 4.0, np.nan]]) / [[3], [2]], nan_ok=True
    )


def test_a_user_is_told_as_the_recommender_sees_them(root, found, rec, capsys):
    """Prompt, hits and rewards of one user, against the ids in the data and Recommender.answers."""
    row = int(np.argmax(casestudy.counts(found, "ppo")[0]))
    user = int(found.pages["ppo"].user[row])
    name, c = found.shop.user_ids[user], found.shop.catalogue
    text = casestudy.run(config(root, user=name))
    assert text in capsys.readouterr().out
    items, ratings = found.shop.csr("train").of(user)
    said = "".join(
        f" <{c.ids[i]}><r{r:.0f}>" for i, r in list(zip(items, ratings, strict=True))[-8:]
    )
    assert f"<{name}> history{said}<page>" in text
    page = found.pages["ppo"].item[row, :6]
    (answer,) = rec.answers([Ask(user=name, policy="sft", page=tuple(c.ids[i] for i in page))])
    rows = re.findall(r"^ +\d+  [✓≈◇ ]+([+-]\d+\.\d+) +([+-]\d+\.\d+)  ", text, re.M)[6:12]
    token = [slot["token_reward"] for slot in answer["items"]]
    assert [float(r) for r, _ in rows] == pytest.approx(token, abs=6e-4)
    assert [float(s) for _, s in rows] == pytest.approx(np.cumsum(token) / 6, abs=1e-3)
    assert float(re.findall(r"R_c ([+-]\d+\.\d+)", text)[1]) == pytest.approx(
        answer["page_reward"], abs=2e-3
    )
    assert text.count("✓") == int(sum(casestudy.counts(found, p)[0, row] for p in ("sft", "ppo")))
    assert f"all {len(found.pages['ppo'].user):,} users" in text and "same brand" in text


def test_what_no_item_has_is_not_counted_as_never_hit(found):
    assert "no item" not in casestudy.table(found)
    brand = found.shop.catalogue.brand_id
    was = brand.copy()
    try:
        brand[:] = -1
        lines = casestudy.table(found).splitlines()
    finally:
        brand[:] = was
    assert lines[-1].startswith("same brand") and lines[-1].endswith("no item of synthetic has one")
    assert lines[-2].startswith("same category") and "[" in lines[-2]


def test_drawn_users_and_wrong_ones(root, found, tmp_path, capsys):
    name = found.shop.user_ids[int(found.pages["ppo"].user[0])]
    assert casestudy.run(config(root, users=3)).count("\nprompt ") == 3
    with pytest.raises(PageLLMError, match="--user nobody: no page of theirs"):
        casestudy.run(config(root, user="nobody"))
    with pytest.raises(PageLLMError, match="users=0"):
        config(root, users=0)
    shutil.copytree(root, tmp_path / "root")
    shutil.rmtree(tmp_path / "root" / "runs" / "base" / "reward")
    judged = casestudy.run(config(root, user=name))
    capsys.readouterr()
    text = casestudy.run(config(tmp_path / "root", user=name))
    assert "no rewards: make reward DATASET=synthetic RUN=base makes one" in capsys.readouterr().out
    # The same text without the two columns of rewards and the line about them.
    bare = re.sub(r"^( +\d+  [✓≈◇ ]{3}) +[+-]\d\.\d+ +[+-]\d\.\d+", r"\1", judged, flags=re.M)
    bare = re.sub(r"\n  token reward R_f .*", "", bare).replace("hit     r_k   sum/T", "hit")
    assert text == bare
    shutil.rmtree(tmp_path / "root" / "runs" / "base" / "evaluate")
    with pytest.raises(PageLLMError, match="Make it with: make"):
        casestudy.run(config(tmp_path / "root"))
