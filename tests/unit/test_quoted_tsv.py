"""TSV files whose cells a program has quoted: read as they are, with one line that says so."""

import logging

import pytest

from distlora.data.sources import load_rows


def warnings_on(tmp_path, caplog, text):
    file = tmp_path / "train.tsv"
    file.write_text(text)
    with caplog.at_level(logging.WARNING):
        rows = load_rows(str(file), "train")
    return rows, [record.getMessage() for record in caplog.records]


def test_cells_quoted_by_a_program_are_told(tmp_path, caplog):
    pandas = pytest.importorskip("pandas")
    table = pandas.DataFrame({"text": ['He said "hi"', "plain", 'A "b"'], "label": [1, 0, 1]})
    rows, told = warnings_on(tmp_path, caplog, table.to_csv(sep="\t", index=False))
    assert rows[0]["text"] == '"He said ""hi"""' and rows[1]["text"] == "plain"
    assert len(told) == 1 and "train.tsv" in told[0] and "write it as CSV" in told[0]


@pytest.mark.parametrize(
    "cells",
    [
        ['"He said ""hi"""', '"Stop, he said'],
        ['"A quotation."', "plain"],
        ['a ""strange"" one'],
        ['"'],
        ['""'],
    ],
)
def test_quotation_marks_of_texts_are_not(tmp_path, caplog, cells):
    rows, told = warnings_on(tmp_path, caplog, "text\tlabel\n" + "".join(f"{cell}\t1\n" for cell in cells))
    assert [row["text"] for row in rows] == cells and told == []
