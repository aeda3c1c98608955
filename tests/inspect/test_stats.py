import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays

from coterie.core.errors import DataError
from coterie.inspect.statistics import formulas


def test_load_statistics_of_a_uniform_and_of_a_collapsed_load():
    uniform, one = np.full(8, 5.0), np.eye(8)[3] * 40
    assert formulas.load_share(uniform) == pytest.approx(np.full(8, 1 / 8))
    assert formulas.load_cv(uniform) == 0.0
    assert formulas.load_cv(one) == pytest.approx(np.sqrt(7))
    assert formulas.max_over_mean(uniform) == 1.0
    assert formulas.max_over_mean(one) == 8.0
    assert formulas.load_entropy(uniform) == pytest.approx(1.0)
    assert formulas.load_entropy(one) == 0.0
    assert formulas.is_collapsed(one) and not formulas.is_collapsed(uniform)


def test_statistics_without_choices_or_with_one_expert_are_defined():
    nothing = np.zeros(4)
    assert formulas.load_share(nothing).sum() == 0
    assert formulas.load_cv(nothing) == 0.0
    assert formulas.max_over_mean(nothing) == 1.0
    assert formulas.load_entropy(nothing) == 1.0
    assert formulas.dead_experts(nothing) == ()
    assert formulas.load_entropy([17.0]) == 1.0
    assert formulas.mutual_information(np.zeros((3, 4))) == 0.0
    assert np.isnan(formulas.chance_overlap(nothing, 0))
    assert np.isnan(formulas.total_variation(nothing, nothing))


def test_dead_means_below_one_per_cent_of_uniform():
    counts = np.array([1000.0, 1000.0, 9.9, 10.2])
    share_of_uniform = counts / counts.mean()
    assert share_of_uniform[2] > 0.01
    assert formulas.dead_experts(counts) == ()
    counts[2] = 5.0  # 5 / 503.8 = 0.99 % of the mean load
    assert formulas.dead_experts(counts) == (2,)
    assert formulas.dead_experts(counts, share=0.5) == (2, 3)


def test_information_is_zero_for_independence_and_log2_for_a_bijection():
    assert formulas.mutual_information(np.outer([1, 2, 3], [4, 5, 6, 7])) == pytest.approx(
        0, abs=1e-12
    )
    joint = np.eye(8) * 11
    info = formulas.information(joint)
    assert info.bits == pytest.approx(3.0)
    assert info.normalised == pytest.approx(1.0)


def test_information_where_the_expert_is_a_function_of_the_class():
    joint = np.kron(np.eye(4), np.ones((2, 1)))  # 8 classes, 4 experts
    info = formulas.information(joint)
    assert info.bits == pytest.approx(2.0)
    assert info.normalised == pytest.approx(1.0)  # the expert's 2 bits are all explained


def test_information_of_a_binary_symmetric_channel():
    error = 0.11
    joint = np.array([[1 - error, error], [error, 1 - error]])
    entropy = -(error * np.log2(error) + (1 - error) * np.log2(1 - error))
    assert formulas.mutual_information(joint) == pytest.approx(1 - entropy)


def test_miller_madow_and_the_floor_hold_for_unrelated_draws():
    rng = np.random.default_rng(0)
    raw, corrected, measurable = [], [], []
    for _ in range(400):
        joint = np.bincount(rng.integers(0, 40, size=400), minlength=40).reshape(5, 8)
        info = formulas.information(joint)
        raw.append(info.bits)
        corrected.append(info.bits - formulas.miller_madow_bias(joint, joint.sum()))
        measurable.append(info.measurable)
    assert np.mean(raw) == pytest.approx(4 * 7 / (2 * 400 * np.log(2)), rel=0.06)
    assert abs(np.mean(corrected)) < 0.06 * np.mean(raw)
    assert np.mean(measurable) < 0.06


def test_floor_counts_independent_samples_not_their_tokens():
    joint = np.full((10, 4), 160.0)
    spread = 27 + 2 * np.sqrt(2 * 27)
    assert formulas.information(joint, 100).floor == pytest.approx(spread / (200 * np.log(2)))
    assert formulas.information(joint).floor == pytest.approx(spread / (12800 * np.log(2)))


def test_effective_draws_of_agreeing_and_of_independent_tokens():
    samples, tokens = 50, 16
    agree = np.eye(5)[np.arange(samples) % 5] * tokens
    clumping = (agree**2).sum() / tokens
    draws = formulas.effective_draws(agree.sum(0), clumping, samples)
    assert draws == pytest.approx(samples, rel=0.03)
    rng = np.random.default_rng(0)
    free = rng.multinomial(tokens, [0.1, 0.2, 0.3, 0.4], size=samples)
    draws = formulas.effective_draws(free.sum(0), (free**2).sum() / tokens, samples)
    assert draws == pytest.approx(samples * tokens, rel=0.15)
    assert formulas.effective_draws([0, 0], 0, 0) == 0
    assert formulas.effective_draws([9, 0], 9, 3) == 9


