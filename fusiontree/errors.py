"""Errors that are printed as one line without a traceback, their exit codes, and the words for their causes."""

import json

_LONGEST = 200  # characters of a cause in a message


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


def short_cause(error: BaseException) -> str:
    """Return in a few words why a file or a value cannot be read, without the contents that `error` quotes."""
    if isinstance(error, UserError | RunError):
        return str(error)
    if isinstance(error, UnicodeDecodeError):
        return f"byte {error.start:,} is not {error.encoding.upper()} text"
    if isinstance(error, UnicodeEncodeError):
        return f"character {error.start:,} is not valid Unicode"
    if isinstance(error, json.JSONDecodeError):
        return f"{error.msg} at line {error.lineno:,}, column {error.colno:,}"
    if isinstance(error, KeyError) and error.args:
        return _one_line(f"no entry {error.args[0]!r}")
    if isinstance(error, TypeError | AttributeError | LookupError | AssertionError):
        return "unexpected structure"  # their messages are about Python objects
    return _message(error) or type(error).__name__


def typed_cause(error: BaseException) -> str:
    """Return the type of a third-party library's error and its message in one line."""
    line = _message(error)
    return f"{type(error).__name__}: {line}" if line else type(error).__name__


def _message(error: BaseException) -> str:
    """Return the message of an error in one line: the system's words, or pydantic's first error with its key."""
    if isinstance(error, OSError) and error.strerror:
        return error.strerror
    if isinstance(error, ValueError) and hasattr(error, "errors"):  # pydantic's ValidationError; its text is a table
        first = error.errors()[0]
        return _one_line(": ".join([".".join(map(str, first["loc"])), first["msg"]]))
    return _one_line(str(error))


def _one_line(text: str) -> str:
    """Return `text` in one line of at most `_LONGEST` characters, with control characters escaped."""
    line = " ".join(text.split()).rstrip(".")
    line = "".join(char if char.isprintable() else ascii(char)[1:-1] for char in line)
    return line if len(line) <= _LONGEST else f"{line[: _LONGEST - 1]}…"
