"""The two ways a run ends early on purpose."""


class UserError(Exception):
    """A mistake of the user's, in one sentence: what is wrong, where, and what to do.

    The command line prints the sentence once, from rank 0, and exits with code 2. No traceback is shown.
    """


class TrainingError(Exception):
    """A run that must not go on (a NaN loss, a tensor that does not train), in one sentence.

    The command line prints the sentence once, from rank 0, and exits with code 1.
    """
