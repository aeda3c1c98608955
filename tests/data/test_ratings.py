"""Ratings: split by time per user, tasks from stars, drawn tasks as asked for, and bad input."""

import numpy as np
import pytest
import torch

from coterie.core.batch import Source
from coterie.core.errors import ConfigError, DataError
from coterie.data import build_source
from coterie.data.ratings.movielens import FIELDS, read_table, year_group
from coterie.data.ratings.rating_rows import (
    Feature,
    RatingSource,
    TaskToyConfig,
    check_users,
    rating_task,
    time_split,
)


def test_each_users_latest_ratings_are_held_out():
    rng = np.random.default_rng(0)
    users = rng.permutation(np.repeat([0, 1, 2], [40, 3, 25]))
    times = rng.integers(0, 30, size=len(users))  # with ties
    part = time_split(users, times)
    for user, (train, validation, test) in enumerate([(32, 4, 4), (1, 1, 1), (21, 2, 2)]):
        own = users == user
        assert np.bincount(part[own], minlength=3).tolist() == [train, validation, test]
        assert times[own & (part == 0)].max() <= times[own & (part == 1)].min()
        assert times[own & (part == 1)].max() <= times[own & (part == 2)].min()


def test_a_user_without_ratings_is_named():
    with pytest.raises(DataError, match="film: user 1 has no ratings; allowed: users with 3"):
        check_users("film", np.array([0, 0, 0, 2, 2, 2]), 3, 3)
    with pytest.raises(DataError, match="user 2 has only 2 ratings"):
        check_users("film", np.array([0, 0, 0, 1, 1, 1, 2, 2]), 3, 3)
    check_users("film", np.array([0, 0, 0]), 1, 3)


def test_tasks_are_questions_about_stars():
    stars = np.arange(1, 6)
    assert rating_task("ge4", stars).tolist() == [0, 0, 0, 1, 1]
    assert rating_task("le2", stars).tolist() == [1, 1, 0, 0, 0]
    assert rating_task("eq5", stars).tolist() == [0, 0, 0, 0, 1]


def test_movielens_has_the_known_sizes_and_disjoint_parts():
    parts = {
        name: build_source({"kind": "movielens", "held_out": name}, "held_out")
        for name in ("test", "validation")
    }
    parts["train"] = build_source("movielens")
    assert {name: len(part) for name, part in parts.items()} == {
        "train": 80808,
        "validation": 9596,
        "test": 9596,
    }
    pairs = [
        {tuple(row) for row in part.get(np.arange(len(part))).x[:, :2].tolist()}
        for part in parts.values()
    ]
    assert len(pairs[0] | pairs[1] | pairs[2]) == 100_000  # nobody rates a film twice
    everything = torch.cat([part.get(np.arange(len(part))).targets for part in parts.values()])
    known = [82520, 55375, 21201, 17480, 6110]  # stars 1..5: 6110 11370 27145 34174 21201
    assert everything.sum(0).tolist() == known
    for part in parts.values():
        assert isinstance(part, Source) and len(np.unique(part.users)) == 943
        assert part.shape == (12,) and part.fields == FIELDS
    assert "of 5" in parts["test"].tell(0)
    batch = parts["test"].get([3])
    assert batch.targets[0, 1] == float(int(parts["test"].tell(3)[-6]) >= 4)


def test_movielens_features_are_chosen_by_name():
    source = build_source({"kind": "movielens", "features": ["item", "genres"], "tasks": ["ge4"]})
    assert source.shape == (7,) and source.task_names == ("ge4",)
    whole = build_source("movielens")
    assert torch.equal(source.get([9]).x, whole.get([9]).x[:, [1, 5, 6, 7, 8, 9, 10]])


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"features": ["user", "itme"]}, r"features: 'itme' .*did you mean 'item'"),
        ({"features": ["user", "user"]}, "one or more different names"),
        ({"features": []}, "one or more different names"),
        ({"tasks": ["ge6"]}, r"tasks: 'ge6' is not allowed; allowed: ge1\.\.ge5"),
        ({"tasks": ["ge4", "ge4"]}, "one or more different names"),
        ({"held_out": "tset"}, "held_out"),
    ],
)
def test_movielens_refuses(fields, message):
    with pytest.raises(ConfigError, match=message):
        build_source({"kind": "movielens", **fields})


def test_files_of_another_form_are_named_by_line():
    with pytest.raises(DataError, match="item line 3: 2 columns; allowed: 4"):
        read_table(b"head\na\tb\tc\td\na\tb\n", "item", 4)
    assert [year_group(text) for text in ("V", "1922", "1960", "1998")] == [0, 1, 2, 40]


def test_ids_outside_a_field_are_named():
    fields, targets = [Feature("user", 2), Feature("tags", 3, 2)], np.zeros((2, 1))

    def build(rows):
        return RatingSource(
            "x", fields, np.array(rows), targets, ["a"], np.array([0, 1]), licence="none"
        )

    build([[0, 2, -1], [1, -1, -1]])
    with pytest.raises(DataError, match=r"field 'tags' of sample 1: 3 .*allowed: -1\.\.2"):
        build([[0, 2, -1], [1, 3, 0]])
    with pytest.raises(DataError, match=r"field 'user' of sample 0: -1 .*allowed: 0\.\.1"):
        build([[-1, 0, 0], [1, 1, 0]])
    with pytest.raises(DataError, match=r"features: \(2, 2\)"):
        build([[0, 1], [1, 1]])


@pytest.mark.parametrize("correlation", [0.0, 0.5, 1.0])
def test_drawn_tasks_correlate_as_asked(correlation):
    found = []
    for seed in range(30):
        config = TaskToyConfig(correlation=correlation, rank=32, positive=(0.5,) * 4, seed=seed)
        weights = config.task_weights() / np.sqrt(32)
        cosine = weights @ weights.T
        found.append((cosine.sum() - 4) / 12)
    assert np.mean(found) == pytest.approx(correlation, abs=0.05)


def test_drawn_answers_are_as_rare_and_as_known_as_asked():
    config = {"kind": "task-toy", "positive": [0.5, 0.05], "observed": [1.0, 0.2]}
    train, held_out = build_source(config), build_source(config, "held_out")
    answers = train.get(np.arange(len(train))).targets.numpy()
    assert np.isfinite(answers).mean(0) == pytest.approx([1.0, 0.2], abs=0.02)
    assert np.nanmean(answers, axis=0) == pytest.approx([0.5, 0.05], abs=0.02)
    shown = held_out.get(np.arange(len(held_out))).targets.numpy()
    assert np.isfinite(shown).all()
    assert shown.mean(0) == pytest.approx([0.5, 0.05], abs=0.03)
    assert len(np.unique(held_out.users)) == 200
    assert torch.equal(train.get([7]).x, build_source(config).get([7]).x)


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"positive": [0.5, 0.0]}, "positive"),
        ({"positive": [1.0]}, "both answers occur"),
        ({"observed": [0.5]}, "4 shares, one per task"),
        ({"count": 400}, "users without ratings cannot be judged"),
    ],
)
def test_toy_refuses(fields, message):
    with pytest.raises(ConfigError, match=message):
        build_source({"kind": "task-toy", **fields})
