"""A tiny backbone and a batch for the tests of models."""

import pytest
import torch

from trainer.config.schema import ModelConfig
from trainer.model.backbone import find_backbone

NAMES = ["World", "Sports", "Business", "Sci/Tech"]


@pytest.fixture(scope="module")
def backbone(tiny_backbone):
    return find_backbone(ModelConfig(name=str(tiny_backbone)), NAMES)


@pytest.fixture(scope="module")
def batch():
    ids = torch.randint(5, 40, (6, 12), generator=torch.Generator().manual_seed(0))
    return {"input_ids": ids, "attention_mask": torch.ones_like(ids)}
