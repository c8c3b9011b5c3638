"""What each rank does in the parity tests: it trains with a run that is built from a command line."""

import dataclasses
import os
from pathlib import Path

import numpy as np


def build(arguments, double=False, precision="no"):
    """What `run.py` with these arguments would train with; in fp64 with `double`."""
    from trainer.config.loading import parse_config
    from trainer.distributed.session import StopRequest, start_accelerator
    from trainer.distributed.watch import Watch
    from trainer.model import backbone
    from trainer.packed import attention
    from trainer.training import setup as building

    attention.GROUP_COST = 500  # else all of these short examples would attend together
    backbone.silence_libraries()
    config = parse_config([*map(str, arguments), "--run.precision", precision])
    folder = Path(config.run.output_dir) / config.run.name
    folder.mkdir(parents=True, exist_ok=True)
    accelerator = start_accelerator(precision)
    plain, kept = building.build_model, building.set_precision
    if double:
        building.build_model = lambda *given: (plain(*given)[0].double(), [])
        building.set_precision = lambda model, compute_type: None
    try:
        inputs = building.prepare(config, folder)
        return building.build(config, folder, inputs, accelerator, StopRequest(), Watch())
    finally:
        building.build_model, building.set_precision = plain, kept


# --- one step's gradient ----------------------------------------------------------------------------------------------


def weigh_parts_alike(run, step, micro_batches):
    """The wrong weighting: mean over micro-batches of the mean over each one's examples."""
    ranks = [
        run.plan.micro_batches(step, r, run.learner.accelerator.num_processes)
        for r in range(run.learner.accelerator.num_processes)
    ]
    count = sum(bool(part.weights.any()) for parts in ranks for part in parts)
    total = run.plan.total_weight(step)
    return [
        dataclasses.replace(part, weights=part.weights * total / count / (part.weights.sum() or 1.0))
        for part in micro_batches
    ]


def gradients(arguments, cases, wrong=None, precision=None):
    """Gradient, loss and sizes of the micro-batches of one step, for each case.

    Args:
        arguments: command line of the run; SGD with a learning rate of 1 and no clipping, so a step subtracts the
            gradient itself.
        cases: (global batch, step, max_tokens) of each.
        wrong: a mistake to make: "mean of means", dropout keyed by "rank" or by "position", or of long documents
            "windows as examples" or "masks of the document".
        precision: None = fp64.
    """
    import torch

    from trainer.training import step as training
    from trainer.training.step import train_step

    run = build(arguments, double=precision is None, precision=precision or "no")
    before = [parameter.detach().clone() for parameter in run.learner.parameters.values()]
    if wrong == "rank":
        run.learner.dropout.seed += run.learner.accelerator.process_index
    if wrong == "position":
        keyed = run.learner.dropout.micro_batch
        run.learner.dropout.micro_batch = lambda step, ids, lengths: keyed(step, np.arange(len(ids)), lengths)
    if wrong == "windows as examples":
        count_windows(training)
    if wrong == "masks of the document":
        collate = run.learner.forward.collate

        def collate_alike(*given):
            batch = collate(*given)
            return dataclasses.replace(batch, window_ids=batch.ids[batch.owners])

        run.learner.forward.collate = collate_alike
    results = {}
    for case in cases:
        batch_size, step, max_tokens = case
        plan = dataclasses.replace(run.plan, batch_size=batch_size, max_tokens=max_tokens)
        now = dataclasses.replace(run, plan=plan)
        parts = plan.micro_batches(step, run.learner.accelerator.process_index, run.learner.accelerator.num_processes)
        sizes = [len(part.ids) if part.weights.any() else 0 for part in parts]
        if wrong == "mean of means":
            parts = weigh_parts_alike(now, step, parts)
        result = train_step(now, step, parts)
        subtracted = [old - new.detach() for old, new in zip(before, run.learner.parameters.values(), strict=True)]
        with torch.no_grad():
            for old, new in zip(before, run.learner.parameters.values(), strict=True):
                new.copy_(old)
        gradient = torch.cat([tensor.flatten() for tensor in subtracted]).numpy()
        results[case] = {"gradient": gradient, "loss": result.loss, "norm": result.grad_norm, "sizes": sizes}
    return results


def count_windows(training):
    """Makes each window of a document an example with its label and weight."""
    losses_of = training.example_losses

    def window_losses(losses, logits, batch):
        owned = {"targets": batch.targets[batch.owners], "weights": batch.weights[batch.owners]}
        each = losses_of(losses, logits, dataclasses.replace(batch, **owned))
        return each.new_zeros(len(batch.ids)).index_add(0, each.new_tensor(batch.owners).long(), each)

    training.average_windows = lambda batch, logits: logits
    training.example_losses = window_losses


