"""What every test shares: one thread, so that results do not depend on the machine and ranks do not fight for its cores; and
which tests stay together where the suite runs in several processes."""

import pytest
import torch

torch.set_num_threads(1)


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """A file in one process, since its tests share what is dear to make; of the distributed ones, what shares a world."""
    for item in items:
        entry = item.callspec.params.get("entry") if hasattr(item, "callspec") else None
        world = getattr(entry, "world", "")
        item.add_marker(pytest.mark.xdist_group(f"{item.path}{world}"))
