from __future__ import annotations

import json
import math
import sys
import threading
import types

import pytest
import torch
from torch import nn

from coterie.core.batch import Losses
from coterie.core.errors import ConfigError
from coterie.train import Trainer, checkpoint, read_metrics
from coterie.train.optimizer import decayed
from coterie.train.precision import has_bfloat16, resolve_device, resolve_precision
from toy_training import (
    POISON_STEPS,
    ToyModel,
    ToyObjective,
    ToySource,
    assert_equal,
    toy_config,
    train,
    weights,
)


def test_training_learns_and_reports_every_step(tmp_path):
    _, records = train(tmp_path, steps=150, lr=0.05, checkpoint_every=1000)
    first, last = records[:10], records[-10:]
    assert sum(r["loss"] for r in last) < 0.5 * sum(r["loss"] for r in first)
    assert [record["step"] for record in records] == list(range(1, 151))
    assert read_metrics(tmp_path / "metrics.jsonl") == json.loads(json.dumps(records))
    detailed = [record["step"] for record in records if "losses" in record]
    assert detailed == [1, *range(3, 151, 3)]
    assert set(records[2]["aux"]) == {"balance/layer0"}
    assert records[2]["experts"]["ffn/layer0"]["experts"] == 4
    assert records[2]["machine"]["samples_per_second"] > 0


def test_total_is_weighted_aux_plus_main():
    _, records = train(steps=3, log_every=1)
    for record in records:
        expected = record["losses"]["mse"] + 0.01 * record["aux"]["balance/layer0"]
        assert math.isclose(record["loss"], expected, rel_tol=1e-6)


def test_noise_bins_are_the_mean_since_the_last_log():
    seen = []

    class Recording(ToyObjective):
        def forward(self, *args):
            losses = super().forward(*args)
            seen.append((losses.noise, losses.per_sample))
            return losses

    _, records = train(objective=Recording(), steps=3, log_every=3, num_bins=4)
    noise = torch.cat([noise for noise, _ in seen[1:3]])  # step 1 has its own record
    loss = torch.cat([loss for _, loss in seen[1:3]])
    for index, mean in enumerate(records[2]["noise_bins"]):
        inside = (noise >= index / 4) & (noise < (index + 1) / 4)
        if mean is None:
            assert not inside.any()
        else:
            assert math.isclose(mean, loss[inside].mean().item(), rel_tol=1e-5)


@pytest.mark.parametrize("accumulate", [2, 4, 8])
def test_micro_batches_equal_one_big_batch(accumulate):
    def run(count):
        objective = ToyObjective(noisy=False)
        return train(objective=objective, dropout=0.0, accumulate=count, ema=None)

    one, records_one = run(1)
    many, records_many = run(accumulate)
    for a, b in zip(records_one, records_many, strict=True):
        assert math.isclose(a["loss"], b["loss"], rel_tol=1e-4)
    for name, value in one.model.state_dict().items():
        assert torch.allclose(value, many.model.state_dict()[name], atol=1e-4), name
    # The model's hook saw the routings of every micro-batch, once per step.
    assert many.model.seen_routings == [accumulate] * POISON_STEPS


def test_same_seed_same_run_and_global_rng_untouched():
    states = []
    torch.manual_seed(11)

    class Source(ToySource):
        def get(self, indices):
            states.append(torch.get_rng_state())
            return super().get(indices)

    trainer = Trainer(toy_config(), ToyModel(), ToyObjective(), Source(), seed=3)
    before = torch.get_rng_state()
    trainer.fit(False)
    assert torch.equal(torch.get_rng_state(), before)
    assert not torch.equal(states[5], before)  # dropout did draw from the global generator
    one, records = train()
    torch.manual_seed(99)
    two, again = train()
    assert [r["loss"] for r in records] == [r["loss"] for r in again]
    assert_equal(weights(one.model), weights(two.model))


def test_objective_parameters_are_trained_with_their_own_rate():
    trainer, _ = train()
    group = next(
        g for g in trainer.optimizer.param_groups if g["weight_decay"] == 0 and g["scale"] != 1
    )
    assert math.isclose(group["scale"] * trainer.config.lr, ToyObjective.lr)
    assert trainer.objective.scale.item() != 0


def test_weight_decay_spares_vectors_tagged_and_stacked_biases():
    class Pool(nn.Module):
        def __init__(self):
            super().__init__()
            self.weight = nn.Parameter(torch.zeros(4, 3, 2))
            self.bias = nn.Parameter(torch.zeros(4, 3))
            self.tagged = nn.Parameter(torch.zeros(4, 3, 2))
            self.tagged.use_decay = False

        def expert_state(self, expert):
            return {"weight": self.weight[expert]}

    model = nn.Sequential(nn.Linear(2, 2), Pool())
    chosen = decayed(model)
    names = {name for name, p in model.named_parameters() if id(p) in chosen}
    assert names == {"0.weight", "1.weight"}


def test_gradient_clipping_bounds_the_step():
    objective, model, source = ToyObjective(), ToyModel(), ToySource()
    trainer = Trainer(toy_config(steps=1, clip=0.01), model, objective, source, seed=3)
    state = trainer.fit(False)
    norms = [p.grad.norm() for p in trainer.parameters.values()]
    assert state.step == 1
    assert math.isclose(torch.stack(norms).norm().item(), 0.01, rel_tol=1e-3)


