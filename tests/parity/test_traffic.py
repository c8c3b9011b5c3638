"""What crosses the network in a step: the gradient of what trains, once, and a few numbers."""

from tests.harness.ranks import call_on_ranks
from tests.parity.ranks import traffic

SETTINGS = (
    "--optim.max_steps", "4", "--batch.size", "20", "--batch.max_tokens", "45", "--evaluation.every_steps", "2",
    "--run.name", "traffic",
)  # fmt: skip
FEW = 9  # the loss, the numbers of broken losses and of ranks short of memory, and one for each of six signals


def test_a_step_sends_one_gradient_and_a_few_numbers(parity_arguments):
    for steps, others, num_trained, num_scored in call_on_ranks(
        2, traffic, parity_arguments("traffic", 0.1, *SETTINGS)
    ):
        assert num_trained > 1000
        assert len(steps) == 4
        for sizes in steps:
            assert sorted(size > FEW for size in sizes) == [False, True]
            assert max(sizes) == num_trained
        assert max(others) <= num_scored, "an evaluation sends its scores, nothing else sends anything large"
        assert sum(size > FEW for size in others) == 2 * 2  # logits and counts, in two evaluations
