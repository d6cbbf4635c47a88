"""A policy for others: embeddings for a ranker that serves without this library (the paper's
section 6.6), or the whole network for transformers; evaluated pages and data for other tools.

Reads   data/<dataset>, runs/<run>/ppo or sft; for trec and ranx runs/<run>/evaluate
Writes  runs/<run>/export-<policy> (--out)  <name>.npy, item_ids.json, user_ids.json, manifest.json
        with --format transformers  runs/<run>/transformers-<policy> (--out), see
        transformers_export.py; with trec, ranx, recbole  runs/<run>/<format>, see exchange.py

    make export         pagellm export --dtype int8 --pca 32 --out export-small
                        pagellm export --format transformers

    item_token     (N, d) the item rows e_i
    item_content   (N, d) mean state over an item's title, brand and category
    user_token     (U, d) the user rows
    user_content   (U, d) h_u, the state after the page prompt

h_u . e_i is the logit of item i in the first slot. `pagellm.serving.embeddings` reads all this with
numpy alone. It takes seconds.
"""

import sys
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import torch

from pagellm.data.shop import Shop, load
from pagellm.model.policy import Policy
from pagellm.model.prompts import left_pad
from pagellm.serving import exchange
from pagellm.serving.embeddings import NAMES, quantise
from pagellm.serving.sources import NEED, WRITERS, check_policy, pick_policy, split_in_words
from pagellm.serving.transformers_export import export_transformers, refuse_blend
from pagellm.stage.command import main
from pagellm.stage.config import PageLLMError, check
from pagellm.stage.dist import pick_device
from pagellm.stage.files import atomic, read_json, sha256, write_json
from pagellm.stage.hints import counted
from pagellm.stage.outputs import check_folder
from pagellm.stage.run import Run, StageConfig, file_id, finished, versions

__all__ = ["Config", "basis_of", "export_embeddings", "item_content", "run", "user_content"]


DTYPES = ("float32", "float16", "int8")
FORMATS = ("embeddings", "transformers")
# Option -> the one format that reads it.
READERS = dict.fromkeys(("dtype", "names", "pca", "split"), "embeddings") | {"k": "transformers"}


@dataclass(frozen=True, kw_only=True)
class Config(StageConfig):
    """Write a policy for others: embeddings as .npy files, or a directory for transformers."""

    source_run: str = ""  # run whose sft is read; empty: this run (studies share one)
    policy: str = ""  # whose embeddings: ppo or sft; empty: ppo if it is there, else sft. With
    # format=trec or ranx any policy that was evaluated, compose too; empty: all of them
    format: str = "embeddings"  # embeddings: matrices as .npy files. transformers: the network with
    # words, users and items as one vocabulary, which AutoModelForCausalLM opens. trec, ranx: qrels
    # and the pages that evaluate wrote. recbole: the data as atomic files
    k: int = 20  # transformers: slots of a page, the tokens that `generate` writes
    names: str = ",".join(NAMES)  # which matrices to write, comma-separated
    dtype: str = ""  # type of the embeddings: float32, float16, or int8 (with one float32 scale for
    # each row); empty: float16. Other formats take none: transformers is float32
    pca: int = 0  # dimensions kept by a projection on the principal directions (PCA); 0: all
    split: str = "none"  # rows that the prompts of user_content do not show. none: they show all
    # rows, for serving; test: train rows alone, as in evaluate
    batch: int = 256  # rows in a forward pass
    out: str = ""  # name of the directory under the run, or a path that begins with /; empty:
    # export-<policy> or transformers-<policy>

    def folder(self, default: str) -> Path:
        """Directory to write. Raises PageLLMError if it holds anything but such an export."""
        out = self.stage(self.out or default)
        check_folder(out, lambda folder: holds_export(folder, self.format), self.stage(""))
        return out

    def where(self, policy: str) -> Path:
        """Directory of sft or ppo."""
        return self.stage(policy, self.source_run if policy == "sft" else "")

    def made_by(self, policy: str) -> str:
        """The command that makes sft or ppo, in the run where it is looked for."""
        return self.make(policy, self.where(policy).parent.name)

    def __post_init__(self):
        super().__post_init__()
        names = self.names.split(",")
        check(
            self,
            policy=(
                (self.policy in ("", "popularity", *WRITERS), "a policy that was evaluated")
                if self.format in exchange.FORMATS
                else check_policy(self.policy)
            ),
            format=(
                self.format in FORMATS + exchange.FORMATS,
                ", ".join(FORMATS + exchange.FORMATS),
            ),
            k=(self.k > 0, "1 or more"),
            dtype=(self.dtype in ("", *DTYPES), ", ".join(DTYPES)),
            names=(
                set(names) <= set(NAMES) and len(set(names)) == len(names),
                f"some of {','.join(NAMES)}",
            ),
            split=(self.split in ("none", "test"), "none or test"),
            batch=(self.batch > 0, "1 or more"),
        )
        for name, reader in READERS.items():
            value = getattr(self, name)
            if self.format != reader and value != getattr(type(self), name):
                written = {"transformers": "always writes float32"}.get(self.format)
                does = (written or "writes no matrix") if name == "dtype" else "does not read it"
                raise PageLLMError(
                    f"{name}={value!r} is for --format {reader}; --format {self.format} {does}\n"
                    f"  Leave --{name} out."
                )


