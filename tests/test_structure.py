"""The house rules, read off the imports: who may know whom."""

import ast
import graphlib
import subprocess
import sys
from functools import cache
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from pagellm.data.shop import read_parquet

ROOT = Path(__file__).parent.parent
STAGES = ("pretrain", "sft", "reward", "ppo", "compose", "evaluate")
# From the ground up. A module imports its own folder and what stands below; no stage imports a
# stage.
LAYERS = (
    {"kernels"},
    {"stage"},
    {"data"},
    {"pages"},
    {"model"},
    {"ppo_config", "ppo_step"},
    {"ppo_setup"},
    {"ppo_gate", "ppo_watch"},
    {"ppo_once"},
    set(STAGES),
    {"serving"},
    {"baselines", "online"},
    {"report"},  # shows what all of them made
    {"upkeep"},  # is all well; forget a person
    {"tuning"},  # trials of the stages
    {"tune", "update"},
    {"pipeline"},  # one command for all of it
    {"storefront"},  # the second system; nothing imports it
    {"python"},  # what `import pagellm` offers
    {"__main__"},
)
LEVEL = {room: level for level, rooms in enumerate(LAYERS) for room in rooms}
BASE = {"torch", "tokenizers", "numpy", "pyarrow", "tqdm", "filelock"}  # torch needs filelock
# Extras that are imported inside functions only, where a person asked for what needs them.
EXTRAS = {"faiss", "gguf", "huggingface_hub", "jinja2", "mlflow", "uvicorn", "matplotlib"}
EXTRAS |= {"duckdb", "lightgbm", "pyspark", "transformers"}
# Modules that cannot be imported without an extra.
WEB = {"fastapi", "starlette", "pydantic", "prometheus_client", "uvicorn", "h11"}
OUTSIDE = {
    "scipy",
    "implicit",
    "cornac",
    "rectools",
    "torch_geometric",
    "pandas",
    "lightning",
    "pytorch_lightning",
}
LEAVES = {
    "serving.api": WEB,
    "serving.frame": WEB,
    "serving.meters": WEB,
    "serving.middleware": WEB,
    "serving.schema": WEB,
    "storefront.api": WEB,
    "baselines.outside": OUTSIDE,
}


@cache
def tree_of(path):
    return ast.parse(path.read_text(encoding="utf-8"))


