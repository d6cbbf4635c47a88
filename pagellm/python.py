"""What `import pagellm` offers: prepare, fit, load, a model's pages and scores, and cards of pages.

    import pagellm

    data = pagellm.prepare(orders, items=items, dataset="autumn")   # tables of any library
    model = pagellm.fit(data, stages="sft")                         # or load("autumn"), later
    pages = model.pages(users=["C00001"], k=20, price_max=30)       # an Arrow table
    pagellm.cards(pages)                                            # what a notebook shows of them
    table = model.evaluate(versus="ALS")                            # an Arrow table, with intervals

Nothing passes between these calls but directories, and they are those of the command line:
data/<dataset> and runs/<run>/<stage>. So either side carries on what the other began, and finds the
same presets. A stage that is done says so; one that was interrupted goes on where it stopped.

Tables come in through Arrow's stream interface, and go out as `pyarrow.Table`, which pandas, polars
and DuckDB read the same way: `pandas.DataFrame.from_arrow(pages)`, `polars.from_arrow(pages)`.

Errors that you can correct are `pagellm.PageLLMError`. torch is loaded by the first call that needs
it, not by the import.
"""

import json
import math
import operator
import sys
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

from pagellm.stage import hints
from pagellm.stage.command import Interrupted, explain, handled_signals
from pagellm.stage.config import PageLLMError, as_words, parse
from pagellm.stage.keywords import in_python
from pagellm.stage.order import STAGES, in_order, reads

if TYPE_CHECKING:  # these load torch or Arrow
    import numpy as np
    import pyarrow as pa

    from pagellm.data.arrow import ArrowStream
    from pagellm.serving.cards import Cards
    from pagellm.serving.recommender import Ask, Recommender

__all__ = ["Data", "Model", "cards", "fit", "load", "prepare"]


LOG, ITEMS = "log.parquet", "items.parquet"  # what `prepare` keeps of tables, in data/raw/<dataset>
Event = str | tuple[str, float]  # an item id, or an item id with its rating


@dataclass(frozen=True)
class Data:
    """A prepared data set: the directory <data>/<dataset>, and what `prepare` noted about it."""

    dataset: str
    data: str = "data"

    @property
    def path(self) -> Path:
        """The directory that holds it."""
        return Path(self.data) / self.dataset

    @property
    def source(self) -> dict[str, Any]:
        """source.json: the files read, and the counts before and after each filter."""
        from pagellm.data.shop import source

        return source(self.path)

    def __repr__(self) -> str:
        counts = self.source["counts"]
        return (
            f"Data({str(self.path)!r}: {hints.counted(counts['users'], 'user')}, "
            f"{hints.counted(counts['items'], 'item')}, "
            f"{hints.counted(counts['interactions'], 'row')})"
        )


def prepare(
    table: "ArrowStream | Mapping[str, Sequence] | str | Path | None" = None,
    *,
    items: "ArrowStream | Mapping[str, Sequence] | str | Path | int | None" = None,
    dataset: str = "",
    data: str | Path = "data",
    **options: Any,
) -> Data:
    """Filter, number and split a log of interactions: `pagellm prepare`.

    table    the log, with a user and an item column: a table of pandas, polars, DuckDB or Arrow,
             or the path of a file or directory. None: the files of data/raw/<dataset>
    items    the item table, of the same kinds; None: none, or what lies beside the log. A number:
             items of the synthetic shop
    dataset  the data set's name; empty: "shop", or "synthetic" where there is no table
    data     directory of prepared data sets
    options  those of `pagellm prepare`: split="temporal", user_column="customer", k_core=3

    A table is kept in <data>/raw/<dataset>/log.parquet, its items in items.parquet beside it.
    Raises PageLLMError for what cannot be read, and where other data have that name.
    """
    from pagellm.data import prepare as stage

    dataset = dataset or ("synthetic" if table is None else "shop")
    told = {"dataset": dataset, "data": str(data)}
    if isinstance(items, int):
        options, items = options | {"items": items}, None
    if table is None and items is not None:
        raise PageLLMError("items= without a table; give the log too")
    if isinstance(table, str) and "://" in table and items is None:
        told["raw"] = table
    elif isinstance(table, str | Path):
        told |= files_of(Path(table), items)
    elif table is not None:
        told |= kept_tables(table, items, dataset, Path(data) / "raw" / dataset)
    if twice := sorted((told.keys() - {"dataset", "data"}) & options.keys()):
        raise PageLLMError(f"{', '.join(twice)}: the table decides; leave it out")
    config = configured(stage.Config, "prepare", told | options)
    with as_a_command("prepare", stage.Config):
        stage.run(config)
    return Data(dataset, str(data))


