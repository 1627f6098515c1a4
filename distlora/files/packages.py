"""Python packages that may be missing."""

import importlib.util


def is_installed(package: str) -> bool:
    """Whether there is code to import. To Python any folder of that name is a package as well, such as the
    `wandb` that W&B writes its runs into.
    """
    spec = importlib.util.find_spec(package)
    return spec is not None and spec.origin is not None
