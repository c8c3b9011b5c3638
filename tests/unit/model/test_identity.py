"""The identity of a backbone: equal for every copy, another one after any change of what it computes."""

import ast
import dataclasses
import hashlib
import json
import shutil

import pytest
import safetensors.torch
from huggingface_hub import constants
from transformers import AutoModelForMaskedLM

from trainer.config.schema import ModelConfig
from trainer.errors import UserError
from trainer.model.adapter import IDENTITY, read_adapter
from trainer.model.backbone import Backbone, Identity, check_same_backbone, find_backbone, load_weights
from trainer.model.card import loading_lines
from trainer.tasks.single_label import TASK

LABELS = ["a", "b"]
SHAPES = "backbone/config.json"
COMMIT = "0123456789abcdef0123456789abcdef01234567"


def identity(name, revision=None, recorded=None):
    return find_backbone(ModelConfig(name=str(name), revision=revision), LABELS, recorded).identity


@pytest.fixture
def folder(tiny_backbone, tmp_path):
    return shutil.copytree(tiny_backbone, tmp_path / "folder")


@pytest.fixture
def sharded(tiny_backbone, tmp_path):
    AutoModelForMaskedLM.from_pretrained(tiny_backbone).save_pretrained(tmp_path / "sharded", max_shard_size="20KB")
    for file in tiny_backbone.glob("*token*"):
        shutil.copy(file, tmp_path / "sharded")
    assert len(list((tmp_path / "sharded").glob("model-*.safetensors"))) > 2
    return tmp_path / "sharded"


@pytest.fixture
def hub(tiny_backbone, tmp_path, monkeypatch):
    """A hub's cache as a download leaves it: links to blobs, weights named by their SHA-256; no branch points there."""
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "hub"))
    place = tmp_path / "hub" / "models--acme--tiny"
    for name in ("blobs", "refs", f"snapshots/{COMMIT}"):
        (place / name).mkdir(parents=True)
    for file in tiny_backbone.iterdir():
        content = file.read_bytes()
        kind = hashlib.sha256 if file.suffix == ".safetensors" else hashlib.sha1
        blob = place / "blobs" / kind(content).hexdigest()
        blob.write_bytes(content)
        (place / "snapshots" / COMMIT / file.name).symlink_to(blob)
    return place


def flip(file):
    content = bytearray(file.read_bytes())
    content[-1] ^= 1
    file.write_bytes(content)


CHANGES = {
    "weights": lambda folder: flip(folder / "model.safetensors"),
    "config": lambda folder: edit(folder / "config.json", hidden_act="relu"),
    "weights with the same values": lambda folder: resave(folder / "model.safetensors"),
}
NO_CHANGES = {
    "another file": lambda folder: (folder / "README.md").write_text("new"),
    "weights in another format": lambda folder: (folder / "tf_model.h5").write_text("new"),
    "weights that are not read": lambda folder: resave(folder / "model.safetensors", "other.safetensors"),
    "tokenizer": lambda folder: edit(folder / "tokenizer_config.json", note="new"),
    "place": lambda folder: None,
}


def edit(file, **values):
    file.write_text(json.dumps({**json.loads(file.read_text()), **values}))


def resave(file, name=None):
    safetensors.torch.save_file(safetensors.torch.load_file(file), file.with_name(name or file.name), {"now": "1"})


@pytest.mark.parametrize("what", [*CHANGES, *NO_CHANGES])
def test_what_makes_another_backbone(tiny_backbone, folder, what, tmp_path):
    was = Identity(**json.loads(json.dumps(dataclasses.asdict(identity(tiny_backbone)))))  # as it is read back
    {**CHANGES, **NO_CHANGES}[what](folder)
    there = identity(folder)
    if what in CHANGES:
        with pytest.raises(UserError, match=f"{tmp_path} was trained on another backbone: SHA-256 of"):
            check_same_backbone(was, there, tmp_path)
    else:
        check_same_backbone(was, there, tmp_path)


@pytest.mark.parametrize("what", ["a shard", "another number of shards"])
def test_every_shard_counts(sharded, what, tmp_path):
    was = identity(sharded)
    files = sorted(file.name for file in sharded.glob("*.safetensors"))
    assert list(was.files) == ["config.json", *files]
    if what == "a shard":
        flip(sharded / files[1])
        assert identity(sharded).files[files[1]] != was.files[files[1]]
    else:
        index = sharded / "model.safetensors.index.json"
        content = json.loads(index.read_text())
        kept = {name: file for name, file in content["weight_map"].items() if file != files[1]}
        index.write_text(json.dumps({**content, "weight_map": kept}))
    with pytest.raises(UserError, match="another backbone"):
        check_same_backbone(was, identity(sharded), tmp_path)


