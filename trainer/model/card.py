"""The model card: README.md of an adapter, with the lines that load it without Isotrain."""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Any

import yaml

from trainer.config.labels import plural
from trainer.config.schema import NO_ADAPTER, Config, DataConfig, chosen_overlap, resolve
from trainer.model.backbone import Backbone
from trainer.model.quantization import modules_kept_whole
from trainer.tasks import make_task
from trainer.tasks.task import Constants, Task, format_score


def model_card(
    name: str,
    config: Config,
    backbone: Backbone,
    label_names: list[str],
    summary: Mapping[str, Any],
    constants: Constants,
) -> str:
    """Text of README.md, from the run's summary and the constants of its task."""
    is_plain = config.peft.peft_type == NO_ADAPTER
    front = {"library_name": "transformers" if is_plain else "peft", "pipeline_tag": "text-classification"}
    if backbone.commit:  # the hub accepts no local folder as a base model
        front["base_model"] = backbone.path
    scores = ""
    for split in [split for split in ("validation", "test") if split in summary]:
        numbers = [f"{name} {format_score(v)}" for name, v in summary[split].items() if name != "num_examples"]
        scores += f"- {split}, {summary[split]['num_examples']} examples: {', '.join(numbers)}\n"
    task = make_task(config.task, constants)
    has_pairs = bool(resolve(config.data.train or "", config.data).text_pair_columns)
    names = "\n".join(f"    {i}: {json.dumps(label, ensure_ascii=False)}" for i, label in enumerate(label_names))
    if constants:
        names += "\n\nNumbers that turn the scores below into predictions (also in task.json):\n\n    "
        names += json.dumps(constants, ensure_ascii=False)
    return f"""---
{yaml.safe_dump(front, sort_keys=False)}---

# {name}

{_describe(config)}, trained by Isotrain: {summary["trainable_parameters"]:,}
trained parameters, {summary["steps"]} steps, best of step {summary["best_step"]}. `backbone/identity.json` names the
backbone, with its commit on the hub and the SHA-256 of its files.

{scores}
{plural(task.noun).capitalize()} by number (also in labels.json):

{names}

These lines {"classify" if task.affine is None else "predict the numbers of"} a text:

{loading_lines(backbone, task, label_names, has_pairs, is_plain)}{window_lines(config.data, task, label_names)}"""


def _describe(config: Config) -> str:
    """What the folder holds, as the beginning of a sentence."""
    if config.peft.peft_type == NO_ADAPTER:
        return "The biases and classification head" if config.peft.train == "bias" else "All weights of a classifier"
    return f"A {config.peft.peft_type} adapter and classification head"


def loading_lines(
    backbone: Backbone, task: Task, label_names: list[str], has_pairs: bool, is_plain: bool = False
) -> str:
    """Python lines that load the adapter and classify a text, or a pair of texts; or that predict its numbers."""
    name, imports = backbone.requested.name, ""
    path, comment = repr(backbone.path), "" if backbone.commit else "  # the backbone's folder"
    if name.startswith("package:"):
        package, _, folder = name.removeprefix("package:").partition("/")
        imports = "from importlib.util import find_spec\n\n"
        path, comment = f"find_spec({package!r}).submodule_search_locations[0] + {'/' + folder!r}", ""
    quantization = ""
    if backbone.requested.quantization is not None:
        imports += "from transformers import BitsAndBytesConfig\n"
        skipped = modules_kept_whole(backbone.config)
        options = f'load_in_4bit=True, bnb_4bit_quant_type="nf4", llm_int8_skip_modules={skipped}'
        quantization = f"\n    quantization_config=BitsAndBytesConfig({options}),"
    revision = f"revision={backbone.commit!r}, " if backbone.commit else ""
    imported = "from peft import PeftModel"
    loaded = "model = PeftModel.from_pretrained(model, adapter).eval()"
    if is_plain:
        imported = "from safetensors.torch import load_file"
        loaded = 'model.load_state_dict(load_file(f"{adapter}/adapter_model.safetensors"), strict=False)\nmodel.eval()'
    text = '{"text": "A text.", "text_pair": "Its pair."}' if has_pairs else '"A text."'
    return f"""```python
{imports}{imported}
from transformers import AutoConfig, AutoModelForSequenceClassification, AutoTokenizer, pipeline

adapter = "adapter"  # this folder
backbone = {path}{comment}

tokenizer = AutoTokenizer.from_pretrained(adapter)
config = AutoConfig.from_pretrained(adapter, subfolder="backbone")
model = AutoModelForSequenceClassification.from_pretrained(
    backbone, {revision}config=config, dtype="float32", ignore_mismatched_sizes=True,{quantization}
)
{loaded}
classify = pipeline("text-classification", model=model, tokenizer=tokenizer)
{show_lines(f"classify([{text}], truncation=True, top_k=None)", task, label_names)}
```
"""


def show_lines(answers: str, task: Task, label_names: list[str]) -> str:
    """Python lines that print the answers of a pipeline; those of a regression in the targets' own units."""
    if task.affine is None:
        return f"print({answers})"
    factor, shift = (dict(zip(label_names, numbers.tolist(), strict=True)) for numbers in task.affine)
    return f"""factor = {factor!r}
shift = {shift!r}
for answer in {answers}:
    print({{one["label"]: one["score"] * factor[one["label"]] + shift[one["label"]] for one in answer}})"""


def window_lines(data: DataConfig, task: Task, label_names: list[str]) -> str:
    """Python lines that classify a long text as the run did, after `loading_lines`; "" if it cut them."""
    overlap = chosen_overlap(data)
    if overlap is None:
        return ""
    answers = 'classify.postprocess({"logits": logits}, top_k=None)'
    answers = answers if task.affine is None else f"[{answers}]"
    return f"""
They read the first {data.max_length} tokens of a text. These average the logits of all its windows, as the run did:

```python
tokens = tokenizer(
    "A long text.", truncation=True, stride={overlap}, return_overflowing_tokens=True, padding=True, return_tensors="pt"
)
tokens.pop("overflow_to_sample_mapping")
logits = model(**tokens.to(model.device)).logits.mean(dim=0, keepdim=True).detach()
{show_lines(answers, task, label_names)}
```
"""
