"""A mixture of exact experts is the denoiser of all data; sparse choices, and what they cost."""

from __future__ import annotations

import warnings
from typing import Any

import pytest
import torch
from exact_mixtures import (
    CLUSTERS,
    DATA,
    F64,
    NAMES,
    NOTHING,
    PRIOR,
    experts,
    process,
    states,
    whole,
)
from torch import Tensor

from coterie.core.context import NULL_LABEL
from coterie.core.errors import ConfigError, DataError
from coterie.core.prediction import VIEWS, Condition, Prediction
from coterie.core.rng import SampleNoise
from coterie.core.routing import ENSEMBLE
from coterie.ensembles import ENSEMBLES, ExactPosterior, MixtureConfig, coverage
from coterie.inspect import Trace
from coterie.process import ExactDenoiser, convert
from coterie.solvers import GRIDS, SOLVERS, GuidanceConfig, guide, initial_noise, sample

Q = tuple(PRIOR.tolist())


def posterior(name: str = "rectified_flow", prior: Tensor | None = None) -> ExactPosterior:
    return ExactPosterior(process(name), DATA, CLUSTERS, prior)


def mixture(members: Any = None, router: Any = None, **fields: Any) -> Any:
    config = MixtureConfig.from_dict(fields)
    return config.build(members or experts(), router or posterior())


class Counting:
    """An expert, or a router, that remembers what it was asked."""

    def __init__(self, inner: Any) -> None:
        self.inner, self.process = inner, inner.process
        self.calls: list[tuple[Tensor, Tensor, Condition]] = []
        self.view = getattr(inner, "view", None)

    def __call__(self, x: Tensor, t: Tensor, cond: Condition) -> Any:
        self.calls.append((x, t, cond))
        return self.inner(x, t, cond)


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("view", VIEWS)
def test_full_equals_the_denoiser_of_all_data_in_every_view(view: str, name: str) -> None:
    x, t = states(name)
    made = mixture(experts(view, name), posterior(name))
    answer = made(x, t, NOTHING)
    assert answer.view == view  # members agree: nothing is converted
    expected = whole(view, name)(x, t, NOTHING).value
    scale = expected.abs().amax(1, keepdim=True).clamp_min(1.0)
    assert float(((answer.value - expected) / scale).abs().max()) < 1e-10


@pytest.mark.parametrize("view", ["auto", *VIEWS])
def test_members_that_answer_in_different_views_are_combined_alike(view: str) -> None:
    x, t = states()
    made = mixture(experts(("x0", "v", "flow")), view=view)
    answer = made(x, t, NOTHING)
    assert answer.view == ("x0" if view == "auto" else view)
    x0 = convert(process(), answer.value, answer.view, "x0", x, t)
    assert float((x0 - whole()(x, t, NOTHING).value).abs().max()) < 1e-10


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("router", NAMES)
def test_experts_and_router_of_different_processes_serve_in_one(name: str, router: str) -> None:
    # Noise levels that all three processes have.
    t = process(name).time_of_lam(torch.linspace(-3.5, 3.5, 40, dtype=F64))
    x0, _ = DATA.sample(40, torch.Generator().manual_seed(1))
    x = process(name).diffuse(x0, torch.randn_like(x0), t)
    made = mixture(experts(("v", "x0", "eps"), NAMES), posterior(router), process=name)
    assert made.process == process(name)
    x0 = made(x, t, NOTHING).value
    assert float((x0 - whole("x0", name)(x, t, NOTHING).value).abs().max()) < 1e-10


def test_samples_of_the_ensemble_are_those_of_the_denoiser_of_all_data() -> None:
    noise = SampleNoise(range(16))
    x = initial_noise(process(), (2,), noise).double()
    settings: dict[str, Any] = {
        "solver": SOLVERS.parse("dpmpp_2m"),
        "grid": GRIDS.parse("lambda"),
        "steps": 12,
    }
    made = sample(mixture(), x, NOTHING, **settings)
    torch.testing.assert_close(made, sample(whole(), x, NOTHING, **settings), rtol=0, atol=1e-10)


@pytest.mark.parametrize("view", VIEWS)
def test_one_member_is_the_expert_itself(view: Any) -> None:
    x, t = states()
    made = MixtureConfig().build([whole(view)], lambda x, t, cond: torch.zeros(len(x), 1))
    answer, alone = made(x, t, NOTHING), whole(view)(x, t, NOTHING)
    assert answer.view == alone.view and torch.equal(answer.value, alone.value)


