"""Search over exported item rows: the largest h_u . e_i, exactly, or by a graph.

Reads   runs/<run>/export-<policy>          what pagellm.serving.export wrote
Writes  nothing; with --index hnsw  runs/<run>/export-<policy>/<name>.hnsw and .hnsw.json

    pagellm search --dataset synthetic                       exact: queries a second, size
    pagellm search --index hnsw                              recall@k of the graph beside it
    pagellm search --index hnsw --copies 30                  the same for a catalogue that is 30
                                                             times as large: see `grown`

    index = Exact.open("runs/toys/export-ppo")               or Index.open, for the graph
    items, score = index.query(h, 100)                       (B, 100) ids of the shop, float32

Exact search is a product of matrices. It needs numpy alone, and up to some ten thousands of items
it is the faster of the two (docs/results/serving.md measures up to where).

The graph is faiss's HNSW (Malkov and Yashunin, arXiv 1603.09320). HNSW finds the nearest row, not
the largest product. So every row gets one more dimension that makes all rows equally long; the
nearest row is then the one with the largest product (Bachrach et al., RecSys 2014). It needs the
extra [search].
"""

import json
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import TypeVar

import numpy as np

from pagellm.serving.embeddings import Embeddings
from pagellm.serving.sources import POLICIES, check_policy
from pagellm.stage import hints
from pagellm.stage.command import main
from pagellm.stage.config import PageLLMError, check
from pagellm.stage.files import atomic, write_json
from pagellm.stage.run import StageConfig, file_id

__all__ = ["Config", "Exact", "Index", "exact", "grown", "run"]


T = TypeVar("T")


@dataclass(frozen=True, kw_only=True)
class Config(StageConfig):
    """Time exact search over an export's item rows; build an HNSW index, and compare both."""

    index: str = "exact"  # exact, or hnsw: also build the graph, keep it, and measure it beside
    # exact search
    policy: str = ""  # whose export is read: ppo or sft; empty: ppo's if it is there, else sft's
    k: int = 100  # items wanted for each user
    degree: int = 32  # links of each item in the graph
    build: int = 200  # items that HNSW visits to find the links of a new one (efConstruction)
    search: str = "100,200,400"  # items that HNSW visits in a query (efSearch), comma-separated;
    # each is measured
    users: int = 1000  # number of queries, which are drawn from the export's users
    copies: int = 1  # make the catalogue so many times as large, to see how search scales
    repeats: int = 3  # timings of each search; the fastest counts

    def __post_init__(self):
        super().__post_init__()
        looked = self.search.split(",")
        check(
            self,
            policy=check_policy(self.policy),
            index=(self.index in ("exact", "hnsw"), "exact or hnsw"),
            k=(self.k > 0, "1 or more"),
            degree=(self.degree > 1, "2 or more"),
            build=(self.build > 0, "1 or more"),
            search=(
                all(x.isdigit() and int(x) > 0 for x in looked),
                "whole numbers above 0, comma-separated",
            ),
            users=(self.users > 0, "1 or more"),
            copies=(self.copies > 0, "1 or more"),
            repeats=(self.repeats > 0, "1 or more"),
        )


def library():
    """faiss. Raises PageLLMError where it is not installed."""
    try:
        import faiss
    except ImportError:
        raise PageLLMError(
            "approximate search needs faiss, which is not installed\n"
            f"  Install it with: {hints.install('search')}"
        ) from None
    return faiss


class Exact:
    """Exact search over item rows (N, d) with the shop's ids: every item is scored."""

    def __init__(self, rows: np.ndarray, ids: list[str]):
        if len(rows) != len(ids):
            raise PageLLMError(
                f"{hints.counted(len(rows), 'row')} and {hints.counted(len(ids), 'id')}: want "
                "one id a row"
            )
        self.rows, self.ids = rows, np.array(ids, dtype=object)

    @classmethod
    def open(cls, folder: str | Path, name: str = "item_token") -> "Exact":
        """The item rows of an export. Raises PageLLMError if they are missing or damaged."""
        source = Embeddings(folder)
        return cls(source.matrix(name), list(source.items))

    def query(self, h: np.ndarray, k: int) -> tuple[np.ndarray, np.ndarray]:
        """ids (B, k) object and h . e (B, k) float32, best first, for h (B, d).

        Past the last item the id is "" and the product -inf.
        """
        if h.ndim != 2 or h.shape[1] != self.rows.shape[1]:
            raise PageLLMError(
                f"queries of shape {h.shape}: these rows want (B, {self.rows.shape[1]})"
            )
        place = exact(self.rows, h, min(k, len(self.rows)))
        score = np.take_along_axis(h @ self.rows.T, place, 1).astype(np.float32)
        lacking = ((0, 0), (0, k - place.shape[1]))
        ids = np.pad(self.ids[place], lacking, constant_values="")
        return ids, np.pad(score, lacking, constant_values=-np.inf)


