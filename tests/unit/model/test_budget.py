"""The rank that fits a budget: the largest one, for each method that has ranks; and the size of an adapter's file."""

import re

import peft
import pytest
import safetensors.torch

from tests.harness.commands import changed
from trainer.config.loading import parse_config
from trainer.config.schema import (
    DEFAULT_ALPHA,
    DEFAULT_RANK,
    RANKED_METHODS,
    PeftConfig,
    find_differences,
    with_rank,
)
from trainer.errors import UserError
from trainer.model.adapter import adapter_tensors
from trainer.model.budget import count_adapter_bytes, count_trained, fit_budget
from trainer.model.build import build_model, build_without_weights

TARGETS = {"target_modules": ["query", "value", "dense"]}
OPTIONS = ["--data.train", "x.csv", "--peft.fit_budget", "true", "--peft.max_trainable_parameters", "9000"]


def fitted(peft_type, budget, **options):
    return PeftConfig(peft_type, max_trainable_parameters=budget, fit_budget=True, options=options)


@pytest.mark.parametrize(
    ("peft_type", "options"),
    [*((name, {}) for name in RANKED_METHODS), ("LORA", {"use_dora": True}), ("LORA", {"bias": "lora_only"})],
    ids=str,
)
def test_the_rank_is_the_largest_that_fits(backbone, peft_type, options):
    settings = fitted(peft_type, 5000, **TARGETS, **options)
    chosen, lines = fit_budget(backbone, settings)
    rank, step = chosen.options["r"], 2 if peft_type == "HRA" else 1
    fits = [count_trained(build_without_weights(backbone, chosen)) <= 5000]
    higher = PeftConfig(peft_type, options={**chosen.options, "r": rank + step})
    fits.append(count_trained(build_without_weights(backbone, higher)) <= 5000)
    assert fits == [True, rank >= 32]
    rows = [re.findall(r"[\d,]+", line) for line in lines if line.startswith((">", " ")) and "bytes" not in line]
    assert [row[0] for row in rows if f"> {int(row[0]):>6}" in "\n".join(lines)] == [str(rank)]
    assert 3 <= len(rows) <= 5
    for number, parameters, num_bytes in rows[:2]:
        row = PeftConfig(peft_type, options={**chosen.options, "r": int(number)})
        model = build_model(backbone, row, 42)[0]
        assert count_trained(model) == int(parameters.replace(",", ""))
        file = safetensors.torch.save(adapter_tensors(model), {"format": "pt"})
        assert len(file) == int(num_bytes.replace(",", "")) == count_adapter_bytes(model, settings)


@pytest.mark.parametrize(("peft_type", "options"), [("SHIRA", {"r": 2}), ("SUPERTUNING", {})])
def test_the_size_of_a_file_with_indices(backbone, peft_type, options):
    settings = PeftConfig(peft_type, options=TARGETS | options)
    file = safetensors.torch.save(adapter_tensors(build_model(backbone, settings, 42)[0]), {"format": "pt"})
    assert count_adapter_bytes(build_without_weights(backbone, settings), settings) == len(file)


def test_no_rank_above_the_smaller_side_of_every_target(backbone):
    chosen, _ = fit_budget(backbone, fitted("LORA", 10**6, target_modules=["query"]))
    assert chosen.options["r"] == 32


@pytest.mark.parametrize(
    ("options", "alpha"),
    [({}, 13), ({"lora_alpha": 16}, 26), ({"r": 4, "lora_alpha": 2}, 6), ({"lora_alpha": 5, "use_rslora": True}, 5)],
    ids=str,
)
def test_the_scale_of_the_adapter_stays(options, alpha):
    assert with_rank(PeftConfig(options=options), 13).options == {**options, "r": 13, "lora_alpha": alpha}


def test_the_defaults_are_those_of_peft():
    for name, alpha in RANKED_METHODS.items():
        config = peft.PEFT_TYPE_TO_CONFIG_MAPPING[peft.PeftType(name)]()
        if alpha:
            assert (config.r, getattr(config, alpha)) == (DEFAULT_RANK, DEFAULT_ALPHA)


def test_a_budget_that_nothing_fits_is_refused(backbone):
    with pytest.raises(UserError, match=r"is below the .* that rank 1 trains; raise it") as caught:
        fit_budget(backbone, fitted("LORA", 1200, **TARGETS))
    assert len(str(caught.value).splitlines()) == 1


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"peft__max_trainable_parameters": None}, "peft.fit_budget needs a budget; add --peft.max_trainable_param"),
        ({"peft__peft_type": "oft"}, "peft.fit_budget: OFT has no rank to choose, .*; supported: LORA, LOHA"),
        ({"peft__peft_type": "IA3"}, "peft.fit_budget: IA3 has no rank"),
        ({"peft__r": "many"}, "peft.r: 'many' must be a number above 0"),
        ({"peft__r": 0}, "peft.r: 0 must be"),
        ({"peft__lora_alpha": "[1]"}, r"peft.lora_alpha: \[1\] must be"),
        ({"peft__rank_pattern": "{query: 2}"}, "peft.rank_pattern: peft.fit_budget chooses one rank"),
        ({"peft__alpha_pattern": "{query: 2}"}, "peft.alpha_pattern: peft.fit_budget chooses one rank"),
    ],
    ids=str,
)
def test_options_that_do_not_go_with_a_budget_are_refused(changes, message):
    with pytest.raises(UserError, match=message) as caught:
        parse_config(changed(OPTIONS, **changes))
    assert len(str(caught.value).splitlines()) == 1


@pytest.mark.parametrize(
    ("changes", "differing"),
    [
        ({}, []),
        ({"peft__r": 4, "peft__lora_alpha": 8}, []),  # the ratio is the same
        ({"peft__lora_alpha": 32}, ["peft.lora_alpha (there 26, now 52)"]),
        ({"peft__max_trainable_parameters": 9001}, ["peft.max_trainable_parameters (there 9000, now 9001)"]),
        ({"peft__fit_budget": "false"}, ["peft.fit_budget (there True, now False)"]),
    ],
    ids=str,
)
def test_a_run_with_the_rank_it_chose_is_the_same_run(changes, differing):
    recorded = parse_config(changed(OPTIONS, peft__r=13, peft__lora_alpha=26))
    now = parse_config(changed(changed(OPTIONS, peft__r=8, peft__lora_alpha=16), **changes))
    found = find_differences(recorded, now, by_name=False)
    assert found[: len(differing)] == differing and bool(found) == bool(differing)
