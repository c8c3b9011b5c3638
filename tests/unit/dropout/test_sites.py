"""Dropout keyed by (seed, step, example id, site): the same units whatever the batch, and random all the same."""

import itertools

import numpy as np
import pytest
import torch
from peft import LoraConfig, TaskType, get_peft_model
from torch import nn
from transformers import (
    AutoModelForSequenceClassification,
    BartConfig,
    BertConfig,
    DebertaV2Config,
    DistilBertConfig,
    ElectraConfig,
    GPT2Config,
    LongformerConfig,
    ModernBertConfig,
    Qwen3Config,
    RobertaConfig,
    SqueezeBertConfig,
)

from trainer.dropout import masks
from trainer.dropout import sites as dropout
from trainer.dropout.masks import Masks, Site
from trainer.dropout.sites import DropoutKeys, KeyedDropout, install

PAD, END, SEED = 1, 2, 7
SIZE = {"vocab_size": 60, "pad_token_id": PAD, "bos_token_id": 0, "eos_token_id": END, "num_labels": 3}
SHAPE = {
    "hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 24,
    "max_position_embeddings": 64,
}  # fmt: skip
RATES = {"hidden_dropout_prob": 0.1, "attention_probs_dropout_prob": 0.1}
DISTIL = {"dim": 16, "n_layers": 2, "n_heads": 2, "hidden_dim": 24, "max_position_embeddings": 64}
MODERN = {"attention_dropout": 0.1, "mlp_dropout": 0.1, "embedding_dropout": 0.1, "classifier_dropout": 0.1}
REACHED = {
    "roberta": lambda: RobertaConfig(**SIZE, **SHAPE, **RATES),
    "bert": lambda: BertConfig(**SIZE, **SHAPE, **RATES),
    "electra": lambda: ElectraConfig(**SIZE, **SHAPE, **RATES, embedding_size=16),
    "distilbert": lambda: DistilBertConfig(**SIZE, **DISTIL, dropout=0.1, attention_dropout=0.1),
    "modernbert": lambda: ModernBertConfig(
        **SIZE, **SHAPE, **MODERN, local_attention=8, cls_token_id=0, sep_token_id=2
    ),
    "gpt2": lambda: GPT2Config(**SIZE, n_embd=16, n_layer=2, n_head=2, n_positions=64),
    "qwen3": lambda: Qwen3Config(**SIZE, **SHAPE, attention_dropout=0.1, num_key_value_heads=1, head_dim=8),
}
BART = {
    "d_model": 16, "encoder_layers": 1, "decoder_layers": 1, "encoder_attention_heads": 2,
    "decoder_attention_heads": 2, "encoder_ffn_dim": 24, "decoder_ffn_dim": 24, "max_position_embeddings": 64,
}  # fmt: skip
UNREACHED = {
    "deberta-v2": lambda: DebertaV2Config(**SIZE, **SHAPE, **RATES, relative_attention=True, pos_att_type=["p2c"]),
    "bart": lambda: BartConfig(**SIZE, **BART, dropout=0.1, attention_dropout=0.1),
    # pads its input inside, so shapes do not follow the length of an example
    "longformer": lambda: LongformerConfig(**SIZE, **SHAPE, **RATES, attention_window=64),
    # keeps the tokens on the last axis
    "squeezebert": lambda: SqueezeBertConfig(**SIZE, **SHAPE, **RATES, embedding_size=16),
}
TARGETS = {
    "distilbert": ["q_lin", "v_lin"], "modernbert": ["Wqkv"], "gpt2": ["c_attn"], "qwen3": ["q_proj", "v_proj"]
}  # fmt: skip
LENGTHS = [9, 4, 13, 1, 11]


@pytest.fixture(scope="module")
def texts():
    generator = torch.Generator().manual_seed(0)
    return [torch.randint(3, 60, (length,), generator=generator) for length in LENGTHS]


def build(family):
    """A tiny model in fp64 with LoRA dropout 0.1, all of whose parameters have a gradient; and its keys."""
    torch.manual_seed(0)
    model = AutoModelForSequenceClassification.from_config(REACHED[family]())
    lora = LoraConfig(
        task_type=TaskType.SEQ_CLS,
        r=2,
        lora_dropout=0.1,
        init_lora_weights=False,
        target_modules=TARGETS.get(family, ["query", "value"]),
    )
    model = get_peft_model(model, lora).double().train()
    return model, install(model, SEED)


