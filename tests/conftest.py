"""What every test shares: one thread, so that results do not depend on the machine and ranks do not fight for
its cores; and which tests stay together where the suite runs in several processes."""

import re

import pytest
import torch

torch.set_num_threads(1)


def pytest_addoption(parser: pytest.Parser) -> None:
    group = parser.getgroup("torture", "of the tests with the marker torture")
    group.addoption("--torture-events", default="500", help="how many, at least")
    group.addoption("--torture-minutes", default="inf", help="at most, before the last run begins")
    group.addoption("--torture-seed", default="1", help="what happens to whom")


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