def files_of(table: Path, items: Any) -> dict[str, str]:
    """The options that name files: a directory, or a log and perhaps an item table."""
    table = table.expanduser()
    if not table.exists():
        raise PageLLMError(f"{table}: no such file or directory")
    if not (items is None or isinstance(items, str | Path)):
        raise PageLLMError("items: the log is a path, so want a path here too")
    told = {"raw": str(table if table.is_dir() else table.parent)}
    if table.is_file():
        told["review_files"] = table.name
        told["item_files"] = "none"
    if items is not None:
        told["item_files"] = str(Path(items).expanduser().absolute())
    return told


def kept_tables(table: Any, items: Any, dataset: str, folder: Path) -> dict[str, str]:
    """Keep both tables as raw files -> the options that name these files."""
    from pagellm.data.arrow import is_kept, keep, table_of

    if dataset == "synthetic":
        raise PageLLMError("dataset='synthetic' is the made-up shop; give the table another name")
    log = table_of(table, "table")
    if isinstance(items, str | Path):
        raise PageLLMError("items: the log is a table, so want a table here too")
    about = None if items is None else table_of(items, "items")
    # What a failed call kept is nobody's yet.
    replace = not (folder.parent.parent / dataset / "source.json").exists()
    if about is None and (folder / ITEMS).exists() and replace and is_kept(folder / ITEMS):
        (folder / ITEMS).unlink()
    if about is None and (folder / ITEMS).exists():
        raise PageLLMError(
            f"{folder / ITEMS} holds the item table of an earlier call\n"
            "  Give items= again, or choose another dataset=."
        )
    if about is not None and not replace and (folder / LOG).exists():
        if not (folder / ITEMS).exists():
            raise PageLLMError(
                f"{dataset} was prepared without an item table\n"
                "  Leave items= out, or choose another dataset=."
            )
    keep(log, folder / LOG, replace)
    if about is not None:
        keep(about, folder / ITEMS, replace)
    return {"review_files": LOG} | ({} if about is None else {"item_files": ITEMS})


