"""DeepSpeed's own reading of a config, apart from any engine."""

import logging
from collections.abc import Iterator
from contextlib import contextmanager


def read_config(config: dict) -> None:
    """Lets DeepSpeed read a config. Raises whatever DeepSpeed does."""
    with _quiet():
        from deepspeed.runtime.config import DeepSpeedConfig  # late: a second or more

        DeepSpeedConfig(config)


@contextmanager
def _quiet() -> Iterator[None]:
    """DeepSpeed's remarks come when the run itself reads the config."""
    logger = logging.getLogger("DeepSpeed")
    before, logger.disabled = logger.disabled, True
    try:
        yield
    finally:
        logger.disabled = before
