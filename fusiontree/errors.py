"""The two errors that reach a user as one line: no traceback, an exit code that says whose turn it is."""


class UserError(ValueError):
    """A mistake in what the user gave. The message says what, where and what to do; the command exits with 2."""

    exit_code = 2


class RunError(RuntimeError):
    """The run could not go on though the input was right (damage, a full disk); the command exits with 1."""

    exit_code = 1


LOST_PEER = "another rank has ended; its own line says why"  # said by a rank that only suffers from another's end


class StoppedError(RunError):
    """The run was asked to stop and has saved: started again it goes on from there. Launchers requeue on this code."""

    exit_code = 75  # EX_TEMPFAIL of sysexits.h


class HungError(RunError):
    """A step took so long that the watchdog ended the job; every rank's stacks lie in the run's folder."""

    exit_code = 76


_BY_CODE = {kind.exit_code: kind for kind in (UserError, RunError, StoppedError, HungError)}


def from_exit_code(code: int | None, message: str) -> UserError | RunError:
    """The error that a process which ended with `code` and said `message` stands for; None: it was killed."""
    return _BY_CODE.get(RunError.exit_code if code is None else code, RunError)(message)
