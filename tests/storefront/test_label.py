"""Labels by people: pairs are written once, and what people say is counted, or refused by line."""

import csv
from pathlib import Path

import numpy as np
import pytest

from pagellm.stage.config import PageLLMError
from pagellm.storefront import label
from pagellm.storefront.label import agreement_of, lacking, read_labels, report


def said(pair, fits, rater="ann"):
    return {"pair": pair, "fits": fits, "rater": rater}


def test_pairs_are_written_filled_in_and_read(made, tmp_path, capsys):
    """Somebody who thinks as the scorer does agrees with it in all of them."""
    common = made | {"runs": str(tmp_path)}
    (tmp_path / "synthetic").mkdir()
    (tmp_path / "synthetic/storefront").symlink_to(Path(made["runs"]) / "synthetic/storefront")
    folder = tmp_path / "synthetic/storefront/label"
    try:
        assert label.run(label.Config(**common, pairs=40)) == {"pairs": 40}
        with pytest.raises(PageLLMError, match="people's work"):
            label.run(label.Config(**common, pairs=40))
        with pytest.raises(PageLLMError, match="nobody has judged"):
            label.run(label.Config(**common, labels=str(folder / "labels.csv")))
        with open(folder / "labels.csv", newline="", encoding="utf-8") as file:
            lines = list(csv.DictReader(file))
        assert "score" not in lines[0] and all(line["name"] for line in lines)
        score = {(t, i): s for t, i, s in label.read_json(folder / "scores.json")["scores"]}
        filled = tmp_path / "filled.csv"
        with open(filled, "w", newline="", encoding="utf-8") as file:
            writer = csv.DictWriter(file, lines[0])
            writer.writeheader()
            for line in lines:
                fits = score[line["title"], line["item"]] >= 0.5
                writer.writerow(line | {"fits": int(fits), "rater": "ann"})
        numbers = label.run(label.Config(**common, labels=str(filled)))
        assert numbers["labels"] == 40 and numbers["agreed"] == 1.0
        assert "the scorer agrees with 100.0%" in capsys.readouterr().out
    finally:
        for name in ("labels.csv", "scores.json"):
            (folder / name).unlink(missing_ok=True)
        folder.rmdir()


def test_two_people_s_kappa_is_that_of_the_pairs_both_judged():
    pairs = [("t", str(n)) for n in range(100)]
    counts = [(1, 1)] * 40 + [(1, 0)] * 10 + [(0, 1)] * 5 + [(0, 0)] * 45
    labels = [said(p, bool(a)) for p, (a, _) in zip(pairs, counts, strict=True)]
    labels += [said(p, bool(b), "bob") for p, (_, b) in zip(pairs, counts, strict=True)]
    both, k = agreement_of(labels)
    assert both == 100 and k == pytest.approx(0.7)
    assert agreement_of(labels[:100]) == (0, None)


def test_a_gate_that_stays_shut_says_how_many_labels_it_lacks():
    score, fits = np.full(40, 0.9), np.ones(40, dtype=bool)
    assert lacking(score, fits) == 19  # 59 without an error are enough
    numbers, text = report([said(("t", str(n)), True) for n in range(40)],
                           {("t", str(n)): 0.9 for n in range(40)})  # fmt: skip
    assert numbers["threshold"] is None and "at least 19 more labels" in text
    numbers, text = report([said(("t", str(n)), True) for n in range(59)],
                           {("t", str(n)): 0.9 for n in range(59)})  # fmt: skip
    assert numbers["threshold"][0] == 0.9 and "lets 100.0% pass" in text


def test_wrong_files_are_refused_by_line(tmp_path):
    path = tmp_path / "labels.csv"
    with pytest.raises(PageLLMError, match="no labels in"):
        read_labels(path, set())
    for text, why in (
        ("title,item\na,b\n", "no column fits"),
        ("title,item,fits\na,b,perhaps\n", "line 2: fits is 'perhaps'"),
        ("title,item,fits\na,b,1\nc,d,0\n", "line 3: 'c' with item 'd' was not asked"),
        ("title,item,fits\na,b,\n", "nobody has judged"),
    ):
        path.write_text(text)
        with pytest.raises(PageLLMError, match=why):
            read_labels(path, {("a", "b")})
    path.write_bytes("title,item,fits\nCrème,b,1\n".encode("latin-1"))
    with pytest.raises(PageLLMError, match="is no CSV in UTF-8 .*\n.*CSV UTF-8"):
        read_labels(path, {("a", "b")})
    path.write_text("title,item,fits,rater\na,b,Yes,ann\n")
    assert read_labels(path, {("a", "b")}) == [said(("a", "b"), True)]