def plain_gradient(arguments, batch_size, step):
    """The same without the trainer: the whole padded batch, torch's own loss, plain autograd.

    Returns:
        loss and gradient by torch's CrossEntropyLoss without class weights, then both with the weights of the examples.
    """
    import torch

    run = build(arguments, double=True)
    ids = dataclasses.replace(run.plan, batch_size=batch_size).global_batch(step)
    rows, pad_token_id = token_rows(run, ids), run.inputs.backbone.tokenizer.pad_token_id
    longest = max(map(len, rows))
    input_ids = torch.tensor([row + [pad_token_id] * (longest - len(row)) for row in rows])
    mask = torch.tensor([[1] * len(row) + [0] * (longest - len(row)) for row in rows])
    labels = torch.tensor(run.inputs.examples["train"].targets[ids])
    smoothing = run.config.optim.label_smoothing
    answers = []
    for weights in (None, torch.tensor(run.plan.weights[ids])):
        logits = run.learner.model(input_ids=input_ids, attention_mask=mask).logits
        if weights is None:
            loss = torch.nn.CrossEntropyLoss(label_smoothing=smoothing)(logits, labels)
        else:
            each = torch.nn.CrossEntropyLoss(label_smoothing=smoothing, reduction="none")(logits, labels)
            loss = (each * weights).sum() / weights.sum()
        found = torch.autograd.grad(loss, list(run.learner.parameters.values()))
        answers.append((loss.item(), torch.cat([tensor.flatten() for tensor in found]).numpy()))
    return answers


def window_gradient(arguments, batch_size, step):
    """The same for long documents: the tokenizer's own windows, document by document.

    Returns:
        loss and gradient, and the number of windows of each document.
    """
    import torch

    run = build(arguments, double=True)
    ids, data = dataclasses.replace(run.plan, batch_size=batch_size).global_batch(step), run.config.data
    split, tokenizer = run.inputs.corpus.splits["train"], run.inputs.backbone.tokenizer
    settings = {"max_length": data.max_length, "stride": data.window_overlap, "truncation": True, "padding": True}
    losses, counts, weights = [], [], torch.tensor(run.plan.weights[ids])
    loss_of = torch.nn.CrossEntropyLoss(label_smoothing=run.config.optim.label_smoothing)
    for i, weight in zip(ids, weights, strict=True):
        rows = tokenizer(split.texts[i], return_overflowing_tokens=True, return_tensors="pt", **settings)
        logits = run.learner.model(input_ids=rows["input_ids"], attention_mask=rows["attention_mask"]).logits
        losses.append(weight * loss_of(logits.mean(dim=0), torch.tensor(split.targets[i])))
        counts.append(len(logits))
    loss = torch.stack(losses).sum() / weights.sum()
    found = torch.autograd.grad(loss, list(run.learner.parameters.values()))
    return loss.item(), torch.cat([tensor.flatten() for tensor in found]).numpy(), counts


def token_rows(run, ids):
    """The tokens of these training examples."""
    examples = run.inputs.examples["train"]
    return [examples.tokens[examples.offsets[i] : examples.offsets[i + 1]].tolist() for i in ids]


# --- steps that fail --------------------------------------------------------------------------------------------------


def broken_step(arguments, fault, hit, scaled=False):
    """One step with a fault on rank `hit`: its "memory" runs out, a "loss" or a "gradient" is not finite.

    In place of sgd stands an optimizer that would apply any gradient, since it knows nothing of scalers.

    Returns:
        the result of the step, or the message; all parameters before and after; all of the optimizer's state after.
    """
    import torch

    from trainer.errors import UserError
    from trainer.training.optim import OPTIMIZERS, set_learning_rate
    from trainer.training.step import train_step

    OPTIMIZERS["sgd"] = lambda groups, config: torch.optim.Adagrad(groups)
    run = build(arguments)
    run = with_scaler(run, 64.0) if scaled else run
    rank, world_size = run.learner.accelerator.process_index, run.learner.accelerator.num_processes
    backward, optimizer = run.learner.accelerator.backward, run.learner.optimizer.optimizer
    parameters, parts = list(run.learner.parameters.values()), run.plan.micro_batches(0, rank, world_size)
    set_learning_rate(optimizer, 0.1)
    before = torch.cat([parameter.detach().flatten() for parameter in parameters]).numpy()

    def faulty(loss):
        backward(loss)
        if fault == "memory":
            raise torch.OutOfMemoryError
        parameters[0].grad[0] = float("nan")

    if rank == hit and fault == "loss":
        parts[0].weights[:] = float("inf")
    elif rank == hit:
        run.learner.accelerator.backward = faulty
    try:
        result = train_step(run, 0, parts)
    except UserError as error:
        result = str(error)
    assert not scaled or run.learner.accelerator.scaler.get_scale() == 64
    state = [tensor.flatten() for values in optimizer.state.values() for tensor in values.values()]
    after = torch.cat([parameter.detach().flatten() for parameter in parameters]).numpy()
    return result, before, after, torch.cat([torch.zeros(1), *state]).numpy()


