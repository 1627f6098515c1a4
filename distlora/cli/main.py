"""The command line: `distlora train RECIPE [dotted.key=value …]` and the other verbs."""

from collections.abc import Sequence

from distlora.cli.ending import INTERRUPTED, TRAINING_ERROR, USER_ERROR, end
from distlora.cli.parser import parse
from distlora.cli.verbs import COMMANDS
from distlora.errors import TrainingError, UserError


def main(arguments: Sequence[str] | None = None) -> int:
    """Runs one verb and returns its exit code.

    0: done. 1: training failed, or the doctor found a failure. 2: a mistake of the user, told in one
    sentence. 75: the run was asked to stop, and the same command continues it. 130: interrupted.
    """
    options = parse(arguments)
    try:
        return COMMANDS[options.verb](options) or 0
    except UserError as error:
        return end(error, USER_ERROR)
    except PermissionError as error:
        return end(UserError(f"{error.filename or 'a file'}: permission denied"), USER_ERROR)
    except TrainingError as error:
        return end(error, TRAINING_ERROR)
    except KeyboardInterrupt:
        return INTERRUPTED
