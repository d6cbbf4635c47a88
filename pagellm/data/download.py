"""Official Amazon review files into data/raw/<dataset>: resumed after a cut, size and gzip checked.

    pagellm download --dataset toys

A file is fetched into NAME.part and renamed when it is whole. The same command again goes on where
an interrupted download stopped. `prepare` calls this for a data set that has no raw files.
"""

import gzip
import http.client
import os
import urllib.request
import zlib
from dataclasses import dataclass
from pathlib import Path

from tqdm import tqdm

from pagellm.stage.command import main
from pagellm.stage.config import PageLLMError, check

__all__ = ["CATEGORIES", "Config", "SHORT_NAMES", "SOURCES", "download", "fetch", "official", "run"]


UCSD = "https://mcauleylab.ucsd.edu/public_datasets/data/"
# Release -> addresses of reviews and of metadata; {} is the category.
# 2014 and 2018: the 5-core reviews.
SOURCES = {
    "2014": (
        "https://snap.stanford.edu/data/amazon/productGraph/categoryFiles/reviews_{}_5.json.gz",
        "https://snap.stanford.edu/data/amazon/productGraph/categoryFiles/meta_{}.json.gz",
    ),
    "2018": (
        UCSD + "amazon_v2/categoryFilesSmall/{}_5.json.gz",
        UCSD + "amazon_v2/metaFiles2/meta_{}.json.gz",
    ),
    "2023": (
        UCSD + "amazon_2023/raw/review_categories/{}.jsonl.gz",
        UCSD + "amazon_2023/raw/meta_categories/meta_{}.jsonl.gz",
    ),
}
CATEGORIES = {
    "2014": """
        Amazon_Instant_Video Apps_for_Android Automotive Baby Beauty Books CDs_and_Vinyl
        Cell_Phones_and_Accessories Clothing_Shoes_and_Jewelry Digital_Music Electronics
        Grocery_and_Gourmet_Food Health_and_Personal_Care Home_and_Kitchen Kindle_Store
        Movies_and_TV Musical_Instruments Office_Products Patio_Lawn_and_Garden Pet_Supplies
        Sports_and_Outdoors Tools_and_Home_Improvement Toys_and_Games Video_Games""".split(),
    "2018": """
        AMAZON_FASHION All_Beauty Appliances Arts_Crafts_and_Sewing Automotive Books CDs_and_Vinyl
        Cell_Phones_and_Accessories Clothing_Shoes_and_Jewelry Digital_Music Electronics Gift_Cards
        Grocery_and_Gourmet_Food Home_and_Kitchen Industrial_and_Scientific Kindle_Store
        Luxury_Beauty Magazine_Subscriptions Movies_and_TV Musical_Instruments Office_Products
        Patio_Lawn_and_Garden Pet_Supplies Prime_Pantry Software Sports_and_Outdoors
        Tools_and_Home_Improvement Toys_and_Games Video_Games""".split(),
    "2023": """
        All_Beauty Amazon_Fashion Appliances Arts_Crafts_and_Sewing Automotive Baby_Products
        Beauty_and_Personal_Care Books CDs_and_Vinyl Cell_Phones_and_Accessories
        Clothing_Shoes_and_Jewelry Digital_Music Electronics Gift_Cards Grocery_and_Gourmet_Food
        Handmade_Products Health_and_Household Health_and_Personal_Care Home_and_Kitchen
        Industrial_and_Scientific Kindle_Store Magazine_Subscriptions Movies_and_TV
        Musical_Instruments Office_Products Patio_Lawn_and_Garden Pet_Supplies Software
        Sports_and_Outdoors Subscription_Boxes Tools_and_Home_Improvement Toys_and_Games Unknown
        Video_Games""".split(),
}
# Short name -> category and the release that the paper used, as far as its tables tell.
SHORT_NAMES = {
    "toys": ("Toys_and_Games", "2014"),
    "beauty": ("Beauty", "2014"),
    "sports": ("Sports_and_Outdoors", "2014"),
    "instruments": ("Musical_Instruments", "2018"),
    "luxury": ("Luxury_Beauty", "2018"),
    "scientific": ("Industrial_and_Scientific", "2018"),
    "food": ("Grocery_and_Gourmet_Food", "2018"),
    "gift_cards": ("Gift_Cards", "2018"),
    "all_beauty": ("All_Beauty", "2018"),
}
BLOCK = 1 << 20
ATTEMPTS = 4  # connections made for one file before giving up
TIMEOUT = 30.0  # seconds without a byte


@dataclass(frozen=True, kw_only=True)
class Config:
    """Fetch the official files of one category."""

    dataset: str = ""  # toys, beauty, sports, instruments, luxury, scientific, food, gift_cards,
    # all_beauty, or the official name of any other category
    release: str = ""  # 2014, 2018 or 2023; empty: the paper's, for other categories 2018,
    # 2014, 2023
    raw: str = ""  # directory for the files; empty: <data>/raw/<dataset>
    data: str = "data"  # directory of prepared data sets

    def __post_init__(self):
        check(self, release=(self.release in ("", *SOURCES), "2014, 2018 or 2023"))