def fit(
    data: "Data | str",
    *,
    stages: str | Sequence[str] = "",
    minutes: float | None = None,
    run: str = "",
    runs: str | Path = "runs",
    **options: Any,
) -> "Model":
    """Train: run stages, those first that they need, and load what they made.

    data     what `prepare` returned, or the name of a prepared data set in ./data
    stages   the last stages wanted: "sft", "ppo", "compose", or several, as in "ppo,compose";
             empty: those that pay, if minutes are given, else compose
    minutes  first choose options and stages on validation for about so long (`pagellm tune`).
             Without `stages` this is `pagellm fit`, which ends with a table of test rows
    run      name of the run; empty: the data set's name
    runs     directory of runs
    options  a stage's own by its name, ppo={"kl_coef": 0.02, "epochs": 1}; those that every stage
             has by theirs, seed=1, device="cuda"

    A stage that is done is not run again. Ctrl-C keeps a checkpoint; the same call carries on.
    Raises PageLLMError as the command line does.
    """
    data = Data(data) if isinstance(data, str) else data
    common, own = shared_and_own(options)
    told = {"dataset": data.dataset, "data": str(data.data), "runs": str(runs), "run": run}
    told |= common
    if minutes is not None and not stages:
        if own:
            raise PageLLMError(
                f"{', '.join(own)}: chosen within minutes={minutes:g}; name stages= to set some"
            )
        run_verb("fit", "pagellm.pipeline", told | {"minutes": minutes})
        return load(run or data.dataset, runs=runs, device=common.get("device", "auto"))

    def needs(name: str) -> tuple[str, ...]:
        """What a stage reads; its options are read here, before the first stage runs."""
        config = configured(module_of(name).Config, name, told | own.get(name, {}), quiet=True)
        return reads(name, config)

    wanted = in_order(stages or "compose", needs)
    if idle := [name for name in own if name not in wanted]:
        raise PageLLMError(
            f"{', '.join(idle)}: options of a stage that is not run; {', '.join(wanted)} "
            f"{'is' if len(wanted) == 1 else 'are'}\n  Name the stage in stages=, or leave its "
            "options out."
        )
    if minutes is not None and not (Path(runs) / (run or data.dataset) / "preset").exists():
        run_verb("tune", "pagellm.tune", told | {"minutes": minutes})
    for name in wanted:
        run_verb(name, f"pagellm.{name}", told | own.get(name, {}))
    return load(run or data.dataset, runs=runs, device=common.get("device", "auto"))


def run_verb(verb: str, module: str, options: Mapping[str, Any]) -> None:
    """Run a command with these options."""
    import importlib

    loaded = importlib.import_module(module)
    config = configured(loaded.Config, verb, options)
    with as_a_command(verb, loaded.Config):
        loaded.run(config)


def shared_and_own(options: Mapping[str, Any]) -> tuple[dict[str, Any], dict[str, dict[str, Any]]]:
    """Options that every stage has, and stage -> its own. Raises PageLLMError for any other."""
    from dataclasses import fields

    from pagellm.stage.run import StageConfig

    every = {f.name for f in fields(StageConfig)} - {"dataset", "data", "runs", "run"}
    common, own = {}, {}
    for name, value in options.items():
        if name in STAGES:
            if not isinstance(value, Mapping):
                raise PageLLMError(f"{name}={value!r}: want the stage's options, as in a dict")
            own[name] = dict(value)
        elif name in every:
            common[name] = value
        else:
            near = hints.nearest(name, [*every, *STAGES])
            hint = f"; did you mean {near}?" if near else ""
            raise PageLLMError(
                f"no option {name!r} that every stage has{hint}\n"
                f"  A stage's own options stand under its name: sft={{{name!r}: {value!r}}}"
            )
    return common, own


def module_of(stage: str) -> Any:
    """The module of a stage."""
    import importlib

    return importlib.import_module(f"pagellm.{stage}")


def configured(cls: Any, verb: str, options: Mapping[str, Any], quiet: bool = False) -> Any:
    """The Config that `pagellm <verb>` would have for these options, presets included.

    quiet  do not say which presets were found
    Raises PageLLMError, which begins with the verb, for an option that is unknown or wrong.
    """

    def tell(line: str) -> None:
        if not quiet:
            print(f"pagellm {verb}: {line}", file=sys.stderr, flush=True)

    given = {name: value for name, value in options.items() if value is not None}
    try:
        # "--name=value" takes any value, also one that looks like an option.
        words = [
            as_words({n: v}) if isinstance(v, bool) else f"--{n}={v}" for n, v in given.items()
        ]
        return parse(cls, words, f"pagellm {verb}", verb, tell)
    except PageLLMError as error:
        raise PageLLMError(f"{verb}: {in_python(str(error), kinds_of(cls))}") from None


def kinds_of(cls: Any) -> dict[str, Any]:
    """Option -> its type, of a Config."""
    return {name: field.type for name, field in cls.__dataclass_fields__.items()}