@pytest.mark.parametrize("what", ["shard", "index", "weights"])
def test_missing_weights_are_refused(sharded, what):
    if what == "shard":
        next(sharded.glob("model-00002*")).unlink()
    if what == "index":
        (sharded / "model.safetensors.index.json").write_text("{")
    if what == "weights":
        (sharded / "model.safetensors.index.json").unlink()
    with pytest.raises(UserError, match=f"model.name: the files of {sharded} cannot be read: "):
        identity(sharded)


def test_weights_that_an_adapter_changes_are_refused(folder):
    (folder / "adapter_config.json").write_text("{}")
    with pytest.raises(UserError, match=r"adapter_config\.json"):
        identity(folder)


@pytest.mark.parametrize("revision", [None, "main", "v1.0", "refs/pr/1", COMMIT[:7]])
def test_any_revision_is_recorded_as_its_commit(hub, revision):
    (hub / "refs" / (revision or "main")).parent.mkdir(parents=True, exist_ok=True)
    (hub / "refs" / (revision or "main")).write_text(COMMIT)
    backbone = find_backbone(ModelConfig(name="acme/tiny", revision=revision), LABELS)
    assert (backbone.identity.revision, backbone.identity.commit) == (revision, COMMIT)
    assert load_weights(backbone)[0].config.num_labels == 2


def test_the_same_request_gets_the_recorded_commit(hub, tmp_path):
    was = identity("acme/tiny", COMMIT)
    was = dataclasses.replace(was, revision="v1.0")
    assert identity("acme/tiny", "v1.0", was) == was  # no such tag in the cache
    with pytest.raises(UserError, match=r"or on the hub at revision 'v2\.0'"):
        identity("acme/tiny", "v2.0", was)
    shutil.rmtree(hub / "snapshots")
    with pytest.raises(UserError, match=f"in the cache, or on the hub at commit {COMMIT}"):
        identity("acme/tiny", "v1.0", was)


def test_large_files_of_the_cache_are_not_read(hub, tiny_backbone):
    (weights,) = (file for file in (hub / "blobs").iterdir() if len(file.name) == 64)
    weights.write_bytes(b"")
    assert identity("acme/tiny", COMMIT).files == identity(tiny_backbone).files


def test_a_hub_model_without_its_weights(hub):
    (hub / "snapshots" / COMMIT / "model.safetensors").unlink()
    with pytest.raises(UserError, match=r"files of acme/tiny cannot be read: model\.safetensors is missing, not"):
        identity("acme/tiny", COMMIT)


@pytest.mark.parametrize("pairs", [False, True])
@pytest.mark.parametrize("path", ["acme/tiny", "/a b/'q'\"d\"\n```\n# x", "/ü\u2028\\n{0}", "package:a_b/model/x'y"])
def test_the_cards_lines_are_python(path, pairs):
    """Whatever a folder is called; the card's fence ends where it should."""
    commit = COMMIT if path == "acme/tiny" else None
    card = loading_lines(Backbone(path, commit, None, None, ModelConfig(name=path)), TASK, LABELS, pairs)
    lines = card.split("\n")
    assert [i for i, line in enumerate(lines) if line.startswith("```")] == [0, len(lines) - 2]
    tree = ast.parse("\n".join(lines[1:-2]))
    literals = [node.value for node in ast.walk(tree) if isinstance(node, ast.Constant)]
    wanted = ["a_b", "/model/x'y"] if path.startswith("package:") else [path]
    assert all(word in literals for word in wanted)
    assert (COMMIT in literals) == (commit is not None)


def test_ranks_compare_what_the_identity_holds(hub, folder):
    prints = [find_backbone(ModelConfig(name="acme/tiny", revision=COMMIT), LABELS).identity.fingerprint]
    prints.append(find_backbone(ModelConfig(name=str(folder)), LABELS).identity.fingerprint)
    flip(folder / "model.safetensors")
    prints.append(find_backbone(ModelConfig(name=str(folder)), LABELS).identity.fingerprint)
    assert prints[0] == prints[1] != prints[2]


@pytest.mark.parametrize("damage", [b"", b"null", b"\xff"])
@pytest.mark.parametrize("name", ["adapter_model.safetensors", "labels.json", "adapter_config.json", IDENTITY, SHAPES])
def test_a_damaged_adapter_to_start_from_is_one_line(tmp_path, name, damage):
    (tmp_path / "backbone").mkdir()
    safetensors.torch.save_file({}, tmp_path / "adapter_model.safetensors")
    identity = {field.name: None for field in dataclasses.fields(Identity)}
    files = {
        "labels.json": ["a"],
        "adapter_config.json": {},
        IDENTITY: identity,
        SHAPES: {"problem_type": "regression"},
    }
    for file, value in files.items():
        (tmp_path / file).write_text(json.dumps(value))
    assert read_adapter(tmp_path).label_names == ["a"]
    (tmp_path / name).write_bytes(damage)
    with pytest.raises(UserError, match="is not the adapter of a finished run") as refusal:
        read_adapter(tmp_path)
    assert "\n" not in str(refusal.value)
