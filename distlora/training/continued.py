"""What a run has put into its checkpoints beside tensors, checked before a later start goes on from it."""

from dataclasses import dataclass, field

from distlora.checkpoints.directory import Checkpoint
from distlora.errors import UserError
from distlora.files.json_files import checked
from distlora.recipe.sections import Recipe
from distlora.training.bad_steps import Stored
from distlora.training.improvement import Improved


@dataclass(frozen=True)
class Extra:
    """The extra state. before: scores of the pretrained model. found_rate: of `train.lr: search`.
    evaluation_due: the evaluation after the step was cut short. unwritten: ends of files for which there was
    no room, by the file's name. bad_steps: what is remembered of them. improvement: of the evaluations so
    far.
    """

    before: dict[str, float]
    init_seconds: float
    found_rate: float | None = None
    evaluation_due: bool = False
    unwritten: dict[str, str] = field(default_factory=dict)
    bad_steps: Stored | None = None
    improvement: Improved | None = None


def check_extra(checkpoint: Checkpoint, recipe: Recipe) -> None:
    """Raises UserError unless a run of this recipe can go on from what the checkpoint says."""
    again = "take another checkpoint, or begin anew with --no-resume"
    try:
        extra = checked(Extra, checkpoint.extra)
    except ValueError as error:
        raise UserError(f"{checkpoint.path}: its extra state is damaged ({error}); {again}") from None
    taken = checkpoint.state.get("taken", checkpoint.step)
    if taken != checkpoint.step:
        raise UserError(f"{checkpoint.path}: it says that {taken} steps were taken; {again}")
    if recipe.train.searches_lr and not (extra.found_rate and 0 < extra.found_rate < 1e6):
        raise UserError(
            f"{checkpoint.path}: it does not say which learning rate train.lr=search has found; {again}"
        )