def official(dataset: str, release: str = "") -> tuple[str, str] | None:
    """(category, release) of an official data set; None for a name that is not one of theirs.

    Raises PageLLMError for a release that does not have the category.
    """
    category, usual = SHORT_NAMES.get(dataset, (dataset, ""))
    releases = [year for year in ("2018", "2014", "2023") if category in CATEGORIES[year]]
    if not releases:
        return None
    if release and release not in releases:
        raise PageLLMError(
            f"release {release} has no {category}; there is {', '.join(sorted(releases))}"
        )
    return category, release or usual or releases[0]


def download(category: str, release: str, dest: str | Path) -> list[Path]:
    """Fetch reviews and metadata of a category into the directory dest; present files stay.

    Returns the two paths. Raises PageLLMError when a file cannot be fetched, and says where to put
    it.
    """
    dest = Path(dest)
    dest.mkdir(parents=True, exist_ok=True)
    urls = [pattern.format(category) for pattern in SOURCES[release]]
    paths = [dest / url.rsplit("/", 1)[1] for url in urls]
    # Metadata first: once the reviews are there, everything is.
    for url, path in reversed(list(zip(urls, paths, strict=True))):
        fetch(url, path)
    return paths


def fetch(url: str, path: Path) -> None:
    """Fetch one gzip file to `path`, resuming from `path`.part. Does nothing if `path` is there.

    Raises PageLLMError when there is no connection, the server lacks the file, or the result is not
    a whole gzip file.
    """
    if path.exists():
        return
    part = path.with_name(path.name + ".part")
    by_hand = f"  Fetch {url}\n  on a machine that can, and put {path.name} into {path.parent}"
    whole, trouble = False, ""
    for _ in range(ATTEMPTS):
        try:
            whole = transfer(url, part)
            trouble = "the connection was cut"
        except urllib.error.HTTPError as error:
            raise PageLLMError(
                f"{url}: the server says {error.code} {error.reason}\n{by_hand}"
            ) from error
        except urllib.error.URLError as error:
            trouble = str(error.reason)
            break  # no connection at all: waiting for three more timeouts helps nobody
        except (OSError, http.client.HTTPException) as error:
            trouble = str(error) or type(error).__name__
        if whole:
            break
    if not whole:
        begun = (
            f"; {part.name} is kept, and the same command goes on from there"
            if part.exists()
            else ""
        )
        raise PageLLMError(f"cannot fetch {path.name}: {trouble}{begun}\n{by_hand}")
    if not is_whole_gzip(part):
        part.unlink(missing_ok=True)
        raise PageLLMError(
            f"{url}: not a whole gzip file came; it was removed. Try again, or\n{by_hand}"
        )
    os.replace(part, path)


def transfer(url: str, part: Path) -> bool:
    """One connection: append to `part` what it lacks. Returns whether it is whole by its size."""
    have = part.stat().st_size if part.exists() else 0
    headers = {"User-Agent": "pagellm", "Accept-Encoding": "identity"}
    if have:
        headers["Range"] = f"bytes={have}-"
    try:
        response = urllib.request.urlopen(
            urllib.request.Request(url, headers=headers), timeout=TIMEOUT
        )
    except urllib.error.HTTPError as error:
        if error.code != 416:  # 416: there is nothing after what we have
            raise
        if total_after(error.headers.get("Content-Range")) == have:
            return True
        part.unlink()  # longer than the file: begin again
        return False
    with response:
        if response.status != 206:
            have = 0  # the server sends the whole file, whatever was asked for
        elif not (response.headers.get("Content-Range") or "").startswith(f"bytes {have}-"):
            part.unlink()  # another piece than the one asked for: begin again
            return False
        length = response.headers.get("Content-Length")
        total = have + int(length) if length else None
        bar = tqdm(
            desc=f"  {part.stem}", total=total, initial=have, unit="B", unit_scale=True, delay=1
        )
        with bar, open(part, "ab" if have else "wb") as file:
            while block := response.read(BLOCK):
                file.write(block)
                bar.update(len(block))
    return total is None or part.stat().st_size == total


def total_after(content_range: str | None) -> int | None:
    """The size in a "bytes */SIZE" header."""
    size = (content_range or "").rpartition("/")[2]
    return int(size) if size.isdigit() else None


def is_whole_gzip(path: Path) -> bool:
    """Whether the file unpacks to its end, checksum included."""
    try:
        with gzip.open(path, "rb") as file:
            while file.read(BLOCK):
                pass
        return path.stat().st_size > 0
    except (OSError, EOFError, zlib.error):
        return False


def run(config: Config) -> list[Path]:
    """Fetch the files of one data set; returns their paths."""
    known = official(config.dataset, config.release)
    if known is None:
        raise PageLLMError(
            f"{config.dataset!r} has no official files; there are {', '.join(SHORT_NAMES)}\n"
            f"  and each release's categories, e.g. {', '.join(CATEGORIES['2018'][:4])}, ..."
        )
    paths = download(*known, config.raw or Path(config.data) / "raw" / config.dataset)
    print("\n".join(f"{path}: {path.stat().st_size:,} bytes" for path in paths), flush=True)
    return paths


if __name__ == "__main__":
    raise SystemExit(main(Config, run, "pagellm download"))
