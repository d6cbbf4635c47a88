"""Weight files: the format's own package reads what we write, and we read what it writes; a damaged
file is named.
"""

import json
import sys
import types
from pathlib import Path

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from pagellm.model.weights import (
    DTYPES,
    read_safetensors,
    read_weights,
    write_safetensors,
    write_weights,
)
from pagellm.stage.config import PageLLMError

tensors = st.dictionaries(
    st.text("abc.0", min_size=1, max_size=6),
    st.tuples(
        st.sampled_from(sorted(DTYPES)),
        st.lists(st.integers(0, 4), max_size=3),
        st.integers(0, 2**31),
    ),
    max_size=5,
)


def draw(dtype, shape, seed):
    raw = torch.randint(
        0, 2 if dtype == "BOOL" else 100, shape, generator=torch.Generator().manual_seed(seed)
    )
    return raw.to(DTYPES[dtype])


def same(a, b):
    return a.keys() == b.keys() and all(
        a[n].dtype == b[n].dtype and torch.equal(a[n], b[n]) for n in a
    )


@settings(
    deadline=None, max_examples=50, suppress_health_check=[HealthCheck.function_scoped_fixture]
)
@given(tensors)
def test_what_is_written_is_read(tmp_path, drawn):
    weights = {name: draw(*what) for name, what in drawn.items()}
    path = tmp_path / "x.safetensors"
    path.unlink(missing_ok=True)
    write_safetensors(path, weights)
    assert same(read_safetensors(path), weights)


def test_the_formats_own_package_agrees(tmp_path):
    package = pytest.importorskip(
        "safetensors.torch", reason="compare with safetensors: pip install -e '.[dev]'"
    )
    weights = {f"w.{dtype}": draw(dtype, [3, 5], at) for at, dtype in enumerate(DTYPES)}
    write_safetensors(tmp_path / "ours.safetensors", weights)
    assert same(package.load_file(tmp_path / "ours.safetensors"), weights)
    package.save_file(weights, tmp_path / "theirs.safetensors", metadata={"format": "pt"})
    assert same(read_safetensors(tmp_path / "theirs.safetensors"), weights)


@settings(
    deadline=None, max_examples=200, suppress_health_check=[HealthCheck.function_scoped_fixture]
)
@given(st.data())
def test_a_damaged_file_is_an_error_that_names_it(tmp_path, data):
    """A file is cut short, or a byte of the length or the header is changed.

    We read the same tensors, others of the same kind, or raise our error.
    """
    path = tmp_path / "x.safetensors"
    path.unlink(missing_ok=True)
    write_safetensors(path, {"a": torch.arange(6.0).view(2, 3), "b": torch.arange(4)})
    raw = bytearray(path.read_bytes())
    header = 8 + int.from_bytes(raw[:8], "little")
    if data.draw(st.booleans()):
        raw = raw[: data.draw(st.integers(0, len(raw) - 1))]
        with pytest.raises(PageLLMError, match="x.safetensors"):
            path.write_bytes(raw)
            read_safetensors(path)
        return
    raw[data.draw(st.integers(0, header - 1))] = data.draw(st.integers(0, 255))
    path.write_bytes(raw)
    try:
        assert all(isinstance(w, torch.Tensor) for w in read_safetensors(path).values())
    except PageLLMError as error:
        assert "x.safetensors" in str(error)


def test_shards_and_what_can_be_wrong_with_them(tmp_path):
    weights = {f"w{i}": torch.randn(64, 64) for i in range(5)}
    write_weights(tmp_path, weights, {"model_type": "x"}, shard_mb=0.04)
    found, config = read_weights(tmp_path)
    assert same(found, weights) and config == {"model_type": "x"}
    index = tmp_path / "model.safetensors.index.json"
    assert same(read_weights(index)[0], weights)
    places = json.loads(index.read_text())["weight_map"]
    assert len(set(places.values())) == 3
    for change, message in (
        ({"w9": "model-00001-of-00003.safetensors"}, r"lacks \['w9'\]"),
        ({"w9": "../model.safetensors"}, "a file beside it"),
        ({"w9": "model-00009-of-00003.safetensors"}, "not beside it"),
    ):
        index.write_text(json.dumps({"weight_map": places | change}))
        with pytest.raises(PageLLMError, match=message):
            read_weights(tmp_path)
    for text, message in (
        ("{}", "names no weights"),
        ("[]", "no JSON table"),
        ("{", "cannot be read"),
    ):
        index.write_text(text)
        with pytest.raises(PageLLMError, match=message):
            read_weights(tmp_path)
    with pytest.raises(PageLLMError, match="no weights in"):
        (tmp_path / "empty").mkdir()
        read_weights(tmp_path / "empty")
    torch.save([1, 2], tmp_path / "pytorch_model.bin")
    with pytest.raises(PageLLMError, match="no table of tensors"):
        read_weights(tmp_path / "pytorch_model.bin")


def test_a_name_is_fetched_from_the_hub_shards_too(tmp_path, monkeypatch):
    """A hub that has one sharded model; what is fetched lies together, as in the hub's cache."""
    weights = {f"w{i}": torch.randn(64, 64) for i in range(3)}
    write_weights(tmp_path, weights, {"model_type": "x"}, shard_mb=0.02)
    asked = []

    class EntryNotFoundError(Exception):
        pass

    class LocalEntryNotFoundError(EntryNotFoundError):
        """As in huggingface_hub: the hub cannot be reached, and the file is not in the cache."""

    def hf_hub_download(name, file):
        asked.append(file)
        if name != "some/model":
            raise LocalEntryNotFoundError("no network")
        if not (tmp_path / file).exists():
            raise EntryNotFoundError(file)
        return str(tmp_path / file)

    hub, utils = types.ModuleType("huggingface_hub"), types.ModuleType("huggingface_hub.utils")
    hub.hf_hub_download, utils.EntryNotFoundError = hf_hub_download, EntryNotFoundError
    utils.LocalEntryNotFoundError = LocalEntryNotFoundError
    monkeypatch.setitem(sys.modules, "huggingface_hub", hub)
    monkeypatch.setitem(sys.modules, "huggingface_hub.utils", utils)
    found, config = read_weights("some/model")
    assert same(found, weights) and config == {"model_type": "x"} and len(asked) == 11
    monkeypatch.chdir(tmp_path)
    (tmp_path / "others" / "models").mkdir(parents=True)
    asked.clear()
    said = "no directory others/model here; did you mean others/models.*\n.*hub .LocalEntryNotFound"
    with pytest.raises(PageLLMError, match=said):
        read_weights("others/model")
    assert len(asked) == 1, "a hub that cannot be reached is asked once"
    for path in ("./others/model", "others/models/x", str(tmp_path / "others" / "model"), "~/x"):
        with pytest.raises(PageLLMError, match=f"^no file or directory {Path(path)}"):
            read_weights(path)
    assert len(asked) == 1, "what can only be a path is no name on the hub"
    monkeypatch.setitem(sys.modules, "huggingface_hub", None)
    with pytest.raises(PageLLMError, match=r"pip install 'pagellm\[hub\]'"):
        read_weights("some/model")
