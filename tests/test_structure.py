"""The house rules, read off the imports: who may know whom."""

import ast
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
# A module imports only kernels and what stands before it.
ORDER = [
    "config",
    "files",
    "embeddings",
    "dist",
    "run",
    "data.records",
    "data.amazon",
    "data.interactions",
    "data.download",
    "data.filters",
    "data.spool",
    "data.synthetic",
    "data.raw",
    "data.parallel",
    "data.prepare",
    "data.shop",
    "vocab",
    "prompts",
    "lists",
    "pairs",
    "weights",
    "backbone",
    "gpt2",
    "llama",
    "lora",
    "networks",
    "sampled",
    "top",
    "decode",
    "metrics",
    "train",
    "als",
    "policy",
    "pretrain",
    "sft",
    "reward",
    "alarms",
    "ppo",
    "evaluate",
    "export",
    "search",
    "recommender",
    "recommend",
    "features",
    "api",
    "serve",
    "__main__",
]
BASE = {"torch", "tokenizers", "numpy", "pyarrow", "tqdm"}
EXTRAS = {"faiss", "huggingface_hub", "uvicorn"}  # imported inside functions only
# need an extra
LEAVES = {"api": {"fastapi", "starlette", "pydantic", "prometheus_client", "uvicorn", "h11"}}


def tree_of(path):
    return ast.parse(path.read_text(encoding="utf-8"))


def imports(tree):
    """(module, name or None) of every import."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            yield from ((alias.name, None) for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            yield from ((node.module, alias.name) for alias in node.names)


def exported(tree):
    for node in tree.body:
        if isinstance(node, ast.Assign) and getattr(node.targets[0], "id", "") == "__all__":
            return ast.literal_eval(node.value)
    return None


MODULES = [p for p in sorted((ROOT / "pagellm").rglob("*.py")) if p.name != "__init__.py"]


def name_of(path):
    return ".".join(path.relative_to(ROOT / "pagellm").with_suffix("").parts)


def test_reading_raw_files_waits_for_no_torch():
    """Every process that reads starts afresh: torch would be most of its start and of its memory."""
    code = "import sys, pagellm.data.prepare; print('torch' in sys.modules)"
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True
    )
    assert done.stdout == "False\n"


def test_the_order_names_every_module():
    assert sorted(ORDER) == sorted(name_of(p) for p in MODULES)


@pytest.mark.parametrize("path", MODULES, ids=name_of)
def test_a_module_imports_only_what_stands_before_it(path):
    place = ORDER.index(name_of(path))
    for module, name in imports(tree_of(path)):
        top = module.split(".")[0]
        outside = {"kernels"} | BASE | EXTRAS | LEAVES.get(name_of(path), set())
        assert top in {"pagellm"} | outside or top in sys.stdlib_module_names, module
        if top != "pagellm" or (module == "pagellm" and name == "__version__"):
            continue
        inner = (module if module != "pagellm" else f"pagellm.{name}").removeprefix("pagellm.")
        if name and f"{inner}.{name}" in ORDER:
            inner = f"{inner}.{name}"
        assert ORDER.index(inner) < place, f"{name_of(path)} imports {inner}"


@pytest.mark.parametrize("path", sorted((ROOT / "kernels").glob("*.py")), ids=lambda p: p.name)
def test_kernels_stand_alone(path):
    for module, _ in imports(tree_of(path)):
        top = module.split(".")[0]
        assert top in {"torch", "kernels"} or top in sys.stdlib_module_names, module


def test_every_module_says_what_it_offers_and_offers_what_it_says():
    for path in [
        *MODULES,
        *sorted((ROOT / "kernels").glob("*.py")),
        *sorted((ROOT / "experiments").glob("*.py")),
    ]:
        if path.name == "__init__.py":
            continue
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
    for path in (ROOT / "experiments").glob("*.py"):
        for module, name in imports(tree_of(path)):
            file = ROOT / (module.replace(".", "/") + ".py") if module else None
            if name and module.startswith("pagellm.") and file and file.exists():
                assert name in exported(tree_of(file)), (
                    f"{path.name}: {module}.{name} is not in its __all__"
                )


def test_nothing_imports_the_studies():
    for folder in ("pagellm", "kernels"):
        for path in (ROOT / folder).rglob("*.py"):
            assert not [m for m, _ in imports(tree_of(path)) if m.startswith("experiments")], path


def test_the_base_alone_imports_every_module_but_the_leaves():
    """In a process where no extra can be imported."""
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
            + "\n".join(f"import {name}" for name in names),
        ],
        cwd=ROOT,
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr


def test_no_pickle_and_no_eval():
    for folder in ("pagellm", "kernels", "experiments"):
        for path in (ROOT / folder).rglob("*.py"):
            text = path.read_text()
            for node in ast.walk(ast.parse(text)):
                if isinstance(node, ast.Call) and getattr(node.func, "id", "") in ("eval", "exec"):
                    raise AssertionError(f"{path}:{node.lineno} calls {node.func.id}")
            assert "import pickle" not in text and "weights_only=False" not in text, path