def holds_export(folder: Path, form: str) -> bool:
    """Whether a directory holds an export of this format, which may be written anew."""
    if form == "embeddings":
        made = folder / "config.json"  # of an interrupted export too
        return made.exists() and "pca" in read_json(made).get("config", {})
    marks = {"trec": "qrels.txt", "ranx": "qrels.json", "recbole": "*/*.inter"}
    return any(folder.glob(marks.get(form, "pagellm.json")))


@torch.no_grad()
def states(policy: Policy, rows: list[list[int]], batch: int, mean: bool) -> np.ndarray:
    """(len(rows), C) float32: the state at each row's last token, or the mean over its tokens."""
    out, device = [], policy.model.word.device
    for at in range(0, len(rows), batch):
        ids, valid = (x.to(device) for x in left_pad(rows[at : at + batch], policy.vocab.pad))
        hidden = policy.model(ids, valid).float()
        if mean:
            own = valid[..., None]
            hidden = torch.where(own, hidden, 0.0).sum(1) / own.sum(1)
        else:
            hidden = hidden[:, -1]
        out.append(hidden.cpu().numpy())
    return np.concatenate(out)


def item_content(policy: Policy, shop: Shop, batch: int = 256) -> np.ndarray:
    """(N, C) float32: the mean state over the words of each item, without its item row.

    An item without any text has the state of the padding token.
    """
    c, room = shop.catalogue, policy.model.shape.n_ctx
    texts = [
        " ".join(part for part in (title, brand, leaf) if part)
        for title, brand, leaf in zip(c.title, c.brand, c.leaf, strict=True)
    ]
    rows = [policy.vocab.words(f" {text}")[:room] if text else [policy.vocab.pad] for text in texts]
    return states(policy, rows, batch, mean=True)


def user_content(policy: Policy, shop: Shop, split: str = "none", batch: int = 256) -> np.ndarray:
    """(U, C) float32: the state after each user's page prompt, which predicts the first slot.

    split  none: all rows in the prompt; test: train rows, as in evaluate
    """
    history = shop.csr("train" if split == "test" else None)
    rows = [
        policy.prompts.page(u if policy.style.use_user else None, *history.of(u))
        for u in range(shop.n_users)
    ]
    return states(policy, rows, batch, mean=False)


def basis_of(x: np.ndarray, d: int) -> np.ndarray:
    """(C, d) orthonormal: the d directions that keep most of the rows' squared length.

    The rows are not centred, so that dot products change little by the projection.
    """
    return np.linalg.svd(x.astype(np.float64), full_matrices=False)[2][:d].T.astype(np.float32)


def export_embeddings(
    policy: Policy, shop: Shop, names=NAMES, split: str = "none", batch: int = 256, pca: int = 0
) -> dict[str, np.ndarray]:
    """name -> (rows, d) float32.

    With pca, item_token and user_content share the basis of the item rows, since they meet in a dot
    product; the others have bases of their own. Raises PageLLMError for pca above the rows' rank.
    """
    policy.model.eval()
    width = policy.model.shape.n_embd
    if pca > min(width, shop.n_items, shop.n_users):
        raise PageLLMError(
            f"pca={pca}: these rows have {min(width, shop.n_items, shop.n_users)} dimensions "
            "at most"
        )
    scored = policy.model.scored_items()
    item, user = (w.detach().float().cpu().numpy() for w in (scored, policy.model.user))
    make = {
        "item_token": lambda: item,
        "item_content": lambda: item_content(policy, shop, batch),
        "user_token": lambda: user,
        "user_content": lambda: user_content(policy, shop, split, batch),
    }
    found = {name: make[name]() for name in names}
    if pca:
        found = {
            name: x @ basis_of(item if name == "user_content" else x, pca)
            for name, x in found.items()
        }
    return found


