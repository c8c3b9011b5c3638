"""Packed == padded == one by one: logits and gradients, in every family and with every PEFT method, dropout on."""

import copy
import itertools

import numpy as np
import peft
import pytest
import torch
from peft import TaskType, get_peft_model
from peft.mapping import PEFT_TYPE_TO_CONFIG_MAPPING
from transformers import AutoConfig, AutoModelForSequenceClassification
from transformers.models.mpnet.modeling_mpnet import MPNetEncoder

from tests.unit.model.test_build import METHODS
from trainer.dropout import masks
from trainer.dropout import sites as dropout
from trainer.model.backbone import set_dropout
from trainer.model.build import set_precision
from trainer.packed import attention, prenorm
from trainer.packed import forward as packed
from trainer.packed import projections as products
from trainer.packed.attention import group_sizes, lay_out
from trainer.packed.families import why_not_packed
from trainer.packed.forward import PackedForward, PaddedForward

PAD = 1
BERTS = ("bert", "roberta", "xlm-roberta", "camembert", "electra", "mpnet", "distilbert")
MODERN = {"local_attention": 8, "cls_token_id": 0, "sep_token_id": 2}  # 4 tokens on each side, in layers 1 and 2 of 3
WINDOWS = {"use_sliding_window": True, "sliding_window": 4, "max_window_layers": 1}
PRE_NORM = {
    "modernbert": MODERN,
    "modernbert, mean": {**MODERN, "classifier_pooling": "mean"},
    "llama": {},
    "qwen2": {"num_key_value_heads": 1},
    "qwen2, windows": {"num_key_value_heads": 2, **WINDOWS},
    "qwen3": {"num_key_value_heads": 2, "head_dim": 12},
}
"""settings by model_type, and by what sets a variant apart"""
NAMES = {"mpnet": ["q", "v"], "distilbert": ["q_lin", "v_lin"], "modernbert": ["Wqkv"], "modernbert, mean": ["Wqkv"]}
TARGETS = {
    **{family: NAMES.get(family, ["query", "value"]) for family in BERTS},
    **{family: NAMES.get(family, ["q_proj", "v_proj"]) for family in PRE_NORM},
}
"""what LoRA is put on in each family"""
SIZE = {
    "vocab_size": 60, "pad_token_id": PAD, "bos_token_id": 0, "eos_token_id": 2, "num_labels": 3, "type_vocab_size": 2,
    "hidden_size": 32, "num_hidden_layers": 3, "num_attention_heads": 4, "intermediate_size": 48,
    "max_position_embeddings": 64, "initializer_range": 0.2, "embedding_size": 24, "hidden_dim": 48,
}  # fmt: skip
LENGTHS = [13, 13, 12, 11, 9, 4, 4, 1]
WHOLE = [list(range(len(LENGTHS)))]
CUTS = {
    "in order": WHOLE,
    "out of order": [[5, 0, 7, 3, 1, 2, 6, 4]],
    "in two": [[0, 2, 3], [1, 4, 5, 6, 7]],
    "one by one": [[i] for i in range(len(LENGTHS))],
}
LENGTH_OF_RUN = {"ADALORA": {"total_step": 100}}  # a run sets it itself
LARGER = {"hidden_size": 64, "num_attention_heads": 2, "initializer_range": 0.1}
PLACES = [
    {"target_modules": "all-linear"},
    {"target_modules": ["key"]},
    {"target_modules": ["dense"]},
    {"target_modules": ["query", "word_embeddings"]},
    {"layers_to_transform": [1]},
    {"rank_pattern": {"value": 5}, "alpha_pattern": {"value": 3}},
    {"lora_bias": True},
    {"modules_to_save": ["LayerNorm"]},
    {"modules_to_save": ["key"]},
    {"modules_to_save": ["self"], "target_modules": ["intermediate.dense"]},
]
LORA = {"r": 2, "target_modules": TARGETS["roberta"], "init_lora_weights": False, "lora_dropout": 0.1}


@pytest.fixture(autouse=True)
def cheap_groups(monkeypatch):
    """Else all of these short examples would attend together."""
    monkeypatch.setattr(attention, "GROUP_COST", 100)
    assert len(group_sizes(np.array(LENGTHS), 100 / SIZE["num_attention_heads"])) == 4


