"""Embeddings for a ranker that serves without this library (the paper's section 6.6).

Reads   data/<dataset>, runs/<run>/ppo or sft
Writes  runs/<run>/export-<policy> (--out)  <name>.npy, item_ids.json, user_ids.json, manifest.json

    make export                             python -m pagellm.serving.export --dtype int8 --pca 32 --out export-small

    item_token     (N, d) the item rows e_i           item_content   (N, d) mean state over title, brand, category
    user_token     (U, d) the user rows               user_content   (U, d) h_u, state behind the page prompt

h_u . e_i is the logit of item i in the first slot. `pagellm.serving.embeddings` reads all this with numpy alone. Seconds.
"""

import sys
from dataclasses import dataclass

import numpy as np
import torch

from pagellm.data.shop import Shop, load
from pagellm.model.policy import Policy
from pagellm.model.prompts import left_pad
from pagellm.serving.embeddings import NAMES, quantise
from pagellm.stage.command import main
from pagellm.stage.config import PageLLMError, check
from pagellm.stage.dist import pick_device
from pagellm.stage.files import atomic, sha256, write_json
from pagellm.stage.run import Run, StageConfig, file_id, finished

__all__ = ["Config", "basis_of", "export_embeddings", "item_content", "run", "user_content"]


DTYPES = ("float32", "float16", "int8")


@dataclass(frozen=True, kw_only=True)
class Config(StageConfig):
    """Write item and user embeddings as .npy files with ids and a manifest."""

    source_run: str = ""  # run whose sft is read; empty: this run
    policy: str = "ppo"  # whose embeddings: ppo or sft
    names: str = ",".join(NAMES)  # which matrices, comma-separated
    dtype: str = "float16"  # float32, float16, or int8 (a float32 scale a row beside it)
    pca: int = 0  # dimensions kept; 0: all
    split: str = "test"  # held-out rows kept from the prompts of user_content: test,
    # or none for serving
    batch: int = 256  # rows in a forward pass
    out: str = ""  # directory under the run, so that others can lie beside; empty: export-<policy>

    def __post_init__(self):
        super().__post_init__()
        names = self.names.split(",")
        check(
            self,
            policy=(self.policy in ("ppo", "sft"), "ppo or sft"),
            dtype=(self.dtype in DTYPES, ", ".join(DTYPES)),
            names=(
                set(names) <= set(NAMES) and len(set(names)) == len(names),
                f"some of {','.join(NAMES)}",
            ),
            split=(self.split in ("test", "none"), "test or none"),
            batch=(self.batch > 0, "1 or more"),
        )


@torch.no_grad()
def states(policy: Policy, rows: list[list[int]], batch: int, mean: bool) -> np.ndarray:
    """(len(rows), C) float32: the last token's state of each row of ids, or the mean over its tokens."""
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
    """(N, C) float32: what the words alone say about an item; an item without any text has the padding's state."""
    c, room = shop.catalogue, policy.model.shape.n_ctx
    texts = [
        " ".join(part for part in (title, brand, leaf) if part)
        for title, brand, leaf in zip(c.title, c.brand, c.leaf, strict=True)
    ]
    rows = [policy.vocab.words(f" {text}")[:room] if text else [policy.vocab.pad] for text in texts]
    return states(policy, rows, batch, mean=True)


def user_content(policy: Policy, shop: Shop, split: str = "test", batch: int = 256) -> np.ndarray:
    """(U, C) float32: the state behind each user's page prompt, from which the first slot is drawn.

    split  test: train rows in the prompt, as in evaluate; none: all that is known
    """
    history = shop.csr("train" if split == "test" else None)
    rows = [
        policy.prompts.page(u if policy.style.use_user else None, *history.of(u))
        for u in range(shop.n_users)
    ]
    return states(policy, rows, batch, mean=False)


def basis_of(x: np.ndarray, d: int) -> np.ndarray:
    """(C, d) orthonormal: the d directions that keep most of the rows' squared length. Not centred, so that dot
    products of rows projected by one basis come near those before."""
    return np.linalg.svd(x.astype(np.float64), full_matrices=False)[2][:d].T.astype(np.float32)


def export_embeddings(
    policy: Policy, shop: Shop, names=NAMES, split: str = "test", batch: int = 256, pca: int = 0
) -> dict[str, np.ndarray]:
    """name -> (rows, d) float32. With pca, item_token and user_content share the basis of the item rows, since they
    meet in a dot product; the others have their own. Raises PageLLMError for pca above the model's width."""
    policy.model.eval()
    width = policy.model.shape.n_embd
    if pca > min(width, shop.n_items, shop.n_users):
        raise PageLLMError(
            f"pca={pca}: these rows have {min(width, shop.n_items, shop.n_users)} dimensions at most"
        )
    item, user = (w.detach().float().cpu().numpy() for w in (policy.model.item, policy.model.user))
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
    where = config.stage(config.policy, config.source_run if config.policy == "sft" else "")
    record = finished(where, f"{config.policy} policy", config.make(config.policy))
    shop = load(config.data_dir)
    inputs = {"data": file_id(config.data_dir / "source.json"), "policy": record["id"]}
    with Run(
        config.stage(config.out or f"export-{config.policy}"), config, inputs, ("batch",)
    ) as out:
        if out.done:
            print(f"export: already done in {out.path}")
            return
        policy = Policy.load(where, pick_device(config.device))
        found, hashes = (
            export_embeddings(
                policy, shop, config.names.split(","), config.split, config.batch, config.pca
            ),
            {},
        )
        files = {}
        for name, x in found.items():
            if config.dtype == "int8":
                files[f"{name}.npy"], files[f"{name}.scale.npy"] = quantise(x)
            else:
                files[f"{name}.npy"] = x.astype(config.dtype)
                if not np.isfinite(files[f"{name}.npy"]).all():
                    raise PageLLMError(
                        f"{name} does not fit in {config.dtype}; export with --dtype float32"
                    )
        for name, x in files.items():
            with atomic(out.path / name) as beside, open(beside, "wb") as file:
                np.save(file, x, allow_pickle=False)
            hashes[name] = sha256(out.path / name)
        for name, ids in (("item_ids.json", shop.catalogue.ids), ("user_ids.json", shop.user_ids)):
            write_json(out.path / name, list(ids))
            hashes[name] = sha256(out.path / name)
        write_json(
            out.path / "manifest.json",
            {
                "dataset": config.dataset,
                "policy": config.policy,
                "inputs": inputs,
                "dtype": config.dtype,
                "pca": config.pca,
                "split": config.split,
                "sha256": hashes,
                "matrices": {name: list(x.shape) for name, x in found.items()},
            },
        )
        out.finish(matrices={name: list(x.shape) for name, x in found.items()})
        size = sum((out.path / name).stat().st_size for name in files)
        print(f"export: {out.path}, {len(found)} matrices, {size / 1e6:.1f} MB in {config.dtype}")


if __name__ == "__main__":
    sys.exit(main(Config, run, "pagellm.serving.export"))
