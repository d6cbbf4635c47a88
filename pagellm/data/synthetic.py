"""A made-up shop whose tastes are known, for the demo, for tests, and to compare with the truth.

    shop = make(users=2000, items=1000, seed=0)       seconds
    shop.truth[u, i]                                  expected rating 1..5, without noise
    write(shop, "raw/", "amazon2018")                 the same shop in a format that prepare reads

An item has a place in a two-level category tree, a brand, a price, a quality, and a position along
six styles (rustic or modern, quiet or bold, ...). A user likes some styles, categories and brands,
and minds prices more or less. People buy what is popular and to their taste; titles, descriptions
and reviews mention the styles.
"""

import csv
import gzip
import html
import json
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from pagellm.data.records import Item, Review
from pagellm.stage.config import PageLLMError

__all__ = ["FORMATS", "STYLES", "SyntheticShop", "make", "write"]


FORMATS = ("amazon2014", "amazon2018", "amazon2023", "sequences", "csv", "parquet", "jsonl")
ROOT = "Everything"  # on every item's path, as a real shop's department is
NEAR_DUPLICATES = 0.08  # share of items that copy another one
RATINGS_PER_USER = 36.0  # mean
NOISE = 0.2  # standard deviation of a rating about its expectation
LIKED = 0.65  # share of what people buy that they are expected to rate above 3
DAY = 86_400
FIRST_DAY = 14_610  # 1 January 2010, in days since 1970

# One style a line: words for its low end, words for its high end. A style is a direction of taste.
STYLES = (
    (("Rustic", "Vintage", "Weathered", "Antique"), ("Modern", "Sleek", "Minimal", "Futuristic")),
    (("Quiet", "Gentle", "Subtle", "Calm"), ("Bold", "Loud", "Vivid", "Striking")),
    (("Compact", "Tiny", "Pocket", "Slim"), ("Large", "Giant", "Roomy", "Wide")),
    (("Soft", "Plush", "Cozy", "Padded"), ("Rugged", "Sturdy", "Tough", "Armored")),
    (("Plain", "Simple", "Basic", "Honest"), ("Ornate", "Fancy", "Elegant", "Gilded")),
    (("Natural", "Wooden", "Organic", "Woven"), ("Electric", "Digital", "Smart", "Wireless")),
)
# Department / leaf category / what is sold there.
TREE = """
    Kitchen & Dining / Cookware / Skillet, Saucepan, Wok
    Kitchen & Dining / Knives / Cleaver, Paring Knife, Slicer
    Kitchen & Dining / Coffee & Tea / Kettle, Grinder, Teapot
    Kitchen & Dining / Bakeware / Loaf Pan, Whisk, Mold
    Kitchen & Dining / Food Storage / Jar, Lunch Box, Canister
    Garden / Pots & Planters / Planter, Flower Pot, Trough
    Garden / Hand Tools / Trowel, Pruner, Rake
    Garden / Watering / Hose, Sprinkler, Watering Can
    Garden / Outdoor Seats / Bench, Hammock, Stool
    Garden / Bird Care / Feeder, Bird Bath, Nest Box
    Music / Guitars / Guitar, Ukulele, Bass
    Music / Drums / Snare, Cymbal, Bongos
    Music / Microphones / Microphone, Mic Stand, Pop Filter
    Music / Keyboards / Piano, Synth, Organ
    Music / Wind / Flute, Clarinet, Harmonica
    Toys & Games / Puzzles / Puzzle, Maze, Brain Teaser
    Toys & Games / Board Games / Board Game, Chess Set, Dice
    Toys & Games / Building Sets / Blocks, Marble Run, Robot Kit
    Toys & Games / Dolls / Doll, Puppet, Teddy
    Toys & Games / Vehicles / Race Car, Train, Kite
    Sports / Yoga / Yoga Mat, Foam Roller, Strap
    Sports / Cycling / Helmet, Pedals, Saddle
    Sports / Camping / Tent, Lantern, Sleeping Bag
    Sports / Running / Shoes, Armband, Vest
    Sports / Fishing / Reel, Rod, Tackle Box
    Beauty / Skin Care / Face Cream, Serum, Cleanser
    Beauty / Hair Care / Shampoo, Brush, Hair Oil
    Beauty / Makeup / Lipstick, Mascara, Palette
    Beauty / Fragrance / Perfume, Cologne, Mist
    Beauty / Bath / Soap, Bath Bomb, Sponge
    Office / Notebooks / Notebook, Planner, Sketchbook
    Office / Writing / Fountain Pen, Pencil, Marker
    Office / Desks / Desk, Desk Pad, Riser
    Office / Lamps / Lamp, Task Light, Clip Light
    Office / Filing / Binder, Folder, Letter Tray
    Pets / Beds / Pet Bed, Crate, Blanket
    Pets / Walking / Leash, Collar, Harness
    Pets / Feeding / Bowl, Fountain, Treat Jar
    Pets / Pet Toys / Chew Toy, Ball, Feather Wand
    Pets / Grooming / Comb, Nail Clipper, Pet Towel
"""
LEAVES = tuple(tuple(line.strip().split(" / ")) for line in TREE.strip().split("\n"))
TOPS = tuple(dict.fromkeys(top for top, _, _ in LEAVES))
TOP_OF_LEAF = np.array([TOPS.index(top) for top, _, _ in LEAVES])
SYLLABLES = "nor vik al mo ra ten sol ber lin ka zu dor fe mar qui tos".split()
COLOURS = ("Red", "Blue", "Green", "Black", "White", "Yellow")
SUMMARIES = ("Waste of money", "Not for me", "It is okay", "Good buy", "Love it")
VERDICTS = (
    "I sent it back.",
    "I would not buy it again.",
    "It does the job.",
    "I am glad I bought it.",
    "It is exactly my taste.",
)


