"""The finished run that the tests of a task look at."""

import pytest

from tests.harness.commands import changed, command


@pytest.fixture(scope="module")
def run(arguments, tmp_path_factory):
    """The folder of the uninterrupted run of the module's `arguments`, and what it said."""
    place = tmp_path_factory.mktemp("uninterrupted")
    ended = command("run", changed(arguments, run__output_dir=place), report=True)
    assert ended.code == 0, ended.stderr
    return place / "run", ended.stderr
