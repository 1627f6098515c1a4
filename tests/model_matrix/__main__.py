"""`python -m tests.model_matrix [FILE]`: writes the table to docs/models.md, or to another file."""

import sys
from pathlib import Path

from transformers.utils import logging

from tests.model_matrix.table import DOCUMENT, matrix, page

logging.disable_progress_bar()
logging.set_verbosity_error()
target = Path(sys.argv[1]) if len(sys.argv) > 1 else DOCUMENT
target.write_text(page(matrix()))
print(target)
