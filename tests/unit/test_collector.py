"""The garbage collector and the imports of libraries."""

import gc

import pytest

from trainer.collector import frozen_imports


@pytest.mark.parametrize("fails", [False, True])
def test_the_collector_is_off_within_and_on_again_behind_without_what_was_imported(fails):
    held = [[] for _ in range(1000)]
    try:
        with frozen_imports():
            assert not gc.isenabled()
            assert any(each is held for each in gc.get_objects())
            if fails:
                raise ImportError
    except ImportError:
        assert fails
    assert gc.isenabled()
    assert not any(each is held for each in gc.get_objects())
    gc.unfreeze()
