"""Learning rates by value and against transformers and torch; parameter groups; state that survives a checkpoint."""

import math
from typing import get_args, get_type_hints

import pytest
import torch
from torch import nn
from transformers import get_cosine_schedule_with_warmup, get_linear_schedule_with_warmup

from trainer.config.schema import OptimConfig
from trainer.training import optim
from trainer.training.checkpoint import DamagedCheckpoint, load_optimizer_tensors, optimizer_tensors
from trainer.training.optim import build_optimizer, learning_rate, set_learning_rate


def rates(total_steps, **settings):
    return [learning_rate(OptimConfig(**settings), step, total_steps) for step in range(total_steps)]


# --- the learning rate ---


@pytest.mark.parametrize(
    ("schedule", "floor", "expected"),
    [
        ("linear", 0.0, [0, 1, 2, 2 * 1.0, 2 * 0.75, 2 * 0.5, 2 * 0.25, 0]),
        ("linear", 0.25, [0, 1, 2, 2.0, 0.5 + 1.5 * 0.75, 1.25, 0.5 + 1.5 * 0.25, 0.5]),
        ("cosine", 0.0, [0, 1, 2, 2 * 1.0, 1 + math.sqrt(0.5), 1.0, 1 - math.sqrt(0.5), 0]),
        ("cosine", 0.25, [0, 1, 2, 2.0, 0.5 + 0.75 * (1 + math.sqrt(0.5)), 1.25, 0.5 + 0.75 * (1 - 0.5**0.5), 0.5]),
        ("constant", 0.0, [0, 1, 2, 2, 2, 2, 2, 2]),
    ],
)
def test_values_at_start_end_of_warmup_midway_and_end(schedule, floor, expected):
    config = OptimConfig(learning_rate=2.0, schedule=schedule, warmup_fraction=0.2, final_lr_fraction=floor)
    steps = [0, 1, 2, 2, 4, 6, 8, 10]  # of 10, 2 of them warm-up
    assert [learning_rate(config, step, 10) for step in steps] == pytest.approx(expected, abs=1e-15)


@pytest.mark.parametrize("warmup_fraction", [0.0, 0.06, 0.1, 0.5, 1.0])
@pytest.mark.parametrize("total_steps", [1, 7, 50])
@pytest.mark.parametrize(
    ("schedule", "theirs"), [("linear", get_linear_schedule_with_warmup), ("cosine", get_cosine_schedule_with_warmup)]
)
def test_equal_to_transformers(schedule, theirs, total_steps, warmup_fraction):
    optimizer = torch.optim.SGD([nn.Parameter(torch.zeros(1))], lr=3e-4)
    scheduler = theirs(optimizer, math.ceil(warmup_fraction * total_steps), total_steps)
    expected = []
    for _ in range(total_steps):
        expected.append(scheduler.get_last_lr()[0])
        optimizer.step()
        scheduler.step()
    ours = rates(total_steps, learning_rate=3e-4, schedule=schedule, warmup_fraction=warmup_fraction)
    assert ours == pytest.approx(expected, rel=1e-12, abs=1e-18)


# --- the optimizer ---


class Small(nn.Module):
    def __init__(self):
        super().__init__()
        self.first = nn.Linear(3, 4)
        self.norm = nn.LayerNorm(4)
        self.frozen = nn.Linear(4, 4).requires_grad_(False)
        self.last = nn.Linear(4, 2)

    def forward(self, x):
        return self.last(self.frozen(self.norm(self.first(x))))


def small_and_optimizer(**settings):
    torch.manual_seed(0)
    model = Small()
    return model, *build_optimizer(model.named_parameters(), OptimConfig(**settings))


def walk(model, optimizer, first, last):
    for step in range(first, last):
        x = torch.randn(5, 3, generator=torch.Generator().manual_seed(step))
        optimizer.zero_grad()
        model(x).square().sum().backward()
        set_learning_rate(optimizer, 0.01 / (step + 1))
        optimizer.step()


@pytest.mark.parametrize(
    ("name", "kind"), [("adamw", torch.optim.AdamW), ("adam", torch.optim.Adam), ("sgd", torch.optim.SGD)]
)
def test_kind_and_settings(name, kind):
    _, optimizer, _ = small_and_optimizer(name=name, weight_decay=0.3, betas=(0.8, 0.95), eps=1e-6, learning_rate=0.02)
    assert type(optimizer) is kind
    assert [group["lr"] for group in optimizer.param_groups] == [0.02, 0.02]
    if name != "sgd":
        assert (optimizer.defaults["betas"], optimizer.defaults["eps"]) == ((0.8, 0.95), 1e-6)
    assert optimizer.defaults.get("momentum", 0) == 0


