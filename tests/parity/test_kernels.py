"""The compiled kernels give what operations of torch and numpy do: masks to the bit, the rest up to bf16's rounding."""

import os
import shutil
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest
import torch

from trainer.dropout import kernels
from trainer.dropout.kernels import NotCompiled, Spans, Units, load_kernels
from trainer.dropout.masks import Draw, HostMasks, Mask, Site
from trainer.packed.attention import CompiledAttention
from trainer.packed.forward import _CompiledNorm

pytestmark = [
    pytest.mark.skipif(not torch.cpu._is_avx512_bf16_supported(), reason="a CPU without bf16 instructions"),
    pytest.mark.skipif(shutil.which("cc") is None, reason="no C compiler"),
]
ROUNDED = 2.5e-3  # relative L2 norm of an error that rounding to bf16 makes, once or twice; once it is some 1.7e-3


def apart(found, exact):
    """Relative L2 difference."""
    return float((found.double() - exact).norm() / exact.norm())


def random(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


# --- masks ---


@pytest.mark.parametrize("num_sites", [1, 4, 5, 11])
def test_masks_are_numpys_to_the_bit(num_sites):
    kinds = [Site("tokens", 48, 0.1), Site("attention", 3, 0.5), Site("pooled", 7, 0.999), Site("tokens", 1, 0.004)]
    sites = [kinds[i % len(kinds)] for i in range(num_sites)]
    draw = Draw(sites, (2**62 + 1, 2**33), np.array([0, 7, 2**40 + 3]), np.array([33, 5, 1]))
    with ThreadPoolExecutor(2) as pool:
        expected = HostMasks(draw, torch.zeros(0, dtype=torch.bool), pool)
        found = HostMasks(draw, torch.ones(len(expected.memory), dtype=torch.bool), pool, load_kernels())
    dropped = 0
    for begin, end in expected._spans.reshape(-1, 2):
        assert torch.equal(found.memory[begin:end], expected.memory[begin:end])
        dropped += int((~found.memory[begin:end]).sum())
    assert dropped > 0
    other = HostMasks(
        Draw(sites, (1, 2), draw.ids, draw.lengths), torch.zeros(0, dtype=torch.bool), None, load_kernels()
    )
    assert not torch.equal(other.memory, found.memory)


# --- residual + dropout, and LayerNorm ---


@pytest.fixture
def norm():
    norm = torch.nn.LayerNorm(96, eps=1e-6).requires_grad_(False)
    norm.weight.copy_(1 + 0.3 * random(96, seed=1))
    norm.bias.copy_(random(96, seed=2))
    return norm


@pytest.mark.parametrize("shape", [(37, 96), (1, 96), (5, 1, 96)])
@pytest.mark.parametrize("p", [0.0, 0.2])
@pytest.mark.parametrize("read", ["both", "y", "narrow"])
def test_add_and_norm(norm, shape, p, read):
    keep = random(*shape, seed=3) > -0.8
    mask = Mask(keep, 1 / (1 - p)) if p else None

    def results(type_of_x, wide, function):
        x = random(*shape, seed=4).bfloat16().to(type_of_x).requires_grad_()
        residual = (3 + random(*shape, seed=5)).to(wide).requires_grad_()
        y, narrow = function(x, residual)
        weights = random(*shape, seed=6).to(wide), random(*shape, seed=7).bfloat16().to(narrow.dtype)
        used = {"both": [0, 1], "y": [0], "narrow": [1]}[read]
        torch.autograd.backward([(y, narrow)[i] for i in used], [weights[i] for i in used])
        return y.detach(), narrow.detach(), residual.grad, x.grad

    def exact(x, residual):
        dropped = x * keep / (1 - p) if p else x
        y = torch.nn.functional.layer_norm(
            residual + dropped, (96,), norm.weight.double(), norm.bias.double(), norm.eps
        )
        return y, 1 * y

    ours = results(torch.bfloat16, torch.float32, lambda x, r: _CompiledNorm.apply(x, r, norm, mask, load_kernels()))
    expected = results(torch.float64, torch.float64, exact)
    for found, wanted, limit in zip(ours, expected, [1e-6, ROUNDED, ROUNDED, ROUNDED], strict=True):
        assert apart(found, wanted) < limit
        assert apart(1.005 * found, wanted) > limit, "too coarse to see a mistake of half a per cent"
    if p:
        assert torch.equal(ours[3] == 0, ~keep)


# --- attention ---

LENGTHS = {"short": [1, 2] * 20, "odd": [33, 17, 16, 15, 3, 1], "long": [130, 64]}


def attention_case(lengths, num_heads, size, p):
    """Queries, keys and values [T, 3 H], the gradient of the outputs, spans, units, and the mask of each example."""
    lengths, squares = np.array(lengths), np.array(lengths) ** 2
    starts, before = lengths.cumsum() - lengths, squares.cumsum() - squares
    spans = Spans(*map(torch.from_numpy, (starts, lengths, before)), int(squares.sum()), int(lengths.max()))
    width = num_heads * size
    qkv = random(lengths.sum(), 3 * width, seed=1).bfloat16()
    gradient = random(lengths.sum(), width, seed=2).bfloat16()
    keep = random(num_heads * squares.sum() + 64, seed=3) > -0.8
    places = torch.from_numpy(64 + num_heads * before)
    masks = [
        keep[place : place + num_heads * n * n].view(num_heads, n, n) for place, n in zip(places, lengths, strict=True)
    ]
    return qkv, gradient, spans, Units(keep, places, 1 / (1 - p)) if p else None, masks


def compiled_attention(case, num_heads, scaling):
    qkv, gradient, spans, units, _ = case
    x = qkv.clone().requires_grad_()
    y = CompiledAttention.apply(x, spans, num_heads, scaling, units, load_kernels())
    y.backward(gradient)
    return y.detach(), *x.grad.chunk(3, dim=1)


def exact_attention(case, num_heads, scaling):
    qkv, gradient, spans, units, masks = case
    x = qkv.double().requires_grad_()
    outputs = []
    for part, mask in zip(x.split(spans.lengths.tolist()), masks, strict=True):
        q, k, v = part.view(len(part), 3, num_heads, -1).permute(1, 2, 0, 3)
        shares = torch.softmax(q @ k.transpose(1, 2) * scaling, dim=-1)
        shares = shares * mask * units.scale if units is not None else shares
        outputs.append((shares @ v).transpose(0, 1).reshape(len(part), -1))
    y = torch.cat(outputs)
    y.backward(gradient.double())
    return y.detach(), *x.grad.chunk(3, dim=1)


@pytest.mark.parametrize("lengths", LENGTHS.values(), ids=LENGTHS)
@pytest.mark.parametrize(("num_heads", "size"), [(3, 32), (2, 64), (1, 96), (1, 160)])
@pytest.mark.parametrize("p", [0.0, 0.2])
def test_attention(lengths, num_heads, size, p):
    case = attention_case(lengths, num_heads, size, p)
    ours, exact = (each(case, num_heads, size**-0.5) for each in (compiled_attention, exact_attention))
    for found, wanted, limit in zip(ours, exact, [0.004, 0.006, 0.006, 0.006], strict=True):
        assert apart(found, wanted) < limit
        assert apart(1.01 * found, wanted) > limit, "too coarse to see a mistake of a per cent"


def test_scores_too_large_for_an_exponential_are_none():
    qkv, *others = attention_case([40, 9], 2, 32, 0.2)
    case = 40 * qkv, *others
    ours, exact = (each(case, 2, 32**-0.5) for each in (compiled_attention, exact_attention))
    assert all(found.isfinite().all() for found in ours)
    assert apart(ours[0], exact[0]) < 0.02


@pytest.mark.parametrize("value", [float("inf"), float("-inf"), float("nan")])
@pytest.mark.parametrize("part", ["query", "key", "value"])
def test_what_is_not_finite_is_not_hidden(value, part):
    qkv, *others = attention_case([40, 9], 2, 32, 0.2)
    qkv = qkv.abs()  # an infinite query finds scores of one sign only
    qkv.view(49, 3, 2, 32)[3, ["query", "key", "value"].index(part), 1, 5] = value
    ours, exact = (each((qkv, *others), 2, 32**-0.5) for each in (compiled_attention, exact_attention))
    assert torch.equal(ours[0].isfinite(), exact[0].isfinite())
    assert not ours[1][:40].isfinite().all(), "it reaches the queries' gradient in each case"
    for found, wanted in zip(ours, exact, strict=True):
        assert found[:40].isfinite().all() == wanted[:40].isfinite().all()
        assert found[40:].isfinite().all(), "the other example is as it was"


@pytest.mark.parametrize("value", [float("inf"), float("nan")])
def test_a_norm_of_what_is_not_finite_is_none(norm, value):
    x = random(5, 96).bfloat16()
    x[2, 7] = value
    for y in _CompiledNorm.apply(x, random(5, 96, seed=1), norm, None, load_kernels()):
        assert y.isnan().any(dim=1).tolist() == [False, False, True, False, False]


def test_without_a_gradient_nothing_is_kept_for_one():
    qkv, _, spans, units, _ = attention_case([5, 2], 1, 32, 0.2)
    assert load_kernels().attention(qkv, spans, 1, 1.0, units, trains=False)[1] is None
    assert load_kernels().attention(qkv, spans, 1, 1.0, units, trains=True)[1] is not None


# --- threads ---


def test_any_number_of_threads_gives_the_same_bits(norm):
    def everything(threads):
        torch.set_num_threads(threads)
        attended = compiled_attention(attention_case([40, 33, 9, 1], 3, 32, 0.2), 3, 0.2)
        x, residual, mask = random(37, 96).bfloat16(), random(37, 96, seed=1), Mask(random(37, 96, seed=2) > 0, 2.0)
        return *attended, *_CompiledNorm.apply(x, residual, norm, mask, load_kernels())

    before = torch.get_num_threads()
    try:
        one, three = everything(1), everything(3)
    finally:
        torch.set_num_threads(before)
    assert all(map(torch.equal, one, three))


# --- compiling ---


@pytest.fixture
def source(tmp_path, monkeypatch):
    """The source at a place of its own, where nothing is compiled yet."""
    copy = shutil.copy(kernels.SOURCE, tmp_path / "kernels.c")
    monkeypatch.setattr(kernels, "SOURCE", copy)
    return copy


def test_they_are_compiled_once(source, monkeypatch):
    load_kernels()
    (kept,) = (source.parent / "__pycache__").iterdir()
    monkeypatch.setenv("CC", "no-such-compiler")
    load_kernels()
    source.write_text(source.read_text() + "\n/* another */\n")
    with pytest.raises(NotCompiled, match="there is no C compiler 'no-such-compiler'"):
        load_kernels()
    monkeypatch.delenv("CC")
    load_kernels()
    assert kept in (source.parent / "__pycache__").iterdir()


@pytest.mark.parametrize("harm", ["empty", "a byte less", "its first pages", "one byte another"])
def test_a_damaged_library_is_made_again(source, harm):
    """One of which pages are missing would end the process when it is called."""
    load_kernels()
    (kept,) = (source.parent / "__pycache__").iterdir()
    content = kept.read_bytes()
    middle = len(content) // 2
    harmed = {
        "empty": b"",
        "a byte less": content[:-1],
        "its first pages": content[:12_000],
        "one byte another": content[:middle] + bytes([content[middle] ^ 1]) + content[middle + 1 :],
    }
    kept.unlink()  # this process has it in use
    kept.write_bytes(harmed[harm])
    load_kernels()
    assert kept.read_bytes() != harmed[harm] and kernels._is_whole(kept)


def test_where_nothing_can_be_kept_they_are_compiled_each_time(source):
    (source.parent / "__pycache__").write_text("no folder")
    load_kernels()
    assert sorted(os.listdir(source.parent)) == ["__pycache__", "kernels.c"]


def test_the_compiler_may_have_arguments(source, monkeypatch):
    source.write_text("#ifndef DEFINED\n#error not defined\n#endif\n" + source.read_text())
    monkeypatch.setenv("CC", "env cc -DDEFINED='a b'")
    load_kernels()


def test_a_compiler_that_hangs_is_left(source, monkeypatch):
    monkeypatch.setattr(kernels, "COMPILES_FOR", 0.1)
    monkeypatch.setenv("CC", "sh -c 'sleep 60'")
    with pytest.raises(NotCompiled, match=r"was not done in 0.1 s"):
        load_kernels()
    assert not any((source.parent / "__pycache__").iterdir())


def test_a_compiler_that_fails_is_quoted(source):
    source.write_text("#error not today\n")
    with pytest.raises(NotCompiled, match=r"fails: .*not today"):
        load_kernels()
    assert not any((source.parent / "__pycache__").iterdir())