def logits_of(model, keys, texts, ids, step=3, padding=0, keyed_by=None):
    """Logits of the texts `ids` in one batch; `keyed_by` stands for their ids where given."""
    lengths = np.array([LENGTHS[i] for i in ids])
    input_ids = torch.full((len(ids), lengths.max() + padding), PAD)
    for row, i in enumerate(ids):
        input_ids[row, : LENGTHS[i]] = texts[i]
    mask = torch.arange(input_ids.shape[1]) < torch.tensor(lengths)[:, None]
    with keys.micro_batch(step, np.array(ids if keyed_by is None else keyed_by), lengths):
        return model(input_ids=input_ids, attention_mask=mask.long()).logits


def logits_and_gradients(model, keys, texts, batches, **how):
    """By text and by parameter, over all batches together; the loss weighs each text and class differently."""
    model.zero_grad()
    rows = {}
    for ids in batches:
        logits = logits_of(model, keys, texts, ids, **how)
        weights = torch.tensor([[1.0 + i, -2.0, 0.5 * i] for i in ids], dtype=torch.float64)
        (logits.log_softmax(dim=-1) * weights).sum().backward()
        rows.update(zip(ids, logits.detach(), strict=True))
    gradients = {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}
    return torch.stack([rows[i] for i in range(len(LENGTHS))]), gradients


def difference(one, other):
    assert one[1].keys() == other[1].keys()
    scale = max(gradient.abs().max().item() for gradient in one[1].values())
    worst = max((one[1][name] - other[1][name]).abs().max().item() for name in one[1])
    return max((one[0] - other[0]).abs().max().item(), worst / max(scale, 1.0))


CUTS = {
    "one by one": {"batches": [[0], [1], [2], [3], [4]]},
    "one by one, padded": {"batches": [[4], [3], [2], [1], [0]], "padding": 6},
    "another order": {"batches": [[4, 1, 3, 0, 2]]},
    "padded": {"batches": [[0, 1, 2, 3, 4]], "padding": 17},
    "two batches": {"batches": [[3, 2], [1, 0, 4]]},
}


# --- the same units whatever the batch ---


@pytest.mark.parametrize("family", REACHED)
def test_masks_depend_on_no_batch(family, texts):
    model, keys = build(family)
    assert not keys.unreached
    assert None not in keys.sites.values()
    kinds = {site.kind for site in keys.sites.values()}
    assert kinds == {"tokens", "attention"} | ({"pooled"} if family not in ("gpt2", "qwen3") else set())
    whole = logits_and_gradients(model, keys, texts, [[0, 1, 2, 3, 4]])
    assert all(f"lora_{part}" in " ".join(whole[1]) for part in "AB")
    for cut, how in CUTS.items():
        assert difference(whole, logits_and_gradients(model, keys, texts, **how)) < 1e-12, cut
    model.eval()
    assert difference(whole, logits_and_gradients(model, keys, texts, [[0, 1, 2, 3, 4]])) > 1e-4, "nothing was dropped"


@pytest.mark.parametrize("cut", CUTS)
def test_masks_keyed_by_the_place_in_the_batch_would_fail(cut, texts, monkeypatch):
    model, keys = build("roberta")
    keyed = keys.micro_batch
    monkeypatch.setattr(keys, "micro_batch", lambda step, ids, lengths: keyed(step, np.arange(len(ids)), lengths))
    whole = logits_and_gradients(model, keys, texts, [[0, 1, 2, 3, 4]])
    changed = difference(whole, logits_and_gradients(model, keys, texts, **CUTS[cut]))
    if cut == "padded":  # the one cut that leaves each text in its place
        assert changed < 1e-12
    else:
        assert changed > 1e-4


# --- a mask, unit by unit ---

CPU = torch.device("cpu")
KINDS = {
    "tokens": (Site("tokens", 32, 0.3), [(18, 32), (4, 9, 32), (4, 11, 32), (4, 1, 32)]),
    "tokens, not in whole words": (Site("tokens", 5, 0.3), [(18, 5), (4, 9, 5), (4, 1, 5)]),
    "attention": (Site("attention", 3, 0.3), [(4, 3, 9, 9), (4, 3, 1, 9), (2, 3, 9, 9)]),
    "pooled": (Site("pooled", 10, 0.3), [(4, 10), (2, 10)]),
    "most are dropped": (Site("pooled", 10, 0.9), [(4, 10)]),
}
IDS, IDS_LENGTHS = [0, 7, 3, 10**9], [5, 3, 9, 1]


def word(key, index):
    """SplitMix64 with Python's own integers."""
    x = (key + (index + 1) * 0x9E3779B97F4A7C15) % 2**64
    x = (x ^ (x >> 30)) * 0xBF58476D1CE4E5B9 % 2**64
    x = (x ^ (x >> 27)) * 0x94D049BB133111EB % 2**64
    return x ^ (x >> 31)


