"""Evaluated pages, and the data themselves, in the file formats of other tools.

    trec      qrels.txt and <policy>.run, for trec_eval and whatever reads its files
    ranx      qrels.json and <policy>.json: ranx.Qrels.from_file, ranx.Run.from_file
    recbole   <dataset>.train.inter, .valid.inter, .test.inter and .item: RecBole's atomic files

    pagellm export --format trec            runs/<run>/trec/
    pagellm export --format ranx            runs/<run>/ranx/
    pagellm export --format recbole         runs/<run>/recbole/<dataset>/

All identifiers are the shop's own. A held-out liked row is relevant, with relevance 1. The score in
a run falls by one a rank: these tools sort by score, and break ties in ways of their own.
"""

import json
from collections.abc import Iterator
from pathlib import Path
from urllib.parse import quote

import numpy as np

from pagellm.data.shop import Shop
from pagellm.pages.ranked import RankedPages, read_pages
from pagellm.stage.config import PageLLMError
from pagellm.stage.files import atomic

__all__ = [
    "FORMATS",
    "evaluated",
    "qrels_of",
    "run_of",
    "write_ranx",
    "write_recbole",
    "write_trec",
]


FORMATS = ("trec", "ranx", "recbole")
Judged = dict[str, dict[str, int]]  # user id -> item id -> relevance, or score


def evaluated(folder: Path, shop: Shop, policy: str = "") -> dict[str, RankedPages]:
    """Policy -> the pages that `pagellm evaluate` wrote into `folder`.

    policy  only this one; empty: all that are there
    Raises PageLLMError if there is none.
    """
    there = sorted(path.parent.name for path in folder.glob("*/pages.parquet"))
    names = [name for name in there if policy in ("", name)]
    if not names:
        raise PageLLMError(
            f"{folder} has no pages of {policy or 'any policy'}"
            + (f"; there are {', '.join(there)}" if there else "")
        )
    return {name: read_pages(folder / name / "pages.parquet", shop) for name in names}


def qrels_of(shop: Shop, split: str) -> Judged:
    """The liked rows of a held-out split, each with relevance 1."""
    held, ids = shop.csr(split), shop.catalogue.ids
    return {
        shop.user_ids[u]: {ids[i]: 1 for i in held.of(u)[0].tolist()}
        for u in np.flatnonzero(held.counts() > 0).tolist()
    }


def run_of(pages: RankedPages, shop: Shop) -> Judged:
    """Ranked pages; the score falls from their depth by one a rank."""
    depth, ids = pages.item.shape[1], shop.catalogue.ids
    return {
        shop.user_ids[user]: {ids[i]: depth - at for at, i in enumerate(row) if i >= 0}
        for user, row in zip(pages.user.tolist(), pages.item.tolist(), strict=True)
    }


def write_ranx(folder: Path, qrels: Judged, runs: dict[str, Judged]) -> list[Path]:
    """qrels.json, and <policy>.json of each; -> the files."""
    files = {"qrels.json": qrels} | {f"{name}.json": run for name, run in runs.items()}
    return [write_text(folder / name, [json.dumps(judged)]) for name, judged in files.items()]


def write_trec(folder: Path, qrels: Judged, runs: dict[str, Judged]) -> list[Path]:
    """qrels.txt, and <policy>.run of each; -> the files.

    An identifier may hold no blank there; blanks are written as in addresses (%20).
    Raises PageLLMError where two identifiers would become one.
    """
    word = words_of(qrels, *runs.values())
    lines = (
        f"{word[user]} 0 {word[item]} {relevance}\n"
        for user, items in qrels.items()
        for item, relevance in items.items()
    )
    files = [write_text(folder / "qrels.txt", lines)]
    for name, run in runs.items():
        lines = (
            f"{word[user]} Q0 {word[item]} {rank} {score} {name}\n"
            for user, items in run.items()
            for rank, (item, score) in enumerate(items.items(), 1)
        )
        files.append(write_text(folder / f"{name}.run", lines))
    return files


def words_of(*judged: Judged) -> dict[str, str]:
    """Identifier -> the same without blanks."""
    users = {user for part in judged for user in part}
    items = {item for part in judged for known in part.values() for item in known}
    word: dict[str, str] = {}
    for names in (users, items):
        made = {n: quote(n, safe="") if any(map(str.isspace, n)) else n for n in names}
        if len(set(made.values())) < len(made):
            raise PageLLMError("two identifiers differ only in blanks; export --format ranx")
        word |= made
    return word


def write_recbole(folder: Path, dataset: str, shop: Shop) -> list[Path]:
    """RecBole's atomic files; -> the files.

    Each split has a file of its liked rows, which RecBole reads with
    `benchmark_filename: [train, valid, test]`. A column that is unknown everywhere is left out.
    """
    rows = {"user_id:token": [shop.user_ids[u] for u in shop.user.tolist()]}
    rows["item_id:token"] = [shop.catalogue.ids[i] for i in shop.item.tolist()]
    if not np.isnan(shop.rating).all():
        rows["rating:float"] = ["" if r != r else f"{r:g}" for r in shop.rating.tolist()]
    if shop.time.any():
        rows["timestamp:float"] = [str(t) for t in shop.time.tolist()]
    files = []
    for split in ("train", "valid", "test"):
        keep = np.flatnonzero(shop.rows(split))
        part = {name: [values[i] for i in keep] for name, values in rows.items()}
        files.append(write_text(folder / f"{dataset}.{split}.inter", tab_lines(part)))
    c = shop.catalogue
    items = {
        "item_id:token": c.ids,
        "title:token_seq": c.title,
        "brand:token": c.brand,
        # RecBole splits a sequence at blanks, so a category is one word.
        "categories:token_seq": [" ".join(n.replace(" ", "_") for n in x) for x in c.categories],
        "price:float": ["" if p != p else f"{p:g}" for p in c.price.tolist()],
    }
    known = {name: values for name, values in items.items() if any(values)}
    files.append(write_text(folder / f"{dataset}.item", tab_lines(known)))
    return files


def tab_lines(columns: dict[str, list[str]]) -> Iterator[str]:
    """A heading and a line a row, with tabs between; blanks within a cell become spaces."""
    yield "\t".join(columns) + "\n"
    for row in zip(*columns.values(), strict=True):
        yield "\t".join(" ".join(cell.split()) for cell in row) + "\n"


def write_text(path: Path, lines) -> Path:
    """Write lines into a file, in one go."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with atomic(path) as beside, open(beside, "w", encoding="utf-8") as file:
        file.writelines(lines)
    return path