def run(config: Config) -> None:
    """Write the matrices, the ids and the manifest.

    Raises PageLLMError where a dtype is too small.
    """
    if config.format in exchange.FORMATS:
        for_tools(config)
        return
    policy = pick_policy(config.policy, config.where, config.made_by)
    config = replace(config, policy=policy)
    record = finished(config.where(policy), NEED[policy], config.made_by(policy))
    if config.format == "transformers":
        for_transformers(config, record["id"])
        return
    config = replace(config, dtype=config.dtype or "float16")
    shop = load(config.data_dir)
    inputs = inputs_of(config, record["id"])
    with Run(config.folder(f"export-{policy}"), config, inputs, ("batch",)) as out:
        if out.already_done():
            return
        found = export_embeddings(
            Policy.load(config.where(policy), pick_device(config.device)),
            shop,
            config.names.split(","),
            config.split,
            config.batch,
            config.pca,
        )
        files = converted(found, config.dtype)
        for name, x in files.items():
            with atomic(out.path / name) as beside, open(beside, "wb") as file:
                np.save(file, x, allow_pickle=False)
        ids = {"item_ids.json": shop.catalogue.ids, "user_ids.json": shop.user_ids}
        for name, values in ids.items():
            write_json(out.path / name, list(values))
        shapes = {name: list(x.shape) for name, x in found.items()}
        write_json(
            out.path / "manifest.json",
            {
                "dataset": config.dataset,
                "policy": policy,
                "inputs": inputs,
                "dtype": config.dtype,
                "pca": config.pca,
                "split": config.split,
                "sha256": {name: sha256(out.path / name) for name in (*files, *ids)},
                "matrices": shapes,
            },
        )
        out.finish(matrices=shapes)
        size = sum((out.path / name).stat().st_size for name in files)
        print(f"export: {out.path}, {len(found)} matrices, {size / 1e6:.1f} MB in {config.dtype}")
        held = split_in_words(config.split).partition(":")[0]
        print(f"export: {policy} {record['id']}; {held}")


def inputs_of(config: Config, policy: str) -> dict[str, str]:
    """What an export is made from: the hash of the data, and that of the policy."""
    return {"data": file_id(config.data_dir / "source.json"), "policy": policy}


def for_tools(config: Config) -> None:
    """Write evaluated pages or the data in another tool's format, and say how it reads them."""
    shop, folder = load(config.data_dir), config.folder(config.format)
    if config.format == "recbole":
        files = exchange.write_recbole(folder / config.dataset, config.dataset, shop)
        print(f"export: {folder / config.dataset}, {', '.join(path.name for path in files)}")
        print(f"export: in RecBole: benchmark_filename: [train, valid, test], data_path: {folder}")
        return
    source = config.stage("evaluate")
    finished(source, "evaluation", config.make("evaluate"))
    made = read_json(source / "config.json")
    if made["inputs"]["data"] != file_id(config.data_dir / "source.json"):
        raise PageLLMError(f"{source} was made from other data than {config.data_dir}")
    pages = exchange.evaluated(source, shop, config.policy)
    runs = {name: exchange.run_of(ranked, shop) for name, ranked in pages.items()}
    write = exchange.write_trec if config.format == "trec" else exchange.write_ranx
    files = write(folder, exchange.qrels_of(shop, made["config"]["split"]), runs)
    print(f"export: {folder}, {', '.join(path.name for path in files)}")


def measured(config: Config, policy: str) -> dict | None:
    """The metrics of this very policy on the test split; None where it was not evaluated."""
    folder = config.stage("evaluate")
    if not (folder / "done").exists():
        return None
    begun = read_json(folder / "config.json")
    if begun["inputs"].get(config.policy) != policy or begun["config"].get("split") != "test":
        return None
    return read_json(folder / "metrics.json").get(config.policy)


def for_transformers(config: Config, identity: str) -> None:
    """Write the policy as a directory that transformers opens, and say what it holds.

    identity  hash of the policy, from its `done`
    """
    folder = config.folder(f"transformers-{config.policy}")
    policy = Policy.load(config.where(config.policy))
    refuse_blend(policy)  # before the shop is read
    shop = load(config.data_dir)
    about = {
        "name": f"{config.run or config.dataset}-{config.policy}",
        "dataset": config.dataset,
        "policy": config.policy,
        "inputs": inputs_of(config, identity),
        "versions": versions(),
    }
    metrics = measured(config, identity)
    made = export_transformers(policy, shop, folder, config.k, about, metrics)
    size = (folder / "model.safetensors").stat().st_size
    print(f"export: {folder}, a {made['architecture']}, {size / 1e6:.1f} MB in float32")
    print(
        f"export: {config.policy} {identity}; {counted(made['n_items'], 'item')} from "
        "token "
        f"{made['first']['items']} on; README.md has the code that writes a page"
    )
    if metrics is None:
        print("export: no metrics in its card; they come from pagellm evaluate")


def converted(matrices: dict[str, np.ndarray], dtype: str) -> dict[str, np.ndarray]:
    """File name -> array of the matrices in `dtype`; int8 has a file of scales beside each.

    Raises PageLLMError where a number is too large for dtype.
    """
    files = {}
    for name, x in matrices.items():
        if dtype == "int8":
            files[f"{name}.npy"], files[f"{name}.scale.npy"] = quantise(x)
        else:
            files[f"{name}.npy"] = x.astype(dtype)
            if not np.isfinite(files[f"{name}.npy"]).all():
                raise PageLLMError(f"{name} does not fit in {dtype}; export with --dtype float32")
    return files


if __name__ == "__main__":
    sys.exit(main(Config, run, "pagellm export"))
