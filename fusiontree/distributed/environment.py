"""Numbers in the variables by which a launcher places a process: RANK, WORLD_SIZE, LOCAL_RANK, MASTER_PORT."""

import os

from fusiontree.errors import UserError


def number(name: str, default: int, limit: int = 2**31) -> int:
    """Return the value of the variable `name`, or `default` if it is unset.

    Raises:
        UserError: it is not a number below `limit`.
    """
    value = os.environ.get(name, str(default))
    if not (value.isascii() and value.isdecimal() and len(value) < 20 and int(value) < limit):
        raise UserError(f"variable {name} is {value!r}; it must be a number below {limit}; unset it, or use `launch`")
    return int(value)