@contextmanager
def as_a_command(verb: str, cls: Any) -> Iterator[None]:
    """Ctrl-C waits for a checkpoint, and a full disk or memory is a PageLLMError, as in a shell.

    What the command says of its options is said of keyword arguments.
    """
    try:
        with handled_signals():
            yield
    except Interrupted as stop:
        saved = stop.saved or "nothing is half-written"
        raise KeyboardInterrupt(f"{verb}: {saved}. The same call carries on.") from None
    except PageLLMError as error:
        if (said := in_python(str(error), kinds_of(cls))) != str(error):
            raise PageLLMError(said) from None
        raise
    except Exception as error:
        if text := explain(error, cls):
            raise PageLLMError(f"{verb}: {text}") from error
        raise


def load(
    run: str | Path = "synthetic",
    *,
    data: str | Path = "",
    runs: str | Path = "runs",
    device: str = "auto",
    split: str = "none",
) -> "Model":
    """A run that was trained here or by the command line.

    run     its name, or its directory
    data    directory of prepared data sets; empty: the one it was trained on
    split   rows that pages hide: none, for a shop; test or valid, for research
    Raises PageLLMError if there is no such run.
    """
    if isinstance(run, Path) or "/" in run:
        run, runs = Path(run).name, Path(run).parent
    for stage in reversed(STAGES):
        made = Path(runs) / run / stage / "config.json"
        if made.exists():
            config = json.loads(made.read_text())["config"]
            home = str(data) or config["data"]
            return Model(run, Data(config["dataset"], home), str(runs), device, split)
    have = sorted(p.parent.parent.name for p in Path(runs).glob("*/*/config.json"))
    there = f"there are {', '.join(dict.fromkeys(have))}" if have else "there are none"
    raise PageLLMError(f"no run {run!r} in {runs}; {there}\n  Make one with: pagellm.fit(data)")