@pytest.mark.parametrize(
    "choice", [{"kind": "top_k", "k": 3}, {"kind": "top_p", "p": 1.0}], ids=["top-K", "nucleus 1"]
)
def test_a_sparse_choice_of_everything_is_full(choice: Any) -> None:
    x, t = states()
    made, full = mixture(choice=choice)(x, t, NOTHING), mixture()(x, t, NOTHING)
    torch.testing.assert_close(made.value, full.value, rtol=0, atol=1e-13)


def test_order_of_the_experts_does_not_matter() -> None:
    x, t = states()
    turn = [2, 0, 1]
    members, router = experts("v"), posterior()
    turned = mixture([members[i] for i in turn], lambda x, t, cond: router(x, t, cond)[:, turn])(
        x, t, NOTHING
    )
    straight = mixture(members)(x, t, NOTHING)
    torch.testing.assert_close(turned.value, straight.value, rtol=0, atol=1e-13)
    torch.testing.assert_close(turned.routings[0].probs, straight.routings[0].probs[:, turn])


def test_the_posterior_is_the_prior_in_pure_noise_and_one_hot_without() -> None:
    x, _ = states()
    made = mixture()
    noisy = made.choose(x, torch.ones(len(x), dtype=F64), NOTHING)
    torch.testing.assert_close(noisy.probs, PRIOR.expand(len(x), 3), rtol=0, atol=1e-14)
    clean = made.choose(DATA.means, torch.full((5,), 1e-4, dtype=F64), NOTHING)
    assert clean.probs.argmax(1).tolist() == list(CLUSTERS)
    assert float(clean.probs.amax(1).min()) > 1 - 1e-3  # clusters hardly overlap there


def test_a_class_balanced_router_is_corrected_to_the_prior() -> None:
    x, t = states()
    balanced = posterior(prior=torch.full((3,), 1 / 3, dtype=F64))
    fields = {"prior": Q, "router_prior": (1 / 3,) * 3}
    made = mixture(router=balanced, **fields)(x, t, NOTHING).value
    goal = whole()(x, t, NOTHING).value
    assert float((made - goal).abs().max()) < 1e-10
    wrong = mixture(router=balanced)(x, t, NOTHING).value
    assert float((wrong - goal).abs().max()) > 0.05


def own_task(cond: Condition) -> Tensor:
    assert cond.task is not None
    return cond.task


def test_rows_are_grouped_and_each_expert_is_called_once_with_its_own() -> None:
    x, t = states()
    members = [Counting(expert) for expert in experts()]
    task = torch.arange(len(x))
    made = mixture(members, choice={"kind": "top_k", "k": 1})
    answer = made(x, t, Condition(task=task))
    routing = answer.routings[0]
    seen = [own_task(member.calls[0][2]) for member in members if member.calls]
    assert all(len(member.calls) <= 1 for member in members) and len(seen) > 1
    assert sorted(torch.cat(seen).tolist()) == task.tolist()
    for index, member in enumerate(members):
        for rows, at, cond in member.calls:
            own = (routing.ids[:, 0] == index).nonzero()[:, 0]
            assert torch.equal(own_task(cond), task[own])
            assert torch.equal(rows, x[own]) and torch.equal(at, t[own])
            assert torch.equal(answer.value[own], member.inner(rows, at, cond).value)
    assert torch.equal(routing.ids[:, 0], routing.probs.argmax(1))
    assert torch.equal(routing.gates, torch.ones(len(x), 1, dtype=F64))


@pytest.mark.parametrize("tau", [0.3, 0.7, 0.95])
def test_nucleus_keeps_the_smallest_set_with_that_mass(tau: float) -> None:
    x, t = states()
    routing = mixture(choice={"kind": "top_p", "p": tau}).choose(x, t, NOTHING)
    for row in range(len(x)):
        kept = routing.ids[row][routing.ids[row] < 3]
        mass = routing.probs[row].sort(descending=True).values.cumsum(0)
        assert len(kept) == int((mass <= tau).sum()) + 1 or float(mass[len(kept) - 1]) >= tau
        gates = routing.gates[row][: len(kept)]
        torch.testing.assert_close(gates, routing.probs[row, kept] / routing.probs[row, kept].sum())


def test_a_drawn_expert_depends_on_the_sample_alone_and_follows_the_posterior() -> None:
    x, _ = states(count=1)
    x = x + torch.randn(4000, 2, generator=torch.Generator().manual_seed(2), dtype=F64)
    t = torch.ones(4000, dtype=F64)
    made = mixture(choice="sampled")
    drawn = made.choose(x, t, NOTHING).ids
    assert torch.equal(made.choose(x[7:9], t[7:9], NOTHING).ids, drawn[7:9])
    found = coverage(drawn[:, 0], Q)
    assert found.total_variation < 3 * found.expected
    other = mixture(choice={"kind": "sampled", "seed": 1}).choose(x, t, NOTHING).ids
    assert not torch.equal(other, drawn)


