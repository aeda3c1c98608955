"""Every ``coterie ...`` of README and docs is run, page by page, in the order in which it is read.

Runs are cut down to two steps; what a page speaks of and does not make is made here, tiny.
"""

from __future__ import annotations

import json
import re
import shlex
import shutil
import subprocess
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import save_file

from coterie.cli.main import run
from coterie.data import ArraySource
from coterie.data.images.photos import CROP, PhotosConfig
from coterie.ensembles import NoiseRangesConfig
from coterie.hub import save_ensemble
from coterie.recipes import get_recipe, list_recipes
from coterie.runs.measure import evaluation, report
from test_documented_commands import PAGES, commands_of

SKIPPED = {
    r"coterie (bench|verify|demo)\b": "trains or times for minutes",
    r"coterie data get\b|cifar10": "fetches from a registry",
    r"--preset (paper|gpu)\b.*": "a published size, or one for a GPU",
    r"--parallel\b": "starts processes that each import torch; tests/train/parallel does",
    r"--compile\b": "compiles for a minute",
}
"""Commands that are not run here (a pattern), and why. ``--dry-run`` and ``show`` always are."""
STEPS = ("--train.steps=2", "--train.batch=4", "--train.threads=1")
SHORT = (*STEPS, "--sample.steps=2")
"""The last of equal flags wins, so these stand in the place of what a page shows."""
TINY: dict[str, tuple[str, ...]] = {
    "train": (*SHORT, "-q"),
    "upcycle": (*STEPS, "--calibration=8", "-q"),
    "aggregate": (
        *SHORT,
        "--width=8",
        "--layers=1",
        "--heads=2",
        "--groups=4",
        "--samples=8",
        "-q",
    ),
    "island plan": SHORT,
    "island run": ("--jobs=1", "-q"),
    "island router": (*STEPS, "-q"),
    "island distil": (*SHORT, "-q"),
    "guide reader": ("--steps=2", "-q"),
    "guide train": ("--steps=2", "--samples=16", "-q"),
    "ranges": ("--bins=4",),
    "rollout": ("--num=4", "-q"),
    "sweep": ("--limit=8", "-q"),
    **dict.fromkeys(("sample", "restore", "report", "place"), ("-q",)),
}
"""Verb -> what is added to it."""
OF_TEXT = {"report": ("-q",), "sweep": ("-q",), "place": ("--read=200", "-q")}
"""The same with ``--text``."""
Made = dict[tuple[str, ...], Path]


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Made]:
    """Where finished runs are kept for other pages: the words of a training command -> its run."""
    return tmp_path_factory.mktemp("made"), {}


