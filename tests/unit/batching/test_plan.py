"""The plan: each example once an epoch, each of a global batch once a step, on any number of ranks."""

import dataclasses
import itertools
from collections import Counter

import numpy as np
import pytest
import torch

from trainer.batching.collate import average_windows, collate_packed, collate_padded
from trainer.batching.order import epoch_order
from trainer.batching.plan import Plan, num_positions, share_out, split_by_tokens
from trainer.data.tokens import Examples

CPU = torch.device("cpu")
SIZES = [(300, 2), (1, 1), (1, 8), (7, 3), (8, 8), (9, 8), (17, 5), (64, 16), (101, 32), (5, 100)]


def plan_of(num_examples, batch_size, seed=3, max_tokens=64, longest=40):
    generator = np.random.default_rng(num_examples)
    return Plan(
        lengths=generator.integers(1, longest + 1, num_examples),
        weights=generator.uniform(0.5, 2.0, num_examples),
        batch_size=batch_size,
        seed=seed,
        max_tokens=max_tokens,
    )


def num_padded(plan, step, world_size):
    return sum(tokens for tokens, _ in plan.sizes(step, world_size))


def news_like_lengths(count, seed=0):
    """Token counts shaped as AG News' under the roberta-base tokenizer: median 52, mean 54, p95 82, max 279."""
    drawn = np.random.default_rng(seed).lognormal(np.log(52), 0.28, count)
    return np.clip(drawn, 10, 279).astype(np.int64)