def test_oracle_takes_the_true_cluster() -> None:
    x, t = states()
    cluster = torch.arange(len(x)) % 3
    made = mixture(choice="oracle")
    answer = made(x, t, Condition(task=cluster))
    assert torch.equal(answer.routings[0].ids[:, 0], cluster)
    for index, expert in enumerate(experts()):
        rows = cluster == index
        alone = expert(x[rows], t[rows], NOTHING).value
        assert torch.equal(answer.value[rows], alone)
    with pytest.raises(DataError, match=r"cond\.task"):
        made(x, t, NOTHING)
    with pytest.raises(DataError, match=r"cond\.task.*0\.\.2"):
        made(x, t, Condition(task=cluster + 1))


def test_a_missing_member_is_masked_named_and_the_others_renormalised() -> None:
    x, t = states()
    first, _, last = experts()
    with pytest.warns(UserWarning, match="without island-b: not given"):
        made = MixtureConfig().build({"a": first, "island-b": None, "c": last}, posterior())
    assert made.missing == ("island-b",)
    full = mixture()(x, t, NOTHING).routings[0].probs
    answer = made(x, t, NOTHING)
    routing = answer.routings[0]
    kept = full[:, [0, 2]] / full[:, [0, 2]].sum(1, keepdim=True)
    torch.testing.assert_close(routing.probs[:, [0, 2]], kept)
    assert float(routing.probs[:, 1].abs().max()) == 0.0
    expected = kept[:, :1] * first(x, t, NOTHING).value + kept[:, 1:] * last(x, t, NOTHING).value
    torch.testing.assert_close(answer.value, expected)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        top = MixtureConfig(choice={"kind": "top_k", "k": 3}).build(
            [first, None, last], posterior()
        )
        oracle = MixtureConfig(choice="oracle").build([first, None, last], posterior())
    torch.testing.assert_close(top(x, t, NOTHING).value, answer.value)
    with pytest.raises(DataError, match="missing: expert 1"):
        oracle(x, t, Condition(task=torch.ones(len(x), dtype=torch.long)))
    with pytest.raises(ConfigError, match="at least one member"):
        MixtureConfig().build([None, None], posterior())


class Labelled(ExactDenoiser):
    """Leans towards its label: 3 where unconditional."""

    def __call__(self, x: Tensor, t: Tensor, cond: Condition) -> Prediction:
        assert cond.label is not None
        answer = super().__call__(x, t, NOTHING)
        lean = torch.where(cond.label == NULL_LABEL, 3, cond.label)
        return answer.replace(value=answer.value + lean[:, None])


@pytest.mark.parametrize("choice", ["dense", {"kind": "top_k", "k": 1}, "sampled"])
def test_guidance_uses_one_choice_for_both_halves(choice: Any) -> None:
    x, t = states()
    label = torch.arange(len(x)) % 3
    members = [Labelled(one.process, one.mixture, one.view) for one in experts()]

    def router(x: Tensor, t: Tensor, cond: Condition) -> Tensor:
        """Reads the condition: unconditional rows alone would go elsewhere."""
        assert cond.label is not None
        return posterior()(x, t, cond) + 5.0 * cond.label[:, None] * torch.arange(3)

    made = mixture(members, router, choice=choice)
    guided = guide(made, GuidanceConfig(weight=2.5))(x, t, Condition(label=label))
    routing = guided.routings[0]
    assert torch.equal(routing.ids[: len(x)], routing.ids[len(x) :])
    assert torch.equal(routing.gates[: len(x)], routing.gates[len(x) :])
    assert routing.label is not None and int(routing.label[len(x) :].max()) == NULL_LABEL
    plain = made(x, t, Condition(label=label)).value
    null = plain - label[:, None] + 3
    torch.testing.assert_close(guided.value, null + 2.5 * (plain - null))


def test_a_router_asked_every_n_steps_is_asked_less_and_answers_for_the_state_before() -> None:
    router = Counting(posterior())
    made = mixture(router=router, router_every=3)
    x = initial_noise(process(), (2,), SampleNoise(range(8))).double()
    settings: dict[str, Any] = {"grid": GRIDS.parse("uniform"), "steps": 9}
    for solver in ("ddim", "heun"):  # heun asks twice at every time but the first
        for _ in range(2):  # a second run begins anew
            router.calls.clear()
            sample(made, x, NOTHING, solver=SOLVERS.parse(solver), **settings)
            asked = [round(float(t[0]), 6) for _, t, _ in router.calls]
            assert asked == [round(v, 6) for v in (1.0, 6 / 9, 3 / 9)]
    exact = sample(mixture(), x, NOTHING, solver=SOLVERS.parse("ddim"), **settings)
    lossy = sample(made, x, NOTHING, solver=SOLVERS.parse("ddim"), **settings)
    assert 1e-6 < float((lossy - exact).abs().mean()) < 0.5
    router.calls.clear()
    made(x[:4], torch.full((4,), 0.2, dtype=F64), NOTHING)  # another batch
    made.reset()
    made(x[:4], torch.full((4,), 0.2, dtype=F64), NOTHING)
    assert len(router.calls) == 2


