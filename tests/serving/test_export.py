"""Exported embeddings: read without torch, they give the policy's own logits."""

import json
import re
import subprocess
import sys

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from pagellm.data.shop import load
from pagellm.model.policy import Policy
from pagellm.serving import export
from pagellm.serving.embeddings import NAMES, Embeddings, dequantise, quantise
from pagellm.stage.command import main
from pagellm.stage.config import PageLLMError, parse


@pytest.fixture(scope="module")
def common(served):
    return {
        "run": "base",
        "data": str(served / "data"),
        "runs": str(served / "runs"),
        "device": "cpu",
    }


@pytest.mark.parametrize("dtype, within", [("float32", 1e-5), ("float16", 1e-3), ("int8", 2e-2)])
def test_dot_products_are_the_logits_of_the_first_slot(common, served, tmp_path, dtype, within):
    """Within `within` of the largest logit, for every user and item."""
    export.run(
        export.Config(
            **{**common, "run": f"e-{dtype}", "source_run": "base"}, policy="sft", dtype=dtype
        )
    )
    rows = Embeddings(served / "runs" / f"e-{dtype}" / "export-sft")
    shop, policy = (
        load(served / "data" / "synthetic"),
        Policy.load(served / "runs" / "base" / "sft"),
    )
    users = np.arange(shop.n_users)
    prompt, valid = policy.prompt(users, [shop.csr(None).of(u) for u in users])
    with torch.no_grad():
        logits = policy.model.item_logits(policy.model(prompt, valid)[:, -1]).numpy()
    got = rows.matrix("user_content") @ rows.matrix("item_token").T
    assert np.abs(got - logits).max() < within * np.abs(logits).max()
    some = [shop.catalogue.ids[i] for i in (3, 0)]
    assert rows.dot(shop.user_ids[5], some) == pytest.approx(got[5, [3, 0]], rel=1e-5)
    assert set(rows.manifest["matrices"]) == set(NAMES)
    assert rows.matrix("user_token").shape == (shop.n_users, policy.model.shape.n_embd)


def test_content_reads_words_alone_and_no_padding(served):
    shop, policy = (
        load(served / "data" / "synthetic"),
        Policy.load(served / "runs" / "base" / "sft"),
    )
    whole, alone = export.item_content(policy, shop, 64), export.item_content(policy, shop, 1)
    assert np.abs(whole - alone).max() < 1e-4
    with torch.no_grad():
        policy.model.item.zero_()
    assert np.array_equal(export.item_content(policy, shop, 64), whole)
    assert np.unique(whole.round(4), axis=0).shape[0] > shop.n_items // 2


def test_pca_keeps_dot_products_as_far_as_it_can(served):
    shop, policy = (
        load(served / "data" / "synthetic"),
        Policy.load(served / "runs" / "base" / "sft"),
    )
    names, C = ("item_token", "user_content"), policy.model.shape.n_embd
    full = export.export_embeddings(policy, shop, names)
    exact = full["user_content"] @ full["item_token"].T
    off = []
    for d in (2, C // 2, C):
        low = export.export_embeddings(policy, shop, names, pca=d)
        assert low["item_token"].shape == (shop.n_items, d)
        off.append(np.abs(low["user_content"] @ low["item_token"].T - exact).max())
    assert off[0] > off[1] > off[2] and off[2] < 1e-4
    with pytest.raises(PageLLMError, match="dimensions at most"):
        export.export_embeddings(policy, shop, names, pca=C + 1)


@given(
    st.lists(
        st.lists(st.floats(-1e3, 1e3, width=32), min_size=3, max_size=3), min_size=1, max_size=4
    )
)
def test_int8_is_within_half_a_step(rows):
    x = np.array(rows, np.float32)
    q, scale = quantise(x)
    assert (
        q.dtype == np.int8
        and (np.abs(dequantise(q, scale) - x) <= scale[:, None] * 0.5001 + 1e-30).all()
    )
    assert (np.abs(q).max(1) == 127)[np.abs(x).max(1) > 1e-30].all()  # the whole range is used


def test_two_exports_lie_beside_each_other(common, served, capsys):
    small = {**common, "policy": "sft", "dtype": "int8", "pca": 4, "out": "export-small"}
    export.run(export.Config(**common, policy="sft"))
    export.run(export.Config(**small))
    both = [Embeddings(served / "runs" / "base" / name) for name in ("export-sft", "export-small")]
    assert [rows.manifest["dtype"] for rows in both] == ["float16", "int8"]
    assert both[1].matrix("item_token").shape[1] == 4 < both[0].matrix("item_token").shape[1]
    capsys.readouterr()
    export.run(export.Config(**common, policy="sft", dtype="float16"))  # by name, as by default
    assert "already done" in capsys.readouterr().out
    with pytest.raises(PageLLMError, match="was made with pca=4, now pca=0"):
        export.run(export.Config(**small | {"pca": 0}))


def test_the_loader_needs_numpy_alone(common, served):
    export.run(export.Config(**common, dtype="int8", pca=8, names="item_token,user_content"))
    path = served / "runs" / "base" / "export-ppo"
    user, item = (json.loads((path / f"{n}_ids.json").read_text())[0] for n in ("user", "item"))
    code = (
        "import sys; from pagellm.serving.embeddings import Embeddings; "
        f"print(Embeddings({str(path)!r}).dot({user!r}, [{item!r}])[0], "
        "*sorted({'torch', 'pyarrow', 'tokenizers'} & set(sys.modules)))"
    )
    said = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, check=True
    ).stdout.split()
    assert len(said) == 1 and float(said[0]) == pytest.approx(
        Embeddings(path).dot(user, [item])[0], rel=1e-5
    )