class Index:
    """An HNSW graph over item rows (N, d), and the shop's ids of its rows.

    longest  the largest |e|^2 of the rows
    """

    def __init__(self, graph, ids: list[str], longest: float):
        self.graph, self.ids, self.longest = graph, np.array(ids, dtype=object), longest

    @classmethod
    def build(cls, rows: np.ndarray, ids: list[str], degree: int = 32, build: int = 200) -> "Index":
        """rows (N, d) float32. degree: links of an item. build: items visited to find these."""
        if len(rows) != len(ids):
            raise PageLLMError(
                f"{hints.counted(len(rows), 'row')} and {hints.counted(len(ids), 'id')}: want "
                "one id a row"
            )
        faiss = library()
        square = (rows.astype(np.float64) ** 2).sum(1)
        longest = float(square.max(initial=0.0))
        graph = faiss.IndexHNSWFlat(rows.shape[1] + 1, degree)
        graph.hnsw.efConstruction = build
        graph.add(
            np.column_stack([rows, np.sqrt(np.maximum(longest - square, 0.0))]).astype(np.float32)
        )
        return cls(graph, ids, longest)

    def query(self, h: np.ndarray, k: int, looked: int = 0) -> tuple[np.ndarray, np.ndarray]:
        """ids (B, k) object and h . e (B, k) float32, best first, for h (B, d).

        looked  items that the search visits, at least k; 0: 2 k
        Past what was found the id is "" and the product -inf.
        """
        place, score = self.places(h, k, looked)
        return np.where(place >= 0, self.ids[np.maximum(place, 0)], ""), score

    def places(self, h: np.ndarray, k: int, looked: int = 0) -> tuple[np.ndarray, np.ndarray]:
        """As `query`, with row numbers (B, k) int64 instead of ids, -1 past what was found."""
        faiss = library()
        if h.ndim != 2 or h.shape[1] + 1 != self.graph.d:
            raise PageLLMError(
                f"queries of shape {h.shape}: this index wants (B, {self.graph.d - 1})"
            )
        how = faiss.SearchParametersHNSW(efSearch=max(k, looked or 2 * k))
        distance, place = self.graph.search(
            np.column_stack([h, np.zeros(len(h))]).astype(np.float32), k, params=how
        )
        # In the space with one more dimension, |h - e|^2 = |h|^2 + longest - 2 h.e.
        score = ((h.astype(np.float64) ** 2).sum(1, keepdims=True) + self.longest - distance) / 2
        return place, np.where(place >= 0, score, -np.inf).astype(np.float32)

    def save(self, folder: str | Path, name: str, about: dict) -> int:
        """Write <name>.hnsw and <name>.hnsw.json into `folder`. Returns the graph's bytes."""
        path = Path(folder) / f"{name}.hnsw"
        with atomic(path) as beside:
            library().write_index(self.graph, str(beside))
        write_json(
            path.with_suffix(".hnsw.json"), about | {"id": file_id(path), "longest": self.longest}
        )
        return path.stat().st_size

    @classmethod
    def open(cls, folder: str | Path, name: str = "item_token") -> "Index":
        """Read an index.

        Raises PageLLMError if it is missing, damaged, or older than the export beside it.
        """
        rows, path = Embeddings(folder), Path(folder) / f"{name}.hnsw"
        try:
            about = json.loads(path.with_suffix(".hnsw.json").read_text())
            same = (
                about["id"] == file_id(path)
                and about["rows"] == rows.manifest["sha256"][f"{name}.npy"]
            )
        except (OSError, ValueError, KeyError) as error:
            raise PageLLMError(
                f"no index in {path} ({type(error).__name__})\n"
                f"  Make it with: {hints.command('search')}"
            ) from None
        if not same:
            raise PageLLMError(
                f"{path} is damaged or not of the rows beside it\n"
                f"  Make it anew with: {hints.command('search')}"
            )
        return cls(library().read_index(str(path)), list(rows.items), about["longest"])


def exact(rows: np.ndarray, h: np.ndarray, k: int, block: int = 256) -> np.ndarray:
    """(B, k) rows with the largest h . e, best first. rows (N, d), h (B, d). Scores every item."""
    out = []
    for at in range(0, len(h), block):
        score = h[at : at + block] @ rows.T
        best = (
            np.argpartition(-score, k - 1, axis=1)[:, :k]
            if k < len(rows)
            else np.argsort(-score, axis=1)
        )
        out.append(
            np.take_along_axis(best, np.argsort(-np.take_along_axis(score, best, 1), axis=1), 1)
        )
    return np.concatenate(out)


def grown(rows: np.ndarray, copies: int, seed: int = 0) -> np.ndarray:
    """(N copies, d): the rows, and for each of them copies - 1 made-up neighbours.

    A neighbour is moved at random by a tenth of each dimension's standard deviation. This stands in
    for a larger catalogue with the same clusters; no shop has these rows.
    """
    rng = np.random.Generator(np.random.Philox(key=seed))
    more = np.tile(rows, (copies - 1, 1))
    return np.concatenate(
        [rows, more + 0.1 * rows.std(0) * rng.standard_normal(more.shape, dtype=np.float32)]
    )


