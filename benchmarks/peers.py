"""What `compare.py` measures Isotrain beside: transformers.Trainer, with and without group_by_length, and Accelerate.

All as their own examples use them: fp32 weights under autocast, 16 examples at a time, accumulated to the batch.
"""

import sys
import warnings

import numpy as np
import torch
import transformers
from accelerate import Accelerator
from peft import LoraConfig, TaskType, get_peft_model
from torch.utils.data import DataLoader
from transformers import (
    AutoModelForSequenceClassification,
    DataCollatorWithPadding,
    PrinterCallback,
    Trainer,
    TrainerCallback,
    TrainingArguments,
)

from benchmarks.workload import (
    ALPHA,
    DROPOUT,
    EVALUATION_BATCH,
    LEARNING_RATE,
    MAX_GRAD_NORM,
    MICRO_BATCH,
    RANK,
    SEED,
    WEIGHT_DECAY,
    Pass,
    clock,
    plan_of,
    read_features,
    serve,
)

GOLDEN = (5**0.5 - 1) / 2


def silence():
    """As `trainer.model.backbone.silence_libraries`, whose module no peer's process loads."""
    transformers.logging.set_verbosity_error()
    transformers.utils.logging.disable_progress_bar()
    warnings.filterwarnings("ignore", module=r"transformers\.")


def build_model(folder, targets):
    """The classifier with its adapter: the same tensors as `trainer.model.build.build_model` draws."""
    torch.manual_seed(SEED)
    model = AutoModelForSequenceClassification.from_pretrained(folder / "backbone")
    torch.manual_seed(SEED)
    lora = LoraConfig(TaskType.SEQ_CLS, r=RANK, lora_alpha=ALPHA, lora_dropout=DROPOUT, target_modules=list(targets))
    return get_peft_model(model, lora)


class CountingCollator:
    """Pads a batch to its longest example, and counts."""

    def __init__(self, tokenizer):
        self.pad = DataCollatorWithPadding(tokenizer)
        self.restart()

    def restart(self):
        self.ids, self.examples, self.tokens, self.positions = [], 0, 0, 0

    def __call__(self, features):
        batch = self.pad([{name: value for name, value in one.items() if name != "id"} for one in features])
        self.ids += [one["id"] for one in features]
        self.examples += len(features)
        self.tokens += int(batch["attention_mask"].sum())
        self.positions += batch["attention_mask"].numel()
        return batch

    def counted(self, seconds):
        return Pass(seconds, self.examples, self.tokens, self.positions)


class Peer:
    """The examples, the model and the order of the steps; `train` and `evaluate` are a contender's interface."""

    def __init__(self, task):
        silence()
        tokenizer, features = read_features(task.folder)
        self.task = task
        self.features = [{**one, "id": i} for i, one in enumerate(features)]
        self.lengths = np.array([len(one["input_ids"]) for one in features])
        self.tokens = np.concatenate([one["input_ids"] for one in features])
        self.plan = plan_of(self.lengths, task.batch)
        self.collator = CountingCollator(tokenizer)
        self.model = build_model(task.folder, task.targets)

    def of_steps(self, steps):
        """The examples that Isotrain trains in these steps."""
        return [self.features[i] for step in steps for i in self.plan.global_batch(step)]


class Clock(TrainerCallback):
    """Takes the time between Trainer's preparations and its end."""

    def __init__(self, device):
        self.device = device

    def on_train_begin(self, *_, **__):
        self.started = clock(self.device)

    def on_train_end(self, *_, **__):
        self.seconds = clock(self.device) - self.started


class TrainerPeer(Peer):
    """transformers.Trainer with dynamic padding; shuffles the examples of the steps by itself."""

    kind, strategy = Trainer, "random"

    def __init__(self, task):
        super().__init__(task)
        arguments = TrainingArguments(
            output_dir=str(task.folder / "trainer"), use_cpu=task.device == "cpu", bf16=task.precision == "bf16",
            fp16=task.precision == "fp16", per_device_train_batch_size=MICRO_BATCH,
            gradient_accumulation_steps=task.batch // MICRO_BATCH, num_train_epochs=1, learning_rate=LEARNING_RATE,
            weight_decay=WEIGHT_DECAY, lr_scheduler_type="constant", max_grad_norm=MAX_GRAD_NORM, save_strategy="no",
            logging_strategy="no", report_to=[], disable_tqdm=True, seed=SEED, remove_unused_columns=False,
            dataloader_pin_memory=task.device == "cuda", label_names=["labels"], train_sampling_strategy=self.strategy,
        )  # fmt: skip
        self.clock = Clock(task.device)
        self.trainer = self.kind(self.model, arguments, self.collator, self.features, callbacks=[self.clock])
        self.trainer.remove_callback(PrinterCallback)

    def train(self, steps):
        self.trainer.train_dataset = self.of_steps(steps)
        return self.run()

    def run(self):
        self.collator.restart()
        self.trainer.train()
        return self.collator.counted(self.clock.seconds)


