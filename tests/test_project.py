"""Rules that hold for every file of the project."""

from __future__ import annotations

import ast
import json
import re
import subprocess
import sys
import time
import tomllib
from collections.abc import Iterator
from functools import cache
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
SOURCE = ROOT / "src" / "coterie"
PROGRAMS = [*sorted((ROOT / "src").rglob("*.py")), *sorted((ROOT / "tests").rglob("*.py"))]
LIBRARY = sorted(SOURCE.rglob("*.py"))
RECIPES = sorted((SOURCE / "recipes").glob("*.py"))
SHARED_BY_RECIPES = {"__init__", "base", "common", "tables", "verify"}

MAX_LINES = 400
MAX_RECIPE_LINES = 150

# Written in pieces so that this file does not break its own rule.
PRIVATE_PATHS = [rf"(?<![\w.])/{name}/\w" for name in ("work", "tmp", "root", "home", "opt")]
REGISTRY_HOSTS = [
    rf"\b{host}\b".replace("@", r"\.")
    for host in (
        "pypi@" + "org",
        "files@pythonhosted@" + "org",
        "registry@npmjs@" + "org",
        "deb@debian@" + "org",
        "download@pytorch@" + "org",
        "proxy@golang@" + "org",
    )
]
FORBIDDEN_TEXT = re.compile("|".join([*PRIVATE_PATHS, *REGISTRY_HOSTS]))


@cache
def tree(path: Path) -> ast.Module:
    return ast.parse(path.read_text(encoding="utf-8"), filename=str(path))


def name_of(path: Path) -> str:
    return path.relative_to(ROOT).as_posix()


def tracked_files() -> list[Path]:
    """Files under version control; without it (an unpacked archive), the sources."""
    listing = subprocess.run(["git", "ls-files", "-z"], cwd=ROOT, capture_output=True, check=False)
    if listing.returncode != 0:
        return PROGRAMS
    names = listing.stdout.decode().split("\0")
    return [ROOT / name for name in names if name and (ROOT / name).is_file()]


def dotted(node: ast.AST) -> str:
    """``a.b.c`` of a name or attribute chain; ``?`` stands for anything else in it."""
    if isinstance(node, ast.Name):
        return node.id
    if isinstance(node, ast.Attribute):
        return f"{dotted(node.value)}.{node.attr}"
    return "?"


def is_constant(node: ast.AST | None, value: object) -> bool:
    return isinstance(node, ast.Constant) and node.value is value


def unsafe_loads(module: ast.Module) -> Iterator[str]:
    """Ways to run code hidden in a data file."""
    for node in ast.walk(module):
        line = getattr(node, "lineno", 0)
        if isinstance(node, ast.Import | ast.ImportFrom):
            names = [alias.name for alias in node.names]
            names.append(getattr(node, "module", None) or "")
            if {name.split(".")[0] for name in names} & {"pickle", "dill", "cloudpickle", "shelve"}:
                yield f"{line}: pickle"
        elif isinstance(node, ast.Call):
            given = {keyword.arg: keyword.value for keyword in node.keywords}
            called = dotted(node.func)
            if called == "torch.load" and not is_constant(given.get("weights_only"), True):
                yield f"{line}: torch.load without weights_only=True"
            pickled = given.get("allow_pickle", ast.Constant(False))
            if called in {"np.load", "numpy.load"} and not is_constant(pickled, False):
                yield f"{line}: numpy.load with allow_pickle"
            if called in {"eval", "exec"}:
                yield f"{line}: {called}"


def prints(module: ast.Module) -> list[int]:
    return [
        node.lineno
        for node in ast.walk(module)
        if isinstance(node, ast.Call) and dotted(node.func) == "print"
    ]


def networks(module: ast.Module) -> list[str]:
    """Names of the classes of ``module`` that derive from a torch module."""
    return [
        node.name
        for node in ast.walk(module)
        if isinstance(node, ast.ClassDef)
        and any(dotted(base).split(".")[-1] == "Module" for base in node.bases)
    ]


def modules_after(code: str) -> set[str]:
    """Names of the modules loaded after running ``code`` in a fresh interpreter."""
    script = f"{code}\nimport json, sys\nprint(chr(10), json.dumps(list(sys.modules)), sep='')"
    done = subprocess.run(
        [sys.executable, "-c", script], capture_output=True, text=True, check=True, cwd=ROOT
    )
    return set(json.loads(done.stdout.splitlines()[-1]))


def test_every_module_says_what_it_is() -> None:
    assert [name_of(path) for path in LIBRARY if not ast.get_docstring(tree(path))] == []