def busiest_over_mean(lengths, world_size, batch_size):
    plan = Plan(lengths, np.ones(len(lengths)), batch_size, seed=0, max_tokens=10**9)
    ratios = []
    for step in range(len(lengths) // batch_size):
        shares = share_out(lengths[plan.global_batch(step)], world_size)
        loads = [lengths[plan.global_batch(step)][share].sum() for share in shares]
        ratios.append(max(loads) / np.mean(loads))
    return float(np.mean(ratios))


# --- epochs ---


@pytest.mark.parametrize(("num_examples", "batch_size"), SIZES)
def test_an_epoch_has_every_example_once_and_keeps_its_tail(num_examples, batch_size):
    plan = plan_of(num_examples, batch_size)
    for epoch in range(3):
        steps = range(epoch * plan.steps_per_epoch, (epoch + 1) * plan.steps_per_epoch)
        batches = [plan.global_batch(step) for step in steps]
        assert sorted(np.concatenate(batches).tolist()) == list(range(num_examples))
        assert [len(batch) for batch in batches[:-1]] == [batch_size] * (plan.steps_per_epoch - 1)
        assert len(batches[-1]) == num_examples - batch_size * (plan.steps_per_epoch - 1) > 0


def order_of(seed, epoch, num_examples):
    return epoch_order(0, num_examples, num_examples, seed, epoch).tolist()


def test_the_order_depends_on_seed_and_epoch_and_on_nothing_else():
    order = order_of(5, 2, 50)
    epoch_order.cache_clear()
    np.random.seed(1)  # noqa: NPY002 - the global state must not matter
    torch.manual_seed(1)
    assert order_of(5, 2, 50) == order
    assert order_of(6, 2, 50) != order
    assert order_of(5, 3, 50) != order
    one, other = plan_of(50, 8), plan_of(50, 8, max_tokens=41)
    assert [one.global_batch(s).tolist() for s in range(9)] == [other.global_batch(s).tolist() for s in range(9)]
    wide = Plan(one.lengths[::-1].copy(), np.ones(50), 5, one.seed, 1)
    flat = [np.concatenate([p.global_batch(s) for s in range(p.steps_per_epoch)]).tolist() for p in (one, wide)]
    assert flat[0] == flat[1], "lengths, weights or batch size changed the order of the epoch"


def test_the_order_is_shared_and_so_cannot_be_written():
    with pytest.raises(ValueError, match="read-only"):
        epoch_order(0, 4, 4, 0, 0)[0] = 1


def test_the_order_is_a_permutation():
    for num_examples in [*range(1, 70), 1000, 2**16 - 1, 2**16, 2**16 + 1]:
        assert sorted(order_of(3, 1, num_examples)) == list(range(num_examples))


def test_any_stretch_of_a_long_order_is_found_alone():
    num_examples = 2**40 + 12345
    whole = epoch_order(10**12, 10**12 + 1000, num_examples, 3, 1)
    assert len(set(whole.tolist())) == 1000
    assert (whole.min() >= 0) and (whole.max() < num_examples)
    parts = [epoch_order(10**12 + start, 10**12 + start + 100, num_examples, 3, 1) for start in range(0, 1000, 100)]
    assert np.concatenate(parts).tolist() == whole.tolist()
    # uniform: in the mean within five standard deviations of half
    assert abs(whole.mean() / num_examples - 0.5) < 5 / np.sqrt(12 * 1000)


def test_the_order_stays_what_it_was():
    """A run continues with the batches it began with, so another version must draw the same."""
    assert order_of(42, 0, 10) == [2, 3, 7, 9, 0, 8, 4, 1, 5, 6]
    assert epoch_order(5, 8, 120_000, 42, 2).tolist() == [74083, 48005, 24604]


def chi_squared(counts):
    expected = counts.sum() / counts.size
    return float(((counts - expected) ** 2 / expected).sum())


def test_all_orders_are_equally_likely():
    orders = Counter(tuple(order_of(seed, 1, 5)) for seed in range(3_000))
    counts = np.array([orders[order] for order in itertools.permutations(range(5))])
    assert chi_squared(counts) < 183, "119 degrees of freedom: above 183 has a chance below 1e-4"


@pytest.mark.parametrize("num_examples", [1000, 4096, 5000])
def test_neighbours_in_the_order_are_strangers(num_examples):
    """In place and in bits: neither an example's place nor the example before it says anything about it."""
    order = np.array(order_of(5, 0, num_examples)) / num_examples
    bound = 5 / np.sqrt(num_examples)
    for shift in (1, 2, 32):
        assert abs(np.corrcoef(order, np.roll(order, shift))[0, 1]) < bound
    assert abs(np.corrcoef(order, np.arange(num_examples))[0, 1]) < bound
    other = np.array(order_of(5, 1, num_examples)) / num_examples
    assert abs(np.corrcoef(order, other)[0, 1]) < bound
    assert np.mean(order == other) < 10 / num_examples
    # halves of the epoch have their share of each tenth of the examples
    counts = np.histogram(order[: num_examples // 2], bins=10, range=(0, 1))[0]
    assert np.abs(counts - num_examples / 20).max() < 5 * np.sqrt(num_examples / 40)


# --- ranks and micro-batches ---


@pytest.mark.parametrize(("num_examples", "batch_size"), SIZES)
@pytest.mark.parametrize("max_tokens", [1, 64, 200, 10**9])
def test_all_ranks_together_compute_the_global_batch_once(num_examples, batch_size, max_tokens):
    plan = plan_of(num_examples, batch_size, max_tokens=max_tokens)
    for world_size, step in itertools.product([1, 2, 3, 4, 7, 11], range(plan.steps_per_epoch + 1)):
        ranks = [plan.micro_batches(step, rank, world_size) for rank in range(world_size)]
        assert len({len(parts) for parts in ranks}) == 1, "ranks with unequal numbers of micro-batches would hang"
        assert len(ranks[0]) >= 1
        working = [part for parts in ranks for part in parts if part.weights.any()]
        fillers = [part for parts in ranks for part in parts if not part.weights.any()]
        ids = np.concatenate([part.ids for part in working])
        assert sorted(ids.tolist()) == sorted(plan.global_batch(step).tolist())
        assert (np.concatenate([part.weights for part in working]) == plan.weights[ids]).all()
        assert sum(part.weights.sum() for part in working) == pytest.approx(plan.total_weight(step), rel=1e-12)
        shortest = plan.lengths[plan.global_batch(step)].min()
        assert all(len(part.ids) == 1 and plan.lengths[part.ids[0]] == shortest for part in fillers)
        padded = sum(len(part.ids) * plan.lengths[part.ids].max() for part in working)
        assert num_padded(plan, step, world_size) == padded >= plan.num_tokens(step)
        assert all(len(p.ids) == 1 or len(p.ids) * plan.lengths[p.ids].max() <= max_tokens for p in working)


def test_a_batch_of_weightless_examples_divides_by_one():
    plan = Plan(np.full(4, 5), np.zeros(4), 2, seed=0, max_tokens=100)
    assert plan.total_weight(0) == 1.0
    assert plan_of(4, 2).total_weight(0) == plan_of(4, 2).weights[plan_of(4, 2).global_batch(0)].sum()


def test_examples_of_one_micro_batch_are_of_like_length():
    lengths = news_like_lengths(640)
    plan = Plan(lengths, np.ones(640), 64, seed=0, max_tokens=512)
    fraction = 1 - sum(map(plan.num_tokens, range(10))) / sum(num_padded(plan, s, 1) for s in range(10))
    naive = 1 - sum(map(plan.num_tokens, range(10))) / sum(64 * lengths[plan.global_batch(s)].max() for s in range(10))
    assert fraction < 0.1 < 0.3 < naive


def test_splitting_by_tokens_as_documented():
    assert split_by_tokens([5, 3, 2], 6) == [[0], [1, 2]]
    assert split_by_tokens([9, 2, 2], 4) == [[0], [1, 2]], "an example above the budget has a part of its own"
    assert split_by_tokens([], 4) == []


def test_packed_parts_are_as_few_as_can_be_and_about_equal():
    lengths = [50, 40, 30, 30, 20, 20, 10]
    assert split_by_tokens(lengths, 100, packed=True) == [[0], [1, 2], [3, 4, 5, 6]], "50, 70 and 80"
    assert split_by_tokens(lengths, 190, packed=True) == [[0, 1], [2, 3, 4, 5, 6]], "not 190 and 10"
    assert split_by_tokens(lengths, 1, packed=True) == [[i] for i in range(7)]
    assert split_by_tokens([], 4, packed=True) == []


@pytest.mark.parametrize("packed", [True, False])
@pytest.mark.parametrize("seed", range(20))
def test_parts_take_each_once_within_the_budget(seed, packed):
    generator = np.random.default_rng(seed)
    lengths = generator.integers(1, 60, generator.integers(1, 90))
    max_tokens = int(generator.integers(1, 400))
    parts = split_by_tokens(lengths, max_tokens, packed=packed)
    assert sorted(position for part in parts for position in part) == list(range(len(lengths)))
    sums = [int(lengths[part].sum() if packed else len(part) * lengths[part].max()) for part in parts]
    assert all(tokens <= max_tokens or len(part) == 1 for part, tokens in zip(parts, sums, strict=True))
    order = [lengths[position] for part in parts for position in part]
    assert order == sorted(order, reverse=True)
    if packed and max_tokens >= 2 * lengths.max():
        assert max(sums) - min(sums) <= 2 * lengths.max()


def test_sharing_out_as_documented():
    assert [share.tolist() for share in share_out(np.array([5, 3, 2, 2]), 2)] == [[0, 3], [1, 2]]
    assert [share.tolist() for share in share_out(np.array([4]), 3)] == [[0], [], []]


def test_work_is_balanced_on_lengths_like_those_of_news():
    assert busiest_over_mean(news_like_lengths(6400), world_size=4, batch_size=32) <= 1.05


# --- collate ---


@pytest.fixture
def examples():
    lengths = np.array([3, 1, 4])
    return Examples(
        tokens=np.array([10, 11, 12, 20, 30, 31, 32, 33], dtype=np.int32),
        offsets=np.array([0, 3, 4, 8]),
        token_types=np.array([0, 0, 1, 0, 0, 1, 1, 1], dtype=np.int8),
        targets=np.array([2, 0, 1]),
        lengths=lengths,
    )


def test_collate_pads_on_the_right_in_the_order_asked_for(examples):
    batch = collate_padded(examples, np.array([2, 0, 1]), np.array([0.5, 1.0, 2.0]), CPU, 9, left=False)
    assert batch.inputs["input_ids"].tolist() == [[30, 31, 32, 33], [10, 11, 12, 9], [20, 9, 9, 9]]
    assert batch.inputs["attention_mask"].tolist() == [[1, 1, 1, 1], [1, 1, 1, 0], [1, 0, 0, 0]]
    assert batch.inputs["token_type_ids"].tolist() == [[0, 1, 1, 1], [0, 0, 1, 0], [0, 0, 0, 0]]
    assert {tensor.dtype for tensor in batch.inputs.values()} == {torch.int64}
    assert batch.targets.tolist() == [1, 2, 0]
    assert batch.weights.tolist() == [0.5, 1.0, 2.0]
    assert batch.weights.dtype == torch.float64
    assert batch.ids.tolist() == [2, 0, 1]
    assert batch.lengths.tolist() == [4, 3, 1]


def test_collate_packs_end_to_end_in_the_order_asked_for(examples):
    batch = collate_packed(examples, np.array([2, 0, 1]), np.ones(3), CPU)
    assert {name: tensor.tolist() for name, tensor in batch.inputs.items()} == {
        "input_ids": [30, 31, 32, 33, 10, 11, 12, 20],
        "token_type_ids": [0, 1, 1, 1, 0, 0, 1, 0],
    }
    assert {tensor.dtype for tensor in batch.inputs.values()} == {torch.int64}
    assert batch.targets.tolist() == [1, 2, 0]
    assert batch.lengths.tolist() == [4, 3, 1]


# --- windows ---


@pytest.fixture
def documents():
    """Three examples of windows of 4 tokens: 2 windows, 1 window and 3 windows."""
    lengths = np.array([6, 3, 9])
    return Examples(np.arange(18, dtype=np.int32), np.array([0, 6, 9, 18]), None, np.arange(3), lengths, 4)


def test_collate_puts_all_windows_of_an_example_in_its_batch(documents):
    ids = np.array([2, 0, 1])
    padded = collate_padded(documents, ids, np.ones(3), CPU, 99, left=False)
    assert padded.inputs["input_ids"].tolist() == [
        [9, 10, 11, 12], [13, 14, 15, 16], [0, 1, 2, 3], [6, 7, 8, 99], [4, 5, 99, 99], [17, 99, 99, 99]
    ]  # fmt: skip
    packed = collate_packed(documents, ids, np.ones(3), CPU)
    assert packed.inputs["input_ids"].tolist() == [9, 10, 11, 12, 13, 14, 15, 16, 0, 1, 2, 3, 6, 7, 8, 4, 5, 17]
    for batch in (padded, packed):
        assert batch.lengths.tolist() == [4, 4, 4, 3, 2, 1]
        assert batch.owners.tolist() == [0, 0, 1, 2, 1, 0]
        assert batch.ids.tolist() == [2, 0, 1] and batch.targets.tolist() == [2, 0, 1] and len(batch.weights) == 3


def test_ids_of_windows_depend_on_nothing_but_example_and_window(documents):
    together = collate_packed(documents, np.array([0, 1, 2]), np.ones(3), CPU)
    assert len({*together.window_ids.tolist()}) == 6
    for i in range(3):
        alone = collate_packed(documents, np.array([i]), np.ones(1), CPU)
        assert alone.window_ids.tolist() == together.window_ids[together.owners == i].tolist()
        assert alone.window_ids[0] == i, "the first window has the masks of an example without windows"


def test_the_logits_of_an_example_are_the_mean_of_its_windows(documents):
    batch = collate_packed(documents, np.array([2, 0, 1]), np.ones(3), CPU)
    logits = torch.tensor([[3.0], [1.0], [0.5], [0.1], [7.5], [-1.0]], requires_grad=True)
    means = average_windows(batch, logits)
    assert means.tolist() == [[1.0], [4.0], [torch.tensor(0.1).item()]] and means.dtype == torch.float32
    assert average_windows(batch, logits.bfloat16()).dtype == torch.float32
    (gradient,) = torch.autograd.grad(means.sum(), logits)
    assert gradient.flatten().tolist() == pytest.approx([1 / 3, 1 / 3, 1 / 2, 1, 1 / 2, 1 / 3])
    broken = average_windows(batch, torch.tensor([[float("nan")], [1.0], [0.5], [0.1], [7.5], [-1.0]]))
    assert broken.isfinite().flatten().tolist() == [False, True, True], "the message would name another example"
    single = collate_packed(documents, np.array([1]), np.ones(1), CPU)
    assert average_windows(single, logits) is logits


def test_a_part_of_padded_windows_takes_a_row_for_each():
    lengths = [6, 3, 9, 2, 1]  # windows of 4: 2, 1, 3, 1 and 1
    assert split_by_tokens(lengths, 20, window_length=4) == [[2, 0], [1, 3, 4]]
    assert split_by_tokens(lengths, 24, window_length=4) == [[2, 0, 1], [3, 4]]
    assert split_by_tokens(lengths, 4, window_length=4) == [[2], [0], [1], [3, 4]], "the budget is below a document"
    assert num_positions(np.array([9, 6, 3]), packed=False, window_length=4) == 24
    assert num_positions(np.array([9, 6, 3]), packed=True, window_length=4) == 18
    assert split_by_tokens(lengths, 10, packed=True, window_length=4) == split_by_tokens(lengths, 10, packed=True)


def test_a_packed_plan_counts_no_padding():
    plan = plan_of(101, batch_size=32)
    packed = dataclasses.replace(plan, packed=True)
    for step in range(plan.steps_per_epoch):
        assert num_padded(packed, step, 2) == plan.num_tokens(step) < num_padded(plan, step, 2)
        parts = [part.ids for rank in range(2) for part in packed.micro_batches(step, rank, 2) if part.weights.any()]
        assert max(packed.sizes(step, 2))[0] == max(int(plan.lengths[part].sum()) for part in parts)
        assert sorted(np.concatenate(parts).tolist()) == sorted(plan.global_batch(step).tolist())


# --- when memory runs out ---


@pytest.mark.parametrize("world_size", [1, 2, 3])
def test_the_largest_micro_batch_is_over_all_ranks(world_size):
    plan = plan_of(101, batch_size=32)
    for step in range(plan.steps_per_epoch):
        parts = [part for rank in range(world_size) for part in plan.micro_batches(step, rank, world_size)]
        padded = {len(part.ids) * int(plan.lengths[part.ids].max()): len(part.ids) for part in parts}
        tokens, examples = max(plan.sizes(step, world_size))
        assert tokens == max(padded)
        assert examples >= padded[tokens]
