"""Score another recommender's run file by our metrics, beside the baselines.

    pagellm runfile --dataset toys --name SASRec --file scores.csv

The file is Parquet, JSON lines, or CSV or TSV with a header line; its columns are user, item, and
score or rank. Identifiers are the shop's own, or the dense numbers of
data/<dataset>/interactions.parquet. Lists should rank the whole catalogue, and be long enough that
`depth` ranks remain when masked items are removed.

Writes runs/<run>/runfile-<name>/  pages.parquet, per_user.parquet, metrics.json,
                                   table.{parquet,md,tex}

Prints what was done to the file: masked items are removed; users without a list count with score 0;
users without held-out items are left out; lists shorter than `depth` are counted. Equal scores are
put in a seeded random order. A file that scores more than three times EASE is refused, because its
model has probably seen test rows.
"""

import json
import sys
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import torch

from pagellm.baselines.compare import read_rows
from pagellm.data.shop import Rows, Shop, load
from pagellm.data.tables import ids_of, read_table, told
from pagellm.data.values import is_number
from pagellm.pages.ranked import (
    RankedPages,
    Scorer,
    audience,
    check_leak,
    check_mask,
    score_row,
    seen_rows,
    top_items,
)
from pagellm.pages.tables import ALL_COLUMNS, compare, save
from pagellm.stage.command import main
from pagellm.stage.config import PageLLMError, check
from pagellm.stage.files import read_json, slug, write_json
from pagellm.stage.hints import counted
from pagellm.stage.run import Run, StageConfig, file_id, finished

__all__ = ["Config", "read_run", "run"]


@dataclass(frozen=True, kw_only=True)
class Config(StageConfig):
    """Score somebody's run file by our metrics and print it beside the baselines."""

    name: str = ""  # name of the row
    file: str = ""  # run file with columns user, item, and score or rank
    ids: str = "auto"  # what user and item are: shop (its own identifiers), dense (the numbers of
    # interactions.parquet and pages.parquet), or auto: whichever fits every row
    mask: str = "train+valid"  # splits whose items are removed from the lists; must be the mask of
    # the baselines
    k: int = 20  # slots on a page; must be the k of the baselines
    depth: int = 100  # length of the ranked list; must be the depth of the baselines
    versus: str = "EASE"  # row that every other row's differences are taken to
    n_boot: int = 1000  # bootstrap draws for each interval

    def __post_init__(self):
        check(
            self,
            name=(
                self.name.replace(" ", "").isprintable()
                and self.name.strip() != ""
                and "/" not in self.name,
                "a name for the row",
            ),
            file=(Path(self.file).is_file(), "an existing run file"),
            ids=(self.ids in ("auto", "shop", "dense"), "auto, shop or dense"),
            mask=check_mask(self.mask),
            k=(self.k > 0, "1 or more"),
            depth=(self.depth >= self.k, f"k={self.k} or more"),
            n_boot=(self.n_boot > 1, "2 or more"),
        )


def read_file(path: Path) -> pa.Table:
    """A run file's table. Raises PageLLMError if it cannot be read or a column is missing."""
    data = read_table(path, ("user", "item"))
    missing = {"user", "item"} - set(data.column_names)
    if missing or not {"score", "rank"} & set(data.column_names):
        raise PageLLMError(
            f"{path}: columns {', '.join(data.column_names)}; want user, item, and score or rank"
        )
    if not len(data):
        raise PageLLMError(f"{path} has no rows; want one for each user and item")
    return data


def orders(data: pa.Table, path: Path) -> np.ndarray:
    """(R,) int64 or float64 that order a user's items, larger first: scores, or ranks negated.

    As exact as the file: times and sums of logarithms differ in digits that float32 does not have.
    Raises PageLLMError for what is not a finite number.
    """
    name = "rank" if "rank" in data.column_names else "score"
    column = data[name].combine_chunks()
    if pa.types.is_decimal(column.type) and not column.null_count:
        # Their order, with every digit: a float has fewer.
        column = pc.rank(column, tiebreaker="dense").cast(pa.int64())
    if not (pa.types.is_integer(column.type) or pa.types.is_floating(column.type)):
        values = [v for v in column.to_pylist() if not is_number(v)] or column.to_pylist()
        raise PageLLMError(f"{path}: column {name} is not numbers: {values[0]!r}")
    if column.null_count or not np.isfinite(column.to_numpy(zero_copy_only=False)).all():
        wrong = column.null_count + int(
            (~np.isfinite(column.drop_null().to_numpy().astype(np.float64))).sum()
        )
        raise PageLLMError(f"{path}: {wrong:,} {name}s are not finite numbers")
    order = column.to_numpy()
    return (
        -order.astype(np.int64 if order.dtype.kind in "iu" else np.float64)
        if (name == "rank")
        else order
    )