@dataclass(frozen=True)
class SyntheticShop:
    """Items, R ratings in columns, and the truth. Users and items are in no order."""

    user_ids: list[str]
    items: list[Item]
    truth: np.ndarray  # (U, N) float32: expected rating 1..5
    user: np.ndarray  # (R,) int64, index into user_ids
    item: np.ndarray  # (R,) int64, index into items
    rating: np.ndarray  # (R,) int64 in 1..5
    time: np.ndarray  # (R,) int64 seconds, whole days as in the Amazon files
    copies: np.ndarray  # (N,) int64: the item this one nearly repeats, -1 for originals
    style: np.ndarray  # (N, 6) float64: position along STYLES
    taste: np.ndarray  # (U, 6) float64: what users like of each style
    seed: int

    def reviews(self) -> Iterator[Review]:
        """Every rating as a record, by user and then time."""
        draws = np.random.default_rng([self.seed, 2]).integers(0, 4, size=(len(self.user), 2))
        columns = (self.user, self.item, self.rating, self.time, draws)
        for user, item, rating, time, words in zip(*(c.tolist() for c in columns), strict=True):
            yield Review(
                self.user_ids[user],
                self.items[item].id,
                float(rating),
                time,
                self.review_text(user, item, rating, words),
            )

    def review_text(self, user: int, item: int, rating: int, words: list[int]) -> str:
        """Summary and text: what the item is like, what the user likes, and the verdict."""
        noun = self.items[item].paths[0][-1].lower()
        trait = adjective(self.style[item], 0, words[0]).lower()
        wish = adjective(self.taste[user], 0, words[1]).lower()
        opinion = f"I like things {wish}." if rating > 3 else f"I wanted something {wish}."
        return f"{SUMMARIES[rating - 1]}\nVery {trait} for {noun}. {opinion} {VERDICTS[rating - 1]}"