def test_sft_alone_is_exported_with_all_that_is_known_of_its_users(sft_alone, capsys):
    """No policy named: the one that is there. Nothing held out: prompts hold every liked row."""
    base = {"run": "base", "data": str(sft_alone / "data"), "runs": str(sft_alone / "runs")}
    export.run(export.Config(**base, device="cpu", dtype="float32"))
    assert re.search("export: sft [0-9a-f]{16}; no rows held out", capsys.readouterr().out)
    rows = Embeddings(sft_alone / "runs" / "base" / "export-sft")
    shop = load(sft_alone / "data" / "synthetic")
    policy = Policy.load(sft_alone / "runs" / "base" / "sft")
    prompt, valid = policy.prompt([7], [shop.csr(None).of(7)])
    with torch.no_grad():
        want = policy.model(prompt, valid)[0, -1].numpy()
    assert rows.row("user_content", shop.user_ids[7]) == pytest.approx(want, abs=1e-4)
    with pytest.raises(PageLLMError, match="make ppo"):
        export.run(export.Config(**base, device="cpu", policy="ppo"))


@pytest.mark.parametrize(
    "format, written",
    [
        ("transformers", "always writes float32"),
        ("trec", "writes no matrix"),
        ("ranx", "writes no matrix"),
        ("recbole", "writes no matrix"),
    ],
)
def test_a_dtype_that_would_be_passed_over_is_refused(format, written, capsys):
    message = f"dtype='float16' is for --format embeddings; --format {format} {written}"
    argv = ["--format", format, "--dtype", "float16"]
    assert main(export.Config, export.run, "pagellm export", argv) == 2
    assert message in capsys.readouterr().err
    assert export.Config(format=format).dtype == ""
    with pytest.raises(PageLLMError, match="dtype='half': want float32, float16, int8"):
        export.Config(format=format, dtype="half")


@pytest.mark.parametrize(
    ("option", "value", "reader"),
    [
        ("--names", "item_token", "embeddings"),
        ("--pca", "2", "embeddings"),
        ("--split", "test", "embeddings"),
        ("--k", "5", "transformers"),
    ],
)
def test_an_option_that_another_format_alone_reads_is_refused(option, value, reader, capsys):
    for format in {"embeddings", "transformers", "trec", "recbole"} - {reader}:
        argv = ["--format", format, option, value]
        assert main(export.Config, export.run, "pagellm export", argv) == 2
        told = capsys.readouterr().err
        assert f"is for --format {reader}; --format {format} does not read it" in told
        assert f"Leave {option} out." in told
    parse(export.Config, ["--format", reader, option, value])  # there it is taken


def test_what_is_wrong_is_named(common, served, tmp_path, capsys):
    config = export.Config(
        **{**common, "run": "wrong", "source_run": "base"}, policy="sft", names="item_token"
    )
    export.run(config)
    export.run(config)
    assert "already done" in capsys.readouterr().out
    path = served / "runs" / "wrong" / "export-sft"
    with pytest.raises(PageLLMError, match="has no user_token; it has item_token"):
        Embeddings(path).matrix("user_token")
    with pytest.raises(PageLLMError, match="no row for 'x'"):
        Embeddings(path).row("item_token", "x")
    with open(path / "item_token.npy", "ab") as file:
        file.write(b"x")
    with pytest.raises(PageLLMError, match="not what manifest.json says"):
        Embeddings(path).matrix("item_token")
    with pytest.raises(PageLLMError, match="no readable manifest"):
        Embeddings(tmp_path)
    with pytest.raises(PageLLMError, match="names="):
        export.Config(names="item")
