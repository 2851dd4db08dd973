"""The two kinds of failure that a command reports in one line (every stage -> command line)."""


class UserError(ValueError):
    """A mistake that the user can correct: bad input, bad configuration, a missing artifact.

    The message is one line that says what is wrong, why it matters and what to do; the command
    line prints it alone and exits with 2.
    """


class StageFailure(RuntimeError):
    """The work itself failed: a peer died, too much bad input, a watchdog fired.

    The command line prints the message alone and exits with 1; the details are in the logs.
    """