def make(users: int = 2000, items: int = 1000, seed: int = 0) -> SyntheticShop:
    """Draw a shop. Raises PageLLMError for fewer than 2 users or 10 items."""
    if users < 2 or items < 10:
        raise PageLLMError(
            f"synthetic shop of {users} users and {items} items: want at least 2 and 10"
        )
    rng = np.random.default_rng([seed, 0])
    leaf, brand, style, quality, price, fame, copies = draw_items(rng, items)
    n_brands = brand.max() + 1
    brand_names = draw_brands(rng, n_brands)
    catalogue = describe(rng, leaf, brand, style, price, copies, brand_names)

    taste = rng.normal(size=(users, len(STYLES))) * rng.choice(
        [0.3, 1.0, 1.7], size=(users, len(STYLES))
    )
    likes_top = rng.gumbel(size=(users, len(TOPS)))
    likes_leaf = rng.normal(size=(users, len(LEAVES)))
    likes_brand = rng.normal(size=(users, n_brands)) * 0.25
    thrift = rng.gamma(2.0, 0.25, size=users)
    wish = np.clip(RATINGS_PER_USER * rng.lognormal(-0.125, 0.5, size=users), 12, None)
    amount = np.minimum(wish, 0.5 * items).astype(int)
    dearness = np.log(price) - np.log(price).mean()

    utility = np.empty((users, items))
    bought = []
    for u in range(users):
        utility[u] = (
            0.55 * style @ taste[u]
            + 0.8 * likes_top[u, TOP_OF_LEAF[leaf]]
            + 0.3 * likes_leaf[u, leaf]
            + likes_brand[u, brand]
            + 1.4 * quality
            - thrift[u] * dearness
        )
        wanted = fame + 1.3 * utility[u] + rng.gumbel(size=items) * 1.2
        bought.append(np.sort(np.argsort(-wanted, kind="stable")[: amount[u]]))
    user = np.repeat(np.arange(users), amount)
    item = np.concatenate(bought)
    # Of what is bought, LIKED is worth more than 3.5 stars, from where ratings round to 4.
    worth_more = np.quantile(utility[user, item], 1 - LIKED)
    stars = 1 + 4 / (1 + np.exp(-0.75 * (utility - worth_more)) * 3 / 5)
    # Rounded, so that the last bit of a machine's arithmetic decides no rating.
    truth = np.round(stars, 4).astype(np.float32)
    noise = rng.normal(size=len(user)) * NOISE
    rating = np.clip(np.rint(truth[user, item] + noise), 1, 5).astype(np.int64)
    time = draw_times(rng, user, users)
    # Rows by user and time; equal times by identifier, so that the same shop is drawn every time.
    names = np.array([entry.id for entry in catalogue])
    order = np.lexsort((names[item], time, user))
    user_ids = [f"U{n:07d}" for n in rng.permutation(users) * 13 + 1000]
    return SyntheticShop(
        user_ids,
        catalogue,
        truth,
        user[order],
        item[order],
        rating[order],
        time[order],
        copies,
        style,
        taste,
        seed,
    )


