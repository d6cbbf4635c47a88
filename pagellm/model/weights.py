"""Published weight files: .safetensors and .bin, one file or shards, local or from the hub.

    weights, config = read_weights("models/Llama-3.2-1B")     # {name: tensor}, config.json or {}
    write_weights("models/mine", weights, config, shard_mb=500)

safetensors files are read and written here with torch alone: 8 bytes that give the length of the
header, a JSON header, the numbers. Files are mapped into memory, so a tensor is read when it is
used. Nothing pickled is loaded. Source of the format: the documentation of huggingface/safetensors.
"""

import json
import re
from pathlib import Path

import torch
from torch import Tensor

from pagellm.stage import hints
from pagellm.stage.config import PageLLMError
from pagellm.stage.files import atomic, write_json
from pagellm.stage.run import load_model_file

__all__ = [
    "DTYPES",
    "folder_of",
    "read_safetensors",
    "read_weights",
    "write_safetensors",
    "write_weights",
]


DTYPES = {
    "F64": torch.float64,
    "F32": torch.float32,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
    "I64": torch.int64,
    "I32": torch.int32,
    "I16": torch.int16,
    "I8": torch.int8,
    "U8": torch.uint8,
    "BOOL": torch.bool,
}
SINGLE = ("model.safetensors", "pytorch_model.bin")
# a repository of the hub: a name, or an owner and a name
HUB_NAME = re.compile(r"\w[\w.-]*(/\w[\w.-]*)?")
INDEX = ("model.safetensors.index.json", "pytorch_model.bin.index.json")
# What belongs to weights, where it is there: words and chat template.
BESIDE = (
    "config.json",
    "tokenizer.json",
    "tokenizer_config.json",
    "chat_template.jinja",
    "vocab.json",
    "merges.txt",
)
HEADER_LIMIT = 100 << 20  # bytes; as the format's own readers have it


def read_safetensors(path: str | Path) -> dict[str, Tensor]:
    """{name: tensor}, mapped from the file.

    Raises PageLLMError for a file that is gone, cut short, or of another format.
    """
    path = Path(path)

    def bad(what: str) -> PageLLMError:
        return PageLLMError(f"{path} is no whole safetensors file: {what}\n  Fetch it again.")

    try:
        size = path.stat().st_size
        with open(path, "rb") as file:
            length = int.from_bytes(file.read(8), "little")
            if size < 8 or not 2 <= length <= min(HEADER_LIMIT, size - 8):
                raise bad(f"{size} bytes, a header of {length}")
            header = json.loads(file.read(length))
    except OSError as error:
        raise PageLLMError(f"{path} cannot be read: {error.strerror}") from None
    except ValueError as error:
        raise bad(f"its header is damaged ({error})") from None
    start, found = 8 + length, {}
    if not isinstance(header, dict):
        raise bad("its header is no table")
    data = torch.from_file(str(path), shared=False, size=size, dtype=torch.uint8)
    for name, entry in header.items():
        if name == "__metadata__":
            continue
        try:
            dtype, shape = DTYPES[entry["dtype"]], [int(n) for n in entry["shape"]]
            first, last = map(int, entry["data_offsets"])
            count = 1
            for n in shape:
                count *= n
            if (
                min([0, *shape]) < 0
                or not 0 <= first <= last <= size - start
                or last - first != count * dtype.itemsize
            ):
                raise ValueError(f"{shape} {entry['dtype']} at {first}:{last} of {size - start}")
        except (KeyError, TypeError, ValueError) as error:
            raise bad(f"{name}: {error}") from None
        raw = data[start + first : start + last]
        # A view must begin at a multiple of the element's size. Most writers pad the header for
        # that, but they need not.
        if (start + first) % dtype.itemsize:
            raw = raw.clone()
        found[name] = raw.view(dtype).view(shape)
    return found


def write_safetensors(path: str | Path, weights: dict[str, Tensor]) -> None:
    """The inverse of `read_safetensors`. The file appears under its name when it is whole."""
    names = {dtype: name for name, dtype in DTYPES.items()}
    header: dict[str, dict] = {"__metadata__": {"format": "pt"}}
    place = 0
    flat = {name: w.detach().cpu().contiguous() for name, w in weights.items()}
    for name, w in flat.items():
        header[name] = {
            "dtype": names[w.dtype],
            "shape": list(w.shape),
            "data_offsets": [place, place + w.nbytes],
        }
        place += w.nbytes
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)
    with atomic(path) as beside, open(beside, "wb") as file:
        file.write(len(text).to_bytes(8, "little") + text)
        for w in flat.values():
            file.write(w.reshape(-1).view(torch.uint8).numpy().data)


def write_weights(
    folder: str | Path, weights: dict[str, Tensor], config: dict, shard_mb: float = 0.0
) -> None:
    """Write model.safetensors and config.json.

    shard_mb  about how many MB a shard has; an index is then written too. 0: one file
    """
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    write_json(folder / "config.json", config)
    if not shard_mb:
        write_safetensors(folder / SINGLE[0], weights)
        return
    shards: list[dict[str, Tensor]] = [{}]
    room = 0.0
    for name, w in weights.items():
        if shards[-1] and room + w.nbytes > shard_mb * 2**20:
            shards.append({})
            room = 0.0
        shards[-1][name] = w
        room += w.nbytes
    where: dict[str, str] = {}
    for at, shard in enumerate(shards, 1):
        file = f"model-{at:05d}-of-{len(shards):05d}.safetensors"
        write_safetensors(folder / file, shard)
        where |= dict.fromkeys(shard, file)
    total = sum(w.nbytes for w in weights.values())
    write_json(folder / INDEX[0], {"metadata": {"total_size": total}, "weight_map": where})


