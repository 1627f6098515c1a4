"""What every test shares: one thread, so that results do not depend on the machine and ranks do not fight for
its cores; and which tests stay together where the suite runs in several processes."""

import re

import pytest
import torch

torch.set_num_threads(1)

#: What takes most of the processor time of tests/unit: files, and single tests of others. They have the mark
#: `slow`, and `launch/test.sh --fast` leaves them out.
SLOW = {
    "test_bad_steps.py",
    "test_benchmarks.py",
    "test_broken_output.py",
    "test_classifier.py",
    "test_doctor_reduction.py",
    "test_dry_run.py",
    "test_experts.py",
    "test_experts_replaced.py",
    "test_export.py",
    "test_full_disk.py",
    "test_hostile_files.py",
    "test_initialise.py",
    "test_linters.py",
    "test_merged_files.py",
    "test_old_runs.py",
    "test_peft_oracles.py",
    "test_plan.py",
    "test_probe.py",
    "test_quantized.py",
    "test_rate_search.py",
    "test_recompose.py",
    "test_report.py",
    "test_shipped_configs.py",
    "test_site.py",
    "test_train.py",
    "test_trainer_mistakes.py",
    "test_trl_trainer.py",
    "test_vocabulary.py",
    "test_a_secret_that_does_not_travel_is_kept_from_mpirun_too",
    "test_an_expression_that_never_ends_is_not_right_and_harms_nothing",
    "test_local_rows_are_read_without_the_hub_library",
    "test_offline_hub_is_named",
    "test_smollm2_speaks_english",
    "test_the_batch_of_the_quickstart_fits_the_ranks_and_what_the_user_says",
    "test_the_public_calls_stay_calls_whatever_has_been_imported",
}


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    for item in items:
        if item.path.parent.name == "unit" and {item.path.name, item.originalname} & SLOW:
            item.add_marker(pytest.mark.slow)


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
