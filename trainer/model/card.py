"""The model card: README.md of an adapter, with the lines that load it without Isotrain."""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Any

import yaml

from trainer.config.schema import Config, DataConfig, chosen_overlap, resolve
from trainer.model.backbone import Backbone


def model_card(
    name: str,
    config: Config,
    backbone: Backbone,
    label_names: list[str],
    summary: Mapping[str, Any],
    constants: Mapping[str, Any],
) -> str:
    """Text of README.md, from the run's summary and the constants of its task."""
    front = {"library_name": "peft", "pipeline_tag": "text-classification"}
    if backbone.commit:  # the hub accepts no local folder as a base model
        front["base_model"] = backbone.path
    scores = ""
    for split in [split for split in ("validation", "test") if split in summary]:
        numbers = [f"{name} {value:.4f}" for name, value in summary[split].items() if name != "num_examples"]
        scores += f"- {split}, {summary[split]['num_examples']} examples: {', '.join(numbers)}\n"
    names = "\n".join(f"    {i}: {json.dumps(label, ensure_ascii=False)}" for i, label in enumerate(label_names))
    heading = "Classes by number (also in labels.json)"
    if config.task.type != "single_label":
        heading = "Labels by number (also in labels.json)"
    if constants:
        names += "\n\nNumbers that turn the scores below into predictions (also in task.json):\n\n    "
        names += json.dumps(constants, ensure_ascii=False)
    return f"""---
{yaml.safe_dump(front, sort_keys=False)}---

# {name}

A {config.peft.peft_type} adapter and classification head, trained by Isotrain: {summary["trainable_parameters"]:,}
trained parameters, {summary["steps"]} steps, best of step {summary["best_step"]}. `backbone/identity.json` names the
backbone, with its commit on the hub and the SHA-256 of its files.

{scores}
{heading}:

{names}

These lines classify a text:

{loading_lines(backbone, pairs=bool(resolve(config.data.train or "", config.data).text_pair_columns))}\
{window_lines(config.data)}"""


def loading_lines(backbone: Backbone, pairs: bool) -> str:
    """Python lines that load the adapter and classify a text, or a pair of texts."""
    name, imports = backbone.requested.name, ""
    path, comment = repr(backbone.path), "" if backbone.commit else "  # the backbone's folder"
    if name.startswith("package:"):
        package, _, folder = name.removeprefix("package:").partition("/")
        imports = "from importlib.util import find_spec\n\n"
        path, comment = f"find_spec({package!r}).submodule_search_locations[0] + {'/' + folder!r}", ""
    revision = f"revision={backbone.commit!r}, " if backbone.commit else ""
    text = '{"text": "A text.", "text_pair": "Its pair."}' if pairs else '"A text."'
    return f"""```python
{imports}from peft import PeftModel
from transformers import AutoConfig, AutoModelForSequenceClassification, AutoTokenizer, pipeline

adapter = "adapter"  # this folder
backbone = {path}{comment}

tokenizer = AutoTokenizer.from_pretrained(adapter)
config = AutoConfig.from_pretrained(adapter, subfolder="backbone")
model = AutoModelForSequenceClassification.from_pretrained(
    backbone, {revision}config=config, dtype="float32", ignore_mismatched_sizes=True
)
model = PeftModel.from_pretrained(model, adapter).eval()
classify = pipeline("text-classification", model=model, tokenizer=tokenizer)
print(classify([{text}], truncation=True, top_k=None))
```
"""


def window_lines(data: DataConfig) -> str:
    """Python lines that classify a long text as the run did, after `loading_lines`; "" if it cut them."""
    overlap = chosen_overlap(data)
    if overlap is None:
        return ""
    return f"""
They read the first {data.max_length} tokens of a text. These average the logits of all its windows, as the run did:

```python
tokens = tokenizer(
    "A long text.", truncation=True, stride={overlap}, return_overflowing_tokens=True, padding=True, return_tensors="pt"
)
tokens.pop("overflow_to_sample_mapping")
logits = model(**tokens.to(model.device)).logits.mean(dim=0, keepdim=True).detach()
print(classify.postprocess({{"logits": logits}}, top_k=None))
```
"""
