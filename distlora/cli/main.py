"""The command line: `distlora train RECIPE [dotted.key=value …]` and the other verbs."""

import argparse
import errno
import sys
from collections.abc import Sequence

from distlora.cli.ending import INTERRUPTED, TRAINING_ERROR, UNREAD, USER_ERROR, end, show_crash
from distlora.cli.output import lasting_output
from distlora.cli.parser import parse
from distlora.cli.verbs import COMMANDS
from distlora.errors import TrainingError, UserError
from distlora.files.problems import is_of_the_disk, sentence_on

#: Verbs whose only work is what they print. The others are done when their work is, whoever reads of it.
PRINTING = ("completion", "methods", "plan", "recipes", "tasks")


def main(arguments: Sequence[str] | None = None) -> int:
    """Runs one verb and returns its exit code.

    0: done. 1: training failed, or the doctor found a failure. 2: a mistake of the user, or a disk that is
    full or broken, told in one sentence. 75: the run was asked to stop, and the same command continues it.
    130: interrupted. 141: nobody reads what a verb prints whose only work that is.
    """
    sys.excepthook = show_crash
    with lasting_output() as output:
        options = parse(arguments)
        code = _run(options)
        output.flush()
        if code or output.error is None or options.verb not in PRINTING:
            return code
        if output.error.errno == errno.EPIPE:
            return UNREAD
        return end(UserError(sentence_on(output.error, "standard output")), USER_ERROR)


def _run(options: argparse.Namespace) -> int:
    try:
        return COMMANDS[options.verb](options) or 0
    except UserError as error:
        return end(error, USER_ERROR)
    except PermissionError as error:
        return end(UserError(f"{error.filename or 'a file'}: permission denied"), USER_ERROR)
    except OSError as error:
        if not is_of_the_disk(error):
            raise
        return end(UserError(sentence_on(error)), USER_ERROR)
    except TrainingError as error:
        return end(error, TRAINING_ERROR)
    except KeyboardInterrupt:
        return INTERRUPTED
