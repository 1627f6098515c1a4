"""What transformers raises and prints while it loads: one sentence, and nothing."""

from collections.abc import Iterator
from contextlib import contextmanager

from safetensors import SafetensorError
from transformers.utils import logging as transformers_logging

from distlora.errors import UserError
from distlora.sentences import first_line

NO_TOKENIZER = "no usable tokenizer files; tokenizer.json is missing"
MISFIT = "the sizes of the weights are not those of config.json; fetch it again"


@contextmanager
def explained(path: str) -> Iterator[None]:
    """Turns what transformers raises for a bad model directory into one sentence."""
    try:
        yield
    except SafetensorError as error:
        raise UserError(
            f"model.path={path}: a weights file is broken ({first_line(error)}); fetch it again"
        ) from error
    except ImportError as error:
        what = first_line(str(error).strip())
        raise UserError(f"model.path={path}: a package is missing: {what}") from error
    except (OSError, ValueError, KeyError) as error:
        what = first_line(error)
        if "backend tokenizer" in what:
            what = NO_TOKENIZER
        elif "custom code" in what:
            what = "the model needs code of its own, which is never executed here"
        raise UserError(f"model.path={path}: {what}") from error
    except RuntimeError as error:
        if "ignore_mismatched_sizes" not in str(error):
            raise
        raise UserError(f"model.path={path}: {MISFIT}") from error


@contextmanager
def quiet() -> Iterator[None]:
    """No progress bar, and no table of new or unused heads: every rank would draw its own."""
    shown, level = transformers_logging.is_progress_bar_enabled(), transformers_logging.get_verbosity()
    transformers_logging.disable_progress_bar()
    transformers_logging.set_verbosity_error()
    try:
        yield
    finally:
        transformers_logging.set_verbosity(level)
        if shown:
            transformers_logging.enable_progress_bar()
