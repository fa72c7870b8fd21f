"""A run's configuration: YAML in, one frozen and validated object out. Free of torch.

Every user error raises a UserError of one line with the problem, its place and the remedy.
"""

from fusiontree.config.deepspeed import check_deepspeed_file, deepspeed_json
from fusiontree.config.keys import KEYS, config_differences, is_among, is_key
from fusiontree.config.reading import load_config, preset_names
from fusiontree.config.run_config import RunConfig
from fusiontree.config.sections import CheckpointingConfig, HealthConfig, LossConfig, OptimizerConfig, ScheduleConfig
from fusiontree.config.text import to_yaml

__all__ = [
    "KEYS",
    "CheckpointingConfig",
    "HealthConfig",
    "LossConfig",
    "OptimizerConfig",
    "RunConfig",
    "ScheduleConfig",
    "check_deepspeed_file",
    "config_differences",
    "deepspeed_json",
    "is_among",
    "is_key",
    "load_config",
    "preset_names",
    "to_yaml",
]