def with_scaler(run, scale):
    """The run with a fp16 scaler, which accelerate has only on a GPU."""
    import torch
    from accelerate.optimizer import AcceleratedOptimizer

    accelerator = run.learner.accelerator
    accelerator.scaler = torch.amp.GradScaler("cpu", init_scale=scale)
    optimizer = AcceleratedOptimizer(run.learner.optimizer.optimizer, scaler=accelerator.scaler)
    run = dataclasses.replace(run, learner=dataclasses.replace(run.learner, optimizer=optimizer))
    accelerator._optimizers = [run.learner.optimizer]
    # accelerate's does so where the precision is fp16
    accelerator.unscale_gradients = lambda: accelerator.scaler.unscale_(run.learner.optimizer.optimizer)
    return run


def reads(arguments):
    """How often the host reads one number or all of a tensor in a step."""
    import torch
    from torch.utils._python_dispatch import TorchDispatchMode

    from trainer.training.step import train_step

    class Reads(TorchDispatchMode):
        number = 0

        def __torch_dispatch__(self, function, types, arguments=(), settings=None):
            self.number += function.overloadpacket.__name__ == "_local_scalar_dense"
            return function(*arguments, **(settings or {}))

    def read(tensor):
        nonlocal whole
        whole += 1
        return plain(tensor)

    run, whole, plain = build(arguments), 0, torch.Tensor.tolist
    torch.Tensor.tolist = read
    with Reads() as single:
        train_step(run, 0, run.plan.micro_batches(0, 0, 1))
    torch.Tensor.tolist = plain
    return whole + single.number


# --- a whole run, and scoring -----------------------------------------------------------------------------------------


def whole_run(arguments, wrong=None):
    """Trains from start to end with the real loop.

    Args:
        arguments: command line of the run.
        wrong: a mistake to make: "mean of means", or dropout keyed by "rank".

    Returns:
        adapter, lines of metrics.jsonl, number of first micro-batches.
    """
    import json

    from trainer.model.adapter import adapter_tensors
    from trainer.training import loop, state

    run = build(arguments)
    before = adapter_tensors(run.learner.model)
    right = loop.train_step

    def train_step(run, step, parts):
        return right(run, step, weigh_parts_alike(run, step, parts) if wrong == "mean of means" else parts)

    loop.train_step = train_step
    if wrong == "rank":
        run.learner.dropout.seed += run.learner.accelerator.process_index
    try:
        end, best = loop.train(run, state.TrainState(), None)
    finally:
        loop.train_step = right
    assert end.step == run.total_steps
    assert max((before[name] - best[name]).abs().max() for name in best) > 1e-4, "nothing was trained"
    lines = (run.folder / "metrics.jsonl").read_text() if run.learner.accelerator.is_main_process else ""
    number = len(run.plan.micro_batches(0, 0, run.learner.accelerator.num_processes))
    adapter = {name: tensor.numpy() for name, tensor in best.items()}
    return adapter, [json.loads(line) for line in lines.splitlines()], number


def whole_runs(arguments, budgets, wrong=None):
    """`whole_run` for each token budget of a micro-batch."""
    name = arguments[-1]
    return {
        budget: whole_run([*arguments, "--batch.max_tokens", budget, "--run.name", f"{name}-{budget}-{wrong}"], wrong)
        for budget in budgets
    }


def sharded_run(arguments):
    """`whole_run` with the frozen weights shared out; and the share of them that this rank held."""
    os.environ["ACCELERATE_USE_FSDP"] = "true"
    run = build(arguments)
    frozen = [parameter for parameter in run.learner.model.parameters() if not parameter.requires_grad]
    held = sum(parameter.to_local().numel() for parameter in frozen) / sum(parameter.numel() for parameter in frozen)
    return whole_run(arguments)[0], held


