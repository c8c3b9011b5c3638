"""The head: taken over for other classes by name, row by row; and scaled to the numbers of a regression."""

import copy

import pytest
import torch
from transformers import AutoModelForSequenceClassification, BertConfig, GPT2Config, RobertaConfig

from tests.families import tiny
from trainer.config.schema import PeftConfig
from trainer.errors import UserError
from trainer.model.adapter import SavedAdapter, find_class_tensors, scale_head, take_over, unwrap_head
from trainer.model.backbone import Backbone

PREFIX = "base_model.model."
# 4 classes, and layers of 4: a shape alone does not tell which tensors have a row for each class
CONFIGS = {
    "roberta": RobertaConfig(vocab_size=9, hidden_size=4, num_hidden_layers=1, num_attention_heads=2, num_labels=4),
    "bert": BertConfig(vocab_size=9, hidden_size=4, num_hidden_layers=1, num_attention_heads=2, num_labels=4),
    "gpt2": GPT2Config(vocab_size=9, n_embd=4, n_layer=1, n_head=2, num_labels=4),
}


@pytest.mark.parametrize(
    ("family", "names"),
    [
        ("roberta", {"classifier.out_proj.weight", "classifier.out_proj.bias"}),
        ("bert", {"classifier.weight", "classifier.bias"}),
        ("gpt2", {"score.weight"}),
    ],
)
def test_the_tensors_with_a_row_for_each_class(family, names):
    backbone = Backbone("none", None, copy.deepcopy(CONFIGS[family]), None, "")
    settings = PeftConfig(options={"r": 4, "target_modules": "all-linear"})
    assert find_class_tensors(backbone, settings) == {PREFIX + name for name in names}
    assert backbone.config.num_labels == 4
    assert AutoModelForSequenceClassification.from_config(backbone.config).num_labels == 4


@pytest.mark.parametrize("names", [["a", "b", "c"], ["c", "b"], ["x", "b", "y", "z"], ["x", "y"], ["c", "a", "b"]])
def test_rows_are_taken_over_by_name(names):
    old = {"dense": torch.arange(9.0).view(3, 3), "out.weight": torch.arange(9.0).view(3, 3), "out.bias": torch.ones(3)}
    start = SavedAdapter(None, old, ["a", "b", "c"], "single_label_classification", None, {})
    new = {"dense": torch.zeros(3, 3), "out.weight": -torch.ones(len(names), 3), "out.bias": -torch.ones(len(names))}
    found = take_over(start, new, names, {"out.weight", "out.bias"})
    assert torch.equal(found["dense"], old["dense"])
    for row, name in enumerate(names):
        for key in ("out.weight", "out.bias"):
            expected = old[key]["abc".index(name)] if name in "abc" else new[key][row]
            assert torch.equal(found[key][row], expected)
    assert (new["out.weight"] == -1).all() and (old["out.weight"] == torch.arange(9.0).view(3, 3)).all()
    assert found.keys() == old.keys()


@pytest.mark.parametrize("family", ["roberta", "bert", "deberta-v2", "modernbert", "electra", "mpnet", "xlnet"])
def test_a_scaled_head_gives_the_numbers_of_a_regression(family):
    model = tiny(family).merge_and_unload().eval()
    unwrap_head(model)
    inputs = {"input_ids": torch.arange(6, 20)[None], "attention_mask": torch.ones(1, 14, dtype=torch.long)}
    factor, shift = torch.tensor([3.0, 100.0, 1e-3]).double(), torch.tensor([-5.0, 1000.0, 0.0]).double()
    with torch.no_grad():
        logits = model(**inputs).logits.double()
        scale_head(model, factor, shift)
        found = model(**inputs).logits.double()
    assert ((found - shift) / factor - logits).abs().max() < 1e-5 * logits.abs().max()


def test_a_head_without_a_bias_cannot_hold_a_mean():
    with pytest.raises(UserError, match=r"has no bias.*predict\.py"):
        scale_head(tiny("llama").merge_and_unload(), torch.ones(3), torch.ones(3))
