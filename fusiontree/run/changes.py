"""Changes of a run's values between its start and a resume. Free of torch."""

from collections.abc import Sequence

from fusiontree.config import RunConfig, config_differences, is_among, is_key
from fusiontree.errors import UserError

# facts of a checkpoint's data that a resume must share, in addition to the keys of the configuration
DATA, TOKENIZER_DATA = "data", "tokenizer"


def check_changes(
    before: RunConfig, config: RunConfig, allow_changed: Sequence[str], data_changes: Sequence[str] = ()
) -> list[str]:
    """Refuse to resume a run with other values, except for those that the user allows.

    Args:
        before: the configuration that the run was trained with.
        config: the configuration to resume with.
        allow_changed: dotted keys, tables of keys, `DATA` or `TOKENIZER_DATA`.
        data_changes: which of `DATA` and `TOKENIZER_DATA` differ.

    Returns:
        The keys that differ and are allowed to.

    Raises:
        UserError: other keys differ, or `allow_changed` contains an unknown key.
    """
    for key in allow_changed:
        if key not in (DATA, TOKENIZER_DATA) and not is_key(key):
            raise UserError(f"--allow-changed {key} is unknown; use a key from the error of a refused resume")
    differing = [*config_differences(before, config), *data_changes]
    refused = [key for key in differing if not is_among(key, allow_changed)]
    if refused:
        locations = ", ".join(config.data.locations.values())
        names = ", ".join(f"data (shards other than those of {locations})" if key == DATA else key for key in refused)
        options = " ".join(f"--allow-changed {key}" for key in refused)
        raise UserError(
            f"{config.run_dir} was trained with other values of {names}; restore them, set another name, or resume "
            f"with the changes: {options}"
        )
    return differing
