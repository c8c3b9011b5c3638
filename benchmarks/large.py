"""What a large backbone costs: host memory while it is loaded; memory and time of a step with gradient checkpointing.

    python -m benchmarks.large               # from the repository's root; Linux only

The weights are random. Each case runs in a fresh process, whose peak of resident memory is counted from the moment
before the case. Mapped pages of the weights' files count too. Prints a line for each case; 5 minutes.
"""

import argparse
import json
import multiprocessing
import re
import tempfile
import time
from pathlib import Path

MIB = 2**20
SHAPE = {"hidden_size": 1024, "num_hidden_layers": 16, "vocab_size": 32000}
LENGTHS = [256] * 8
"""tokens of the examples of a step"""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.parse_args()
    context = multiprocessing.get_context("spawn")
    with tempfile.TemporaryDirectory() as place:
        cases = []
        for stored, num_shards in (("bfloat16", 4), ("bfloat16", 1), ("float32", 4)):
            folder = Path(place) / f"{stored}-{num_shards}"
            save_llama(folder, stored, num_shards, **SHAPE)
            cases += [(f"load {stored}, {num_shards} files", loading, (folder, kind)) for kind in ("bf16", "no")]
        for family in ("llama", "roberta"):
            cases += [(f"step {family}", step, (family, is_on)) for is_on in (False, True)]
        for name, case, arguments in cases:
            with context.Pool(1) as pool:
                print(f"{name}: {json.dumps(pool.apply(case, arguments))}", flush=True)


def save_llama(folder: Path, stored: str, num_shards: int, **shape: int) -> None:
    """Writes a random Llama in this type, as a hub download would look, with the tests' tokenizer."""
    import safetensors.torch
    import torch
    from transformers import LlamaConfig, LlamaModel

    from tests.harness.data import make_tokenizer

    sizes = {"num_attention_heads": 8, "num_key_value_heads": 2, "max_position_embeddings": 512}
    special = {"pad_token_id": 1, "bos_token_id": 0, "eos_token_id": 2}
    config = LlamaConfig(**shape, **sizes, **special, intermediate_size=4 * shape["hidden_size"])
    with torch.device("meta"):
        tensors = LlamaModel(config).state_dict()
    config.save_pretrained(folder)
    make_tokenizer().save_pretrained(folder)
    generator, dtype, where = torch.Generator().manual_seed(0), getattr(torch, stored), {}
    for number in range(num_shards):
        file = f"model-{number + 1:05d}-of-{num_shards:05d}.safetensors" if num_shards > 1 else "model.safetensors"
        shapes = {name: tensor.shape for name, tensor in list(tensors.items())[number::num_shards]}
        shard = {name: (0.02 * torch.randn(shape, generator=generator)).to(dtype) for name, shape in shapes.items()}
        safetensors.torch.save_file(shard, folder / file, {"format": "pt"})
        where |= dict.fromkeys(shard, file)
    if num_shards > 1:
        index = {"metadata": {}, "weight_map": where}
        (folder / "model.safetensors.index.json").write_text(json.dumps(index))


def resident(key: str) -> int:
    """Bytes of resident memory: VmRSS = now, VmHWM = at most so far."""
    found = re.search(rf"{key}:\s+(\d+) kB", Path("/proc/self/status").read_text())
    assert found
    return int(found[1]) * 1024


def loading(folder: Path, precision: str) -> dict[str, float]:
    """Loads a backbone as a run does; its size in the types that it keeps, and the peak while it was loaded.

    A tiny one is loaded before: that maps the libraries' code, whose pages are not the weights'.
    """
    from trainer.config.schema import ModelConfig, PeftConfig
    from trainer.model.backbone import find_backbone, silence_libraries
    from trainer.model.build import COMPUTE_TYPES, build_model, set_precision

    silence_libraries()
    with tempfile.TemporaryDirectory() as tiny:
        save_llama(Path(tiny), "bfloat16", 1, hidden_size=32, num_hidden_layers=1, vocab_size=60)
        for place in (tiny, folder):
            backbone = find_backbone(ModelConfig(name=str(place)), ["one", "other"])
            before = resident("VmRSS")
            Path("/proc/self/clear_refs").write_text("5")  # resets the peak
            model, _ = build_model(backbone, PeftConfig(options={"r": 8, "target_modules": ["q_proj", "v_proj"]}), 0)
            set_precision(model, COMPUTE_TYPES[precision])
    peak = resident("VmHWM") - before
    kept = sum(parameter.nbytes for parameter in model.parameters())
    return {"precision": precision, "kept_mib": kept // MIB, "peak_mib": peak // MIB, "ratio": round(peak / kept, 2)}


def step(family: str, checkpointing: bool) -> dict[str, float]:
    """Forward and backward in bf16; the memory that they add at most, and the seconds of the second one."""
    import numpy as np
    import torch
    from peft import LoraConfig, TaskType, get_peft_model
    from transformers import AutoModelForSequenceClassification, LlamaConfig, RobertaConfig

    from trainer.compat import checkpoint_layers
    from trainer.dropout.sites import install
    from trainer.model.build import set_precision
    from trainer.packed.forward import Padding, build_forward

    sizes = {"hidden_size": 768, "num_hidden_layers": 12, "num_attention_heads": 12, "intermediate_size": 3072}
    sizes |= {"vocab_size": 1000, "pad_token_id": 1, "max_position_embeddings": 514}
    config = {"llama": LlamaConfig, "roberta": RobertaConfig}[family](**sizes)
    lora = LoraConfig(task_type=TaskType.SEQ_CLS, r=8, lora_dropout=0.1, target_modules="all-linear")
    model = get_peft_model(AutoModelForSequenceClassification.from_config(config), lora)
    keys = install(model.train(), seed=0)
    set_precision(model, torch.bfloat16)
    checkpoint = keys.checkpoint if checkpointing else None
    if checkpoint is not None:
        checkpoint_layers(model.get_base_model(), checkpoint)
    forward = build_forward(model, 1, "auto", Padding(), checkpoint=checkpoint)
    lengths, tokens = np.array(LENGTHS), torch.randint(3, 1000, (len(LENGTHS), LENGTHS[0]))
    inputs = {"input_ids": tokens.flatten() if forward.packed else tokens}
    before, seconds = resident("VmRSS"), 0.0
    Path("/proc/self/clear_refs").write_text("5")
    for number in range(2):
        started = time.perf_counter()
        with keys.micro_batch(number, np.arange(len(lengths)), lengths):
            with torch.autocast("cpu", torch.bfloat16):
                loss = forward(inputs, lengths).square().sum()
            loss.backward()
        seconds = time.perf_counter() - started
    peak = resident("VmHWM") - before
    return {"packed": forward.packed, "checkpointing": checkpointing, "peak_mib": peak // MIB, "s": round(seconds, 1)}


if __name__ == "__main__":
    main()
