"""A disk that fills up while a data set is brought from the hub."""

import errno
import os

import pytest

from distlora.data.sources import load_rows
from distlora.errors import UserError


@pytest.mark.parametrize("code", [errno.ENOSPC, errno.EDQUOT, errno.EROFS])
@pytest.mark.parametrize("is_wrapped", [False, True])
def test_full_cache_is_told_as_such(monkeypatch, code, is_wrapped):
    import datasets
    from datasets.exceptions import DatasetGenerationError

    def load(path, name=None, split=None):
        full = OSError(code, os.strerror(code), "/cache/rows.arrow")
        if not is_wrapped:
            raise full
        raise DatasetGenerationError("An error occurred while generating the dataset") from full

    monkeypatch.setattr(datasets, "load_dataset", load)
    with pytest.raises(UserError) as caught:
        load_rows("org/name", "train")
    told = str(caught.value)
    assert os.strerror(code) in told and "/cache/rows.arrow" in told and "correct the name" not in told