def raw_run(arguments):
    """The same run as anyone would write it: DistributedDataParallel, AdamW, transformers' schedule, torch's loss.

    Right only where a global batch is dealt out evenly and all examples weigh the same. Returns the adapter.
    """
    import torch
    from transformers import get_cosine_schedule_with_warmup

    from trainer.model.adapter import adapter_tensors

    run = build(arguments)
    optim, rank, world_size = (
        run.config.optim,
        run.learner.accelerator.process_index,
        run.learner.accelerator.num_processes,
    )
    pad_token_id = run.inputs.backbone.tokenizer.pad_token_id
    model = torch.nn.parallel.DistributedDataParallel(run.learner.model)
    parameters = [parameter for parameter in model.parameters() if parameter.requires_grad]
    groups = [
        {"params": [p for p in parameters if p.ndim > 1], "weight_decay": optim.weight_decay},
        {"params": [p for p in parameters if p.ndim == 1], "weight_decay": 0.0},
    ]
    optimizer = torch.optim.AdamW(groups, lr=optim.learning_rate)
    warmup = -int(-optim.warmup_fraction * run.total_steps // 1)
    scheduler = get_cosine_schedule_with_warmup(optimizer, warmup, run.total_steps)
    loss_of = torch.nn.CrossEntropyLoss(label_smoothing=optim.label_smoothing)
    for step in range(run.total_steps):
        ids = run.plan.global_batch(step)
        assert len(ids) % world_size == 0
        ids = ids[rank::world_size]
        rows = [torch.tensor(row) for row in token_rows(run, ids)]
        input_ids = torch.nn.utils.rnn.pad_sequence(rows, batch_first=True, padding_value=pad_token_id)
        logits = model(input_ids=input_ids, attention_mask=(input_ids != pad_token_id).long()).logits
        loss_of(logits, torch.tensor(run.inputs.examples["train"].targets[ids])).backward()
        torch.nn.utils.clip_grad_norm_(parameters, optim.max_grad_norm)
        optimizer.step()
        scheduler.step()
        optimizer.zero_grad()
    return {name: tensor.numpy() for name, tensor in adapter_tensors(run.learner.model).items()}


def scores(arguments, sizes):
    """Logits of the first n examples of train, for each n of `sizes`."""
    from trainer.training.scoring import score_split

    run = build(arguments)
    examples, found = run.inputs.examples["train"], {}
    for size in sizes:
        end = int(examples.offsets[size])
        part = dataclasses.replace(
            examples,
            tokens=examples.tokens[:end],
            offsets=examples.offsets[: size + 1],
            targets=examples.targets[:size],
            lengths=examples.lengths[:size],
        )
        found[size] = score_split(
            run.learner.forward,
            part,
            run.learner.accelerator,
            max_tokens=run.eval_max_tokens,
            num_labels=len(run.inputs.corpus.label_names),
        )
        assert run.learner.model.training
    return found, examples.targets


def scaled_steps(arguments, scale):
    """The first step without a scaler; and with one of this scale, tried as often as its gradients overflow as fp16's.

    Of each try the norm of the gradient, by how much the parameters change, and the scale afterwards.
    """
    import torch

    from trainer.training.optim import set_learning_rate
    from trainer.training.step import train_step

    def step(run):
        before = torch.cat([parameter.detach().flatten() for parameter in run.learner.parameters.values()])
        parts = run.plan.micro_batches(0, run.learner.accelerator.process_index, run.learner.accelerator.num_processes)
        set_learning_rate(run.learner.optimizer, 0.1)
        result = train_step(run, 0, parts)
        after = torch.cat([parameter.detach().flatten() for parameter in run.learner.parameters.values()])
        scaler = run.learner.accelerator.scaler
        return {
            "norm": result.grad_norm,
            "change": float((after - before).norm()),
            "scale": scaler.get_scale() if scaler is not None else 1.0,
        }

    plain, run = step(build(arguments)), with_scaler(build(arguments), scale)
    backward = run.learner.accelerator.backward

    def overflowing(loss):
        backward(loss)
        for parameter in run.learner.parameters.values():
            parameter.grad[parameter.grad.abs() > 65504] = float("inf")

    run.learner.accelerator.backward = overflowing
    steps = [step(run)]
    while not steps[-1]["change"]:
        steps.append(step(run))
    return plain, steps