@dataclass(frozen=True)
class Model:
    """A run's directory: it writes pages, and it is scored.

    run, runs   the run's name, and the directory of runs
    data        the prepared data that it was trained on
    device      where pages are written
    split       rows that pages hide, see `load`
    """

    run: str
    data: Data
    runs: str = "runs"
    device: str = "auto"
    split: str = "none"

    @property
    def path(self) -> Path:
        """The run's directory."""
        return Path(self.runs) / self.run

    @cached_property
    def recommender(self) -> "Recommender":
        """What writes the pages, as in `pagellm serve`; read at the first use, then kept."""
        from pagellm.serving.recommender import Recommender
        from pagellm.serving.sources import Sources

        with as_a_command("pages", Sources):
            return Recommender.load(Sources(**self.common(), device=self.device, split=self.split))

    def update(
        self, data: "Data | str", *, run: str = "", steps: int = 0, **options: Any
    ) -> "Model":
        """Bring the run to newer data without training it anew: `pagellm update`.

        data     the newer data: what `prepare` returned, or the name of a data set in ./data
        run      name of the new run; empty: the data set's name. The old one stays as it is
        steps    steps of a short fit; 0: none
        options  further ones of `pagellm update`: fresh=0.5, lr=0.3, seed=1

        Raises PageLLMError as the command line does.
        """
        data = Data(data) if isinstance(data, str) else data
        told: dict[str, Any] = {"dataset": data.dataset, "data": str(data.data), "run": run}
        told |= {"source_run": self.run, "runs": self.runs, "steps": steps}
        run_verb("update", "pagellm.update", told | options)
        return load(run or data.dataset, runs=self.runs, device=self.device, split=self.split)

    def common(self) -> dict[str, Any]:
        """Where data and run are, as every Config names them."""
        return {
            "dataset": self.data.dataset,
            "data": str(self.data.data),
            "run": self.run,
            "runs": self.runs,
        }

    def pages(
        self,
        users: str | Sequence[str] | None = None,
        history: "Sequence[Event] | Mapping[str, Sequence[Event]] | ArrowStream | None" = None,
        k: int = 20,
        *,
        policy: str = "",
        mode: str = "",
        exclude: Sequence[str] = (),
        categories: Sequence[str] | None = None,
        in_stock: Sequence[str] | None = None,
        price_min: float | None = None,
        price_max: float | None = None,
        seen: str = "hide",
        new_items: int = 0,
        batch: int = 256,
    ) -> "pa.Table":
        """Pages of k slots, one row a slot.

        users    whose, by the shop's own ids; None: of everybody, or of those in `history`
        history  what is known beside the data, oldest first: item ids, or (id, rating) with
                 ratings of 1 to 5, of one user or stranger; a dict user -> such a list; or a table
                 with columns user, item and perhaps rating
        policy   ppo, sft or another that the run has; empty: what `pagellm recommend` takes
        mode     greedy, beam, one_shot or hybrid; empty: as in `pagellm recommend`
        exclude, categories, in_stock, price_min, price_max
                 filters that hold in every slot; an item of unknown price fails a price filter
        seen     items that the user has met: hide, no page holds them; allow, a page may hold them
                 again, unless the user disliked them
        new_items  slots kept for new items, those whose first row lies within the last 30 days of
                 the log
        batch    pages written at once

        returns  user, known, rank (from 1), item, title, category, price, score and reward.
                 score is the log-probability of the item in its slot, in nats. reward is null
                 without a reward model, user for a stranger without an id.

        Raises PageLLMError for a wrong option. Unknown ids are no error: they are printed.
        """
        from pagellm.serving.filters import SEEN, Filters
        from pagellm.serving.recommender import Ask

        if seen not in SEEN:
            raise PageLLMError(f"seen={seen!r}: want {' or '.join(SEEN)}")
        as_filter: dict[str, Any] = dict(
            exclude=ids_of(exclude),
            price_min=bound("price_min", price_min),
            price_max=bound("price_max", price_max),
            seen=seen,
        )
        low, high = as_filter["price_min"], as_filter["price_max"]
        if (low or 0) < 0 or (high is not None and high < (low or 0)):
            raise PageLLMError(
                f"price_min={price_min}, price_max={price_max}: want prices, price_min the lower"
            )
        as_filter |= {
            name: None if value is None else ids_of(value)
            for name, value in (("categories", categories), ("in_stock", in_stock))
        }
        k, batch, new_items = (
            whole(name, value)
            for name, value in (("k", k), ("batch", batch), ("new_items", new_items))
        )
        if k < 1 or batch < 1:
            raise PageLLMError(f"k={k}, batch={batch}: want 1 or more")
        if not 0 <= new_items <= k:
            raise PageLLMError(f"new_items={new_items}: want 0 to k={k}")
        wanted = {"k": k, "policy": policy, "filters": Filters(**as_filter)}  # type: ignore[arg-type]
        wanted["new_items"] = new_items
        if mode:
            from pagellm.model.policy import MODES

            if mode not in MODES:
                raise PageLLMError(f"mode={mode!r}: want {', '.join(MODES)}")
            wanted["mode"] = mode
        asks = [
            Ask(user=user, history=events, **wanted)  # type: ignore[arg-type]
            for user, events in self.asked(users, history)
        ]
        return page_table(self.recommender, asks, batch)

    def asked(
        self, users: Any, history: Any
    ) -> list[tuple[str | None, tuple[tuple[str, float], ...]]]:
        """(user, history) of every page wanted."""
        if hasattr(history, "__arrow_c_stream__"):
            history = histories_of(history)
        if users is None and history is None:
            there = self.recommender
            return [(user, ()) for user in (*there.shop.user_ids, *there.left_out.users)]
        if isinstance(history, Mapping):
            known = {id_of(user, "user"): events_of(events) for user, events in history.items()}
            names = list(known) if users is None else ids_of(users)
            return [(user, known.get(user, ())) for user in names]
        alone = () if history is None else events_of(history)
        if users is None:
            return [(None, alone)]
        names = ids_of(users)
        if alone and len(names) != 1:
            raise PageLLMError(
                f"one history for {hints.counted(len(names), 'user')}; give a dict user -> "
                "history, or a table"
            )
        return [(user, alone) for user in names]

    def evaluate(
        self,
        versus: str = "",
        *,
        split: str = "test",
        baselines: Mapping[str, Any] | None = None,
        **options: Any,
    ) -> "pa.Table":
        """Every policy's pages, scored on held-out rows: `pagellm evaluate`.

        versus     another row to compare with: a policy, or one of `pagellm baselines` such as
                   "ALS", which are fitted if they are not there; empty: none
        split      held-out rows that count as right: test or valid
        baselines  options of `pagellm baselines`, where it has to run: {"models": "ALS"}
        options    those of `pagellm evaluate`: k=10, policies="sft,ppo", quiet=True

        returns    policy, metric, direction (up or down is better), mean, low, high, coverage and
                   count; with `versus` also versus, difference, difference_low and difference_high:
                   the policy minus that row over the same users. Intervals are of 95%, by bootstrap
                   over users.

        Raises PageLLMError for a row that is not there.
        """
        from pagellm import evaluate as stage

        if split != "test" and versus and versus not in stage.LABELS:
            raise PageLLMError(f"versus={versus!r}: plain rows are scored on test rows alone")
        own = {"split": split, "policies": self.policies_there(), "device": self.device}
        config = configured(stage.Config, "evaluate", self.common() | own | options)
        other = None
        if versus and versus not in config.policies.split(","):  # a wrong name costs no pages
            other = self.plain_row(versus, baselines or {}, config.mask)
        with as_a_command("evaluate", stage.Config):
            results = stage.run(config)
        folder = self.path / "evaluate"
        rows = {name: per_user_of(folder / name) for name in results if name in stage.LABELS}
        other = rows.get(versus, other)
        return score_table(results, rows, versus, other, config.seed, config.n_boot)

    def policies_there(self) -> str:
        """popularity and the policies that are done, as `pagellm evaluate` names them."""
        done = [n for n in ("sft", "ppo", "compose") if (self.path / n / "done").exists()]
        return ",".join(["popularity", *done])

    def plain_row(self, name: str, options: Mapping[str, Any], mask: str) -> "dict[str, Any]":
        """A row of `pagellm baselines`: metric -> (U,) scores, and `user`."""
        from pagellm.baselines import compare

        known = [*compare.GRIDS, compare.LIGHTGBM]
        if name.partition(" + ")[0] not in known:
            like = hints.nearest(name, known)
            raise PageLLMError(
                f"versus={name!r}: no such row; there are the policies evaluated ("
                f"{self.policies_there()}) and {', '.join(known)}, each also with ' + MMR'"
                + (f"\n  Did you mean {like!r}?" if like else "")
            )
        told = {**self.common(), "run": "", **options}
        if "models" in options:  # the row that the others are compared with is one of these
            told.setdefault("versus", name)
        folder = Path(self.runs) / self.data.dataset / "baselines"
        if not (folder / "done").exists():
            config = configured(compare.Config, "baselines", told)
            with as_a_command("baselines", compare.Config):
                compare.run(config)
        rows, made = compare.read_rows(folder)
        if made["mask"] != mask:
            raise PageLLMError(
                f"{folder} was made with mask={made['mask']!r}, this run with {mask!r}"
            )
        if name not in rows:
            raise PageLLMError(
                f"versus={name!r}: no such row; there are popularity, sft, ppo, compose and, in "
                f"{folder}, {', '.join(rows)}\n  Others need another "
                f"{hints.command('baselines', self.data.dataset)}: remove {folder} first."
            )
        return rows[name]


