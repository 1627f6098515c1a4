"""Parquet files whose values cannot be had as values of Python."""

import pyarrow
import pytest
from pyarrow import parquet

from distlora.data.sources import load_rows
from distlora.errors import UserError


def saved(tmp_path, **columns):
    parquet.write_table(pyarrow.table(columns), tmp_path / "a.parquet")
    return str(tmp_path / "a.parquet")


def test_column_that_cannot_be_converted_is_named_and_the_file_not_called_damaged(tmp_path):
    times = pyarrow.array([1], pyarrow.timestamp("s", tz="Nowhere/Foo"))
    with pytest.raises(UserError, match="column 'time' of .* cannot be converted") as caught:
        load_rows(saved(tmp_path, text=pyarrow.array(["a"]), time=times), "train")
    assert "damaged" not in str(caught.value) and "remove that column" in str(caught.value)


def test_columns_of_one_name_are_named_first(tmp_path):
    table = pyarrow.Table.from_arrays([pyarrow.array(["a"]), pyarrow.array(["b"])], ["text", "text"])
    parquet.write_table(table, tmp_path / "a.parquet")
    with pytest.raises(UserError, match="two columns called 'text'"):
        load_rows(str(tmp_path / "a.parquet"), "train")
