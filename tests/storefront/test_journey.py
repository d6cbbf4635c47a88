"""The Complete Journey's tables, in small: what stays, what it is called, where it goes."""

import json

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from pagellm.data.orders import load_orders
from pagellm.data.shop import load
from pagellm.stage.config import PageLLMError
from pagellm.storefront import journey
from pagellm.storefront.journey import plain_name

WEEK = 7 * 86_400
START = 1_483_228_800
PRODUCTS = [
    # id, maker, department, brand, category, type, size
    (10, 1, "GROCERY", "National", "FRZN ICE", "ICE - CRUSHED/CUBED", "22 LB"),
    (11, 69, "GROCERY", "Private", "SALD DRSNG/SNDWCH SPRD", "POURABLE SALAD DRESSINGS", None),
    (12, 2, "FUEL", "National", "FUEL", "GASOLINE", None),
    (13, 2, "GROCERY", "National", None, None, None),
    (14, 2, "GROCERY", "National", "CHEESE", "CHEESE", "8 OZ"),
]
# household, basket, product, quantity, paid, week
LINES = [
    (1, 100, 10, 1, 2.0, 1),
    (2, 101, 10, 2, 6.0, 2),
    (1, 102, 10, 1, 2.0, 46),
    (1, 103, 10, 1, 2.0, 50),
    (2, 104, 11, 1, 1.5, 3),
    (1, 105, 11, 1, 1.5, 50),
    (1, 106, 12, 1, 9.0, 1),
    (2, 107, 13, 1, 9.0, 1),
    (2, 108, 14, 1, 9.0, 50),
]


@pytest.fixture
def raw(tmp_path):
    names = ("product_id", "manufacturer_id", "department", "brand", "product_category")
    names += ("product_type", "package_size")
    columns = dict(zip(names, map(list, zip(*PRODUCTS, strict=True)), strict=True))
    pq.write_table(pa.table(columns), tmp_path / "products.parquet")
    names = ("household_id", "basket_id", "product_id", "quantity", "sales_value", "week")
    columns = dict(zip(names, map(list, zip(*LINES, strict=True)), strict=True))
    moment = np.array([START + (week - 1) * WEEK for week in columns["week"]]) * 10**9
    columns["transaction_timestamp"] = pa.array(moment, pa.timestamp("ns"))
    pq.write_table(pa.table(columns), tmp_path / "transactions.parquet")
    return tmp_path


def prepared(raw):
    config = journey.Config(raw=str(raw), data=str(raw / "data"), min_households=1)
    return load(journey.run(config))


def test_names_are_put_into_plain_words():
    assert plain_name("FRZN ICE") == "Frozen ice"
    assert plain_name("SALD DRSNG/SNDWCH SPRD") == "Salad dressing sandwich spread"
    assert plain_name("BREAD:ITALIAN/FRENCH") == "Bread italian french"
    assert plain_name(None) == ""


def test_what_is_not_sold_in_train_or_is_no_goods_stays_out(raw):
    shop = prepared(raw)
    assert shop.catalogue.ids == ["00000010", "00000011"]
    assert shop.catalogue.title[0] == "Ice crushed cubed 22 lb"
    assert shop.catalogue.categories[0] == ("Frozen ice", "Ice crushed cubed")  # the root is common
    assert shop.catalogue.brand == ["Maker 1", "Own brand"]
    assert shop.catalogue.price.tolist() == [2.0, 1.5]  # a piece costs 2 or 3: the lower median


def test_the_shop_keeps_first_purchases_and_the_orders_all_of_them(raw):
    shop = prepared(raw)
    assert len(shop.user) == 4 and shop.rows("test").sum() == 1  # only item 11 was new in week 50
    orders = load_orders(shop)
    assert len(orders.user) == 6
    assert [len(orders.only(name).user) for name in ("train", "valid", "test")] == [3, 1, 2]
    user, item, count, _ = orders.only("train").pairs()
    assert set(zip(user.tolist(), item.tolist(), count.tolist(), strict=True)) == {
        (0, 0, 1), (1, 0, 1), (1, 1, 1),
    }  # fmt: skip


def test_nothing_is_read_of_a_person_but_a_number(raw):
    shop = prepared(raw)
    text = json.dumps([shop.user_ids, *pq.read_table(shop.path / "orders.parquet").column_names])
    assert "age" not in text and "income" not in text


def test_lines_read_and_left_out_are_counted_by_reason(raw, capsys):
    table = pq.read_table(raw / "transactions.parquet")
    odd = table.slice(0, 3).to_pylist()
    odd[0]["household_id"] = odd[1]["transaction_timestamp"] = None
    odd[2]["product_id"] = 99
    odd = pa.Table.from_pylist(odd, table.schema)
    odd = pa.concat_tables([table, odd]).append_column("store", pa.array(range(12)))
    # a column of whole numbers that lacks one is a column of floats to pandas
    odd = odd.set_column(0, "household_id", odd["household_id"].cast(pa.float64()))
    pq.write_table(odd, raw / "transactions.parquet")
    shop = prepared(raw)
    assert shop.user_ids == ["000001", "000002"] and len(load_orders(shop).user) == 6
    said = capsys.readouterr().out
    assert "transactions.parquet: 12 rows" in said and "left over: store" in said
    assert "journey: 12 lines read, 6 kept; left out: 2 of fuel, coupons" in said
    for why in (
        "1 no household_id",
        "1 no transaction_timestamp",
        "1 of products that fewer than 1 households bought",
        "1 of products that products.parquet does not have",
    ):
        assert why in said
    text = odd.set_column(2, "product_id", pa.array(["x"] * 12))
    pq.write_table(text, raw / "transactions.parquet")
    with pytest.raises(PageLLMError, match="column product_id"):
        journey.run(journey.Config(raw=str(raw), data=str(raw / "other")))


def test_missing_files_are_named(tmp_path):
    with pytest.raises(PageLLMError, match="no .*transactions.parquet"):
        journey.run(journey.Config(raw=str(tmp_path), data=str(tmp_path)))
