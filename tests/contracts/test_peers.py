"""The comparison with its peers compares what it says: same examples, same weights that train, right verdicts."""

import subprocess
import sys

import numpy as np
import pytest
import torch
from accelerate.state import GradientState
from transformers import RobertaConfig

from benchmarks import compare, ours, overhead, peers, workload
from tests.harness.processes import ROOT

LENGTHS = {0: 5, 0.5: 12, 0.9: 20, 1: 45}
STEPS = range(1, 3)


@pytest.fixture(scope="module")
def task(tmp_path_factory):
    folder = tmp_path_factory.mktemp("workload")
    rows = workload.generated_rows(128, LENGTHS)
    config = RobertaConfig(
        vocab_size=1100, hidden_size=16, num_hidden_layers=2, num_attention_heads=2, intermediate_size=32,
        max_position_embeddings=514, type_vocab_size=1,
    )  # fmt: skip
    workload.write_inputs(folder, config, rows, workload.word_tokenizer([text for text, _ in rows]))
    return workload.Task(folder, batch=32, precision="no", device="cpu")


@pytest.fixture(autouse=True)
def own_accumulation():
    """accelerate's state is the process's: other tests go on with theirs."""
    shared = GradientState._shared_state
    kept = dict(shared)
    yield
    shared.clear()
    shared.update(kept)


@pytest.fixture
def isotrain(task):
    return ours.Isotrain(task)


# --- who trains what --------------------------------------------------------------------------------------------------


def test_isotrain_and_its_peers_train_the_same_examples(task, isotrain, monkeypatch):
    computed = []
    right = ours.loop.train_step
    monkeypatch.setattr(ours.loop, "train_step", lambda *given: (computed.extend(given[2]), right(*given))[1])
    found = isotrain.train(STEPS)
    ids = np.concatenate([part.ids for part in computed])
    assert len(set(ids.tolist())) == len(STEPS) * task.batch == found.examples
    for kind in (peers.TrainerPeer, peers.AcceleratePeer):
        peer = kind(task)
        examples = isotrain.run.inputs.examples["train"]
        assert np.array_equal(examples.tokens, np.concatenate([one["input_ids"] for one in peer.features]))
        assert examples.targets.tolist() == [one["labels"] for one in peer.features]
        other = peer.train(STEPS)
        assert sorted(peer.collator.ids) == sorted(ids)
        assert peer.collator.ids != ids.tolist()
        assert (other.examples, other.tokens) == (found.examples, found.tokens)
        assert other.positions > found.tokens
        assert found.seconds > 0 and other.seconds > 0


