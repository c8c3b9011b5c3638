import pytest

from tests.unit.distributed.ranks import Ranks


@pytest.fixture
def ranks():
    ranks = Ranks()
    yield ranks
    ranks.kill()
