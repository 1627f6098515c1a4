"""Whether this start can, and may, write into its run directory: all ranks ask after every step."""

from collections.abc import Callable
from dataclasses import dataclass, field

from distlora.cluster.lease import Lease
from distlora.engine.comm import Comm
from distlora.engine.coordination import on_main
from distlora.files.problems import WriteErrors


@dataclass
class Writing:
    """lease: on rank 0, else None; also None where nobody else can write there. errors: of this rank's
    metrics and log.
    """

    comm: Comm
    lease: Lease | None = None
    errors: WriteErrors = field(default_factory=WriteErrors)

    def agree(self) -> None:
        """Raises UserError on every rank if any of them cannot write, or if another start has taken the
        directory over. Collective.
        """
        self.comm.agree((self.lease and self.lease.problem()) or self.errors.first)

    def check(self, at_once: bool = True) -> None:
        """Raises UserError if another start has taken the directory over. For rank 0, before what it must not
        overwrite. at_once: see `Lease.problem`."""
        problem = self.lease and self.lease.problem(at_once)
        if problem:
            raise problem

    def on_main(self, what: object, action: Callable[[], object]) -> None:
        """The action on rank 0, after `check`. Collective: what either raises is raised on every rank."""

        def checked() -> None:
            self.check()
            action()

        on_main(self.comm, what, checked)

    def is_ours(self) -> bool:
        """Whether the directory is still this start's. Collective."""
        lost = self.lease is not None and self.lease.problem(at_once=True) is not None
        return not self.comm.share(lost)
