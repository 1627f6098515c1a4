"""DeepSpeed's own reading of a config, apart from any engine."""

import logging
from collections.abc import Iterator
from contextlib import contextmanager

from pydantic import BaseModel


def read_config(config: dict) -> None:
    """Lets DeepSpeed read a config. Raises whatever DeepSpeed does."""
    with _quiet():
        from deepspeed.runtime.config import DeepSpeedConfig  # late: a second or more

        DeepSpeedConfig(config)


def deepspeed_section(title: str) -> type[BaseModel]:
    """DeepSpeed's model of a section of its config, by the name of its class."""
    from deepspeed.runtime.config_utils import DeepSpeedConfigModel

    return next(model for model in _descendants(DeepSpeedConfigModel) if model.__name__ == title)


def _descendants(cls: type[BaseModel]) -> Iterator[type[BaseModel]]:
    for child in cls.__subclasses__():
        yield child
        yield from _descendants(child)


@contextmanager
def _quiet() -> Iterator[None]:
    """DeepSpeed's remarks come when the run itself reads the config."""
    logger = logging.getLogger("DeepSpeed")
    before, logger.disabled = logger.disabled, True
    try:
        yield
    finally:
        logger.disabled = before
