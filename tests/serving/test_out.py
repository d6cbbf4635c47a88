"""--out of every command that has one: it never leads into what another command made."""

import dataclasses
import importlib
import shutil

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from pagellm import evaluate
from pagellm.__main__ import VERBS
from pagellm.data.shop import load
from pagellm.online import abtest
from pagellm.serving import export
from pagellm.stage.config import PageLLMError
from pagellm.stage.outputs import NAMES

# Commands whose --out is a name below the run, a directory anywhere, or a file.
IN_RUN = {
    "export trec": {"format": "trec"},
    "export ranx": {"format": "ranx"},
    "export recbole": {"format": "recbole"},
    "export embeddings": {},
    "export transformers": {"format": "transformers", "k": 6},
    "simulator": {"treatment": "ppo", "k": 6, "visitors": 100},
}
FILES = ("report", "recommend", "features", "abtest")


@pytest.fixture(scope="module")
def shop_and_run(served, tmp_path_factory):
    """The shop of `served` with evaluated pages, a file of pairs and one of users of two arms."""
    root = tmp_path_factory.mktemp("out")
    for part in ("data", "runs"):
        shutil.copytree(served / part, root / part, ignore=shutil.ignore_patterns("evaluate"))
    evaluate.run(evaluate.Config(k=6, n_boot=2, **places(root)))
    shop = load(root / "data" / "synthetic")
    pairs = {"user_id": [shop.user_ids[0]], "item_id": [shop.catalogue.ids[0]]}
    pq.write_table(pa.table(pairs), root / "pairs.parquet")
    arms = {"user": ["a", "b", "c", "d"], "arm": ["control", "treatment"] * 2}
    log = pa.table(arms | {name: [3, 2, 4, 5] for name in abtest.COLUMNS})
    pq.write_table(log, root / "log.parquet")
    return root


def places(root):
    return {"run": "base", "data": str(root / "data"), "runs": str(root / "runs"), "device": "cpu"}


def do(root, verb, out, **more):
    """Run a command with this --out."""
    module = importlib.import_module(VERBS[verb.partition(" ")[0]])
    given = places(root) | IN_RUN.get(verb, {}) | more
    if verb == "recommend":
        given |= {"all": True, "k": 6}
    if verb == "features":
        given |= {"pairs": str(root / "pairs.parquet"), "k": 6}
    if verb == "abtest":
        given = {"log": str(root / "log.parquet")} | more
    if verb == "import-gguf":
        given = {"file": __file__}
    return module.run(module.Config(**given, out=str(out)))


def tree(root):
    """Path -> when and how it was written, of all that lies below."""
    found = (p for p in sorted(root.rglob("*")) if p.name not in ("lock", "__pycache__"))
    return {str(p.relative_to(root)): (p.stat().st_size, p.stat().st_mtime_ns) for p in found}


def test_every_command_with_out_is_here():
    known = {verb.partition(" ")[0] for verb in IN_RUN} | {*FILES, "import-gguf"}
    known |= {"update"}  # whose --out is the name of a run, see test_update.py
    found = set()
    for verb, name in VERBS.items():
        config = importlib.import_module(name).Config
        if "out" in {f.name for f in dataclasses.fields(config)} | set(
            getattr(config, "ALIASES", {})
        ):
            found.add(verb)
    assert found == known


@pytest.mark.parametrize("out", ["evaluate", "ppo", ".", "../base", "sft/mine", "compose"])
@pytest.mark.parametrize("verb", IN_RUN)
def test_a_name_below_the_run_is_no_stage_and_not_the_run(shop_and_run, verb, out):
    before = tree(shop_and_run)
    with pytest.raises(PageLLMError, match="nothing was written"):
        do(shop_and_run, verb, out)
    assert tree(shop_and_run) == before


@pytest.mark.parametrize("verb", [v for v in IN_RUN if v != "export transformers"])
def test_what_a_command_wrote_itself_is_written_again(shop_and_run, verb):
    do(shop_and_run, verb, f"again-{verb}")
    do(shop_and_run, verb, f"again-{verb}")
    other = "export ranx" if verb != "export ranx" else "export trec"
    with pytest.raises(PageLLMError, match="it holds"):
        do(shop_and_run, other, f"again-{verb}")


def test_a_directory_of_other_files_or_a_data_set_takes_no_export(shop_and_run, tmp_path):
    (tmp_path / "thesis.tex").write_text("all of it")
    for out in (tmp_path, shop_and_run / "data" / "synthetic", shop_and_run / "data"):
        for verb in IN_RUN:
            with pytest.raises(PageLLMError, match="it holds"):
                do(shop_and_run, verb, out.absolute())
    assert [p.name for p in tmp_path.iterdir()] == ["thesis.tex"]


@pytest.mark.parametrize("verb", [*FILES, "import-gguf"])
def test_a_file_goes_neither_among_those_of_a_stage_nor_over_another(shop_and_run, verb, tmp_path):
    root = shop_and_run
    mine = tmp_path / "orders.parquet"
    pq.write_table(pa.table({"user_id": ["u"], "item_id": ["i"]}), mine)
    before = tree(root), tree(tmp_path)
    places = [root / "runs/base/sft/new", root / "runs/base/evaluate/ppo/pages.parquet", mine]
    places += [root / "data/synthetic/interactions.parquet", root / "runs/base/ppo/model.pt"]
    for out in places:
        with pytest.raises(PageLLMError, match="nothing was written|Move it away|is there already"):
            do(root, verb, out)
    assert (tree(root), tree(tmp_path)) == before


@pytest.mark.parametrize("verb", FILES)
def test_a_file_of_the_command_itself_is_written_again(shop_and_run, verb, tmp_path):
    out = tmp_path / ("own.parquet" if verb in ("recommend", "features") else "own.html")
    do(shop_and_run, verb, out)
    do(shop_and_run, verb, out)
    assert out.is_file()


def test_a_result_of_an_online_test_is_not_written_over_a_plan_of_the_user(shop_and_run, tmp_path):
    log = shutil.copy(shop_and_run / "log.parquet", tmp_path)
    (tmp_path / "abtest.json").write_text('{"colour": "blue"}')
    with pytest.raises(PageLLMError, match="a file of something else"):
        do(shop_and_run, "abtest", "", log=str(log))


def test_names_of_stages_are_taken_before_the_stage_was_run(shop_and_run):
    """An export that waits in the place of a later stage would be in its way."""
    for name in sorted(NAMES):
        with pytest.raises(PageLLMError, match="nothing was written"):
            export.run(export.Config(format="recbole", out=name, **places(shop_and_run)))
