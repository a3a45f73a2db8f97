"""The docs' table of which method runs where is what the methods do in the frameworks."""

import pytest

from integrations.where import SETTINGS
from regularizers import where
from regularizers.rows import ROWS


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("setting", SETTINGS)
@pytest.mark.parametrize("name", ROWS)
def test_the_table_says_where_a_method_runs(name, setting):
    assert where.read()[name][setting] == where.cell(SETTINGS[setting], ROWS[name])
