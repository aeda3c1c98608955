"""Agreement of routers with themselves from one sampling step to the next."""

import numpy as np
import pytest
import torch
from synthetic_routings import routing

from coterie.core.errors import DataError
from coterie.inspect.statistics.trace import Trace


def test_step_consistency_of_kept_half_kept_and_changed_choices():
    def at(ids):
        return [routing(torch.tensor(ids), 4, (2, 1), label=torch.tensor([0, -1]))]

    trace = Trace()
    trace.add_step(0, at([[0, 1], [2, 3]]))
    trace.add_step(1, at([[1, 0], [2, 0]]))
    trace.add_step(1, at([[3, 2], [3, 1]]))  # the second stage of a solver: passed over
    trace.add_step(2, at([[2, 3], [2, 0]]))
    (steps,) = trace.steps.values()
    assert steps.mean_overlap(0)[1:].tolist() == [1.0, 0.0]
    assert steps.mean_overlap(1)[1:].tolist() == [0.5, 1.0]
    assert steps.mean_overlap()[1:].tolist() == [0.75, 0.5]
    assert np.isnan(steps.mean_overlap()[0])
    assert steps.early_late() == (0.75, 0.5)
    assert steps.counts.sum(1).tolist() == [4, 4, 4]


def test_a_new_sampling_run_or_other_samples_are_not_compared():
    def at(ids, samples):
        return [routing(torch.tensor(ids), 4, (2, 1), sample_ids=torch.tensor(samples))]

    trace = Trace()
    trace.add_step(0, at([0, 1], [5, 6]))
    trace.add_step(1, at([0, 1], [5, 6]))
    trace.add_step(0, at([2, 3], [7, 8]))
    trace.add_step(1, at([2, 0], [7, 8]))
    trace.add_step(2, at([2, 0], [7, 9]))  # another sample
    trace.add_step(4, at([2, 0], [7, 9]))  # a gap
    (steps,) = trace.steps.values()
    assert steps.rows[0].tolist() == [0, 4, 0, 0, 0]
    assert steps.mean_overlap()[1] == pytest.approx(0.75)


def test_variable_k_overlap_divides_by_the_larger_choice():
    trace = Trace()
    trace.add_step(0, [routing(torch.tensor([[0, 1], [3, 3]]), 3, (2, 1))])
    trace.add_step(1, [routing(torch.tensor([[0, 3], [3, 3]]), 3, (2, 1))])
    (steps,) = trace.steps.values()
    assert steps.mean_overlap()[1] == 0.5
    assert steps.rows[0, 1] == 1  # a row that chose nobody twice says nothing
    with pytest.raises(DataError, match="step"):
        trace.add_step(-1, [])
    with pytest.raises(DataError, match="num_experts"):
        trace.add_step(2, [routing(torch.tensor([0, 0]), 2, (2, 1))])
