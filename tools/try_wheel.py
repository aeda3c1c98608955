"""Build the source archive and the wheel, and run the wheel where only core dependencies are seen.

    python tools/try_wheel.py --out dist     # also `make wheel`

The wheel is built from the source archive, so both are complete. It is installed into a folder of
its own; beside it lie links to the distributions that coterie needs without extras, found by what
each of them declares. A Python without any other path then lists, shows, trains, samples and
reports. What imports an optional library without asking fails here.
"""

from __future__ import annotations

import argparse
import os
import shutil
import subprocess
import sys
import tarfile
import tempfile
import zipfile
from collections.abc import Iterator, Sequence
from importlib import metadata
from pathlib import Path

from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

ROOT = Path(__file__).resolve().parents[1]
BESIDE = ("pyproject.toml", "MANIFEST.in", "README.md", "LICENSE", "CITATION.cff", "CHANGELOG.md")
"""Files at the root that belong into the source archive."""
PACKAGED = {".py", ".c", ".h", ".typed"}
ISOLATED = (sys.executable, "-I", "-S")
START = """
import sys
sys.path[:0] = {paths!r}
from coterie.cli.main import run
for words in {lines!r}:
    print("$ coterie", *words, flush=True)
    if code := run(words):
        sys.exit(code)
"""
"""One process for several commands: each alone would import torch again."""


def build(folder: Path) -> tuple[Path, Path]:
    """Source archive and wheel, built below ``folder`` from a copy: the checkout stays clean."""
    source = folder / "source"
    shutil.copytree(
        ROOT / "src", source / "src", ignore=shutil.ignore_patterns("__pycache__", "*.egg-info")
    )
    for name in BESIDE:
        shutil.copy(ROOT / name, source / name)
    archive = _setuptools("sdist", source, folder)
    with tarfile.open(archive) as packed:
        packed.extractall(folder / "unpacked", filter="data")
    (unpacked,) = (folder / "unpacked").iterdir()
    return archive, _setuptools("wheel", unpacked, folder)


def _setuptools(kind: str, source: Path, out: Path) -> Path:
    code = f"import sys, setuptools.build_meta as b; print(b.build_{kind}(sys.argv[1]))"
    said = _run([sys.executable, "-c", code, str(out)], source)
    return out / said.splitlines()[-1]


def missing_from(wheel: Path) -> set[str]:
    """Files of the package that the wheel lacks."""
    wanted = {
        path.relative_to(ROOT / "src").as_posix()
        for path in (ROOT / "src" / "coterie").rglob("*")
        if path.suffix in PACKAGED or path.name == "py.typed"
    }
    with zipfile.ZipFile(wheel) as packed:
        return wanted - set(packed.namelist())


def needed(name: str, found: dict[str, metadata.Distribution]) -> None:
    """Add to ``found`` what the requirements of ``name`` lead to, extras that nobody asks for
    left out."""
    for text in metadata.distribution(name).requires or []:
        requirement = Requirement(text)
        wanted = requirement.marker is None or requirement.marker.evaluate({"extra": ""})
        key = canonicalize_name(requirement.name)
        if wanted and key not in found:
            found[key] = metadata.distribution(requirement.name)
            needed(requirement.name, found)


def link_core(wheel: Path, folder: Path) -> set[str]:
    """Links in ``folder`` to the core dependencies that ``wheel`` declares; their names."""
    folder.mkdir()
    sys.path.insert(0, str(wheel))  # this coterie's requirements, not those of another one here
    try:
        found: dict[str, metadata.Distribution] = {}
        needed("coterie", found)
    finally:
        sys.path.remove(str(wheel))
    for distribution in found.values():
        for top in {path.parts[0] for path in distribution.files or []} - {"..", "__pycache__"}:
            target = Path(str(distribution.locate_file(top))).resolve()
            if not (folder / top).exists():
                (folder / top).symlink_to(target)
    return set(found)


def coterie(lines: Sequence[Sequence[str]], paths: Sequence[Path], cwd: Path) -> str:
    """What ``coterie`` says to each of ``lines`` where only ``paths`` and the standard library are
    seen."""
    code = START.format(paths=[str(path) for path in paths], lines=[list(words) for words in lines])
    return _run([*ISOLATED, "-c", code], cwd)


def _run(command: Sequence[str], cwd: Path) -> str:
    done = subprocess.run(command, cwd=cwd, capture_output=True, text=True, check=False)
    if done.returncode:
        raise RuntimeError(f"{' '.join(command)}\n{done.stdout}{done.stderr}")
    return done.stdout


def draw_pictures(folder: Path, classes: int = 10, each: int = 6) -> None:
    """Stripes, a class per width: pictures that need neither a download nor a library of data."""
    from PIL import Image

    for kind in range(classes):
        (folder / str(kind)).mkdir(parents=True)
        for number in range(each):
            stripes = [255 * ((column + number) // (kind + 1) % 2) for column in range(28)]
            picture = Image.new("L", (28, 28))
            picture.putdata(stripes * 28)
            picture.save(folder / str(kind) / f"{number}.png")


def commands(pictures: Path) -> Iterator[list[str]]:
    """A first hour with coterie, in two steps of training."""
    data = f'--data={{"kind": "image-folder", "path": "{pictures}", "size": 28, "channels": 1}}'
    small = ["--train.batch=4", "--train.steps=2", "--model.backbone.trunk.depth=1"]
    quick = ["--sample.solver=euler", "--sample.steps=2"]
    yield ["--help"]
    yield ["list"]
    yield ["show", "dit-moe"]
    yield ["train", "dit-moe", "--out", "run", "-q", data, *small, *quick]
    yield ["sample", "run", "--num", "2", "--steps", "2", "-q"]
    yield ["report", "run", "-q"]


def try_wheel(folder: Path) -> tuple[Path, Path, list[Path]]:
    """Build and try below the empty ``folder``: the archive, the wheel, the paths of a Python that
    sees it and its core dependencies. RuntimeError with all output where a step fails."""
    archive, wheel = build(folder)
    if missing := missing_from(wheel):
        raise RuntimeError(f"{wheel.name} lacks {', '.join(sorted(missing))}")
    installed, core = folder / "installed", folder / "core"
    pip = [sys.executable, "-m", "pip", "install", "--disable-pip-version-check", "--no-compile"]
    _run([*pip, "-q", "--no-deps", "--no-index", "--target", str(installed), str(wheel)], folder)
    link_core(installed, core)
    draw_pictures(folder / "pictures")
    coterie(list(commands(folder / "pictures")), [installed, core], folder)
    return archive, wheel, [installed, core]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n", 1)[0])
    parser.add_argument("--out", type=Path, default=Path("dist"), help="where both files go")
    out = parser.parse_args().out
    out.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory() as folder:
        archive, wheel, _ = try_wheel(Path(folder))
        for file in (archive, wheel):
            print(shutil.copy(file, out), f"{os.stat(file).st_size / 1e6:.1f} MB")


if __name__ == "__main__":
    main()