def stays(p, seed, step, example, site, position):
    """Whether a unit stays; `position`: its axes within the example."""
    key = word(word(word(word(0, seed), step), example), site)
    threshold = (round(p * 2**56) + (word(key, -1) >> 16)) >> 48
    *rows, unit = (0, 0, *position)
    row = sum(number << 20 * axis for axis, number in enumerate(reversed(rows)))
    return (word(key, (row << 20) + unit // 8) >> 8 * (unit % 8)) % 256 >= threshold


def position_of(place, shape, first):
    """The number of the example in the micro-batch that a place of a mask is of, and the place's axes within it."""
    if len(shape) != 2 or shape[0] != sum(IDS_LENGTHS):
        return first + place[0], place[1:]
    example = int(np.searchsorted(np.cumsum(IDS_LENGTHS), place[0], side="right"))
    return example, (place[0] - sum(IDS_LENGTHS[:example]), place[1])


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("seed", [SEED, 2**63 - 1])
def test_a_mask_is_a_function_of_seed_step_example_site_and_position(kind, seed):
    """At any place of a mask, whatever else is drawn with it and whichever the first example is."""
    site, shapes = KINDS[kind]
    sites = [Site("pooled", 3, 0.5), site, Site("tokens", 7, 0.1), site]
    drawn = Masks(sites, seed, 2**40, np.array(IDS), np.array(IDS_LENGTHS))
    for number, shape in itertools.product([1, 3, 1], shapes):
        first = 2 if shape[0] == 2 else 0
        keep = drawn.keep(number, shape, first, CPU)
        assert keep.shape == shape
        for place in itertools.product(*map(range, shape)):
            example, position = position_of(place, shape, first)
            assert bool(keep[place]) == stays(site.p, seed, 2**40, IDS[example], number, position), place


# --- evaluation, and outside of a keyed micro-batch ---


def test_replicated_layers_have_keys_too():
    torch.manual_seed(0)
    model = AutoModelForSequenceClassification.from_config(REACHED["bert"]())
    lora = LoraConfig(task_type=TaskType.SEQ_CLS, target_modules=["query"], layer_replication=[[0, 2], [1, 2]])
    keys = install(get_peft_model(model, lora), SEED)
    kinds = [site.kind for site in keys.sites.values()]
    assert (kinds.count("attention"), keys.unreached) == (3, [])


def test_outside_of_a_micro_batch_it_is_torchs_dropout():
    x = torch.randn(200, 50)
    ours, theirs = KeyedDropout(0.3), nn.Dropout(0.3)
    torch.manual_seed(5)
    expected = theirs(x)
    torch.manual_seed(5)
    assert torch.equal(ours(x), expected)
    assert torch.equal(ours.eval()(x), x)
    assert torch.equal(KeyedDropout(0.0)(x), x)


# --- what is out of reach says so ---


@pytest.mark.parametrize("family", UNREACHED)
def test_a_family_out_of_reach_says_so_and_still_trains(family, texts):
    torch.manual_seed(0)
    model = AutoModelForSequenceClassification.from_config(UNREACHED[family]()).train()
    keys = install(model, SEED)
    assert keys.unreached
    ended = [torch.cat([text, torch.tensor([END])]) for text in texts]
    length = len(ended[2])
    input_ids = torch.stack([torch.cat([ended[i], torch.full((length - len(ended[i]),), PAD)]) for i in (0, 2)])
    with keys.micro_batch(0, np.array([0, 2]), np.array([len(ended[0]), length])):
        logits = model(input_ids=input_ids, attention_mask=(input_ids != PAD).long()).logits
    logits.sum().backward()
    assert torch.isfinite(logits).all()


def test_any_other_random_operation_is_found():
    class Noisy(type(AutoModelForSequenceClassification.from_config(REACHED["bert"]()))):
        def forward(self, input_ids, attention_mask):
            output = super().forward(input_ids=input_ids, attention_mask=attention_mask)
            output.logits = output.logits + torch.randn_like(output.logits)
            return output

    assert install(Noisy(REACHED["bert"]()), SEED).unreached == ["randn_like"]


@pytest.mark.parametrize(
    ("shape", "site"),
    [
        ((2, 16), Site("pooled", 16, 0.1)),
        ((2, 11, 16), Site("tokens", 16, 0.1)),
        ((2, 4, 11, 11), Site("attention", 4, 0.1)),
        ((3, 11, 16), None),  # examples are not on the first axis
        ((2, 11), None),
        ((2, 16, 11), None),
        ((2, 512, 16), None),  # padded inside the model
        ((2, 4, 11, 16), None),
        ((2, 1, 4, 11, 11), None),
    ],
)
def test_a_site_is_known_by_its_shape(shape, site):
    assert dropout.PROBE_BATCH == 2
    assert dropout._site_of(torch.Size(shape), 0.1, length=11) == site


@pytest.mark.parametrize("size", [11, 12, 13])
def test_no_size_of_the_model_is_taken_for_a_length(size):
    sizes = {"hidden_size": 2 * size, "num_attention_heads": size, "intermediate_size": 12, "num_hidden_layers": 1}
    keys = install(AutoModelForSequenceClassification.from_config(BertConfig(vocab_size=60, **sizes)), SEED)
    assert [site.kind for site in keys.sites.values()] == ["tokens", "attention", "tokens", "tokens", "pooled"]
    assert [site.width for site in keys.sites.values()] == [2 * size, size, 2 * size, 2 * size, 2 * size]
    assert not keys.unreached


# --- random all the same ---


def keep_masks(p, num_examples, step=0, seed=SEED, num_sites=1, width=500):
    """Which units stay, bool [sites, examples, width], of `pooled` sites."""
    keys = DropoutKeys(seed)
    keys.sites = {("caller", 1 + call): Site("pooled", width, p) for call in range(num_sites)}
    ones = torch.ones(num_examples, width)
    with keys.micro_batch(step, np.arange(num_examples), np.full(num_examples, 4)):
        return torch.stack([masks.dropped(ones, keys.mask(ones, p, "caller")) != 0 for _ in range(num_sites)]).numpy()


@pytest.mark.parametrize("p", [0.05, 0.1, 0.3, 0.5, 0.999])
def test_keep_rate(p):
    kept = keep_masks(p, num_examples=2000)
    # five standard deviations; units of one example share a threshold, which adds the second term
    spread = 5 * np.sqrt(p * (1 - p) / kept.size + (0.25 / 256**2) / 2000)
    assert abs(kept.mean() - (1 - p)) < spread
    assert spread < 0.01 * (1 - p) or p == 0.999
    by_unit = kept.mean(axis=(0, 1))
    assert np.abs(by_unit - (1 - p)).max() < 5.5 * np.sqrt(p * (1 - p) / 2000) + 1e-12, "some unit is favoured"


def test_the_threshold_is_drawn_so_that_the_rate_is_exact_on_average():
    """p = 0.1 is no whole number of 256ths: with a fixed threshold the rate would be 25/256 or 26/256."""
    kept = keep_masks(0.1, num_examples=20_000, width=200)
    spread = 5 * np.sqrt(0.09 / kept.size + (0.24 / 256**2) / 20_000)
    assert spread < min(0.1 - 25 / 256, 26 / 256 - 0.1)
    assert abs(1 - kept.mean() - 0.1) < spread


@pytest.mark.parametrize("p", [0.1, 0.3, 0.5])
def test_the_expectation_is_kept(p):
    keys = DropoutKeys(SEED)
    keys.sites = {("caller", 1): Site("tokens", 32, p)}
    x = torch.linspace(0.5, 1.5, 20 * 32, dtype=torch.float64).reshape(20, 32)
    with keys.micro_batch(0, np.arange(3000), np.full(3000, 20)):
        many = x.expand(3000, 20, 32)
        dropped = masks.dropped(many, keys.mask(many, p, "caller"))
    values = dropped[dropped != 0] / x.expand(3000, 20, 32)[dropped != 0]
    assert torch.allclose(values, torch.full_like(values, 1 / (1 - p)))
    spread = np.sqrt(p / (1 - p) / 3000)
    assert ((dropped.mean(dim=0) / x - 1).abs() < 5.5 * spread).all()


def correlation(one, other):
    return abs(np.corrcoef(one.ravel(), other.ravel())[0, 1])


@pytest.mark.parametrize("p", [0.1, 0.5])
def test_sites_examples_steps_and_seeds_are_independent(p):
    by_site = keep_masks(p, num_examples=400, num_sites=3)
    found = {f"site {i}": by_site[i] for i in range(3)}
    found |= {f"step {step}": keep_masks(p, 400, step=step)[0] for step in (1, 2, 400)}
    found |= {f"seed {seed}": keep_masks(p, 400, seed=seed)[0] for seed in (0, SEED + 1)}
    found["next example"] = np.roll(by_site[0], 1, axis=0)
    found["next unit"] = np.roll(by_site[0], 1, axis=1)
    bound = 5 / np.sqrt(by_site[0].size) + 0.25 / 256**2 / (p * (1 - p))
    for (name, one), (other_name, other) in itertools.combinations(found.items(), 2):
        assert correlation(one, other) < bound, (name, other_name)


def test_masks_stay_what_they_were():
    """A run continues with the masks it began with. Other masks need another DRAW_FORMAT, see training/setup.py."""
    kept = keep_masks(0.5, num_examples=1, width=16)[0, 0]
    assert "".join("01"[int(unit)] for unit in kept) == "1100110011101100"
