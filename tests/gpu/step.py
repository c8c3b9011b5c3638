"""Training steps on a GPU that is not there: fake tensors, so nothing is computed, but all is asked for.

    python tests/gpu/step.py SHIM "2 ours" "4 ours" "4 transformers" ...    (number of layers, and whose step)

Prints as JSON, for each step, how many operations a GPU would be given (views and allocations aside), how often the
host would wait for it, and how many tensors it would send to the host without that; or the error: operations among
tensors of two devices are one. The step is the second, asked for while the first is in flight. Besides "ours" there are
its MISTAKES, "recorded": ours of a shape whose work was recorded before, and "transformers": a step of its own forward,
padded, in two halves.
"""

import contextlib
import ctypes
import functools
import importlib.util
import json
import os
import sys
from collections import Counter
from pathlib import Path
from types import SimpleNamespace
from unittest.mock import patch

torch_libraries = Path(importlib.util.find_spec("torch").origin).with_name("lib")
for library in (torch_libraries / "libc10.so", torch_libraries / "libtorch_cpu.so", sys.argv[1]):
    ctypes.CDLL(str(library), ctypes.RTLD_GLOBAL)

import numpy as np
import torch
from peft import LoraConfig, TaskType, get_peft_model
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode
from transformers import AutoModelForSequenceClassification, RobertaConfig

sys.path[0] = str(Path(__file__).resolve().parents[2])
from trainer.batching.plan import Plan
from trainer.config.schema import Config
from trainer.data.tokens import Examples
from trainer.distributed.session import StopRequest
from trainer.dropout import masks
from trainer.dropout import sites as dropout
from trainer.errors import UserError
from trainer.model.build import set_precision
from trainer.packed import attention
from trainer.packed.forward import PackedForward
from trainer.packed.graphs import Graphs
from trainer.training.optim import build_optimizer
from trainer.training.step import train_step

NO_KERNEL = {
    "_reshape_alias", "_unsafe_view", "alias", "as_strided", "detach", "empty", "empty_like", "empty_strided", "expand",
    "lift_fresh", "new_empty", "permute", "select", "slice", "split", "split_with_sizes", "squeeze", "t", "transpose",
    "unbind", "unsqueeze", "view",
}  # fmt: skip
SIZE = {"hidden_size": 64, "num_attention_heads": 4, "intermediate_size": 96, "vocab_size": 90, "num_labels": 4}
LENGTHS = np.array([120, 90, 83, 71, 66, 62, 60, 58, 55, 54, 52, 50, 49, 47, 44, 43, 40, 39, 36, 30])
CUDA = torch.device("cuda")


class Requests(TorchDispatchMode):
    """Counts what the GPU is asked for, by operation, and how often an answer is waited for."""

    def __init__(self):
        super().__init__()
        self.operations, self.waits, self.sent = Counter(), 0, 0

    def __torch_dispatch__(self, function, types, arguments=(), settings=None):
        name = function.overloadpacket.__name__
        if name == "_local_scalar_dense":
            self.waits += 1
            return 0.5
        result = function(*arguments, **(settings or {}))
        if name in {"_to_copy", "copy_"}:
            to, source = (result, arguments[0]) if name == "_to_copy" else arguments[:2]
            waits = not (settings or {}).get("non_blocking")
            self.waits += waits and to.device.type != source.device.type
            self.sent += not waits and to.device.type == "cpu" != source.device.type
        tensors = [part for part in torch.utils._pytree.tree_leaves(result) if isinstance(part, torch.Tensor)]
        if name not in NO_KERNEL and any(tensor.device.type == "cuda" for tensor in tensors):
            self.operations[name] += 1
        return result


class Accelerator:
    """What `train_step` asks of accelerate's, for one process."""

    device, num_processes, process_index, scaler = CUDA, 1, 0, None

    @staticmethod
    def autocast():
        return torch.autocast("cuda", torch.bfloat16)

    def backward(self, loss):
        loss.backward()

    def reduce(self, numbers, how):
        return numbers

    def unscale_gradients(self):
        pass


def place(model, device):
    """Gives the model fake weights on a device."""
    for module in model.modules():
        for tensors in (module._parameters, module._buffers):
            for name, old in tensors.items():
                if old is not None:
                    new = torch.empty(old.shape, dtype=old.dtype, device=device)
                    tensors[name] = torch.nn.Parameter(new, old.requires_grad) if tensors is module._parameters else new


