"""What every test shares: one thread, so that results do not depend on the machine and ranks do not fight for
its cores; and which tests stay together where the suite runs in several processes."""

import re

import pytest
import torch

torch.set_num_threads(1)


@pytest.hookimpl(optionalhook=True)
def pytest_xdist_make_scheduler(config: pytest.Config, log):
    """A file in one process, since its tests share what is dear to make; of the parity tests, what shares a
    world.
    """
    from xdist.scheduler import LoadScopeScheduling

    class ByFileAndWorld(LoadScopeScheduling):
        def _split_scope(self, nodeid: str) -> str:
            file, _, name = nodeid.partition("::")
            world = re.search(r"-world\d", name) if file.endswith("test_parity.py") else None
            return file + (world[0] if world else "")

    return ByFileAndWorld(config, log)
