"""Methods of PEFT that are refused: each reason is true."""

import dataclasses

import pytest
import torch
from peft import PEFT_TYPE_TO_CONFIG_MAPPING, PeftModel, PeftType, get_peft_model
from transformers import AutoModelForSequenceClassification

from tests.unit.model.conftest import NAMES
from tests.unit.model.test_build import ATTENTION, logits, save, train
from trainer.config.schema import ModelConfig, PeftConfig
from trainer.dropout.sites import install
from trainer.errors import UserError
from trainer.model.backbone import find_backbone
from trainer.model.build import check_fit
from trainer.model.peft_options import NO_BASIS, NO_HEAD, NO_KEYS, NO_TASK, PEFT_TYPES, REFUSED

VIRTUAL = {"num_virtual_tokens": 3}


@pytest.fixture(scope="module")
def backbone(tiny_backbone):
    return find_backbone(ModelConfig(name=str(tiny_backbone), dropout=0.1), NAMES)


def named(reason):
    return [name for name, found in REFUSED.items() if found == reason]


def config_of(name, **options):
    return PEFT_TYPE_TO_CONFIG_MAPPING[PeftType(name)](task_type="SEQ_CLS", **options)


def plain_model(backbone):
    return AutoModelForSequenceClassification.from_pretrained(backbone.path, config=backbone.config)


def wrapped(backbone, name, seed=0, **options):
    """The backbone with the adapter, by PEFT alone."""
    torch.manual_seed(seed)
    model = AutoModelForSequenceClassification.from_config(backbone.config)
    return get_peft_model(model, config_of(name, **options))


def test_each_method_of_peft_is_supported_or_refused():
    assert {kind.value for kind in PEFT_TYPE_TO_CONFIG_MAPPING} - {*PEFT_TYPES} == {*REFUSED}


@pytest.mark.parametrize("name", REFUSED)
def test_a_refusal_names_the_method_the_reason_and_what_to_use(backbone, name):
    with pytest.raises(UserError, match=f"peft.peft_type: '{name}' is not supported: .*; supported: LORA") as error:
        check_fit(backbone, PeftConfig(peft_type=name), 32, pairs=False)
    assert REFUSED[name] in str(error.value)


@pytest.mark.parametrize("name", named(NO_HEAD))
def test_no_head(name):
    fields = {field.name for field in dataclasses.fields(PEFT_TYPE_TO_CONFIG_MAPPING[PeftType(name)])}
    assert "modules_to_save" not in fields


@pytest.mark.parametrize("name", [*named(NO_KEYS), "PVERA"])
def test_dropout_or_noise_cannot_be_keyed(backbone, name):
    options = {"r": 4, "target_modules": ATTENTION} if name == "PVERA" else VIRTUAL
    keys = install(wrapped(backbone, name, **options), 0)
    assert keys.unreached
    lora = install(wrapped(backbone, "LORA", r=4, target_modules=ATTENTION, lora_dropout=0.1), 0)
    assert not lora.unreached


@pytest.mark.parametrize("name", named(NO_TASK))
def test_no_task(backbone, batch, name):
    options = {"target_modules": ATTENTION} if name == "POLY" else VIRTUAL | {"num_tasks": 2}
    with pytest.raises(ValueError, match="task_ids"):
        wrapped(backbone, name, **options)(**batch)


def with_other_signs(vectors):
    """Every second column with the other sign: as right a basis."""
    return vectors * torch.ones(vectors.shape[-1]).index_fill(0, torch.arange(1, vectors.shape[-1], 2), -1)


@pytest.mark.parametrize("name", [*named(NO_BASIS), "OSF", "TINYLORA"])
def test_no_basis(backbone, batch, name, tmp_path, monkeypatch):
    """Loaded where the decomposition has other signs, a refused method computes another function."""
    svd, qr, eigh = torch.linalg.svd, torch.linalg.qr, torch.linalg.eigh

    def other_svd(matrix, full_matrices=True):
        u, s, vh = svd(matrix, full_matrices=False)
        return torch.return_types.linalg_svd((with_other_signs(u), s, with_other_signs(vh.mT).mT))

    def other_qr(matrix):
        q, r = qr(matrix)
        return torch.return_types.linalg_qr((with_other_signs(q), with_other_signs(r.mT).mT))

    def other_eigh(matrix):
        values, vectors = eigh(matrix)
        return torch.return_types.linalg_eigh((values, with_other_signs(vectors)))

    def load():
        return PeftModel.from_pretrained(plain_model(backbone), str(folder)).eval()

    options = {"progressbar": False} if name == "FROD" else {}
    model = get_peft_model(plain_model(backbone), config_of(name, target_modules=ATTENTION, **options))
    train(model, batch, steps=5)
    folder = save(model, tmp_path / "adapter")
    assert (logits(load(), batch) - logits(model, batch)).abs().max() < 1e-6
    monkeypatch.setattr(torch.linalg, "svd", other_svd)
    monkeypatch.setattr(torch.linalg, "qr", other_qr)
    monkeypatch.setattr(torch.linalg, "eigh", other_eigh)
    difference = (logits(load(), batch) - logits(model, batch)).abs().max()
    assert (difference > 1e-3) == (name in REFUSED), difference


def test_shapes_that_depend_on_the_weights(backbone):
    shapes = []
    for seed in (0, 1):
        model = wrapped(backbone, "ADAMSS", seed=seed, target_modules=ATTENTION)
        shapes.append([parameter.shape for parameter in model.parameters() if parameter.requires_grad])
    assert shapes[0] != shapes[1]


def test_examples_that_change_one_another(backbone, batch):
    model = train(wrapped(backbone, "LILY", r=4, target_modules=ATTENTION), batch, steps=5)
    alone = torch.cat([logits(model, {name: tensor[i : i + 1] for name, tensor in batch.items()}) for i in range(6)])
    assert (alone - logits(model, batch)).abs().max() > 1e-5


def test_causal_models_only():
    with pytest.raises(ValueError, match="CAUSAL_LM"):
        config_of("CPT")


def test_an_object_in_place_of_the_hidden_states(backbone, batch):
    with pytest.raises(AttributeError, match="ShadowCarrier"):
        wrapped(backbone, "SHADOW", target_modules=ATTENTION)(**batch)