def read_words(data: pa.Table, path: Path) -> list[str]:
    """What is read of a run file, and whether ranks stand beside scores."""
    both = {"rank", "score"} <= set(data.column_names)
    by = "rank" if "rank" in data.column_names else "score"
    more = ["ranks decide; the scores beside them are not read"] if both else []
    return [told(path, data, ("user", "item", by)), *more]


def places(user: np.ndarray, order: np.ndarray) -> np.ndarray:
    """(R,) float32: each row's place in its user's list from below, equal orders sharing one.

    user (R,) int, sorted; order (R,). A list has fewer than 2^24 items, so float32 holds its
    places.
    """
    by = np.lexsort((order, user))
    new = np.ones(len(by), dtype=bool)
    new[1:] = (np.diff(user[by]) != 0) | (order[by][1:] != order[by][:-1])
    count = np.cumsum(new)
    first = np.searchsorted(user[by], user[by])
    place = np.empty(len(by), np.float32)
    place[by] = count - count[first] if len(by) else count
    return place


def numbers(column: list[str], own: list[str], what: str, path: Path, ids: str) -> np.ndarray:
    """Dense numbers of a column of those, or of the shop's own identifiers: see Config.ids.

    Raises PageLLMError for a value that is neither and, with auto, for one that might be both. It
    also might where it is an identifier without its leading zeros, which spreadsheets drop.
    """
    text = pa.array(column, pa.string())
    found = {
        "shop": pc.index_in(text, pa.array(own, pa.string())),
        "dense": pc.index_in(text, pa.array(list(map(str, range(len(own)))))),
    }
    fits = [
        name for name, number in found.items() if ids in ("auto", name) and not number.null_count
    ]
    if not fits:
        strange = text.filter(pc.is_null(found["dense" if ids == "dense" else "shop"]))[0].as_py()
        raise PageLLMError(
            f"{path}: {what} {strange!r} is not "
            + {
                "auto": f"one of the shop's identifiers, nor are all numbers in 0..{len(own) - 1}",
                "shop": "one of the shop's identifiers",
                "dense": f"in 0..{len(own) - 1}",
            }[ids]
        )
    if ids == "auto" and fits == ["dense"]:
        padded = {name.lstrip("0"): name for name in own}
        if all(name.lstrip("0") in padded for name in set(column)):
            raise PageLLMError(
                f"{path}: column {what}: {column[0]!r} is not one of the shop's identifiers, but "
                f"{padded[column[0].lstrip('0')]!r} is; were zeros in front lost?\n"
                "  Write identifiers as text, or say --ids dense if the numbers of "
                "interactions.parquet are meant."
            )
    chosen = [found[name].to_numpy().astype(np.int64) for name in fits]
    if len(fits) > 1 and (chosen[0] != chosen[1]).any():
        raise PageLLMError(
            f"{path}: column {what} can be read as the shop's own identifiers and as the "
            "numbers of interactions.parquet\n  Say which with --ids shop or --ids dense."
        )
    return chosen[0]