@settings(max_examples=40, deadline=None)
@given(arrays(np.int64, (4, 5), elements=st.integers(0, 50)))
def test_information_is_bounded_symmetric_and_blind_to_order(joint):
    bits = formulas.mutual_information(joint)
    bound = min(formulas.entropy_bits(joint.sum(0)), formulas.entropy_bits(joint.sum(1)))
    assert 0 <= bits <= bound + 1e-9
    assert formulas.mutual_information(joint.T) == pytest.approx(bits, abs=1e-9)
    assert formulas.mutual_information(joint[::-1, [3, 1, 0, 4, 2]]) == pytest.approx(
        bits, abs=1e-9
    )
    assert 0 <= formulas.information(joint).normalised <= 1


def test_confidence_entropy_of_certain_and_undecided_rows():
    rows = np.array([10.0, 10.0, 0.0])
    total = np.array([0.0, 10 * np.log(4), 0.0])
    out = formulas.confidence_entropy(total, rows, 4)
    assert out[:2] == pytest.approx([0.0, 1.0])
    assert np.isnan(out[2])
    assert formulas.confidence_entropy(0.0, 3.0, 1) == 0.0


def test_coactivation_lift_is_one_for_uniform_pairs_and_marks_a_couple():
    uniform = np.ones((6, 6)) + np.diag(np.full(6, 4.0))  # every pair once: each expert 5 times
    lift = formulas.coactivation_lift(uniform)
    assert lift[~np.eye(6, dtype=bool)] == pytest.approx(1.0)
    assert np.isnan(np.diag(lift)).all()
    couples = np.zeros((4, 4))
    couples[:2, :2] = couples[2:, 2:] = 10.0
    lift = formulas.coactivation_lift(couples)
    assert lift[0, 1] == pytest.approx(3.0)  # a partner would be any of 3, and is always the same
    assert lift[0, 2] == 0.0


def test_lift_without_pairs_is_undefined_everywhere():
    assert np.isnan(formulas.coactivation_lift(np.diag([3.0, 4.0]))).all()


def test_always_on_needs_every_noise_level_that_was_seen():
    usage = np.array([[1, 0.9, 0.0], [1, 0.4, 0.6], [np.nan] * 3])
    assert formulas.always_on(usage) == (0,)
    assert formulas.always_on(usage, threshold=0.3) == (0, 1)
    assert formulas.always_on(np.full((3, 2), np.nan)) == ()


def test_top_k_usage_marks_the_largest_and_breaks_ties_by_index():
    usage = formulas.top_k_usage([[0.2, 0.5, 0.3], [0.4, 0.4, 0.2]], 2)
    assert usage.tolist() == [[0, 1, 1], [1, 1, 0]]


def test_task_affinity_of_sliding_windows_is_their_overlap():
    windows = np.array([[1, 1, 1, 0, 0], [0, 1, 1, 1, 0], [0, 0, 1, 1, 1]], dtype=float)
    expected = windows @ windows.T / 3
    assert formulas.task_affinity(windows) == pytest.approx(expected)
    missing = windows.copy()
    missing[1] = np.nan
    out = formulas.task_affinity(missing)
    assert np.isnan(out[1]).all() and np.isnan(out[:, 1]).all()
    assert out[0, 2] == pytest.approx(1 / 3)


def test_cosine_matrix_ignores_length_and_survives_a_zero_row():
    cosine = formulas.cosine_matrix([[1, 0], [5, 5], [0, 0]])
    assert cosine[0, 1] == pytest.approx(np.sqrt(0.5))
    assert cosine[2].tolist() == [0, 0, 0]


def test_chance_overlap_of_a_uniform_and_of_a_constant_choice():
    assert formulas.chance_overlap(np.full(8, 2 * 100 / 8), 100) == pytest.approx(2 / 8)
    assert formulas.chance_overlap([100, 100, 0], 100) == pytest.approx(1.0)


def test_total_variation():
    assert formulas.total_variation([1, 1], [10, 10]) == 0
    assert formulas.total_variation([1, 0], [0, 4]) == 1


def test_usage_rate_and_choice_histogram():
    rate = formulas.usage_rate([[2, 4], [0, 0]], [4, 0])
    assert rate[0].tolist() == [0.5, 1.0]
    assert np.isnan(rate[1]).all()
    assert formulas.choice_histogram([1, 0, 3]).tolist() == [0.25, 0, 0.75]


@pytest.mark.parametrize("bad", [[1.0, np.nan], [1.0, -1.0], [np.inf, 1.0]])
def test_bad_counts_are_refused(bad):
    with pytest.raises(DataError, match="counts"):
        formulas.load_share(bad)