def cards(pages: "ArrowStream", most: int = 4) -> "Cards":
    """Pages as cards in a grid, as `pagellm serve` shows them; the last line of a notebook's cell.

    pages  what `model.pages` returns, or a file of `pagellm recommend --all`, read by any library.
           Columns: user and item, or user_id and item_id; perhaps rank, title, category, price
    most   users that are shown, the first ones

    returns  an object that a notebook draws; `.save("pages.html")` writes a file for a browser.
             Plain HTML without a script, which asks nobody for anything.

    Raises PageLLMError for a table without such columns.
    """
    from pagellm.data.arrow import storable, table_of
    from pagellm.serving.cards import of

    found = storable(table_of(pages, "pages"))
    for name in ("user", "item"):  # a file of `recommend` has numbers there, and ids beside them
        if f"{name}_id" in found.column_names:
            found = found.drop_columns([n for n in (name,) if n in found.column_names])
            found = found.rename_columns({f"{name}_id": name})
    if missing := {"user", "item"} - set(found.column_names):
        raise PageLLMError(
            f"cards: no column {', '.join(sorted(missing))}; there are "
            f"{', '.join(found.column_names)}\n  Want what model.pages returns."
        )
    if "page" in found.column_names:  # ranks after the page
        found = found.filter(found["page"])
    return of(found.to_pylist(), most)


