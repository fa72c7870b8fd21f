"""The command line. Handlers parse, call and print; what they call is imported when needed, so that --help is quick."""

import argparse
import errno
import os
import sys

from fusiontree.cli import bench, data, launching, machine, model, training
from fusiontree.cli.parsing import FORMAT
from fusiontree.errors import RunError, UserError

# what a file system answers when the user's disk, rights or paths are at fault, not this program
_FILE_ERRORS = {
    *(errno.ENOSPC, errno.EDQUOT, errno.EACCES, errno.EPERM, errno.EROFS, errno.EIO),
    *(errno.ENOENT, errno.EEXIST, errno.ENOTDIR, errno.EISDIR, errno.ENAMETOOLONG, errno.EMFILE, errno.ENFILE),
    *(errno.EBUSY, errno.EXDEV, errno.ELOOP, errno.ESTALE, errno.EFBIG),
}
_INTERRUPTED = "interrupted; nothing half-written was left under a final name"


def main(argv: list[str] | None = None) -> int:
    """Run one command and return its exit code: 0, 2 for the user's mistakes, 1 for what went wrong on the way.

    Any other exception is this program's own mistake and keeps its traceback.
    """
    args = _parse(argv)
    code, message, told = 1, None, False
    try:
        code, message = _outcome(args)
    finally:
        if args.is_rank:
            from fusiontree.distributed import outcome

            told = outcome.report(code, message)
    if message and not told:
        rank = os.environ.get("RANK", "0")
        kind = "" if message == _INTERRUPTED else "error: "
        print(f"fusiontree: {kind}{'' if rank == '0' else f'rank {rank}: '}{message}", file=sys.stderr)
    return code


def _outcome(args: argparse.Namespace) -> tuple[int, str | None]:
    """The exit code of the command and the line that explains it."""
    try:
        code: int = args.handler(args)
        sys.stdout.flush()
        return code, None
    except KeyboardInterrupt:
        return 1, _INTERRUPTED
    except (UserError, RunError) as error:
        return error.exit_code, str(error)
    except BrokenPipeError:
        # the reader has left (`| head`): give what is still buffered nowhere to go, so that the exit stays silent
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 1, None
    except OSError as error:
        if error.errno not in _FILE_ERRORS:
            raise
        place = error.filename or getattr(args, "output", None) or "the output"
        return 1, f"{place}: {error.strerror}"


def _parse(argv: list[str] | None) -> argparse.Namespace:
    """The arguments; overrides may stand on either side of the options, which argparse alone does not take."""
    parser = _parser()
    args, rest = parser.parse_known_args(argv)
    if rest and not ("overrides" in args and all("=" in text and not text.startswith("-") for text in rest)):
        parser.error(f"unrecognized arguments: {' '.join(rest)}")
    if rest:
        args.overrides += rest
    return args


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="fusiontree",
        description="Pretrain hybrid language models: a Mamba and an attention branch, fused by a learned gate.",
        epilog="Example: fusiontree demo",
        formatter_class=FORMAT,
    )
    parser.set_defaults(is_rank=False)  # a rank of a launch, which is told how it ended
    commands = parser.add_subparsers(title="commands", metavar="COMMAND", required=True)
    for module in (data, training, launching, model, machine, bench):
        module.add(commands)
    return parser
