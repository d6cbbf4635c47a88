"""What a shop knows as text: the four kinds of prompt that pre-training reads."""

import shutil
from array import array
from collections.abc import Iterable, Iterator
from pathlib import Path

import numpy as np

from pagellm.data.shop import Catalogue, Shop
from pagellm.model.prompts import Example, Prompts
from pagellm.stage import dist
from pagellm.stage.files import atomic

__all__ = ["Corpus", "KINDS", "Tokens", "texts"]


KINDS = ("contents", "first_order", "second_order", "interaction")


def catalogue_texts(c: Catalogue) -> Iterator[tuple[int, str, str]]:
    """(item, field, text) of every text in the catalogue."""
    for item in range(len(c)):
        for field, text in (
            ("title", c.title[item]),
            ("brand", c.brand[item]),
            ("category", ", ".join(c.categories[item])),
            ("description", c.description[item]),
        ):
            if text:
                yield item, field, text


def review_texts(shop: Shop) -> Iterator[tuple[int, int, str]]:
    """(user, item, review) of the train rows that have a review."""
    return ((user, item, text) for user, item, text in zip(*shop.reviews(), strict=True) if text)


def texts(shop: Shop) -> Iterator[str]:
    """All text that the words are learnt from."""
    yield from (text for _, _, text in catalogue_texts(shop.catalogue))
    yield from (text for _, _, text in review_texts(shop))
    yield from (
        f" {word}:" for word in ("title", "brand", "category", "description", "history", "rating")
    )


class Tokens:
    """Many texts as token ids in two files, which are mapped into memory instead of read.

    `ids` holds all texts one after another; text i is ids[start[i] : start[i + 1]].
    """

    def __init__(self, path: Path):
        self.ids, self.start = (
            np.load(path / f"{name}.npy", mmap_mode="r") for name in ("ids", "start")
        )

    def __getitem__(self, index: int) -> list[int]:
        return self.ids[self.start[index] : self.start[index + 1]].tolist()

    @staticmethod
    def write(path: Path, rows: Iterable[list[int]]) -> None:
        """Write both files. `start` is written last: where it exists, both are complete."""
        ids, start = array("i"), array("q", [0])
        for row in rows:
            ids.extend(row)
            start.append(len(ids))
        ids.append(0)  # because an empty file cannot be mapped
        path.mkdir(parents=True, exist_ok=True)
        for name, values, kind in (("ids", ids, np.int32), ("start", start, np.int64)):
            with atomic(path / f"{name}.npy") as beside, open(beside, "wb") as file:
                # np.save would raise an error without an error number on a full disk
                table = np.frombuffer(values, kind)
                np.lib.format.write_array_header_1_0(
                    file, np.lib.format.header_data_from_array_1_0(table)
                )
                file.write(table.data)

    @staticmethod
    def remove(path: Path) -> None:
        """Remove the directory, `start` first."""
        (path / "start.npy").unlink(missing_ok=True)
        shutil.rmtree(path, ignore_errors=True)


class Corpus:
    """The four kinds of prompt over one shop. `draw` makes one Example of a kind.

    ordered  interaction prompts list a user's items in order of time; False: in random order
    path     directory for the token ids of all texts; the main process fills it once
    """

    def __init__(self, shop: Shop, prompts: Prompts, ordered: bool, path: Path):
        self.shop, self.prompts, self.ordered = shop, prompts, ordered
        c = shop.catalogue
        contents, reviews = list(catalogue_texts(c)), list(review_texts(shop))
        if dist.is_main() and not (path / "start.npy").exists():
            Tokens.write(
                path, (prompts.tokens(text)[: prompts.room] for _, _, text in (*contents, *reviews))
            )
        dist.barrier()
        self.tokens = Tokens(path)
        self.contents = [(item, field) for item, field, _ in contents]
        self.reviews = np.array([(user, item) for user, item, _ in reviews], np.int64).reshape(
            -1, 2
        )
        groups: dict[tuple[str, str], list[int]] = {}
        for item in range(len(c)):
            for field, names in (("category", c.categories[item]), ("brand", (c.brand[item],))):
                for name in names:
                    if name:
                        groups.setdefault((field, name), []).append(item)
        self.groups = [
            (field, name, np.array(items))
            for (field, name), items in groups.items()
            if len(items) > 1
        ]
        self.train = shop.csr("train")
        self.choosers = np.flatnonzero(self.train.counts() > 1)
        self.sizes = {
            "contents": len(self.contents),
            "first_order": len(self.reviews),
            "second_order": len(self.groups),
            "interaction": len(self.choosers),
        }

    def draw(self, kind: str, rng: np.random.Generator) -> Example:
        """A random Example of one of KINDS."""
        index = int(rng.integers(self.sizes[kind]))
        if kind == "contents":
            return self.prompts.contents(*self.contents[index], self.tokens[index])
        if kind == "first_order":
            user, item = self.reviews[index].tolist()
            user, item = self.reviews[index].tolist()
            return self.prompts.first_order(user, item, self.tokens[len(self.contents) + index])
        if kind == "second_order":
            field, name, items = self.groups[index]
            chunk = rng.permutation(items)[:32].tolist()
            backwards = rng.random() < 0.5
            return (
                self.prompts.second_order_reverse(field, name, chunk[:8])
                if backwards
                else self.prompts.second_order(field, name, chunk)
            )
        chooser = int(self.choosers[index])
        chosen, _ = self.train.of(chooser)
        return self.prompts.interaction(
            chooser, (chosen if self.ordered else rng.permutation(chosen)).tolist()
        )
