import copy
import dataclasses
import hashlib
import json
import mmap

import datasets
import numpy as np
import pytest

from tests.harness.data import WORDS
from trainer.data.rows import TextSplit, hash_texts
from trainer.data.tokens import Examples, num_windows, tokenize
from trainer.errors import UserError


@pytest.fixture(autouse=True)
def kept(cache):
    """A cache of its own for each test."""


def split_of(texts, pairs=None):
    return TextSplit("train", "here", texts, pairs, np.zeros(len(texts), dtype=np.int64), hash_texts(texts, pairs))


def example(examples, i):
    return examples.tokens[examples.offsets[i] : examples.offsets[i + 1]].tolist()


def words(count, seed=0):
    chooser = np.random.default_rng(seed)
    return [" ".join(chooser.choice(WORDS, chooser.integers(1, 30))) for _ in range(count)]


@pytest.fixture(scope="session")
def bert_tokenizer():
    from tokenizers import Tokenizer, models, pre_tokenizers, processors
    from transformers import PreTrainedTokenizerFast

    vocabulary = {word: i for i, word in enumerate(["[PAD]", "[CLS]", "[SEP]", "[UNK]", *dict.fromkeys(WORDS)])}
    tokenizer = Tokenizer(models.WordLevel(vocabulary, unk_token="[UNK]"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    tokenizer.post_processor = processors.TemplateProcessing(
        single="[CLS] $A [SEP]", pair="[CLS] $A [SEP] $B:1 [SEP]:1", special_tokens=[("[CLS]", 1), ("[SEP]", 2)]
    )
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, cls_token="[CLS]", sep_token="[SEP]", pad_token="[PAD]", unk_token="[UNK]",
        model_input_names=["input_ids", "token_type_ids", "attention_mask"],
    )  # fmt: skip


def test_a_text_without_tokens_has_one(bert_tokenizer):
    from tokenizers import Tokenizer

    bare = copy.deepcopy(bert_tokenizer)
    settings = json.loads(bare.backend_tokenizer.to_str()) | {"post_processor": None}
    bare._tokenizer = Tokenizer.from_str(json.dumps(settings))
    for pairs in (None, ["", "", "goal"]):
        examples = tokenize(split_of(["", "goal", ""], pairs), bare, 16, quiet=True)
        assert examples.lengths.tolist() == [1, 1, 1] and len(examples.tokens) == 3
        assert example(examples, 0) == [bare.unk_token_id]
        assert pairs is None or len(examples.token_types) == 3


@pytest.mark.parametrize("count", [1, 999, 1000, 1001, 10001])
def test_tokenize_equals_the_tokenizer(tiny_tokenizer, count):
    texts = words(count)
    examples = tokenize(split_of(texts), tiny_tokenizer, 16, quiet=True)
    direct = tiny_tokenizer(texts, truncation=True, max_length=16)["input_ids"]
    assert len(examples) == count and examples.token_types is None
    assert examples.lengths.tolist() == [len(ids) for ids in direct]
    assert examples.tokens.tolist() == [token for ids in direct for token in ids]
    assert examples.offsets.tolist() == [0, *np.cumsum(examples.lengths)]
    assert max(examples.lengths) == 16 or count == 1
    assert (examples.tokens.dtype, examples.offsets.dtype, examples.lengths.dtype) == (np.int32, np.int64, np.int64)


def test_tokenize_pairs_with_types(bert_tokenizer):
    left, right = words(1203, seed=1), words(1203, seed=2)
    examples = tokenize(split_of(left, right), bert_tokenizer, 20, quiet=True)
    direct = bert_tokenizer(left, right, truncation=True, max_length=20)
    assert examples.tokens.tolist() == [token for ids in direct["input_ids"] for token in ids]
    assert examples.token_types.tolist() == [kind for kinds in direct["token_type_ids"] for kind in kinds]
    assert examples.token_types.dtype == np.int8
    assert examples.lengths.max() == 20 and example(examples, 7) == direct["input_ids"][7]
    assert tokenize(split_of(left), bert_tokenizer, 20, quiet=True).token_types is None


# --- windows ---


@pytest.mark.parametrize("side", ["right", "left"])
@pytest.mark.parametrize("overlap", [0, 1, 5, 13])
def test_windows_are_the_tokenizers_own_and_cover_every_token(tiny_tokenizer, overlap, side):
    tokenizer, texts = copy.deepcopy(tiny_tokenizer), [*words(40), "", " ".join(["goal"] * 14)]
    tokenizer.truncation_side = side
    examples = tokenize(split_of(texts), tokenizer, 16, quiet=True, overlap=overlap)
    assert examples.window_length == 16 and len(examples) == len(texts)
    counts = num_windows(examples.lengths, 16)
    assert {1, 2, 3} <= {*counts} and counts[-2:].tolist() == [1, 1]
    for i, text in enumerate(texts):
        settings = {"truncation": True, "max_length": 16, "stride": overlap, "return_overflowing_tokens": True}
        direct, own = tokenizer(text, **settings)["input_ids"], example(examples, i)
        assert [own[first : first + 16] for first in range(0, len(own), 16)] == direct
        assert all(window[0] == 0 and window[-1] == 2 for window in direct), "a window has no special tokens"
        bare = [window[1:-1] for window in direct[:: 1 if side == "right" else -1]]
        joined = bare[0] + [token for window in bare[1:] for token in window[overlap:]]
        if side == "right":
            assert joined == tokenizer(text, add_special_tokens=False)["input_ids"]


def test_windows_where_all_fit_train_as_without(tiny_tokenizer, cache):
    split = split_of(words(30))
    cut, windows = (tokenize(split, tiny_tokenizer, 32, quiet=True, overlap=overlap) for overlap in (None, 8))
    assert cut.fingerprint() == windows.fingerprint()
    prints = {
        tokenize(split, tiny_tokenizer, 16, quiet=True, overlap=overlap).fingerprint() for overlap in (None, 4, 5)
    }
    assert len(prints) == 3 and len(kept_arrays(cache)) == 5


def test_windows_that_cannot_advance_are_refused(tiny_tokenizer):
    tokenize(split_of(["goal " * 30]), tiny_tokenizer, 16, quiet=True, overlap=13)
    with pytest.raises(UserError, match=r"data\.window_overlap: 14 must be below 14"):
        tokenize(split_of(["goal " * 30]), tiny_tokenizer, 16, quiet=True, overlap=14)


def kept_arrays(cache):
    return sorted(cache.glob("*.tokens"))


def test_cache_is_used_the_second_time(tiny_tokenizer, cache, monkeypatch):
    split = split_of(words(50))
    first = tokenize(split, tiny_tokenizer, 16, quiet=True)
    (folder,) = kept_arrays(cache)
    # truncation and padding of earlier calls are no part of the tokenizer
    tiny_tokenizer(["goal"], truncation=True, max_length=3, padding="max_length")
    monkeypatch.setattr(type(tiny_tokenizer), "__call__", lambda *_, **__: pytest.fail("tokenized again"))
    second = tokenize(split, tiny_tokenizer, 16, quiet=True)
    assert kept_arrays(cache) == [folder]
    assert second.fingerprint() == first.fingerprint()


@pytest.mark.parametrize(
    "change", ["text", "order", "max_length", "side", "special", "pairs", "empty pairs", "tokenizer"]
)
def test_cache_is_missed_after_a_change(tiny_tokenizer, bert_tokenizer, cache, change):
    texts = [*words(50), "goal <mask>"]
    before = tokenize(split_of(texts), tiny_tokenizer, 16, quiet=True)
    tokenizer, pairs, length = tiny_tokenizer, None, 16
    if change == "text":
        texts = [*texts[:-1], "goal"]
    if change == "order":
        texts = texts[::-1]
    if change == "max_length":
        length = 15
    if change == "side":
        tokenizer = copy.deepcopy(tiny_tokenizer)
        tokenizer.truncation_side = "left"
    if change == "special":
        tokenizer = copy.deepcopy(tiny_tokenizer)
        tokenizer.split_special_tokens = not tokenizer.split_special_tokens
    if change == "pairs":
        pairs = texts
    if change == "empty pairs":
        pairs = [""] * 51
    if change == "tokenizer":
        tokenizer = bert_tokenizer
    after = tokenize(split_of(texts, pairs), tokenizer, length, quiet=True)
    assert len(kept_arrays(cache)) == 2
    direct = tokenizer(texts, pairs, truncation=True, max_length=length)["input_ids"]
    assert after.tokens.tolist() == [token for ids in direct for token in ids]
    assert after.fingerprint() != before.fingerprint()


@pytest.mark.parametrize("name", ["tokens", "lengths", "token_types", "hashes.json"])
@pytest.mark.parametrize("damage", ["one bit", "cut", "cut late", "empty", "foreign", "longer", "absent"])
def test_damaged_array_is_made_again(bert_tokenizer, cache, name, damage):
    split = split_of(words(2500), words(2500, seed=1))
    before = tokenize(split, bert_tokenizer, 16, quiet=True).fingerprint()
    (folder,) = kept_arrays(cache)
    content = (folder / name).read_bytes()
    if damage == "absent":
        (folder / name).unlink()
    else:
        flipped = bytes([content[0] ^ 1]) + content[1:]
        cut = {
            "one bit": flipped,
            "cut": content[: len(content) // 2],
            "cut late": content[:-8],
            "empty": b"",
            "foreign": b"x" * 5000,
        }
        (folder / name).write_bytes(cut.get(damage, content + content))
    again = tokenize(split, bert_tokenizer, 16, quiet=True)
    assert again.fingerprint() == before
    assert (folder / name).read_bytes() == content
    assert kept_arrays(cache) == [folder]


def test_what_a_killed_process_left_is_removed(tiny_tokenizer, cache):
    split = split_of(words(50))
    tokenize(split, tiny_tokenizer, 16, quiet=True)
    (folder,) = kept_arrays(cache)
    folder.rename(folder.with_suffix(".part"))
    (folder.with_suffix(".part") / "tokens").write_bytes(b"half")
    examples = tokenize(split, tiny_tokenizer, 16, quiet=True)
    assert kept_arrays(cache) == [folder] and len(examples) == 50


@pytest.mark.parametrize("count", [1, 255, 256, 257, 3001])
def test_any_number_of_workers_gives_the_same_in_the_same_order(tiny_tokenizer, tmp_path, monkeypatch, count):
    prints = set()
    for workers in (1, 2, 5):
        monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / str(workers))
        prints.add(tokenize(split_of(words(count)), tiny_tokenizer, 16, quiet=True, workers=workers).fingerprint())
    assert len(prints) == 1


def test_kept_arrays_are_mapped_and_equal_those_in_memory(bert_tokenizer, cache, monkeypatch):
    split = split_of(words(1203, seed=1), words(1203, seed=2))
    monkeypatch.setattr("trainer.data.tokens.load_or_create", lambda *_: None)
    loaded = tokenize(split, bert_tokenizer, 20, quiet=True)
    monkeypatch.undo()
    mapped = tokenize(split, bert_tokenizer, 20, quiet=True)
    assert isinstance(mapped.tokens.base.obj, mmap.mmap) and loaded.tokens.base is None
    assert mapped.fingerprint() == loaded.fingerprint()
    assert [array.dtype for array in (mapped.tokens, mapped.token_types)] == [np.int32, np.int8]


AWKWARD = [
    "x",
    "goal " * 3000,
    "a\0b",
    "\U0001f600 🏴󠁧󠁢󠁥󠁮󠁧󠁿 goal",
    "e\u0301",
    "\u202eteam",
    "goal\n\tteam",
    "[SEP] </s> goal",
    "中文 goal",
]


@pytest.mark.parametrize("pairs", [None, ["", "y", "\0", "", "goal " * 3000, "", "\U0001f600", "", "x"]])
def test_awkward_texts_equal_the_tokenizers_own_call(bert_tokenizer, tiny_tokenizer, cache, pairs):
    for tokenizer in (bert_tokenizer, tiny_tokenizer):
        examples = tokenize(split_of(AWKWARD, pairs), tokenizer, 20, quiet=True)
        direct = tokenizer(AWKWARD, pairs, truncation=True, max_length=20)["input_ids"]
        assert [example(examples, i) for i in range(len(AWKWARD))] == direct


def test_fingerprint_is_that_of_the_whole_arrays(tiny_tokenizer, cache, monkeypatch):
    monkeypatch.setattr("trainer.data.tokens.HASHED_NUMBERS", 7)
    examples = tokenize(split_of(words(100)), tiny_tokenizer, 16, quiet=True)
    arrays = (examples.tokens, examples.offsets, examples.targets)
    assert examples.fingerprint() == hashlib.sha256(b"".join(array.tobytes() for array in arrays)).hexdigest()


def test_fingerprint_sees_everything_that_trains():
    base = Examples(np.arange(4), np.array([0, 2, 4]), None, np.array([0, 1]), np.array([2, 2]))
    others = [
        dataclasses.replace(base, tokens=np.array([0, 1, 2, 9])),
        dataclasses.replace(base, offsets=np.array([0, 1, 4])),
        dataclasses.replace(base, targets=np.array([1, 0])),
        dataclasses.replace(base, token_types=np.array([0, 0, 0, 1])),
        dataclasses.replace(base, token_types=np.array([0, 1, 0, 1])),
    ]
    assert len({part.fingerprint() for part in [base, *others]}) == 6
    assert dataclasses.replace(base, tokens=np.arange(4)).fingerprint() == base.fingerprint()