class SpreadTrainer(Trainer):
    """Of the steps into which group_by_length cuts an epoch, takes some spread evenly over all lengths.

    They are sorted by length, so the first few are no sample of the epoch. An epoch of few examples would be grouped
    worse than a real one.
    """

    def _get_train_sampler(self, train_dataset=None):
        order = np.array(list(super()._get_train_sampler(train_dataset)))
        lengths = np.array([len(self.train_dataset[i]["input_ids"]) for i in order])
        batch = self.args.train_batch_size * self.args.gradient_accumulation_steps
        return order.reshape(-1, batch)[spread(lengths.reshape(-1, batch).max(1), *self.share)].flatten().tolist()


def spread(sizes, number, offset):
    """Which `number` of the batches to take, in their order; they lie evenly from the largest to the smallest.

    Example: sizes [9, 3, 7, 5], 2 of them, offset 0 -> [0, 3]   (the largest, and the third by size)
    """
    places = ((np.arange(number) + offset) / number * len(sizes)).astype(int)
    return np.sort(np.argsort(-sizes, kind="stable")[places])


class GroupedPeer(TrainerPeer):
    """Trainer with group_by_length over all examples; of that epoch it trains as many steps as the others."""

    kind, strategy = SpreadTrainer, "group_by_length"

    def __init__(self, task):
        super().__init__(task)
        self.features = self.features[: len(self.features) // task.batch * task.batch]
        self.turn = 0

    def train(self, steps):
        self.trainer.train_dataset = self.features
        self.trainer.share = (len(steps), self.turn * GOLDEN % 1)  # the first time with the longest examples
        self.turn += 1
        return self.run()


class AcceleratePeer(Peer):
    """The loop of Accelerate's examples."""

    def __init__(self, task):
        super().__init__(task)
        self.accelerator = Accelerator(
            mixed_precision=task.precision,
            cpu=task.device == "cpu",
            gradient_accumulation_steps=task.batch // MICRO_BATCH,
        )
        trained = [parameter for parameter in self.model.parameters() if parameter.requires_grad]
        optimizer = torch.optim.AdamW(trained, lr=LEARNING_RATE, weight_decay=WEIGHT_DECAY)
        self.model, self.optimizer = self.accelerator.prepare(self.model, optimizer)

    def batches(self, features, size, shuffle):
        self.collator.restart()
        pin = self.task.device == "cuda"
        loader = DataLoader(features, size, shuffle=shuffle, collate_fn=self.collator, pin_memory=pin)
        return self.accelerator.prepare(loader)

    def train(self, steps):
        accelerator, model = self.accelerator, self.model.train()
        loader = self.batches(self.of_steps(steps), MICRO_BATCH, shuffle=True)
        started = clock(self.task.device)
        for inputs in loader:
            with accelerator.accumulate(model):
                accelerator.backward(model(**inputs).loss)
                if accelerator.sync_gradients:
                    accelerator.clip_grad_norm_(model.parameters(), MAX_GRAD_NORM)
                self.optimizer.step()
                self.optimizer.zero_grad()
        return self.collator.counted(clock(self.task.device) - started)

    @torch.no_grad()
    def evaluate(self, places):
        """Scores the examples at these places in padded batches, unsorted, as Trainer.evaluate does."""
        model = self.model.eval()
        features = [self.features[i % len(self.features)] for i in places]
        loader = self.batches(features, EVALUATION_BATCH, shuffle=False)
        started = clock(self.task.device)
        torch.cat([model(**inputs).logits.float() for inputs in loader]).cpu()
        return self.collator.counted(clock(self.task.device) - started)


PEERS = {
    "Trainer, dynamic padding": TrainerPeer,
    "Trainer, group_by_length": GroupedPeer,
    "Accelerate loop": AcceleratePeer,
}

if __name__ == "__main__":
    serve(sys.argv[1:], lambda task, name: PEERS[name](task))