def ids_of(values: Any) -> tuple[str, ...]:
    """Different ids as text: of one id, of a list, or of a column of any library.

    Raises PageLLMError for a whole table.
    """
    if hasattr(values, "columns"):
        raise PageLLMError("ids: this is a table; give one column of it")
    values = [values] if isinstance(values, str) or not isinstance(values, Iterable) else values
    return tuple(dict.fromkeys(id_of(value) for value in values))


def whole(name: str, value: Any) -> int:
    """The value of an option as an int. Raises PageLLMError if it is no whole number."""
    try:
        return operator.index(value)
    except TypeError:
        raise PageLLMError(f"{name}={value!r}: want a whole number") from None


def bound(name: str, value: Any) -> float | None:
    """A price as a float, None for none. Raises PageLLMError if it is no number."""
    try:
        number = None if value is None else float(value)
    except (TypeError, ValueError):
        number = math.nan
    if number is not None and math.isnan(number):
        raise PageLLMError(f"{name}={value!r}: want a number, or None")
    return number


def id_of(value: Any, what: str = "id") -> str:
    """An id as `prepare` keeps it: 17850.0 is 17850. Raises PageLLMError for a missing one."""
    from pagellm.data.values import Broken, identifier

    try:
        return identifier(value.as_py() if hasattr(value, "as_py") else value, what)
    except Broken as broken:
        raise PageLLMError(f"{value!r} is no {what}: {broken}") from None


def events_of(events: Any) -> tuple[tuple[str, float], ...]:
    """Item ids, or (id, rating), as (id, rating), where an unknown rating is NaN.

    Raises PageLLMError for anything else, and for a rating outside of 1 to 5.
    """
    if isinstance(events, str) or not isinstance(events, Iterable):
        raise PageLLMError(f"history={events!r}: want a list of item ids, or of (id, rating)")
    out = []
    for event in events:
        pair = tuple(event) if isinstance(event, tuple | list) else (event, math.nan)
        if len(pair) != 2:
            raise PageLLMError(f"history: {event!r}: want an item id, or (id, rating)")
        item, rating = pair
        try:
            value = math.nan if rating is None else float(rating)
        except (TypeError, ValueError):
            value = math.inf
        if not (math.isnan(value) or 1 <= value <= 5):
            raise PageLLMError(f"history: {item} has rating {rating}; want 1 to 5, or none")
        out.append((id_of(item, "item"), value))
    return tuple(out)


def histories_of(table: "ArrowStream") -> dict[str, list[tuple[str, float]]]:
    """user -> history, from a table with columns user, item and perhaps rating, oldest first."""
    from pagellm.data.arrow import storable, table_of

    found = storable(table_of(table, "history"))
    if missing := {"user", "item"} - set(found.column_names):
        raise PageLLMError(
            f"history: no column {', '.join(sorted(missing))}; there are "
            f"{', '.join(found.column_names)}\n  Want user and item, and perhaps rating."
        )
    ratings = found["rating"].to_pylist() if "rating" in found.column_names else [None] * len(found)
    out: dict[str, list[tuple[str, float]]] = {}
    rows = zip(found["user"].to_pylist(), found["item"].to_pylist(), ratings, strict=True)
    for user, item, rating in rows:
        out.setdefault(id_of(user, "user"), []).append((item, rating))
    return out


