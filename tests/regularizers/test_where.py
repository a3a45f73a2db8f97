"""The docs' table of which method runs where is what the methods do."""

import pytest

from ranks import on_ranks
from regularizers import where
from regularizers.rows import ROWS


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("setting", where.SETTINGS)
@pytest.mark.parametrize("name", ROWS)
def test_the_table_says_where_a_method_runs(name, setting):
    assert where.read()[name][setting] == where.cell(where.SETTINGS[setting], ROWS[name])


def test_the_table_says_what_runs_in_two_processes():
    expected = {name: cells["DDP"] for name, cells in where.read().items()}
    assert on_ranks(where.ddp_column) == [expected, expected]


def test_the_table_has_every_method_and_no_other():
    assert list(where.read()) == list(ROWS)