@pytest.fixture(autouse=True)
def few_samples(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """Reports look at a few samples, and photographs are noise: none are fetched."""
    monkeypatch.setattr(report, "SHOWN", 4)
    monkeypatch.setattr(report, "SCORED", 4)
    monkeypatch.setattr(evaluation.held_out, "__defaults__", (8, 8))
    monkeypatch.setattr(PhotosConfig, "build", noise_photos)
    monkeypatch.chdir(tmp_path)


def noise_photos(self: PhotosConfig, split: str = "train") -> ArraySource:
    data = np.random.default_rng(0).integers(0, 255, (6, 3, CROP, CROP), dtype=np.uint8)
    shape = (3, CROP, CROP)
    return ArraySource("photos", "image", data, shape=shape, licence="", transform=self.transform)


def pictures(folder: Path) -> None:
    """Four pictures of 80 x 72."""
    folder.mkdir(parents=True)
    rng = np.random.default_rng(0)
    for index in range(4):
        pixels = rng.integers(0, 255, (72, 80, 3), dtype=np.uint8)
        Image.fromarray(pixels).save(folder / f"{index}.png")


def pairs(folder: Path) -> None:
    """Degraded and clean pictures of one kind."""
    for name in ("input", "gt"):
        pictures(folder / "rain" / name)


def classes(folder: Path) -> None:
    for name in ("first", "second"):
        pictures(folder / name)


def book(path: Path) -> None:
    path.write_text("One expert reads this sentence, another one reads that. " * 9, "utf-8")


def episodes(path: Path) -> None:
    """Four episodes of thirty steps, of four observed numbers and two of action."""
    rng = np.random.default_rng(0)
    steps, goals = np.full(4, 30), np.arange(4)
    seen, done = rng.normal(size=(120, 4)), rng.uniform(-1, 1, (120, 2))
    np.savez(path, observations=seen, actions=done, lengths=steps, goals=goals)


def two_ranges(folder: Path) -> None:
    """Two random denoisers of digits of 28 pixels, joined by noise range."""
    config = get_recipe("dit").config().model
    pair = NoiseRangesConfig(boundaries=(0.5,)).build([config.build(), config.build()])
    save_ensemble(pair.eval(), folder)


def olmoe(folder: Path) -> None:
    transformers = pytest.importorskip("transformers")
    torch.manual_seed(0)
    sizes = {"num_hidden_layers": 2, "num_attention_heads": 2, "num_key_value_heads": 2}
    config = transformers.OlmoeConfig(
        vocab_size=300, hidden_size=16, intermediate_size=12, num_experts=8,
        num_experts_per_tok=2, max_position_embeddings=64, eos_token_id=1, **sizes,
    )  # fmt: skip
    transformers.OlmoeForCausalLM(config).save_pretrained(folder)


def llama(folder: Path) -> None:
    transformers = pytest.importorskip("transformers")
    torch.manual_seed(0)
    sizes = {"num_hidden_layers": 2, "num_attention_heads": 2, "num_key_value_heads": 2}
    config = transformers.LlamaConfig(
        vocab_size=300, hidden_size=16, intermediate_size=32, max_position_embeddings=64, **sizes
    )
    transformers.LlamaForCausalLM(config).save_pretrained(folder)


def unet(folder: Path, kind: str = "UNet2DModel") -> None:
    diffusers = pytest.importorskip("diffusers")
    torch.manual_seed(0)
    sizes: dict[str, Any] = {
        "sample_size": 8, "in_channels": 1, "out_channels": 1, "block_out_channels": (8, 16),
        "layers_per_block": 1, "norm_num_groups": 4, "attention_head_dim": 8,
        "down_block_types": ("DownBlock2D",) * 2, "up_block_types": ("UpBlock2D",) * 2,
    }  # fmt: skip
    if kind == "UNet2DConditionModel":
        sizes |= {
            "down_block_types": ("DownBlock2D", "CrossAttnDownBlock2D"),
            "up_block_types": ("CrossAttnUpBlock2D", "UpBlock2D"),
            "attention_head_dim": 4, "cross_attention_dim": 8,
        }  # fmt: skip
    getattr(diffusers, kind)(**sizes).save_pretrained(folder)


def prompted_unet(folder: Path) -> None:
    unet(folder, "UNet2DConditionModel")


def pipeline(folder: Path) -> None:
    diffusers = pytest.importorskip("diffusers")
    unet(folder / "unet")
    network = diffusers.UNet2DModel.from_pretrained(folder / "unet")
    diffusers.DDPMPipeline(network, diffusers.DDPMScheduler()).save_pretrained(folder)


def prompt(path: Path) -> None:
    save_file({"tokens": torch.randn(5, 8)}, path)


FILES: dict[str, Callable[[Path], None]] = {
    r"book\.txt": book,
    r"episodes\.npz": episodes,
    r"prompt\.safetensors": prompt,
    r"holiday": pictures,
    r"mine": pairs,
    r"shapes": classes,
    r"models/(?:olmoe|tiny)": olmoe,
    r"models/ranges": two_ranges,
    r"models/smollm2": llama,
    r"models/unet-\w": unet,
    r"pipelines/\w": pipeline,
    r"unets/\w": prompted_unet,
}
"""What pages read and do not make: a pattern of its path, and what makes a small one."""


def verb(words: list[str]) -> str:
    two = " ".join(words[:2])
    return two if words[0] in ("island", "guide", "adapter", "data", "bench") else words[0]


def why_skipped(command: str, words: list[str]) -> str | None:
    if words[0] == "show" or {"--dry-run", "-n"} & set(words):
        return None
    found = (reason for pattern, reason in SKIPPED.items() if re.search(pattern, command))
    return next(found, None)


def shortened(words: list[str]) -> list[str]:
    """The command with what makes it small."""
    name, dry = verb(words), bool({"--dry-run", "-n", "--headroom"} & set(words))
    added = list((OF_TEXT if "--text" in words else TINY).get(name, ()))
    if name in ("train", "upcycle") and words[1].split("/")[0] not in list_recipes():
        goes_on_as_it_was = name == "train" or words[1].startswith("models/")
        added = ["-q"] if goes_on_as_it_was else added
    if "--train.steps=0" in words:
        added.remove("--train.steps=2")
    if dry:
        added = [flag for flag in added if flag == "-q" or flag.startswith("--samples")]
    if "--search" in words or name != "ranges":
        return [*words, *added]
    return words


def prepare(words: list[str], page: Path, made: tuple[Path, Made]) -> None:
    """Make what the command reads and nothing has made yet."""
    out = words[words.index("--out") + 1] if "--out" in words else None
    text = " ".join(word for word in words if word != out)
    for pattern, make in FILES.items():
        for name in re.findall(rf"(?<![\w/.-]){pattern}(?![\w/-])", text):
            if not Path(name).exists():
                Path(name).parent.mkdir(parents=True, exist_ok=True)
                make(Path(name))
    for name in dict.fromkeys(re.findall(r"runs/[\w-]+", text)):
        if not Path(name).exists():
            recipe = name.removeprefix("runs/")
            train(["train", recipe if recipe in list_recipes() else "dit", "--out", name], made)


def train(words: list[str], made: tuple[Path, Made]) -> int:
    """Train a recipe, or copy the run that another page has trained by the same command."""
    folder, runs = made
    words = shortened(words)
    place = words.index("--out") if "--out" in words else None
    out = Path(f"runs/{words[1]}" if place is None else words[place + 1])
    key = tuple(words if place is None else words[:place] + words[place + 2 :])
    apart = "runs/" not in " ".join(key) and get_recipe(words[1]).config().init is None
    if apart and key in runs and not out.exists():
        shutil.copytree(runs[key], out)
        return 0
    code = run(words)
    if apart and code == 0 and "--dry-run" not in words:
        runs[key] = folder / str(len(runs))
        shutil.copytree(out, runs[key])
    return code


def with_files(words: list[str], page: Path) -> list[str]:
    """``$(cat NAME.json)`` as a shell would put it; the file is the page's block of JSON."""
    blocks = re.findall(r"```json\n(.*?)```", page.read_text(encoding="utf-8"), re.DOTALL)
    return [re.sub(r"\$\(cat [\w.]+\)", lambda _: json.dumps(json.loads(blocks[0])), word)
            for word in words]  # fmt: skip


SHOWN = [page for page in PAGES if commands_of(page.read_text(encoding="utf-8"))]


def lines_of(page: Path) -> list[tuple[str, str]]:
    """(folder, command) in order: of coterie, and the copies between them."""
    text = page.read_text(encoding="utf-8")
    text = re.sub(r"^((?:mkdir|cp) .*)$", r"coterie sh \1", text, flags=re.MULTILINE)
    text = re.sub(r"^\(cd (\S+); (coterie .*)\)$", r"coterie in \1 \2", text, flags=re.MULTILINE)
    found: list[tuple[str, str]] = []
    for command in commands_of(text):
        inside = re.fullmatch(r"coterie in (\S+) (.*)", command)
        found.append((".", command) if inside is None else (inside[1], inside[2]))
    return found


@pytest.mark.parametrize("page", SHOWN, ids=lambda page: page.stem)
def test_commands_of_a_page_run_in_order(
    page: Path,
    made: tuple[Path, Made],
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    for folder, command in lines_of(page):
        words = with_files(shlex.split(command, comments=True)[1:], page)
        words = words[: next((i for i, word in enumerate(words) if word in ("|", ">", "&&")), None)]
        if not words or why_skipped(command, words):
            continue
        if words[0] == "sh":
            subprocess.run(words[1:], check=True)
            continue
        prepare(words, page, made)
        recipe = words[0] == "train" and words[1] in list_recipes()
        with monkeypatch.context() as patch:
            patch.chdir(folder)
            code = train(words, made) if recipe else run(shortened(words))
        assert code == 0, f"{command}\n{capsys.readouterr().err}"


def test_few_commands_are_left_out() -> None:
    commands = [c for page in SHOWN for c in commands_of(page.read_text(encoding="utf-8"))]
    left_out = [c for c in commands if why_skipped(c, shlex.split(c, comments=True)[1:])]
    assert len(left_out) < len(commands) / 3
    for pattern in SKIPPED:
        assert any(re.search(pattern, command) for command in commands), f"{pattern} is not needed"