def test_biases_and_norms_are_not_decayed_and_frozen_weights_not_there():
    model, optimizer, trained = small_and_optimizer(weight_decay=0.3)
    by_decay = {group["weight_decay"]: {id(p) for p in group["params"]} for group in optimizer.param_groups}
    names = {decay: {n for n, p in model.named_parameters() if id(p) in ids} for decay, ids in by_decay.items()}
    assert names == {0.3: {"first.weight", "last.weight"}, 0.0: {"first.bias", "norm.weight", "norm.bias", "last.bias"}}
    assert set(trained) == names[0.3] | names[0.0]


def test_loras_b_learns_faster_by_the_ratio_all_along():
    model = nn.Module()
    model.lora_A, model.lora_B = (
        nn.ModuleDict({"default": nn.Linear(3, 2)}),
        nn.ModuleDict({"default": nn.Linear(2, 3)}),
    )
    layer = nn.ModuleDict({"layer": model})
    config = OptimConfig(name="sgd", learning_rate=0.5, weight_decay=0.3, lora_b_lr_ratio=16.0)
    optimizer, trained = build_optimizer(layer.named_parameters(), config)
    assert [id(p) for p in trained.values()] == [id(p) for group in optimizer.param_groups for p in group["params"]]
    for rate in (0.5, 0.125):
        set_learning_rate(optimizer, rate)
        rates = {id(p): group["lr"] for group in optimizer.param_groups for p in group["params"]}
        assert {name: rates[id(p)] for name, p in trained.items()} == {
            name: 16 * rate if "lora_B" in name else rate for name in trained
        }
    assert sorted(group["weight_decay"] for group in optimizer.param_groups) == [0, 0, 0.3, 0.3]


def test_names_are_in_the_order_of_the_optimizers_state():
    _, optimizer, trained = small_and_optimizer()
    in_groups = [parameter for group in optimizer.param_groups for parameter in group["params"]]
    assert [id(parameter) for parameter in trained.values()] == [id(parameter) for parameter in in_groups]
    numbers = [number for group in optimizer.state_dict()["param_groups"] for number in group["params"]]
    assert numbers == list(range(len(trained)))


@pytest.mark.parametrize("name", ["adamw", "adam", "sgd"])
def test_state_survives_a_checkpoint(name):
    model, optimizer, trained = small_and_optimizer(name=name, weight_decay=0.1)
    walk(model, optimizer, 0, 3)
    saved = optimizer_tensors(optimizer, list(trained))
    weights = {key: value.clone() for key, value in model.state_dict().items()}
    walk(model, optimizer, 3, 6)

    other, fresh, names = small_and_optimizer(name=name, weight_decay=0.1)
    other.load_state_dict(weights)
    load_optimizer_tensors(fresh, list(names), saved)
    walk(other, fresh, 3, 6)
    assert all(torch.equal(a, b) for a, b in zip(model.state_dict().values(), other.state_dict().values(), strict=True))
    if name != "sgd":
        assert set(saved) == {f"{n}/{entry}" for n in trained for entry in ("step", "exp_avg", "exp_avg_sq")}
        without, bare, _ = small_and_optimizer(name=name, weight_decay=0.1)
        without.load_state_dict(weights)
        walk(without, bare, 3, 6)
        assert not torch.equal(without.first.weight, model.first.weight), "the state was of no use: nothing is tested"


def test_saved_state_is_a_copy():
    model, optimizer, trained = small_and_optimizer()
    walk(model, optimizer, 0, 1)
    saved = optimizer_tensors(optimizer, list(trained))
    before = saved["first.weight/exp_avg"].clone()
    walk(model, optimizer, 1, 2)
    assert torch.equal(saved["first.weight/exp_avg"], before)


def test_state_of_an_unknown_parameter_is_refused():
    _, optimizer, trained = small_and_optimizer()
    with pytest.raises(DamagedCheckpoint, match="unknown parameter nowhere"):
        load_optimizer_tensors(optimizer, list(trained), {"nowhere/step": torch.zeros(())})


def test_the_options_name_every_entry():
    options = get_type_hints(OptimConfig)
    assert get_args(options["name"]) == tuple(optim.OPTIMIZERS)
    assert get_args(options["schedule"]) == tuple(optim.SCHEDULES)
