"""Errors that are printed as one line without a traceback, and their exit codes."""


class UserError(ValueError):
    """A mistake in the user's input. The message names what is wrong, where, and the remedy; the exit code is 2."""

    exit_code = 2


class RunError(RuntimeError):
    """A failure despite valid input, such as a damaged file or a full disk; the exit code is 1."""

    exit_code = 1


LOST_PEER = "another rank has ended; its own line gives the cause"  # the launch ranks it below any other message


class StoppedError(RunError):
    """A stop on request, after a save. Launchers requeue a job that exits with this code."""

    exit_code = 75  # EX_TEMPFAIL of sysexits.h


class HungError(RunError):
    """A step so long that the watchdog ended the job; the stacks of every rank are in the run's folder."""

    exit_code = 76


_BY_CODE = {kind.exit_code: kind for kind in (UserError, RunError, StoppedError, HungError)}


def from_exit_code(code: int | None, message: str) -> UserError | RunError:
    """Return the error for a process that exited with `code` and `message`; a code of None means it was killed."""
    return _BY_CODE.get(RunError.exit_code if code is None else code, RunError)(message)
