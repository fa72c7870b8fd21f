"""The command line. Handlers import their implementation when called, which keeps --help fast."""

import argparse
import errno
import os
import sys

from fusiontree.cli import bench, data, launching, machine, model, training
from fusiontree.cli.parsing import FORMAT, Parser
from fusiontree.cli.stdout import reserve_stdout, results
from fusiontree.errors import RunError, UserError, short_cause

# errors of the user's disk, permissions or paths; any other OSError is a bug
_FILE_ERRORS = {
    *(errno.ENOSPC, errno.EDQUOT, errno.EACCES, errno.EPERM, errno.EROFS, errno.EIO),
    *(errno.ENOENT, errno.EEXIST, errno.ENOTDIR, errno.EISDIR, errno.ENAMETOOLONG, errno.EMFILE, errno.ENFILE),
    *(errno.EBUSY, errno.EXDEV, errno.ELOOP, errno.ESTALE, errno.EFBIG),
}
_INTERRUPTED = "interrupted; no partial output is left under its final name"


def main(argv: list[str] | None = None, own_stdout: bool = False) -> int:
    """Run one command and return its exit code: 0, 2 for a user error, 1 for a failure of the run.

    Any other exception is a bug and keeps its traceback.

    Args:
        argv: the command's words; None: those of the process.
        own_stdout: reserve the process's standard output for results.
    """
    args = _parser().parse_args(argv)
    if own_stdout and not args.has_children:
        reserve_stdout()
    code, message, reported = 1, None, False
    try:
        code, message = _outcome(args)
    finally:
        if args.is_rank:
            from fusiontree.distributed import outcome

            reported = outcome.report(code, message)
    if message and not reported:
        rank = os.environ.get("RANK", "0")
        kind = "" if message == _INTERRUPTED else "error: "
        print(f"fusiontree: {kind}{'' if rank == '0' else f'rank {rank}: '}{message}", file=sys.stderr)
    return code


def _outcome(args: argparse.Namespace) -> tuple[int, str | None]:
    """Run the command; return its exit code and error message."""
    try:
        code: int = args.handler(args)
        results().flush()
        return code, None
    except KeyboardInterrupt:
        return 1, _INTERRUPTED
    except (UserError, RunError) as error:
        return error.exit_code, str(error)
    except BrokenPipeError:
        # the reader has closed the pipe (`| head`): discard the buffer, or flushing it at exit would raise again
        os.dup2(os.open(os.devnull, os.O_WRONLY), results().fileno())
        return 1, None
    except OSError as error:
        if error.errno not in _FILE_ERRORS:
            raise
        place = error.filename or getattr(args, "output", None) or "the output"
        return 1, f"{place}: {short_cause(error)}"


def _parser() -> argparse.ArgumentParser:
    parser = Parser(
        prog="fusiontree",
        description="Pretrain hybrid language models whose layers fuse a Mamba and an attention branch by a gate.",
        epilog="Example: fusiontree demo",
        formatter_class=FORMAT,
    )
    # is_rank: a launch waits for this process's report; has_children: they inherit standard output for their results
    parser.set_defaults(is_rank=False, has_children=False)
    commands = parser.add_subparsers(title="commands", metavar="COMMAND", required=True)
    for module in (data, training, launching, model, machine, bench):
        module.add(commands)
    return parser