def imports(tree):
    """(module, name or None) of every import."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            yield from ((alias.name, None) for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            module = node.module if not node.level else "kernels"  # only kernels imports by place
            yield from ((module, alias.name) for alias in node.names)


def exported(tree):
    for node in tree.body:
        if isinstance(node, ast.Assign) and getattr(node.targets[0], "id", "") == "__all__":
            return ast.literal_eval(node.value)
    return None


def python_files(folder):
    """Every module below a folder, each once: pagellm/kernels is a link to kernels."""
    found = sorted((ROOT / folder).rglob("*.py"))
    return [p for p in found if p.name != "__init__.py" and "pagellm/kernels" not in p.as_posix()]


MODULES, STUDIES = python_files("pagellm"), python_files("experiments")
KERNELS = python_files("kernels")


def name_of(path):
    return ".".join(path.relative_to(ROOT / "pagellm").with_suffix("").parts)


def room_of(module):
    """The folder of a module of pagellm, or the module itself where it stands at the top."""
    return module.split(".")[0]


def test_reading_raw_files_waits_for_no_torch():
    """Each process that reads starts anew: torch would be most of its start and of its memory."""
    code = "import sys, pagellm.data.prepare; print('torch' in sys.modules)"
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True
    )
    assert done.stdout == "False\n"


def test_a_prepared_table_is_read_without_pandas(tmp_path):
    """Where it is installed it takes every start half a second more."""
    for name in ("x", "y"):
        pq.write_table(pa.table({"a": [1, 2], "b": [name, name]}), tmp_path / f"{name}.parquet")
    code = (
        "import pathlib, sys\nfrom pagellm.data.shop import read_parquet\n"
        "print(read_parquet(pathlib.Path(sys.argv[1]), ['a']).to_pydict(), 'pandas' in sys.modules)"
    )
    done = subprocess.run(
        [sys.executable, "-c", code, tmp_path / "x.parquet"],
        cwd=ROOT,
        capture_output=True,
        text=True,
        check=True,
    )
    assert done.stdout == "{'a': [1, 2]} False\n"
    assert read_parquet(tmp_path)["b"].to_pylist() == ["x", "x", "y", "y"]


def test_every_module_has_a_room():
    assert {room_of(name_of(p)) for p in MODULES} == set(LEVEL) - {"kernels"}


@pytest.mark.parametrize("path", MODULES, ids=name_of)
def test_a_module_imports_its_own_room_and_what_lies_below(path):
    room = room_of(name_of(path))
    for module, name in imports(tree_of(path)):
        top = module.split(".")[0]
        allowed = BASE | EXTRAS | LEAVES.get(name_of(path), set())
        assert top in {"pagellm"} | allowed or top in sys.stdlib_module_names, module
        if top != "pagellm" or (module == "pagellm" and name == "__version__"):
            continue
        inner = module.removeprefix("pagellm.") if module != "pagellm" else name
        other = room_of(inner)
        beside = other == room and room not in STAGES  # no stage imports a stage
        assert beside or LEVEL[other] < LEVEL[room], f"{name_of(path)} imports {inner}"


def test_no_circle_among_the_modules_of_a_room():
    graph = {}
    for path in MODULES:
        graph[name_of(path)] = targets = set()
        for module, name in imports(tree_of(path)):
            for full in (f"{module}.{name}", module):
                inner = full.removeprefix("pagellm.")
                if (ROOT / "pagellm" / (inner.replace(".", "/") + ".py")).exists():
                    targets.add(inner)
                    break
    order = list(graphlib.TopologicalSorter(graph).static_order())  # raises CycleError
    assert len(order) >= len(MODULES)


@pytest.mark.parametrize("path", KERNELS, ids=lambda p: p.name)
def test_kernels_stand_alone(path):
    for module, _ in imports(tree_of(path)):
        top = module.split(".")[0]
        assert top in {"torch", "kernels"} or top in sys.stdlib_module_names, module


def test_every_module_says_what_it_offers_and_offers_what_it_says():
    for path in [*MODULES, *KERNELS, *STUDIES]:
        tree = tree_of(path)
        names = exported(tree)
        assert names is not None, f"{path} has no __all__"
        made = {n.name for n in tree.body if isinstance(n, (ast.FunctionDef, ast.ClassDef))}
        made |= {
            t.id
            for n in tree.body
            if isinstance(n, (ast.Assign, ast.AnnAssign))
            for t in ast.walk(n)
            if isinstance(t, ast.Name) and isinstance(t.ctx, ast.Store)
        }
        made |= {name or module for module, name in imports(tree)}
        assert set(names) <= made, f"{path}: {set(names) - made}"


def test_studies_use_the_public_surface():
    for path in STUDIES:
        for module, name in imports(tree_of(path)):
            file = ROOT / (module.replace(".", "/") + ".py") if module else None
            if name and module.startswith("pagellm.") and file and file.exists():
                assert name in exported(tree_of(file)), (
                    f"{path.name}: {module}.{name} is not in its __all__"
                )


def test_nothing_imports_the_studies():
    for path in [*MODULES, *KERNELS]:
        assert not [m for m, _ in imports(tree_of(path)) if m.startswith("experiments")], path


def test_the_base_alone_imports_every_module_but_the_leaves():
    """In a process where no extra can be imported. Nor is what divides tensors among processes,
    which takes torch 0.6 processor seconds: `dist.wrap` imports it."""
    names = [f"pagellm.{name_of(p)}" for p in MODULES if name_of(p) not in (*LEAVES, "__main__")]
    others = sorted(
        {
            *EXTRAS,
            *set().union(*LEAVES.values()),
            "matplotlib",
            "locust",
            "schemathesis",
            "scipy",
            "transformers",
            "implicit",
            "cornac",
            "httpx",
            "pandas",
            "pytest",
            "hypothesis",
        }
    )
    done = subprocess.run(
        [
            sys.executable,
            "-c",
            f"import sys\nsys.modules |= dict.fromkeys({others})\n"
            + "\n".join(f"import {name}" for name in names)
            + "\nassert 'torch.distributed.tensor' not in sys.modules",
        ],
        cwd=ROOT,
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr


@pytest.mark.parametrize("folder", ["pagellm", "kernels", "experiments"])
def test_no_function_is_longer_than_100_lines(folder):
    for path in python_files(folder):
        for node in ast.walk(tree_of(path)):
            if isinstance(node, ast.FunctionDef):
                lines = node.end_lineno - node.lineno + 1
                assert lines <= 100, f"{path}: {node.name} has {lines} lines"


def test_no_pickle_and_no_eval():
    for folder in ("pagellm", "kernels", "experiments"):
        for path in (ROOT / folder).rglob("*.py"):
            text = path.read_text()
            for node in ast.walk(tree_of(path)):
                if isinstance(node, ast.Call) and getattr(node.func, "id", "") in ("eval", "exec"):
                    raise AssertionError(f"{path}:{node.lineno} calls {node.func.id}")
            assert "import pickle" not in text and "weights_only=False" not in text, path