def fastest(call: Callable[[], T], repeats: int) -> tuple[float, T]:
    """Seconds of the fastest of some calls, and what the last one returned."""
    seconds, out = [], None
    for _ in range(repeats):
        started = time.perf_counter()
        out = call()
        seconds.append(time.perf_counter() - started)
    assert out is not None
    return min(seconds), out


def run(config: Config) -> list[dict]:
    """Print and return one record for exact search and, for hnsw, each number of items visited."""
    names = [f"export-{name}" for name in ([config.policy] if config.policy else POLICIES)]
    folders = [config.stage(name) for name in names]
    folder = next((f for f in folders if (f / "manifest.json").exists()), None)
    if folder is None:
        raise PageLLMError(
            f"no export in {' or '.join(map(str, folders))}\n"
            f"  Make it with: {config.make('export')}" + hints.other_runs(folders[0].parent)
        )
    source = Embeddings(folder)
    rows, users = source.matrix("item_token"), source.matrix("user_content")
    rng = np.random.Generator(np.random.Philox(key=config.seed))
    h = users[np.sort(rng.permutation(len(users))[: config.users])]
    ids = list(source.items)
    if config.copies > 1:
        rows = grown(rows, config.copies, config.seed)
        ids = [f"{name}/{copy}" if copy else name for copy in range(config.copies) for name in ids]
    if config.k > len(rows):
        raise PageLLMError(f"k={config.k}: the export has {hints.counted(len(rows), 'item')}")
    seconds, true = fastest(lambda: exact(rows, h, config.k), config.repeats)
    records = [record("exact", np.ones(len(h)), None, len(h) / seconds, rows.nbytes)]
    built = ""
    if config.index == "hnsw":
        more, built = with_graph(config, folder, source, rows, ids, h, true)
        records += more
    made_up = (
        f" ({config.copies} times the catalogue, made up; kept nowhere)"
        if config.copies > 1
        else ""
    )
    print(
        f"{folder}: {hints.counted(len(rows), 'item')}{made_up} of {rows.shape[1]} dimensions, "
        f"{hints.counted(len(h), 'user')}, "
        f"k={config.k}{built}"
    )
    print(f"\n{'':<24}{'recall@' + str(config.k):<28}{'queries/s':>10}{'MB':>8}")
    for r in records:
        span = f"{r['recall']:.4f} [{r['low']:.4f}, {r['high']:.4f}]"
        print(f"{r['search']:<24}{span:<28}{r['qps']:>10,.0f}{r['bytes'] / 1e6:>8.1f}")
    return records


def with_graph(
    config: Config,
    folder: Path,
    source: Embeddings,
    rows: np.ndarray,
    ids: list[str],
    h: np.ndarray,
    true: np.ndarray,
) -> tuple[list[dict], str]:
    """Build the graph and measure it; -> a record for each of config.search, and words about it.

    A graph of the export's own rows is kept beside them.

    rows (N, d), ids (N,)    h (B, d) queries    true (B, k) rows that exact search finds
    """
    library().omp_set_num_threads(1)
    rng = np.random.Generator(np.random.Philox(key=config.seed))
    started = time.perf_counter()
    index = Index.build(rows, ids, config.degree, config.build)
    built = time.perf_counter() - started
    if config.copies == 1:
        about = {
            "rows": source.manifest["sha256"]["item_token.npy"],
            "degree": config.degree,
            "build": config.build,
        }
        size = index.save(folder, "item_token", about)
    else:
        size = library().serialize_index(index.graph).nbytes
    records = []
    for looked in dict.fromkeys(max(int(x), config.k) for x in config.search.split(",")):
        seconds, (place, _) = fastest(
            lambda looked=looked: index.places(h, config.k, looked),  # type: ignore[misc]
            config.repeats,
        )
        hits = [len(np.intersect1d(a, b)) for a, b in zip(place, true, strict=True)]
        recall = np.array(hits) / config.k
        records.append(record(f"HNSW, {looked} looked at", recall, rng, len(h) / seconds, size))
    return records, f", one thread; built in {built:.1f} s"


def record(
    search: str, recall: np.ndarray, rng: np.random.Generator | None, qps: float, size: int
) -> dict:
    """One line of the table: mean recall of the queries (n,) with its bootstrap 95% interval.

    rng  None: every query has the same recall, so there is nothing to draw
    """
    boot = recall
    if rng is not None:
        boot = recall[rng.integers(len(recall), size=(1000, len(recall)))].mean(1)
    return {
        "search": search,
        "recall": float(recall.mean()),
        "low": float(np.quantile(boot, 0.025)),
        "high": float(np.quantile(boot, 0.975)),
        "qps": qps,
        "bytes": size,
    }


if __name__ == "__main__":
    sys.exit(main(Config, run, "pagellm search"))
