"""The table of methods x families is whole and true: a tenth of its cells, another each day, runs again.

ISOTRAIN_MATRIX_PART=0..9 chooses the tenth.
"""

import datetime
import os

from tests.matrix import BEGIN, CELLS, END, METHODS, PAGE, find_verdicts, listed, render
from trainer.config.schema import NO_ADAPTER
from trainer.model.peft_options import PEFT_TYPES


def test_the_table_has_every_method_and_no_cell_that_fails():
    assert {name.partition(" ")[0] for name in METHODS} == {*PEFT_TYPES, NO_ADAPTER}
    verdicts = listed()
    assert list(verdicts) == CELLS
    assert [cell for cell, verdict in verdicts.items() if verdict.startswith("fails")] == []
    assert f"{BEGIN}{render(verdicts)}{END}" in PAGE.read_text(encoding="utf-8")


def test_a_tenth_of_the_cells(tmp_path):
    part = int(os.environ.get("ISOTRAIN_MATRIX_PART", datetime.date.today().toordinal() % 10))
    print(f"ISOTRAIN_MATRIX_PART={part}")
    cells, verdicts = CELLS[part::10], listed()
    assert find_verdicts(cells, tmp_path) == {cell: verdicts[cell] for cell in cells}
