"""AdaLoRA's budget: as PEFT's own loop updates it, and refused where it cannot work."""

from types import SimpleNamespace

import pytest
import torch
from peft import AdaLoraConfig, get_peft_model
from transformers import AutoModelForSequenceClassification

from trainer.errors import UserError
from trainer.training.adalora import add_orthogonality, set_total_steps, update_ranks

SCHEDULE = {"init_r": 4, "target_r": 2, "tinit": 2, "tfinal": 3, "deltaT": 2}
STEPS = 10


@pytest.fixture
def build(tiny_backbone):
    def build(total_step):
        torch.manual_seed(0)
        plain = AutoModelForSequenceClassification.from_pretrained(tiny_backbone, num_labels=4)
        config = AdaLoraConfig(task_type="SEQ_CLS", target_modules=["query"], total_step=total_step, **SCHEDULE)
        model = get_peft_model(plain, config).eval()
        trained = {name: parameter for name, parameter in model.named_parameters() if parameter.requires_grad}
        return model, trained, torch.optim.AdamW(trained.values(), lr=0.02)

    return build


def batch(step):
    ids = torch.randint(5, 40, (6, 12), generator=torch.Generator().manual_seed(step))
    return {"input_ids": ids, "attention_mask": torch.ones_like(ids), "labels": torch.arange(6) % 4}


def test_equal_to_pefts_own_loop(build):
    theirs, expected, optimizer = build(STEPS)
    for step in range(STEPS):
        theirs(**batch(step)).loss.backward()  # with the regularizer
        optimizer.step()
        theirs.base_model.update_and_allocate(step + 1)
        optimizer.zero_grad()

    model, trained, optimizer = build(9)
    set_total_steps(model, STEPS)
    learner = SimpleNamespace(
        model=model,
        parameters=trained,
        accelerator=SimpleNamespace(is_main_process=True, backward=lambda loss: loss.backward()),
        optimizer=SimpleNamespace(optimizer=optimizer),
    )
    for step in range(STEPS):
        inputs = batch(step)
        labels = inputs.pop("labels")
        torch.nn.functional.cross_entropy(model(**inputs).logits, labels).backward()
        add_orthogonality(learner)
        optimizer.step()
        update_ranks(learner, step, is_finite=True)
        optimizer.zero_grad()
    assert max((expected[name] - trained[name]).abs().max() for name in trained) < 1e-6
    values = torch.cat([parameter for name, parameter in trained.items() if ".lora_E." in name])
    assert values.count_nonzero() == 2 * 2, "target_r for each of two layers"


def test_a_run_without_room_for_its_phases_is_refused(build):
    with pytest.raises(UserError, match=r"peft\.tinit 2 and peft\.tfinal 3: the 5 steps of the run"):
        set_total_steps(build(9)[0], 5)


@pytest.mark.parametrize("skipped", [0, 4, STEPS - SCHEDULE["tfinal"] - 1])
def test_a_gradient_that_overflows_leaves_the_importance_and_the_budget_is_met(build, skipped):
    model, trained, optimizer = build(9)
    set_total_steps(model, STEPS)
    learner = SimpleNamespace(model=model, parameters=trained, optimizer=SimpleNamespace(optimizer=optimizer))
    for step in range(STEPS):
        inputs = batch(step)
        labels = inputs.pop("labels")
        torch.nn.functional.cross_entropy(model(**inputs).logits, labels).backward()
        if step == skipped:  # as fp16's scaler, which then takes no optimizer step
            for parameter in trained.values():
                parameter.grad.fill_(float("inf"))
        else:
            optimizer.step()
        update_ranks(learner, step, is_finite=step != skipped)
        optimizer.zero_grad()
    assert all(value.isfinite().all() for state in optimizer.state.values() for value in state.values())
    values = torch.cat([parameter for name, parameter in trained.items() if ".lora_E." in name])
    assert values.count_nonzero() == 2 * 2