def test_group_by_length_draws_its_steps_from_the_whole_pool(task):
    grouped, plain = peers.GroupedPeer(task), peers.TrainerPeer(task)
    steps = range(len(grouped.features) // task.batch)
    whole, shuffled = grouped.train(steps), plain.train(steps)
    assert sorted(grouped.collator.ids) == list(range(len(grouped.features)))
    assert whole.tokens == shuffled.tokens
    assert whole.positions < shuffled.positions
    grouped.turn = 0
    half = grouped.train(range(2))
    assert half.examples == 2 * task.batch
    assert int(np.argmax(grouped.lengths)) in grouped.collator.ids


def test_the_same_tensors_train_from_the_same_start(task, isotrain):
    for kind in peers.PEERS.values():
        peer = kind(task)
        trained = {name: p for name, p in peer.model.named_parameters() if p.requires_grad}
        assert trained.keys() == isotrain.run.learner.parameters.keys()
        before = {name: parameter.detach().clone() for name, parameter in trained.items()}
        assert all(torch.equal(before[name], p) for name, p in isotrain.run.learner.parameters.items())
        peer.train(STEPS)
        assert all(not torch.equal(before[name], parameter) for name, parameter in trained.items())
        rates = {module.p for module in peer.model.modules() if type(module) is torch.nn.Dropout}
        assert rates == {workload.DROPOUT} == {peer.model.config.attention_probs_dropout_prob}
    before = {name: parameter.detach().clone() for name, parameter in isotrain.run.learner.parameters.items()}
    isotrain.train(STEPS)
    assert all(not torch.equal(before[name], parameter) for name, parameter in isotrain.run.learner.parameters.items())


# --- nothing wrong is timed -------------------------------------------------------------------------------------------


def test_the_gradient_is_the_padded_forward_s(isotrain):
    before = {name: parameter.detach().clone() for name, parameter in isotrain.run.learner.parameters.items()}
    found = ours.parity(isotrain.run, 0)
    compare.refuse_other_numbers(found, "no")
    assert max(found.values()) < 1e-5
    assert all(torch.equal(before[name], parameter) for name, parameter in isotrain.run.learner.parameters.items())
    assert all(parameter.grad is None for parameter in isotrain.run.learner.parameters.values())


@pytest.mark.parametrize("mistake", ["other masks", "a weight"])
def test_a_wrong_gradient_is_not_timed(isotrain, monkeypatch, mistake):
    right = ours.loop.train_step

    def wrong(run, step, parts):
        if mistake == "other masks":
            return right(run, step + 1, parts)
        parts[0].weights[0] = 0.5
        return right(run, step, parts)

    monkeypatch.setattr(ours.loop, "train_step", wrong)
    found = ours.parity(isotrain.run, 0)
    assert found["gradient"] > 1e-2
    with pytest.raises(SystemExit, match="nothing was timed"):
        compare.refuse_other_numbers(found, "no")


def test_rounding_in_bf16_is_allowed_and_more_is_not():
    found = {"gradient": 0.02, "gradient_rounding": 0.01, "logits": 0.002, "logits_rounding": 0.002}
    compare.refuse_other_numbers(found, "bf16")
    for wrong in ({"gradient": 0.06, "gradient_rounding": 0.02}, {"logits": 0.006}, {"gradient": float("nan")}):
        with pytest.raises(SystemExit):
            compare.refuse_other_numbers(found | wrong, "bf16")
    with pytest.raises(SystemExit):  # fp32 has no such excuse
        compare.refuse_other_numbers(found, "no")


def test_a_contender_s_process_does_what_it_is_told(task):
    peer, own = compare.Contender(task, compare.LOOP), compare.Contender(task, compare.OURS)
    assert peer.about["tokens"] == own.about["tokens"]
    assert all(one.about["memory"]["process"] > one.about["memory"]["libraries"] > 0 for one in (peer, own))
    compare.refuse_other_numbers(own("parity"), "no")
    for what in ("train", "evaluate"):
        span = (1, 3) if what == "train" else (120, 168)  # behind the last example comes the first
        found, other = own(what, *span), peer(what, *span)
        assert (found["examples"], found["tokens"]) == (other["examples"], other["tokens"])
        assert found["examples"] == (2 * task.batch if what == "train" else 48)
        assert min(found["seconds"], found["peak"], other["seconds"], other["peak"]) > 0
    own.close()
    assert own.process.returncode == 0
    peer.process.kill()
    peer.process.wait()
    with pytest.raises(SystemExit, match=f"{compare.LOOP} failed"):
        peer("train", 1, 3)
    peer.close()


def test_the_time_outside_of_the_arithmetic_is_a_share(isotrain):
    assert 0 < overhead.share_outside(isotrain.run) < 1


# --- the workload -----------------------------------------------------------------------------------------------------


def test_the_generated_texts_have_the_lengths_of_news():
    rows = workload.generated_rows(workload.POOL)
    tokenizer = workload.word_tokenizer([text for text, _ in rows])
    lengths = np.array(list(map(len, tokenizer([text for text, _ in rows])["input_ids"])))
    assert lengths.max() == 279
    assert abs(lengths.mean() - 54) < 1
    assert np.percentile(lengths, [50, 95]).tolist() == pytest.approx([52, 82], abs=1)
    assert len({text for text, _ in rows}) == len(rows) == workload.POOL
    assert np.bincount([label for _, label in rows]).tolist() == [workload.POOL // workload.LABELS] * workload.LABELS


def test_the_weights_that_count():
    counts = {name: workload.num_layer_weights(backbone.config()) for name, backbone in workload.BACKBONES.items()}
    assert counts == {
        "roberta-base": 85_054_464, "minilm": 10_646_784, "distilbert": 42_527_232, "electra": 85_054_464,
        "mpnet": 85_054_464, "modernbert": 110_330_112,
    }  # fmt: skip


def test_the_peak_of_a_process_is_its_own_and_what_it_holds():
    """In a process of its own: this one may have held far more than it does."""
    import_it = "import numpy; from benchmarks.workload import peak_of_process as peak; before = peak(); "
    done = subprocess.run(
        [sys.executable, "-c", import_it + "held = numpy.ones(2**24); print(before, peak())"],
        cwd=ROOT, capture_output=True, text=True, check=True, timeout=120,
    )  # fmt: skip
    before, after = map(int, done.stdout.split())
    assert before + 2**26 < after < before + 2**28


# --- the numbers ------------------------------------------------------------------------------------------------------


def passes_of(*seconds, padding=2):
    return [{"seconds": s, "examples": 64, "tokens": 100, "positions": 100 * padding, "peak": 1e12} for s in seconds]


@pytest.fixture
def result():
    training = {name: passes_of(10.0, 12.0, 11.0) for name in peers.PEERS}
    training |= {compare.GROUPED: passes_of(5.6, 5.6, 5.6), compare.OURS: passes_of(3.0, 4.0, 5.0, padding=1)}
    memory = {name: {"libraries": 2**29, "process": 2**32} for name in peers.PEERS}
    return {
        "num_layer_weights": 85_054_464,
        "training": training,
        "evaluation": {compare.EVALUATION: passes_of(9.0), compare.OURS: passes_of(3.0)},
        "memory": memory | {compare.OURS: {"libraries": 2**29, "process": 2**31}},
    }


def test_ratios_are_taken_pass_by_pass(result):
    rows = compare.summarised(result)["training"]
    assert rows[compare.TRAINER]["times_as_fast"] == pytest.approx([3.0, 11 / 5, 10 / 3])
    assert rows[compare.OURS]["times_as_fast"] == [1.0, 1.0, 1.0]
    assert rows[compare.OURS]["examples_per_second"] == [16.0, 64 / 5, 64 / 3]
    assert (rows[compare.OURS]["padding"], rows[compare.TRAINER]["padding"]) == (0.0, 0.5)
    assert rows[compare.OURS]["useful_flops"][0] == 4 * 85_054_464 * 25
    assert rows[compare.OURS]["share_of_peak"][0] == pytest.approx(4 * 85_054_464 * 25 / 1e12)


def test_a_missed_target_is_named(result):
    judged = compare.verdicts(compare.summarised(result), "roberta-base", "cpu", 32)
    assert [met for met, _ in judged] == [True, False, True, True]
    assert judged[1][1].startswith("MISSED: Trainer, group_by_length: 1.40x, at least 1.5x (the other reaches")
    assert judged[3][1] == "met: memory: 0.50x, at most 0.6x"
    [(met, said)] = compare.verdicts(compare.summarised(result), "mpnet", "cpu", 32)
    assert met and said == "met: Trainer, dynamic padding: 3.00x, at least 2.5x"
    result["training"][compare.GROUPED] = passes_of(7.0, 7.0, 7.0)
    assert all(met for met, _ in compare.verdicts(compare.summarised(result), "roberta-base", "cpu", 32))
    result["memory"][compare.OURS]["process"] = 2**32
    judged = compare.verdicts(compare.summarised(result), "roberta-base", "cpu", 32)
    assert [met for met, _ in judged] == [True, True, True, False]


@pytest.mark.parametrize(("ours_seconds", "code"), [(1.0, 0), (8.0, 1)])
def test_check_decides_the_exit_code(result, monkeypatch, tmp_path, capsys, ours_seconds, code):
    result["training"][compare.OURS] = passes_of(*[ours_seconds] * 3)
    place = {"device": "CPU", "cpu": "some", "threads": 2}
    other = {"machine": place, "precision": "no", "steps_a_pass": 2, "formula": compare.FORMULA.format(1)}
    monkeypatch.setattr(compare, "run", lambda options, device: result | other)
    output = tmp_path / "results" / "found.json"
    monkeypatch.setattr("sys.argv", ["compare.py", "--device", "cpu", "--check", "--output", str(output)])
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "")
    assert compare.main() == code
    assert "useful FLOP/s = 4 N x real tokens/s" in capsys.readouterr().out
    assert output.is_file()
