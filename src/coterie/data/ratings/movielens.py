"""MovieLens-100K: 943 people rate 1,682 films, as packaged with the library RecBole.

Tasks are questions about a rating (at least 3, at most 2, ...); a rating is not an impression: what
people did not rate is not here. The package is read as an archive; the library is not imported.
Legend: S samples.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any, ClassVar, Literal, Self

import numpy as np
from pydantic import model_validator

from coterie.core.errors import ConfigError, DataError, describe
from coterie.core.json_reader import read_object
from coterie.data.download.cache import save_array
from coterie.data.download.clients import Package, members
from coterie.data.download.fetch import Download, Files, fetch, load, register_download
from coterie.data.ratings.rating_rows import (
    NOTHING,
    Feature,
    RatingSource,
    check_users,
    chosen_fields,
    rating_task,
    time_split,
)
from coterie.data.source import SOURCES, SourceConfig, SourceInfo, Split

KIND = "movielens"
LEAST = 3  # ratings of a user: one for each part of the split
AGES = (18, 25, 35, 45, 50, 56)  # where the next group of ages begins
FIRST_YEAR, LAST_YEAR = 1960, 1998  # earlier ones are one group
OCCUPATIONS = 21
GENRES, MOST_GENRES = 19, 6
FIELDS = (
    Feature("user", 943),
    Feature("item", 1682),
    Feature("age", len(AGES) + 1),
    Feature("gender", 2),
    Feature("occupation", OCCUPATIONS),
    Feature("genres", GENRES, MOST_GENRES),
    Feature("year", LAST_YEAR - FIRST_YEAR + 3),  # 0 unknown, 1 earlier
)


def read_table(content: bytes, name: str, columns: int) -> list[list[str]]:
    """Rows of a tab-separated file below its header; DataError names a line of another form."""
    try:
        rows = [line.split("\t") for line in content.decode("utf-8").splitlines()[1:]]
    except UnicodeDecodeError as error:
        raise DataError(f"{name}: not UTF-8 text ({error.reason} at byte {error.start})") from None
    for number, row in enumerate(rows, start=2):
        if len(row) != columns:
            raise DataError(f"{name} line {number}: {len(row)} columns; allowed: {columns}")
    return rows


def year_group(text: str) -> int:
    """0 unknown, 1 before 1960, 2.. one per year."""
    if not text.isdecimal():
        return 0
    return min(max(int(text), FIRST_YEAR - 1), LAST_YEAR) - FIRST_YEAR + 2


def _ids(words: Sequence[str], name: str, most: int) -> dict[str, int]:
    found = {word: number for number, word in enumerate(sorted(set(words)))}
    if len(found) > most:
        raise DataError(describe(f"{KIND}: {name}", len(found), f"at most {most} different ones"))
    return found


def _convert(files: Sequence[Files], folder: Path) -> None:
    """``ratings`` i64 [S, 4] (user, item, rating, part of the split), and a row of features for
    each user and item. Users and items are numbered in the order of their ids."""
    content = {path.rsplit(".", 1)[-1]: data for path, data in files[0].items()}
    people = sorted(read_table(content["user"], "user", 5), key=lambda row: int(row[0]))
    films = sorted(read_table(content["item"], "item", 4), key=lambda row: int(row[0]))
    jobs = _ids([row[3] for row in people], "occupations", OCCUPATIONS)
    genres = _ids([word for row in films for word in row[3].split(" ")], "genres", GENRES)
    user_of = {row[0]: number for number, row in enumerate(people)}
    item_of = {row[0]: number for number, row in enumerate(films)}
    table = read_table(content["inter"], "inter", 4)
    users = np.array([user_of[row[0]] for row in table])
    check_users(KIND, users, len(people), LEAST)
    part = time_split(users, np.array([int(row[3]) for row in table]))
    rated = [(item_of[row[1]], int(row[2])) for row in table]
    save_array(folder, "ratings", np.column_stack([users, np.array(rated), part]).astype(np.int64))
    ages = np.searchsorted(AGES, [int(row[1]) for row in people], side="right")
    sexes = [int(row[2] == "M") for row in people]
    facts = np.column_stack([ages, sexes, [jobs[row[3]] for row in people]])
    save_array(folder, "users", facts.astype(np.int64))
    kinds = np.full((len(films), MOST_GENRES), NOTHING, dtype=np.int64)
    for number, row in enumerate(films):
        own = sorted(genres[word] for word in row[3].split(" "))
        kinds[number, : len(own)] = own
    save_array(folder, "genres", kinds)
    save_array(folder, "years", np.array([year_group(row[2]) for row in films]))
    text = json.dumps({"titles": [row[1] for row in films], "genres": list(genres)}, indent=1)
    (folder / "items.json").write_text(text, encoding="utf-8")


@SOURCES.register
class MovieLensConfig(SourceConfig):
    """MovieLens-100K: ratings of films, with one yes-or-no task per threshold."""

    kind: Literal["movielens"] = "movielens"
    features: tuple[str, ...] = tuple(field.name for field in FIELDS)  # input columns, in order
    tasks: tuple[str, ...] = ("ge3", "ge4", "eq5", "le2", "eq1")
    """questions about the rating, in order: ge3 = at least 3, ..."""
    held_out: Literal["test", "validation"] = "test"
    """latest tenth of each user's ratings (test), or the tenth before"""
    info: ClassVar[SourceInfo] = SourceInfo(
        summary="MovieLens-100K; tasks are questions about a rating, split by time per user",
        modality="ratings",
        shape="12 ids",
        count="80808 + 9596",
        licence="research use only, not to be redistributed (GroupLens); the package is MIT",
    )

    @model_validator(mode="after")
    def _known(self) -> Self:
        chosen_fields(self.features, FIELDS)
        for name in self.tasks:
            rating_task(name, np.ones(1))
        if len(set(self.tasks)) < len(self.tasks) or not self.tasks:
            raise ConfigError(describe("tasks", self.tasks, "one or more different names"))
        return self

    def build(self, split: Split = "train") -> RatingSource:
        ratings, people, genres, years = load(self.kind, "ratings", "users", "genres", "years")
        part = 0 if split == "train" else {"validation": 1, "test": 2}[self.held_out]
        users, items, stars, _ = ratings[ratings[:, 3] == part].T
        age, gender, occupation = people[users].T
        columns: dict[str, Any] = {
            "user": users,
            "item": items,
            "age": age,
            "gender": gender,
            "occupation": occupation,
            "genres": genres[items],
            "year": years[items],
        }
        fields = chosen_fields(self.features, FIELDS)
        titles = read_object(fetch(self.kind) / "items.json")["titles"]

        def tell(index: int) -> str:
            return f"user {users[index] + 1} on {titles[items[index]]}: {stars[index]} of 5"

        return RatingSource(
            self.kind,
            fields,
            np.column_stack([columns[field.name] for field in fields]),
            np.stack([rating_task(name, stars) for name in self.tasks], axis=1),
            self.tasks,
            users,
            licence=self.info.licence,
            tell=tell,
        )


register_download(
    Download(
        KIND,
        (
            Package(
                "pip",
                "recbole",
                "1.2.1",
                members(
                    """
                    4edb74e2a81178c2ba9ff381495f754f996c4aea351b1272ca36b43da0935eff 1979230
                    recbole/dataset_example/ml-100k/ml-100k.inter
                    51d7cdf777ce5c0f5b32c1d947a4a81fe07d75e78abbe761e0cd4d0756064532 66632
                    recbole/dataset_example/ml-100k/ml-100k.item
                    4f670007d9cfbeb9807e757209af1555b9bcc186bde25e767f67cb67c6dd5972 22697
                    recbole/dataset_example/ml-100k/ml-100k.user
                    """
                ),
                megabytes=2.1,
            ),
        ),
        _convert,
    )
)