def test_files_stay_short() -> None:
    lengths = {name_of(path): len(path.read_text("utf-8").splitlines()) for path in PROGRAMS}
    assert {name: lines for name, lines in lengths.items() if lines > MAX_LINES} == {}


def test_recipes_are_short_and_define_no_network() -> None:
    for path in RECIPES:
        lines = len(path.read_text(encoding="utf-8").splitlines())
        allowed = MAX_LINES if path.stem in SHARED_BY_RECIPES else MAX_RECIPE_LINES
        assert lines <= allowed, f"{name_of(path)} has {lines} lines"
        assert networks(tree(path)) == [], f"{name_of(path)} defines a network"


def test_nothing_loads_code_from_data() -> None:
    found = [f"{name_of(path)}:{line}" for path in LIBRARY for line in unsafe_loads(tree(path))]
    assert found == []


def test_the_library_does_not_print() -> None:
    outside = [path for path in LIBRARY if "cli" not in path.relative_to(SOURCE).parts]
    found = [f"{name_of(path)}:{line}" for path in outside for line in prints(tree(path))]
    assert found == []


def test_no_private_path_or_registry_host_is_tracked() -> None:
    found = []
    for path in tracked_files():
        try:
            text = path.read_text(encoding="utf-8")
        except UnicodeDecodeError:
            continue  # pictures
        found += [f"{name_of(path)}: {hit.group()}" for hit in FORBIDDEN_TEXT.finditer(text)]
    assert found == []


@pytest.mark.parametrize(
    "code",
    [
        "import pickle",
        "from pickle import loads",
        "import torch\ntorch.load('x')",
        "import torch\ntorch.load('x', weights_only=False)",
        "import numpy as np\nnp.load('x', allow_pickle=True)",
        "eval('1')",
    ],
)
def test_unsafe_loading_is_recognised(code: str) -> None:
    assert list(unsafe_loads(ast.parse(code)))


def test_safe_loading_is_not_suspected() -> None:
    code = """
torch.load('x', weights_only=True)
np.load('x', allow_pickle=False)
json.load(f)
model.eval()
Model().eval()
"""
    assert list(unsafe_loads(ast.parse(code))) == []


def test_the_other_rules_recognise_what_they_forbid() -> None:
    assert prints(ast.parse("def f():\n    print(1)")) == [2]
    assert networks(ast.parse("from torch import nn\nclass A(nn.Module): ...")) == ["A"]
    assert FORBIDDEN_TEXT.search("see /ho" + "me/me/x")
    assert FORBIDDEN_TEXT.search("https://pypi." + "org/simple")
    assert not FORBIDDEN_TEXT.search("docs/work/a.md and src/tmp/b")


def test_importing_the_package_loads_nothing_heavy() -> None:
    loaded = modules_after("import coterie; coterie.__version__; dir(coterie)")
    assert not loaded & {"torch", "numpy", "matplotlib", "scipy", "pydantic"}


def test_recipes_do_not_import_the_compiler() -> None:
    loaded = modules_after("import coterie.recipes.base")
    assert "torch" in loaded and "torch._dynamo" not in loaded


def test_the_help_of_the_command_line_is_quick() -> None:
    code = "from coterie.cli.main import main\ntry:\n    main(['--help'])\nexcept SystemExit: pass"
    start = time.perf_counter()
    loaded = modules_after(code)
    assert time.perf_counter() - start < 2.0
    assert "coterie.cli.main" in loaded
    assert not loaded & {"torch", "numpy", "matplotlib", "scipy", "pydantic"}


def test_the_help_of_no_verb_imports_torch() -> None:
    from coterie.cli.main import VERBS

    code = f"""
from coterie.cli.main import run
for verb in {list(VERBS)!r}:
    assert run([verb, "--help"]) == 0
"""
    loaded = modules_after(code)
    assert "coterie.cli.train" in loaded
    assert not loaded & {"torch", "numpy", "matplotlib", "scipy", "pydantic"}


def test_the_version_is_the_same_everywhere() -> None:
    import coterie

    declared = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    assert coterie.__version__ == declared["version"]
    citation = (ROOT / "CITATION.cff").read_text(encoding="utf-8")
    assert f"\nversion: {declared['version']}\n" in citation


def test_the_makefile_and_ci_agree() -> None:
    script = ROOT / ".ci" / "run"
    assert script.stat().st_mode & 0o111, ".ci/run must be executable"
    makefile = (ROOT / "Makefile").read_text(encoding="utf-8")
    for target in ("demo", "test", "lint", "verify", "bench", "clean"):
        assert re.search(rf"^{target}:", makefile, flags=re.MULTILINE), target
