"""The recipe of guides: equal budgets, no labels where none are claimed, one range per expert."""

from __future__ import annotations

from coterie.guides.guide import GuideConfig
from coterie.recipes import ppap


def test_guides_are_trained_for_equal_steps_and_differ_in_what_is_claimed() -> None:
    arms = ppap.arms()
    guides = {n: c for n, c in arms.items() if n.endswith("-guide") and not n.startswith("map")}
    assert len({(c.train.steps, c.train.batch, c.train.lr, c.seed) for c in guides.values()}) == 1
    for name, config in guides.items():
        model = config.model
        assert isinstance(model, GuideConfig)
        labelled = name.startswith("labelled")
        told = "data" if labelled else "teacher"
        assert config.objective.learn_from == told
        assert (config.data.kind == "generated") is not labelled
        assert (model.adapt == "full") is labelled
        assert (model.ranges == 1) is (name in ("single-guide", "labelled-guide"))
        assert config.train.schedule.times == model.ranges


def test_all_samples_are_of_one_denoiser_and_differ_in_their_guide_alone() -> None:
    arms = {n: c for n, c in ppap.arms().items() if c.model.kind == "guided"}
    assert {c.model.denoiser.path for c in arms.values()} == {"arm:denoiser"}
    assert {c.model.scale for n, c in arms.items() if n[-1] not in "128"} == {ppap.SCALE}
    assert len({(c.data.to_json(), c.sample.to_json()) for c in arms.values()}) == 1


def test_published_settings() -> None:
    config = ppap.paper()
    assert (config.train.steps, config.train.batch, config.train.lr) == (300_000, 256, 1e-4)
    assert (config.model.rank, config.model.alpha, config.model.ranges) == (16, 8.0, 5)
    assert config.data.count == 500_000 and config.objective.temperature == 0.25
    assert config.objective.first == "previous" and config.train.schedule.schedule.kind == "linear"