def build(family="roberta", method="LORA", options=LORA, p=0.1, dtype=torch.float64, **size):
    """A model in training mode, all of whose trained tensors are away from their start; and its dropout keys."""
    torch.manual_seed(0)
    settings = {**SIZE, **PRE_NORM.get(family, {}), **size}
    config = AutoConfig.for_model(family.split(",")[0], **settings)
    set_dropout(config, p)
    model = AutoModelForSequenceClassification.from_config(config)
    kind = PEFT_TYPE_TO_CONFIG_MAPPING[peft.PeftType(method)]
    model = get_peft_model(model, kind(task_type=TaskType.SEQ_CLS, **options)).to(dtype).train()
    for parameter in model.parameters():
        if parameter.requires_grad:
            parameter.data += 0.05 * torch.randn_like(parameter)
    return model, dropout.install(model, seed=7)


def inputs_of(order, pad, segments):
    """Tokens of the examples `order` as the model takes them: padded, or end to end."""
    generator = np.random.default_rng(0)
    texts = [generator.integers(3, 60, length) for length in LENGTHS]
    kinds = [(np.arange(length) > length // 2).astype(np.int64) for length in LENGTHS]
    named = {"input_ids": (texts, PAD)} | ({"token_type_ids": (kinds, 0)} if segments else {})
    if not pad:
        return {name: torch.from_numpy(np.concatenate([rows[i] for i in order])) for name, (rows, _) in named.items()}
    longest = max(LENGTHS[i] for i in order)
    padded = {
        name: np.stack([np.pad(rows[i], (0, longest - LENGTHS[i]), constant_values=fill) for i in order])
        for name, (rows, fill) in named.items()
    }
    padded["attention_mask"] = (np.arange(longest) < np.array([[LENGTHS[i]] for i in order])).astype(np.int64)
    return {name: torch.from_numpy(array) for name, array in padded.items()}


def results(forward, keys, batches=WHOLE, segments=False, compute_type=None):
    """Logits [N, C] by example and the gradient of all that trains; the loss weighs examples and classes unlike."""
    forward.model.zero_grad()
    logits = torch.zeros(len(LENGTHS), SIZE["num_labels"], dtype=torch.float64)
    for order in batches:
        lengths = np.array([LENGTHS[i] for i in order])
        with (
            keys.micro_batch(3, np.array(order), lengths),
            torch.autocast("cpu", compute_type or torch.bfloat16, enabled=compute_type is not None),
        ):
            found = forward(inputs_of(order, not forward.packed, segments), lengths)
        weights = torch.tensor([[1.0 + i, -2.0, 0.5 * i] for i in order], dtype=found.dtype)
        (found.log_softmax(dim=-1) * weights).sum().backward()
        logits[order] = found.detach().double()
    named = {name: p.grad.clone() for name, p in forward.model.named_parameters() if p.requires_grad}
    return logits, named


def difference(one, other):
    """Largest difference of a logit, and of a gradient's entry, each relative to the largest there is."""
    assert one[1].keys() == other[1].keys()
    scale = max(gradient.abs().max() for gradient in one[1].values())
    worst = max((one[1][name] - other[1][name]).abs().max() for name in one[1])
    return max(float((one[0] - other[0]).abs().max() / one[0].abs().max()), float(worst / scale))


@pytest.mark.parametrize("p", [0.0, 0.1])
@pytest.mark.parametrize(
    ("family", "segments"), [*itertools.product(BERTS, (False, True)), *((family, False) for family in PRE_NORM)]
)
def test_packed_is_padded_is_one_by_one(family, p, segments):
    model, keys = build(family, options={**LORA, "lora_dropout": p, "target_modules": TARGETS[family]}, p=p)
    assert why_not_packed(model) is None and not keys.unreached
    expected = results(PaddedForward(model, 1), keys, segments=segments)
    assert all(gradient.abs().max() > 0 for gradient in expected[1].values())
    forward = PackedForward(model)
    for cut, batches in CUTS.items():
        assert difference(expected, results(forward, keys, batches, segments)) < 1e-12, cut
    model.eval()
    padded, unpadded = (results(f, keys, CUTS["in two"], segments) for f in (PaddedForward(model, 1), forward))
    assert difference(padded, unpadded) < 1e-12
    assert (difference(padded, expected) > 1e-3) == (p > 0), "dropout did not drop"


@pytest.mark.parametrize("method", METHODS)
def test_every_peft_method(method):
    model, keys = build(method=method.split(" ")[0], options={**METHODS[method], **LENGTH_OF_RUN.get(method, {})})
    expected = results(PaddedForward(model, 1), keys)
    limit = (
        1e-6 if method in {"C3A", "DEFT", "FOURIERFT"} else 1e-12
    )  # these three compute in fp32 whatever they are given
    assert difference(expected, results(PackedForward(model), keys, CUTS["in two"])) < limit


PRE_NORM_PLACES = [
    {"target_modules": "all-linear"},
    {"modules_to_save": ["attn", "self_attn"], "target_modules": ["Wi", "gate_proj"]},
    {"target_modules": ["tok_embeddings", "embed_tokens", "Wo", "k_proj"]},
]


@pytest.mark.parametrize(
    ("family", "options"),
    [
        *(("roberta", options) for options in PLACES),
        *itertools.product(("modernbert", "qwen3"), PRE_NORM_PLACES),
        *((family, PRE_NORM_PLACES[0]) for family in ("modernbert, mean", "llama", "qwen2, windows")),
    ],
    ids=str,
)
def test_whatever_lora_is_put_on(family, options):
    model, keys = build(family, options={**LORA, **options})
    expected = results(PaddedForward(model, 1), keys)
    assert difference(expected, results(PackedForward(model), keys, CUTS["in two"])) < 1e-12


def projections(forward):
    """Query, key and value of each layer."""
    return [layer.projection for layer in forward._layers]


def test_joining_takes_no_memory_and_changes_no_weight():
    model, _ = build()
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    forward = PackedForward(model)
    after = model.state_dict()
    assert all(torch.equal(before[name], after[name]) for name in before)
    kept = {tensor.untyped_storage().data_ptr(): tensor.untyped_storage().nbytes() for tensor in after.values()}
    assert sum(kept.values()) == sum(tensor.untyped_storage().nbytes() for tensor in before.values())
    assert all(joined.frozen.weight.untyped_storage().data_ptr() in kept for joined in projections(forward))


IN_BF16 = {
    **{
        name: ("roberta", name.split(" ")[0], {**options, **LENGTH_OF_RUN.get(name, {})})
        for name, options in METHODS.items()
    },
    **{str(options): ("roberta", "LORA", {**LORA, **options}) for options in (PLACES[0], PLACES[6], PLACES[8])},
    **{family: (family, "LORA", {**LORA, "target_modules": targets}) for family, targets in TARGETS.items()},
}


@pytest.mark.parametrize("name", IN_BF16)
def test_every_peft_method_and_family_in_bf16(name):
    """Whatever trains gets its gradient, no further from that in fp32 than the padded forward's."""
    family, method, options = IN_BF16[name]
    model, keys = build(family, method, options, dtype=torch.float32, **LARGER)
    exact = results(PaddedForward(model, 1), keys)
    set_precision(model, torch.bfloat16)
    padded = relative(exact, results(PaddedForward(model, 1), keys, compute_type=torch.bfloat16))
    found = results(PackedForward(model), keys, CUTS["in two"], compute_type=torch.bfloat16)
    assert all(found[1][name].abs().max() > 0 for name, gradient in exact[1].items() if gradient.abs().max() > 0)
    assert all(ours < 2.5 * theirs for ours, theirs in zip(relative(exact, found), padded, strict=True))


def relative(one, other):
    """How far apart the logits are, and the gradients: L2 norms, relative."""
    gradients = [torch.cat([gradient.flatten() for gradient in each[1].values()]) for each in (one, other)]
    return [float((a - b).norm() / a.norm()) for a, b in ((one[0], other[0]), gradients)]


# --- mistakes that the tests above would see ---


def without_mask(layout):
    for group in layout.groups:
        group.bias.zero_()


def positions_run_on(layout):
    layout.positions.copy_(torch.arange(len(layout.positions)).clamp(max=60))


def first_tokens_one_too_far(layout):
    layout.starts[:-1] += 1


def padding_asks(layout):
    """Logits right and gradients wrong: what padding attends to is read by nobody, but its gradient is not 0."""
    padding = layout.attended.take >= len(layout.attended.back)
    assert padding.any()
    layout.attended.take[padding] = 0


def gradients_go_elsewhere(layout):
    layout.projected.back.copy_(layout.projected.back.flip(0))


def gradients_of_the_last_layer_go_elsewhere(layout):
    layout.whole.back.copy_(layout.whole.back.flip(0))


MISTAKES = {
    without_mask: "logits", positions_run_on: "logits", first_tokens_one_too_far: "logits",
    padding_asks: "gradients", gradients_go_elsewhere: "gradients",
    gradients_of_the_last_layer_go_elsewhere: "gradients",
}  # fmt: skip


@pytest.mark.parametrize("mistake", MISTAKES)
def test_a_wrong_layout_would_be_seen(mistake, monkeypatch):
    # without dropout, whose masks would hide what padding asks
    model, keys = build(options={**LORA, "lora_dropout": 0.0}, p=0.0)
    expected = results(PaddedForward(model, 1), keys)

    def wrong(*given):
        layout = lay_out(*given)
        mistake(layout)
        return layout

    monkeypatch.setattr(packed, "lay_out", wrong)
    found = results(PackedForward(model), keys)
    assert difference(expected, found) > 1e-4
    same_logits = (found[0] - expected[0]).abs().max() < 1e-12
    assert same_logits == (MISTAKES[mistake] == "gradients")


def test_a_relative_bias_one_bucket_off_would_be_seen(monkeypatch):
    model, keys = build("mpnet", options={**LORA, "target_modules": TARGETS["mpnet"]})
    expected = results(PaddedForward(model, 1), keys)
    bucket = MPNetEncoder.relative_position_bucket
    monkeypatch.setattr(
        MPNetEncoder, "relative_position_bucket", lambda *args, **sizes: (bucket(*args[1:], **sizes) + 1) % 32
    )
    assert difference(expected, results(PackedForward(model), keys)) > 1e-4


PRE_NORM_MISTAKES = {
    "no window": ("modernbert", {"look_around": lambda layout, reach: layout}),
    "the window is too wide": ("modernbert", {"look_around": lambda layout, reach: attention.look_around(layout, 5)}),
    "one theta for all layers": (
        "modernbert, mean", {"_rotary": lambda *given, **how: ROTARY_OF(*given[:2], "full_attention", **how)}
    ),
    "sees what follows": ("llama", {"look_back": lambda layout, window: layout}),
    "the window is too narrow": (
        "qwen2, windows", {"look_back": lambda layout, window: attention.look_back(layout, window and window - 1)}
    ),
}  # fmt: skip
ROTARY_OF = prenorm._rotary


@pytest.mark.parametrize("mistake", PRE_NORM_MISTAKES)
def test_a_mistake_of_pre_norm_layers_would_be_seen(mistake, monkeypatch):
    family, wrong = PRE_NORM_MISTAKES[mistake]
    model, keys = build(family, options={**LORA, "target_modules": TARGETS[family]})
    expected = results(PaddedForward(model, 1), keys)
    for name, function in wrong.items():
        monkeypatch.setattr(prenorm, name, function)
    assert difference(expected, results(PackedForward(model), keys)) > 1e-4


@pytest.mark.parametrize("method", ["turn", "turn_back"])
@pytest.mark.parametrize("family", ["modernbert", "qwen3"])
def test_positions_that_do_not_turn_would_be_seen(family, method, monkeypatch):
    model, keys = build(family, options={**LORA, "target_modules": TARGETS[family]})
    expected = results(PaddedForward(model, 1), keys)
    monkeypatch.setattr(attention.Rotary, method, lambda rotary, x: None)
    found = results(PackedForward(model), keys)
    assert difference(expected, found) > 1e-4
    assert ((found[0] - expected[0]).abs().max() < 1e-12) == (method == "turn_back")


WRITTEN_OUT = [
    attention._Attention, attention._Gather, products._Product, masks._Drop,
]  # fmt: skip


@pytest.mark.parametrize("function", WRITTEN_OUT)
def test_a_wrong_gradient_would_be_seen(function, monkeypatch):
    """Each function whose gradient is written out is in use here, and its gradient counts."""
    model, keys = build()
    expected = results(PaddedForward(model, 1), keys)
    right = function.backward

    def wrong(ctx, gradient):
        first, *others = right(ctx, gradient)
        return first if first is None else 1.01 * first, *others

    monkeypatch.setattr(function, "backward", staticmethod(wrong))
    found = results(PackedForward(model), keys)
    assert (found[0] - expected[0]).abs().max() < 1e-12
    assert difference(expected, found) > 1e-4


# --- the layout ---


@pytest.mark.parametrize("seed", range(20))
def test_the_layout_puts_each_token_in_one_place(seed):
    generator = np.random.default_rng(seed)
    lengths = np.sort(generator.integers(1, 60, generator.integers(1, 40)))[::-1].copy()
    layout = lay_out(lengths, 1, torch.device("cpu"), torch.float32)
    assert layout.starts.tolist() == [0, *np.cumsum(lengths)[:-1]]
    assert layout.positions.tolist() == list(itertools.chain(*map(range, lengths)))
    assert [group.first for group in layout.groups] == [0, *np.cumsum([group.size for group in layout.groups])[:-1]]
    assert sum(group.size for group in layout.groups) == len(lengths)
    open_places = np.concatenate([(group.bias == 0).flatten().numpy() for group in layout.groups])
    outputs = layout.attended
    # query and key share their places: what is open for attention are the places of tokens
    assert np.flatnonzero(open_places).tolist() == outputs.back.tolist()
    assert outputs.take[outputs.back].tolist() == list(range(lengths.sum()))
    assert set(outputs.take[~torch.from_numpy(open_places)].tolist()) <= {lengths.sum()}


@pytest.mark.parametrize("seed", range(20))
def test_groups_cost_the_least_that_groups_can(seed):
    generator = np.random.default_rng(seed)
    lengths, cost = generator.integers(1, 12, generator.integers(1, 9)), float(generator.integers(0, 200))
    if seed % 4:
        lengths = np.sort(lengths)[::-1]

    def cost_of(sizes):
        parts = np.split(lengths, np.cumsum(sizes)[:-1])
        return sum(cost + len(part) * int(part.max()) ** 2 for part in parts)

    ways = itertools.product([False, True], repeat=len(lengths) - 1)
    every = [np.diff([0, *np.flatnonzero(way) + 1, len(lengths)]) for way in ways]
    sizes = group_sizes(lengths, cost)
    assert sum(sizes) == len(lengths) and min(sizes) > 0
    assert cost_of(sizes) == min(map(cost_of, every))


def test_what_cannot_be_packed_says_why():
    model, _ = build()
    decoder = copy.deepcopy(model)
    decoder.get_base_model().config.is_decoder = True
    assert "decoder" in why_not_packed(decoder)
    other = copy.deepcopy(model)
    other.get_base_model().config.position_embedding_type = "relative_key"
    assert "relative_key" in why_not_packed(other)
    for options in (
        {"target_modules": ["q", "relative_attention_bias"]},
        {"modules_to_save": ["relative_attention_bias"]},
    ):
        biased, _ = build("mpnet", options={**LORA, "target_modules": ["q"], **options})
        assert "relative_attention_bias" in why_not_packed(biased)
    for kind in ("dynamic", "longrope"):
        rope = {"rope_type": kind, "rope_theta": 1e4, "factor": 2.0, "original_max_position_embeddings": 32}
        factors = {"short_factor": [1.0] * 4, "long_factor": [2.0] * 4} if kind == "longrope" else {}
        stretched, _ = build("llama", options={**LORA, "target_modules": "all-linear"}, rope_parameters=rope | factors)
        assert kind in why_not_packed(stretched)


@pytest.mark.parametrize("kind", ["linear", "llama3", "yarn"])
def test_angles_that_depend_on_the_position_alone_are_packed(kind):
    bounds = {"low_freq_factor": 1.0, "high_freq_factor": 4.0} if kind == "llama3" else {}
    rope = {"rope_type": kind, "rope_theta": 1e4, "factor": 4.0, "original_max_position_embeddings": 8, **bounds}
    model, keys = build("llama", options={**LORA, "target_modules": "all-linear"}, rope_parameters=rope)
    assert why_not_packed(model) is None
    expected = results(PaddedForward(model, 1), keys)
    assert difference(expected, results(PackedForward(model), keys, CUTS["in two"])) < 1e-12


def test_a_decoder_reads_the_last_token_that_is_not_padding():
    """Some tokenizers end each text with the token that is also padding. An example may be nothing else."""
    model, keys = build("qwen3", options={**LORA, "target_modules": "all-linear"})
    rows, lengths = [[5, 6, PAD, 7, PAD, PAD], [8, 9, 10, PAD], [11, 12, 13], [PAD, PAD]], np.array([6, 4, 3, 2])
    padded = torch.tensor([row + [PAD] * (6 - len(row)) for row in rows])
    mask = (torch.arange(6) < torch.tensor(lengths)[:, None]).long()
    with torch.no_grad():
        with keys.micro_batch(0, np.arange(4), lengths):
            expected = PaddedForward(model, PAD)({"input_ids": padded, "attention_mask": mask}, lengths)
        with keys.micro_batch(0, np.arange(4), lengths):
            found = PackedForward(model)({"input_ids": torch.tensor(list(itertools.chain(*rows)))}, lengths)
    assert (found - expected).abs().max() < 1e-12