def read_weights(source: str | Path) -> tuple[dict[str, Tensor], dict]:
    """{name: tensor} of a published model and its config.json ({} where there is none).

    source  a directory, a weight file, an index of shards, or a name on the hub ("gpt2",
            "meta-llama/Llama-3.2-1B")
    Raises PageLLMError if there are no such files, a shard is missing or damaged, or the hub cannot
    be reached.
    """
    path = located(source)
    beside = path.parent / "config.json"
    config = read_table(beside) if beside.exists() else {}
    if not path.name.endswith(".index.json"):
        return read_file(path), config
    places = read_table(path).get("weight_map")
    if not isinstance(places, dict) or not places:
        raise PageLLMError(f"{path} names no weights (weight_map)")
    weights: dict[str, Tensor] = {}
    for file in sorted(set(map(str, places.values()))):
        if Path(file).name != file:
            raise PageLLMError(f"{path} names the shard {file!r}; want a file beside it")
        if not (path.parent / file).exists():
            raise PageLLMError(
                f"{path} names the shard {file}, which is not beside it; fetch it too"
            )
        inside = read_file(path.parent / file)
        wanted = {name for name, place in places.items() if place == file}
        if missing := sorted(wanted - set(inside)):
            raise PageLLMError(
                f"{path.parent / file} lacks {missing[:3]}, which {path.name} places there"
            )
        weights |= {name: inside[name] for name in wanted}
    return weights, config


def located(source: str | Path) -> Path:
    """The weight file, or the index of shards, that a source names; fetched where it is a name."""
    path = Path(source)
    if path.is_dir():
        found = [path / name for name in (*SINGLE, *INDEX) if (path / name).exists()]
        if not found:
            packed = sorted(path.glob("*.gguf"))
            more = (
                f"\n  Unpack it first: pagellm import-gguf {packed[0]} --out DIR" if packed else ""
            )
            raise PageLLMError(f"no weights in {path}; want {', '.join((*SINGLE, INDEX[0]))}{more}")
        return found[0]
    if path.suffix == ".gguf" and path.exists():
        raise PageLLMError(
            f"{path} is a GGUF file; unpack it first: pagellm import-gguf {path} --out DIR"
        )
    if path.exists():
        return path
    if not HUB_NAME.fullmatch(str(source)):
        raise PageLLMError(f"no file or directory {path}{nearest(path)}")
    return fetch(str(source))


def nearest(path: Path) -> str:
    """ "; did you mean ...?" with the name beside `path` that is most like it, or nothing."""
    there = [one.name for one in path.parent.iterdir()] if path.parent.is_dir() else []
    close = hints.nearest(path.name, there)
    return f"; did you mean {path.parent / close}?" if close else ""


def folder_of(source: str | Path) -> Path:
    """The directory in which weights lie, with what was published beside them."""
    return located(source).parent


def read_table(path: Path) -> dict:
    """A JSON object from a file. Raises PageLLMError if it is none."""
    try:
        table = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise PageLLMError(f"{path} cannot be read: {error}") from None
    if not isinstance(table, dict):
        raise PageLLMError(f"{path} is no JSON table")
    return table


def read_file(path: Path) -> dict[str, Tensor]:
    """{name: tensor} of one .safetensors or .bin file."""
    if path.suffix == ".safetensors":
        return read_safetensors(path)
    weights = load_model_file(path)
    if not isinstance(weights, dict) or not all(isinstance(w, Tensor) for w in weights.values()):
        raise PageLLMError(f"{path} holds no table of tensors")
    return weights


def fetch(name: str) -> Path:
    """The weight file or index of a model on the hub; its shards and config.json lie beside it.

    The files are in the cache of huggingface_hub. Raises PageLLMError if it cannot be reached.
    """
    try:
        from huggingface_hub import hf_hub_download
        from huggingface_hub.utils import EntryNotFoundError, LocalEntryNotFoundError
    except ImportError:
        raise PageLLMError(
            f"{name} is no file here; to fetch it from the hub: pip install 'pagellm[hub]'"
        ) from None
    try:
        try:
            path = Path(hf_hub_download(name, SINGLE[0]))
        except LocalEntryNotFoundError:  # the hub cannot be reached: it is not asked again
            raise
        except EntryNotFoundError:
            path = Path(hf_hub_download(name, INDEX[0]))
            for file in sorted(set(map(str, read_table(path).get("weight_map", {}).values()))):
                hf_hub_download(name, file)
        for file in BESIDE:
            try:
                hf_hub_download(name, file)
            except EntryNotFoundError:
                pass
    except PageLLMError:
        raise
    except Exception as error:
        raise PageLLMError(
            f"no directory {name} here{nearest(Path(name))}\n  Nor could it be fetched from the "
            f"hub ({type(error).__name__}); put its files into a directory and name its path."
        ) from error
    return path