def read_run(
    path: Path,
    shop: Shop,
    users: np.ndarray,
    seen: Rows,
    k: int,
    depth: int,
    seed: int = 0,
    ids: str = "auto",
    said: list[str] | None = None,
) -> tuple[RankedPages, str]:
    """Lists (U, depth) of exactly `users`, without items they have seen; and notes in words.

    said  is filled with lines about what was read and what was left over, if given
    Equal scores are put in a seeded random order. If the file has ranks, its scores are ignored.
    Raises PageLLMError for unknown identifiers, repeated (user, item), scores that are not numbers.
    """
    data = read_file(path)
    texts = {name: ids_of(data, name, path) for name in ("user", "item")}
    user = numbers(texts["user"], shop.user_ids, "user", path, ids)
    item = numbers(texts["item"], shop.catalogue.ids, "item", path, ids)
    score = orders(data, path)
    if said is not None:
        said += read_words(data, path)
        for what, number, all_ids in (
            ("user", user, shop.user_ids),
            ("item", item, shop.catalogue.ids),
        ):
            dense = all_ids[number[0]] != texts[what][0]
            kind = "the numbers of interactions.parquet" if dense else "the shop's identifiers"
            said.append(f"column {what} is read as {kind} (--ids)")
    if len(np.unique(user * shop.n_items + item)) < len(user):
        raise PageLLMError(f"{path}: a user's list repeats an item; want each (user, item) once")
    order = np.argsort(user, kind="stable")
    user, item, score = user[order], item[order], score[order]
    place = places(user, score)
    indptr = np.searchsorted(user, np.arange(shop.n_users + 1))
    items, values = [], []
    for at in range(0, len(users), 512):
        some = users[at : at + 512]
        full = torch.full((len(some), shop.n_items), -torch.inf)
        span = [np.arange(indptr[u], indptr[u + 1]) for u in some]
        row = np.repeat(np.arange(len(some)), [len(s) for s in span])
        at_line = np.concatenate(span)
        full[row, item[at_line]] = torch.from_numpy(place[at_line])
        best, value = top_items(full, some, seen, depth, seed)
        given = np.full(full.shape, -np.inf)  # the file's own scores, for whoever reads the pages
        given[row, item[at_line]] = score[at_line]
        own = torch.from_numpy(given.astype(np.float32)).gather(1, best.clamp(min=0))
        items.append(best)
        values.append(torch.where(best >= 0, own, value))
    ranked = RankedPages(users, torch.cat(items).numpy(), torch.cat(values).numpy(), np.zeros(0))
    length = (ranked.item >= 0).sum(1)
    ranked.slots = np.minimum(length, k)
    code = np.repeat(np.arange(shop.n_users), seen.counts()) * shop.n_items + seen.items
    scored = np.isin(user, users)
    masked = int(np.isin(user * shop.n_items + item, code)[scored].sum())
    given = np.diff(indptr)[users]
    room = np.minimum(depth, shop.n_items - seen.counts()[users])
    notes = (
        f"{counted(len(user), 'row')} read; {masked:,} masked items taken out, "
        f"{counted(int((given == 0).sum()), 'user')} without a list count with 0, "
        f"{counted(len(np.unique(user[~scored])), 'user')} without held-out items left out, "
        f"{int(((given > 0) & (length < room)).sum()):,} lists shorter than {depth}"
    )
    return ranked, notes


def run(config: Config) -> dict:
    """Score the run file and print the table. Returns {name: metric -> {mean, low, high, ...}}."""
    shop = load(config.data_dir)
    baselines = config.stage("baselines")
    finished(baselines, "baselines", config.make("baselines"))
    inputs = {
        "data": file_id(config.data_dir / "source.json"),
        "file": file_id(config.file),
        "baselines": file_id(baselines / "metrics.json"),
    }
    rows, made = read_rows(baselines)
    other = [
        f"{name}={made[name]}"
        for name in ("mask", "k", "depth")
        if made[name] != getattr(config, name)
    ]
    if other or config.name in rows:
        raise PageLLMError(
            f"{baselines} was made with {', '.join(other + ['rows ' + ', '.join(rows)])}; want the "
            f"same mask, k and depth, and another name than {config.name!r}"
        )
    if read_json(baselines / "config.json")["inputs"]["data"] != inputs["data"]:
        raise PageLLMError(
            f"{baselines} was made on another split than {config.data_dir} holds now\n"
            f"  Remove it, then {config.make('baselines')}"
        )
    with Run(config.stage(f"runfile-{slug(config.name)}"), config, inputs, ("file",)) as out:
        if out.done:
            print((out.path / "table.md").read_text())
            return {}
        scorer = Scorer(shop, "test")
        seen = seen_rows(shop, "test", config.mask)
        said: list[str] = []
        ranked, notes = read_run(
            Path(config.file),
            shop,
            scorer.users,
            seen,
            config.k,
            config.depth,
            config.seed,
            config.ids,
            said,
        )
        rows[config.name], result = score_row(
            out.path, config.name, ranked, scorer, seen, config.k, config.seed, config.n_boot
        )
        check_leak(
            config.name,
            rows[config.name],
            scorer.held.counts()[scorer.users],
            json.loads((baselines / "metrics.json").read_text()).get("EASE"),
        )
        write_json(out.path / "metrics.json", {config.name: result})
        records = compare(
            {name: [scores] for name, scores in rows.items()},
            ALL_COLUMNS,
            config.versus,
            config.seed,
            config.n_boot,
        )
        text = save(
            out.path,
            records,
            "\n".join(
                [
                    f"{config.dataset}: {audience(shop, scorer, config.mask)}",
                    f"{config.name}: {notes}",
                    *said,
                ]
            ),
        )
        out.finish(users=len(scorer.users))
        print(text)
        return {config.name: result}


if __name__ == "__main__":
    sys.exit(main(Config, run, "pagellm runfile"))