def page_table(recommender: "Recommender", asks: "list[Ask]", batch: int) -> "pa.Table":
    """Answer all asks, `batch` at once, with a progress bar if there are several batches."""
    import pyarrow as pa
    from tqdm import tqdm

    rows: list[tuple] = []
    unknown: dict[str, dict[str, None]] = {"users": {}, "items": {}, "categories": {}}
    short = 0
    parts = range(0, len(asks), batch)
    for at in tqdm(parts, desc="pages", unit="batch", disable=len(parts) < 2):
        for answer in recommender.answers(asks[at : at + batch]):
            if isinstance(answer, PageLLMError):
                raise answer
            who, slots = answer["user"], answer["items"]
            short += bool(answer["notes"])
            if answer["unknown"]["user"] and not who["history"]:
                strangers = {who["id"]: None}.keys() - recommender.left_out.users.keys()
                unknown["users"] |= dict.fromkeys(strangers)
            for what in ("items", "categories"):
                unknown[what] |= dict.fromkeys(answer["unknown"][what])
            rows += [(who["id"], who["known"], *(s[name] for name in SLOT)) for s in slots]
    for what, names in unknown.items():
        if names:
            more = ", ..." if len(names) > 10 else ""
            print(f"pages: unknown {what}: {', '.join(list(names)[:10])}{more}", flush=True)
    if short:
        print(
            f"pages: {short:,} of {len(asks):,} pages are short: no more items pass the filters",
            flush=True,
        )
    kinds = [pa.string(), pa.bool_(), pa.int32(), pa.string(), pa.string(), pa.string()]
    kinds += [pa.float64()] * 3
    columns = list(zip(*rows, strict=True)) or [()] * len(kinds)
    names_ = ["user", "known", "rank", "item", "title", "category", "price", "score", "reward"]
    return pa.table(
        {n: pa.array(c, kind) for n, c, kind in zip(names_, columns, kinds, strict=True)}
    )


# Fields of a slot, in the order of the table's columns.
SLOT = ("rank", "item", "title", "category", "price", "score", "token_reward")


def per_user_of(folder: Path) -> "dict[str, np.ndarray]":
    """Every user's scores of a policy, as `evaluate` wrote them."""
    from pagellm.pages.tables import per_user

    return per_user(folder / "per_user.parquet")


def score_table(
    results: Mapping[str, Mapping[str, Mapping[str, Any]]],
    rows: "Mapping[str, Mapping[str, np.ndarray]]",
    versus: str,
    other: "Mapping[str, np.ndarray] | None",
    seed: int,
    n_boot: int,
) -> "pa.Table":
    """One row for each policy and metric; with `other` the paired difference to that row too."""
    import numpy as np
    import pyarrow as pa

    from pagellm.pages import metrics, stats
    from pagellm.pages.tables import ALL_COLUMNS

    records = []
    for name, scores in rows.items():
        for metric in [m for m in ALL_COLUMNS if m in results[name]]:
            found = results[name][metric]
            direction = metrics.DIRECTION.get(metric, "up")
            record: dict[str, Any] = {"policy": name, "metric": metric, "direction": direction}
            record |= {n: found[n] for n in ("mean", "low", "high", "coverage", "count")}
            if other is not None:
                if not np.array_equal(scores["user"], other["user"]):
                    raise PageLLMError(f"{versus} was scored on other users than {name}")
                gap = (
                    stats.paired(scores[metric], other[metric], seed, n_boot)
                    if metric in other
                    else dict.fromkeys(("mean", "low", "high"))
                )
                record["versus"] = versus
                record["difference"] = gap["mean"]
                record |= {f"difference_{n}": gap[n] for n in ("low", "high")}
            records.append(record)
    return pa.Table.from_pylist(records)
