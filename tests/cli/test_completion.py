"""What a shell offers: the same names as the registries know, found without torch."""

from __future__ import annotations

import json
import os
import subprocess
import sys

import pytest
from click.shell_completion import BashComplete, FishComplete, ShellComplete, ZshComplete

from coterie.cli import candidates
from coterie.cli.list import REGISTRIES
from coterie.cli.main import VERBS, cli, run


def offered(line: str) -> list[str]:
    """What Tab offers for the last word of ``coterie line``."""
    *args, incomplete = line.split(" ")
    shell = ShellComplete(cli, {}, "coterie", "_COTERIE_COMPLETE")
    return [item.value for item in shell.get_completions(args, incomplete)]


@pytest.fixture
def folder(tmp_path, monkeypatch):
    """A present folder with two runs and what is none."""
    for name in ("runs/first", "runs/deep/er/second", "runs/first/inner", ".hidden/run"):
        (tmp_path / name).mkdir(parents=True)
        (tmp_path / name / "config.json").write_text('{"seed": 0, "train": {"steps": 3}}', "utf-8")
    (tmp_path / "runs" / "none").mkdir()
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("COTERIE_CACHE", str(tmp_path / "cache"))
    return tmp_path


def test_verbs_and_verbs_of_verbs() -> None:
    assert offered("") == list(VERBS)
    assert offered("sh") == ["show"]
    assert offered("data ") == ["get", "list"]
    assert "--version" in offered("--")


def test_an_unknown_verb_offers_nothing() -> None:
    assert offered("shwo di") == []


def test_recipes_and_presets_are_those_of_the_recipes() -> None:
    from coterie.recipes import get_recipe, list_recipes

    assert offered("show ") == offered("cite ") == offered("verify ") == list_recipes()
    for name in list_recipes():
        assert candidates.preset_names(name) == get_recipe(name).presets(), name
    assert offered("train dit-moe --preset g") == ["gpu"]


def test_sources_are_those_of_data_get() -> None:
    import coterie.encoders.lite0
    import coterie.runs  # noqa: F401
    from coterie.data import SOURCES
    from coterie.data.download.fetch import DOWNLOADS

    own = {kind for kind in SOURCES.kinds() if SOURCES.get(kind).__module__.startswith("coterie.")}
    assert set(offered("data get ")) >= own | set(DOWNLOADS)
    assert set(candidates.source_names()) - {*SOURCES.kinds(), *DOWNLOADS} == set()
    assert offered("data get mnist") == ["mnist", "mnist-5k"]


def test_kinds_of_parts() -> None:
    assert offered("list ") == ["recipes", *REGISTRIES]


@pytest.mark.parametrize("verb", ["sample", "report", "sweep", "upcycle", "ranges", "aggregate"])
def test_runs_below_the_present_folder(folder, verb: str) -> None:
    assert offered(f"{verb} ") == ["runs/deep/er/second", "runs/first"]
    assert offered(f"{verb} runs/f") == ["runs/first"]


def test_where_no_run_begins_like_this_the_shell_offers_folders(folder) -> None:
    shell = ShellComplete(cli, {}, "coterie", "_COTERIE_COMPLETE")
    (item,) = shell.get_completions(["report"], "/models/")
    assert (item.value, item.type) == ("/models/", "dir")


def test_train_takes_recipes_and_runs(folder) -> None:
    assert offered("train runs/f") == ["runs/first"]
    assert "dit-moe" in offered("train dit") and "runs/first" in offered("train ")


def test_flags_of_a_recipe_are_paths_of_its_configuration(folder) -> None:
    from coterie.recipes import get_recipe

    found = offered("train dit-moe --train.")
    assert "--train.steps" in found and all(flag.startswith("--train.") for flag in found)
    deep = "--model.backbone.trunk.slots.0.expert.num_experts"
    assert deep in offered("show dit-moe --model.backbone.trunk.s")
    assert {"--preset", "--parallel"} <= set(offered("train dit-moe --p"))
    for path in candidates.config_paths("dit-moe", "tiny"):  # each names a value
        value = get_recipe("dit-moe").config("tiny").model_dump(mode="json")
        for part in path.split("."):
            value = value[int(part)] if isinstance(value, list) else value[part]
        assert not isinstance(value, dict) or value == {}


def test_paths_come_from_the_cache_until_the_package_changes(folder, monkeypatch) -> None:
    found = candidates.config_paths("dit", "tiny")
    asked = []
    monkeypatch.setattr(candidates, "_of_recipe", lambda *names: asked.append(names) or {"a": 1})
    assert candidates.config_paths("dit", "tiny") == found and not asked
    (kept,) = (folder / "cache" / "completion").iterdir()
    os.utime(kept, (0, 0))
    assert candidates.config_paths("dit", "tiny") == ["a"] and asked == [("dit", "tiny")]


def test_paths_of_a_run_come_from_its_file_and_of_nothing_there_are_none(folder) -> None:
    assert candidates.config_paths("runs/first", "tiny") == ["seed", "train.steps"]
    assert candidates.config_paths("no-such", "tiny") == []
    (folder / "runs" / "first" / "config.json").write_text("{", "utf-8")
    assert offered("train runs/first --tr") == []


@pytest.mark.parametrize(
    ("shell", "made"), [("bash", BashComplete), ("zsh", ZshComplete), ("fish", FishComplete)]
)
def test_the_script_is_that_of_the_shell(capsys, shell: str, made: type[ShellComplete]) -> None:
    assert run(["completion", shell]) == 0
    told = capsys.readouterr().out
    assert f"_COTERIE_COMPLETE={shell}_complete" in told and "coterie" in told
    assert told.strip() == (made.source_template % made(
        cli, {}, "coterie", "_COTERIE_COMPLETE"
    ).source_vars()).strip()  # fmt: skip


@pytest.mark.parametrize(
    "words", ["coterie ", "coterie train ", "coterie data get m", "coterie report runs/"]
)
def test_a_completion_does_not_import_torch(folder, words: str) -> None:
    code = (
        "import sys, atexit\n"
        "heavy = {'torch', 'numpy', 'pydantic', 'matplotlib'}\n"
        "atexit.register(lambda: print(sorted(heavy & set(sys.modules)), file=sys.stderr))\n"
        "from coterie.cli.main import main\nmain()"
    )
    words_before = len(words.split(" ")) - 1
    env = {
        **os.environ,
        "_COTERIE_COMPLETE": "bash_complete",
        "COMP_WORDS": words,
        "COMP_CWORD": str(words_before),
    }
    done = subprocess.run(
        [sys.executable, "-c", code], env=env, capture_output=True, text=True, check=True
    )
    assert done.stderr.strip() == "[]" and done.stdout.startswith(("plain,", "dir,"))


def test_kept_paths_are_a_list_of_texts(folder) -> None:
    candidates.config_paths("dit", "tiny")
    (kept,) = (folder / "cache" / "completion").iterdir()
    assert all(isinstance(path, str) for path in json.loads(kept.read_text("utf-8")))