def test_the_choice_is_a_routing_that_traces_read() -> None:
    x, t = states(count=20)
    answer = mixture(choice={"kind": "top_k", "k": 2})(x, t, NOTHING, sample_ids=torch.arange(20))
    (routing,) = answer.routings
    assert (routing.unit, routing.slot, routing.name) == ("sample", ENSEMBLE, "ensemble")
    assert routing.num_experts == 3 and routing.top_k == 2 and routing.batch == (20, 1)
    assert torch.equal(routing.sample_ids, torch.arange(20))
    trace = Trace()
    trace.add(answer.routings)
    (found,) = trace.routers
    assert found.place.slot == ENSEMBLE


def test_top_1_covers_fewer_clusters_than_the_data_near_pure_noise() -> None:
    """Top-1 sends every sample to the largest cluster at first: its clusters are off, and said."""
    x = initial_noise(process(), (2,), SampleNoise(range(1500))).double()
    settings: dict[str, Any] = {
        "solver": SOLVERS.parse("ddim"),
        "grid": GRIDS.parse("uniform"),
        "steps": 25,
    }

    def covered(choice: Any) -> Any:
        made = sample(mixture(choice=choice), x, NOTHING, **settings)
        t = torch.full((len(made),), 1e-3, dtype=F64)
        return coverage(posterior()(made, t, NOTHING).argmax(1), Q)

    full, top = covered("dense"), covered({"kind": "top_k", "k": 1})
    assert full.total_variation < 4 * full.expected
    assert top.total_variation > 2 * full.total_variation
    assert top.total_variation > 0.05 and top.num_samples == 1500


def test_coverage_of_known_histograms() -> None:
    found = coverage(torch.tensor([0, 0, 0, 1]), (0.5, 0.25, 0.25))
    assert found.histogram == (0.75, 0.25, 0.0) and found.total_variation == 0.25
    draws = torch.multinomial(PRIOR, 200 * 400, True, generator=torch.Generator().manual_seed(0))
    chance = [coverage(part, Q).total_variation for part in draws.reshape(200, 400)]
    assert sum(chance) / 200 == pytest.approx(coverage(draws[:400], Q).expected, rel=0.1)
    with pytest.raises(ConfigError, match="prior"):
        coverage(torch.tensor([0]), (0.5, 0.2))
    with pytest.raises(DataError, match="clusters"):
        coverage(torch.tensor([3]), (0.5, 0.5))


@pytest.mark.parametrize(
    ("fields", "words"),
    [
        ({"prior": (0.5, 0.2)}, "prior.*add up to 1"),
        ({"router_prior": (0.5, 0.5)}, "prior"),
        ({"prior": (0.5, 0.5), "router_prior": (1.0,)}, "router_prior"),
        ({"choice": "random"}, "kind"),
        ({"router_every": 0}, "router_every"),
        ({"view": "velocity"}, "view"),
    ],
)
def test_settings_that_cannot_be_are_refused(fields: dict[str, Any], words: str) -> None:
    with pytest.raises(ConfigError, match=words):
        MixtureConfig.from_dict(fields)


def test_members_and_routers_that_do_not_fit_are_refused() -> None:
    x, t = states()
    with pytest.raises(ConfigError, match="prior"):
        mixture(prior=(0.5, 0.5))
    with pytest.raises(ConfigError, match=r"k.*1\.\.3"):
        mixture(choice={"kind": "top_k", "k": 4})
    with pytest.raises(ConfigError, match="router"):
        MixtureConfig().build(experts())
    with pytest.raises(DataError, match="router: logits"):
        mixture(router=lambda x, t, cond: torch.zeros(len(x), 2))(x, t, NOTHING)
    with pytest.raises(DataError, match="NaN"):
        mixture(router=lambda x, t, cond: torch.full((len(x), 3), float("nan")))(x, t, NOTHING)
    with pytest.raises(DataError, match="t:"):
        mixture()(x, t[:3], NOTHING)


def test_configuration_is_json_and_registered() -> None:
    config = MixtureConfig(
        choice={"kind": "top_p", "p": 0.9}, prior=(0.25, 0.75), process="vp_linear", view="v"
    )
    assert MixtureConfig.from_json(config.to_json()) == config
    assert ENSEMBLES.parse({"kind": "mixture"}) == MixtureConfig()