class Recorder:
    """Stands in for CUDA's: what is asked for here is asked for in no other step; the host must not be needed."""

    def rehearse(self, work):
        work()

    def record(self, work):
        def refuse(array, device):
            raise RuntimeError("something is brought to the device while recording")

        requests = Requests()
        with patch.multiple(masks, on_device=refuse), patch.multiple(attention, on_device=refuse), requests:
            losses = work()
        if requests.waits:
            raise RuntimeError("the host waits while recording")
        return lambda: None, losses


def ours(model, requests, recorded=False):
    place(model, "cpu")
    keys = dropout.install(model, seed=1)  # on the CPU, as `building.build` does it
    place(model, CUDA)
    optimizer, trained = build_optimizer(model.named_parameters(), Config().optim)
    num_examples, forward = len(LENGTHS), PackedForward(model, keys)
    run = SimpleNamespace(
        config=Config(),
        accelerator=Accelerator(),
        forward=forward,
        # its step is one kernel on a GPU, and many on a fake of it
        optimizer=SimpleNamespace(optimizer=optimizer, step=lambda: None, zero_grad=optimizer.zero_grad),
        trained=trained,
        dropout=keys,
        plan=Plan(LENGTHS, np.ones(num_examples), num_examples, 0, 65536, packed=True),
        train=Examples(
            tokens=np.ones(LENGTHS.sum(), dtype=np.int32),
            offsets=np.concatenate([[0], LENGTHS.cumsum()]),
            token_types=None,
            labels=np.zeros(num_examples, dtype=np.int64),
            lengths=LENGTHS,
        ),
        stop=StopRequest(),
        graphs=Graphs(forward, keys, trained.values(), Accelerator.autocast, Recorder) if recorded else None,
    )
    micro_batches = run.plan.micro_batches(0, 0, 1)
    with Requests():
        before = train_step(run, 0, micro_batches)
    with requests:
        train_step(run, 1, micro_batches, before)


def theirs(model, requests):
    """What `transformers.Trainer` does with a batch in two micro-batches, without what it logs."""
    place(model, CUDA)
    with requests:
        for part in np.split(LENGTHS, 2):
            ids = torch.ones(len(part), part.max(), dtype=torch.long, device=CUDA)
            labels = torch.zeros(len(part), dtype=torch.long, device=CUDA)
            with torch.autocast("cuda", torch.bfloat16):
                loss = model(input_ids=ids, attention_mask=torch.ones_like(ids), labels=labels).loss
            (loss / 2).backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)


def copied_and_waited_for(array, device):
    return torch.from_numpy(array).to(device)


def left_on_the_host(array, device):
    return torch.from_numpy(array)


def asks_for_a_number(scores):
    return torch.ops.aten._softmax(scores * scores.max().item(), -1, False)


MISTAKES = {
    "many groups": {"GROUP_COST_ON_GPU": 0},
    "left on the host": {"on_device": left_on_the_host},
    "copied and waited for": {"on_device": copied_and_waited_for},
    "asks for a number": {"_softmax": asks_for_a_number},
    "recorded asking for a number": {"_softmax": asks_for_a_number},
}


def counted(num_layers, whose):
    with torch.device("meta"):
        model = AutoModelForSequenceClassification.from_config(RobertaConfig(**SIZE, num_hidden_layers=num_layers))
        lora = LoraConfig(TaskType.SEQ_CLS, r=8, lora_dropout=0.1, target_modules=["query", "value"])
        model = get_peft_model(model, lora).train()
    step = theirs
    if whose != "transformers":
        step = functools.partial(ours, recorded=whose.startswith("recorded"))
        set_precision(model, torch.bfloat16)
    requests = Requests()
    with FakeTensorMode(), contextlib.ExitStack() as stack:
        for name, mistaken in MISTAKES.get(whose, {}).items():
            stack.enter_context(patch.object(attention, name, mistaken))
        try:
            step(model, requests)
        except (RuntimeError, UserError) as error:
            return {"error": str(error)}
    return {"operations": sum(requests.operations.values()), "waits": requests.waits, "sent": requests.sent}


def main():
    # torch's own questions for a device; answered where there is none
    torch.cuda.amp.common.amp_definitely_not_available = lambda: False
    torch.cuda.is_bf16_supported = lambda *_, **__: True
    torch.cuda.current_device = lambda: 0
    torch.Tensor.pin_memory = lambda tensor: tensor
    torch.cuda.Event = lambda: SimpleNamespace(record=lambda: None)
    steps = {}
    for case in sys.argv[2:]:
        num_layers, _, whose = case.partition(" ")
        steps[case] = counted(int(num_layers), whose)
    print(json.dumps(steps), flush=True)
    os._exit(0)  # autograd's thread for the device that is not there may still wait for work: torch would abort


if __name__ == "__main__":
    main()