def draw_items(rng: np.random.Generator, n: int):
    """leaf, brand, style (n, 6), quality, price, fame, copies of n items.

    The last 8% of the items nearly repeat other ones.
    """
    n_brands = max(6, n // 20)
    home = rng.integers(0, len(TOPS), size=n_brands)  # a brand lives in one department
    lean = rng.normal(size=(n_brands, len(STYLES))) * 0.6  # and has a style of its own
    leaf = rng.integers(0, len(LEAVES), size=n)
    at_home = [np.flatnonzero(home == top) for top in range(len(TOPS))]
    brand = np.array(
        [
            rng.choice(makers if len(makers) else n_brands)
            for makers in (at_home[TOP_OF_LEAF[i]] for i in leaf)
        ]
    )
    style = lean[brand] + rng.normal(size=(n, len(STYLES)))
    quality = rng.normal(size=n)
    price = np.exp(rng.normal(3.0, 0.7, size=n) + 0.2 * quality)
    fame = rng.normal(size=n) * 0.9
    copies = np.full(n, -1)
    last = np.arange(n - int(NEAR_DUPLICATES * n), n)
    source = rng.permutation(last[0] if len(last) else n)[: len(last)]
    copies[last] = source
    leaf[last], brand[last], fame[last] = leaf[source], brand[source], fame[source] - 0.3
    style[last] = style[source] + rng.normal(size=(len(last), len(STYLES))) * 0.05
    quality[last] = quality[source] + rng.normal(size=len(last)) * 0.05
    price[last] = price[source] * np.exp(rng.normal(size=len(last)) * 0.05)
    return leaf, brand, style, quality, np.round(price, 2), fame, copies


def draw_brands(rng: np.random.Generator, n: int) -> list[str]:
    """n different names of two or three syllables."""
    names: dict[str, None] = {}
    while len(names) < n:
        names["".join(rng.choice(SYLLABLES, size=rng.integers(2, 4))).capitalize()] = None
    return list(names)


def describe(
    rng: np.random.Generator, leaf, brand, style, price, copies, brand_names
) -> list[Item]:
    """The items as a shop lists them. A copy's title is its original's and a colour."""
    ids = rng.permutation(len(leaf)) * 7 + 1000
    words = rng.integers(0, 4, size=(len(leaf), 4))
    noun_of = [rng.choice(LEAVES[at][2].split(", ")) for at in leaf]
    items: list[Item] = []
    for n, (ident, at) in enumerate(zip(ids.tolist(), leaf.tolist(), strict=True)):
        top, name, _ = LEAVES[at]
        noun = noun_of[n if copies[n] < 0 else copies[n]]
        first, second = (adjective(style[n], place, words[n, place + 1]) for place in (0, 1))
        maker = brand_names[brand[n]]
        title = f"{maker} {first} {second} {noun} M{ident}"
        if copies[n] >= 0:
            title = f"{items[copies[n]].title} {COLOURS[words[n, 3] % len(COLOURS)]}"
        also = adjective(style[n], 0, words[n, 3])
        looks = f"{first} and {second}, for those who like {also} things".lower()
        text = f"{noun} by {maker}: {looks}. From {top}, {name}."
        items.append(
            Item(f"B{ident:07d}", title, maker, ((ROOT, top, name),), float(price[n]), text)
        )
    return items


def adjective(position: np.ndarray, place: int, choice: int) -> str:
    """One of four words for the place-th strongest style at a position (6,), low end or high."""
    strongest = int(np.argsort(-np.abs(position), kind="stable")[place])
    return STYLES[strongest][int(position[strongest] > 0)][choice]


def draw_times(rng: np.random.Generator, user: np.ndarray, users: int) -> np.ndarray:
    """(R,) seconds at midnight: each user is a customer for some part of the years 2010 to 2014."""
    start = rng.integers(0, 1200, size=users)
    stretch = rng.integers(60, 600, size=users)
    return (
        FIRST_DAY + start[user] + np.floor(rng.random(len(user)) * stretch[user]).astype(np.int64)
    ) * DAY


# Writing the shop in each spelling. Text is escaped as the published files have it.


def write(shop: SyntheticShop, folder: str | Path, spelling: str, compress: bool = True) -> None:
    """Write the shop to `folder` as one of FORMATS; compress: gzip the text formats.

    Sequence files carry identifiers, order, titles and categories; the others carry everything.
    Raises PageLLMError for another spelling.
    """
    if spelling not in FORMATS:
        raise PageLLMError(f"no format {spelling!r}; there are {', '.join(FORMATS)}")
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    if spelling == "parquet":
        pq.write_table(pa.Table.from_pylist(list(log_rows(shop))), folder / "interactions.parquet")
        pq.write_table(pa.Table.from_pylist(list(item_rows(shop))), folder / "items.parquet")
        return
    reviews, items = {
        "amazon2014": ("reviews_Synthetic.json", "meta_Synthetic.json"),
        "amazon2018": ("Synthetic.json", "meta_Synthetic.json"),
        "amazon2023": ("Synthetic.jsonl", "meta_Synthetic.jsonl"),
        "sequences": ("Synthetic.sequences.txt", "meta_Synthetic.titles.json"),
        "csv": ("interactions.csv", "items.csv"),
        "jsonl": ("interactions.jsonl", "items.jsonl"),
    }[spelling]
    ending = ".gz" if compress else ""
    opened = gzip.open if compress else open
    with opened(folder / (reviews + ending), "wt", encoding="utf-8", newline="") as file:
        if spelling == "csv":
            write_csv(file, log_rows(shop))
        elif spelling == "sequences":
            file.writelines(line + "\n" for line in sequence_lines(shop))
        else:
            rows = log_rows(shop) if spelling == "jsonl" else amazon_reviews(shop, spelling)
            file.writelines(json.dumps(row) + "\n" for row in rows)
    with opened(folder / (items + ending), "wt", encoding="utf-8", newline="") as file:
        if spelling == "csv":
            write_csv(
                file,
                ({**row, "categories": " > ".join(row["categories"])} for row in item_rows(shop)),
            )
        elif spelling == "jsonl":
            file.writelines(json.dumps(row) + "\n" for row in item_rows(shop))
        else:
            dump = repr if spelling == "amazon2014" else json.dumps  # 2014: Python literals
            file.writelines(dump(row) + "\n" for row in amazon_items(shop, spelling))


def write_csv(file, rows: Iterator[dict]) -> None:
    first = next(rows)
    writer = csv.DictWriter(file, first, lineterminator="\n")
    writer.writeheader()
    writer.writerow(first)
    writer.writerows(rows)


def log_rows(shop: SyntheticShop) -> Iterator[dict]:
    for review in shop.reviews():
        summary, text = review.text.split("\n")
        yield {
            "user_id": review.user,
            "item_id": review.item,
            "rating": review.rating,
            "timestamp": review.time,
            "summary": summary,
            "text": text,
        }


def item_rows(shop: SyntheticShop) -> Iterator[dict]:
    for item in shop.items:
        yield {
            "item_id": item.id,
            "title": item.title,
            "brand": item.brand,
            "categories": list(item.paths[0]),
            "price": item.price,
            "description": item.description,
        }


def sequence_lines(shop: SyntheticShop) -> Iterator[str]:
    for u, name in enumerate(shop.user_ids):
        yield " ".join([name, *(shop.items[i].id for i in shop.item[shop.user == u])])


def amazon_reviews(shop: SyntheticShop, spelling: str) -> Iterator[dict]:
    for review in shop.reviews():
        summary, text = (html.escape(part) for part in review.text.split("\n"))
        if spelling == "amazon2023":
            yield {
                "rating": review.rating,
                "title": summary,
                "text": text,
                "images": [],
                "asin": review.item,
                "parent_asin": review.item,
                "user_id": review.user,
                "timestamp": review.time * 1000,
                "helpful_vote": 0,
                "verified_purchase": True,
            }
            continue
        marks = {"helpful": [0, 0]} if spelling == "amazon2014" else {"verified": True}
        yield {
            "reviewerID": review.user,
            "asin": review.item,
            "reviewText": text,
            "overall": review.rating,
            "summary": summary,
            "unixReviewTime": review.time,
            **marks,
        }


def amazon_items(shop: SyntheticShop, spelling: str) -> Iterator[dict]:
    for item in shop.items:
        title, brand, text = (
            html.escape(part) for part in (item.title, item.brand, item.description)
        )
        path = [html.escape(name) for name in item.paths[0]]
        if spelling == "sequences":
            yield {"asin": item.id, "title": title, "categories": [path]}
        elif spelling == "amazon2014":
            yield {
                "asin": item.id,
                "title": title,
                "brand": brand,
                "price": item.price,
                "categories": [path],
                "description": text,
            }
        elif spelling == "amazon2018":
            yield {
                "category": path,
                "description": [text],
                "title": title,
                "brand": brand,
                "price": f"${item.price:,.2f}",
                "asin": item.id,
            }
        else:
            yield {
                "main_category": ROOT,
                "title": title,
                "description": [text],
                "price": item.price,
                "store": brand,
                "categories": path,
                "details": {},
                "parent_asin": item.id,
            }