def test_projection_changes_nothing():
    def make():
        return Trainer(toy_config(), ToyModel(), ToyObjective(), ToySource(), seed=3)

    plain, projected = make(), make()
    seconds = projected.project(2)
    assert 0 < seconds < 60
    assert projected.state.step == 0
    plain.fit(False)
    projected.fit(False)
    assert_equal(weights(plain.model), weights(projected.model))


def test_progress_function_sees_every_step_and_bar_works(capsys):
    calls = []
    trainer = Trainer(toy_config(), ToyModel(), ToyObjective(), ToySource())
    trainer.fit(lambda done, total, record: calls.append((done, total, record["loss"])))
    assert [call[:2] for call in calls] == [(i + 1, POISON_STEPS) for i in range(POISON_STEPS)]
    Trainer(toy_config(steps=2), ToyModel(), ToyObjective(), ToySource()).fit(True)
    assert "2/2" in capsys.readouterr().err


def test_training_works_outside_the_main_thread():
    done = []
    thread = threading.Thread(target=lambda: done.append(train(steps=2)[0].state.step))
    thread.start()
    thread.join()
    assert done == [2]


def test_averaged_swaps_weights_and_puts_them_back():
    trainer, _ = train()
    own = weights(trainer.model)
    with pytest.raises(KeyError), trainer.averaged() as model:
        assert not torch.equal(model.second.weight, own["second.weight"])
        raise KeyError
    assert_equal(weights(trainer.model), own)
    plain, _ = train(ema=None)
    with plain.averaged() as model:
        assert_equal(weights(model), own)


def test_auto_precision_follows_the_machine(monkeypatch):
    cpu = torch.device("cpu")
    assert resolve_device("cpu") == cpu
    for has, expected in ((False, torch.float32), (True, torch.bfloat16)):
        monkeypatch.setattr(torch.cpu, "_is_avx512_bf16_supported", lambda has=has: has)
        monkeypatch.setattr(torch.cpu, "_is_amx_tile_supported", lambda: False)
        assert has_bfloat16(cpu) is has
        assert resolve_precision("auto", cpu) == expected
    assert resolve_precision("bfloat16", cpu) == torch.bfloat16
    assert not has_bfloat16(torch.device("meta"))


def test_bfloat16_is_used_inside_and_weights_stay_float32():
    kinds = []

    class Watching(ToyObjective):
        def forward(self, model, *args):
            hook = model.first.register_forward_hook(lambda _m, _i, out: kinds.append(out.dtype))
            losses = super().forward(model, *args)
            hook.remove()
            return losses

    trainer, records = train(objective=Watching(), steps=2, precision="bfloat16")
    assert set(kinds) == {torch.bfloat16}
    assert trainer.model.first.weight.dtype == torch.float32
    assert all(math.isfinite(record["loss"]) for record in records)


def test_compiled_models_train_and_save_under_their_own_names(tmp_path, monkeypatch):
    compiled = []

    def fake(model):
        compiled.append(model)
        return lambda x: model(x)

    monkeypatch.setattr(torch, "compile", fake)
    trainer, records = train(tmp_path, compile=True)
    assert compiled == [trainer.model]
    assert [r["loss"] for r in records] == [r["loss"] for r in train()[1]]
    found = checkpoint.load(checkpoint.latest(tmp_path))
    assert "first.weight" in found.state["model"]


def test_a_loss_without_gradient_is_not_silently_accepted():
    class Constant:
        def __call__(self, model, batch, rng, progress):
            return Losses({"nothing": torch.zeros(())})

    with pytest.raises(RuntimeError, match="does not require grad"):
        train(objective=Constant())


def test_a_frozen_model_is_refused():
    model = ToyModel().requires_grad_(False)
    with pytest.raises(ConfigError, match="no trainable parameters"):
        Trainer(toy_config(), model, lambda *args: None, ToySource())


def test_tensorboard_gets_the_numbers(tmp_path, monkeypatch):
    written = {}

    class Writer:
        def __init__(self, folder, purge_step):
            assert (folder, purge_step) == (str(tmp_path / "tensorboard"), 1)

        def add_scalar(self, name, value, step):
            written[name, step] = value

        def close(self):
            written["closed", 0] = 1

    fake = types.SimpleNamespace(SummaryWriter=Writer)
    monkeypatch.setitem(sys.modules, "torch.utils.tensorboard", fake)
    _, records = train(tmp_path, steps=2, tensorboard=True)
    assert written["loss", 2] == records[1]["loss"]
    assert written["aux/balance/layer0", 1] == records[0]["aux"]["balance/layer0"]
    assert ("closed", 0) in written


def test_missing_tensorboard_is_a_clear_error(tmp_path, monkeypatch):
    import builtins

    real = builtins.__import__

    def without(name, *args, **kwargs):
        if name.startswith("torch.utils.tensorboard"):
            raise ImportError(name)
        return real(name, *args, **kwargs)

    monkeypatch.setattr(builtins, "__import__", without)
    with pytest.raises(ConfigError, match=r"train.tensorboard.*pip install 'coterie\[track\]'"):
        train(tmp_path, tensorboard=True)
