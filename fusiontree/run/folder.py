"""Layout and file names of a run's folder. Free of torch.

::

    runs/NAME/
      config.yaml        the complete configuration, as the ranks read it
      metrics.jsonl      figures of updates and validations, one object per line
      layers.jsonl       figures of each layer
      incidents.jsonl    failures and unusual events
      lease.json         the start of the run that may write here
      attempts.json      the attempts of a SLURM job
      tokenizer/         copy of the dataset's tokenizer
      logs/              output of the ranks
      checkpoints/
        latest           name of the newest checkpoint
        step-N/          DeepSpeed's files, config.yaml and:
          state.json           counters and fingerprints for a resume
          gates.safetensors    running mean of the gates
          manifest.json        sha256 of every other file, written last
"""

import re
from pathlib import Path

from fusiontree.files import refuse_existing

CONFIG_FILE = "config.yaml"
METRICS_FILE = "metrics.jsonl"
LAYERS_FILE = "layers.jsonl"
INCIDENTS_FILE = "incidents.jsonl"
LEASE_FILE = "lease.json"
ATTEMPTS_FILE = "attempts.json"
TOKENIZER = "tokenizer"
LOGS = "logs"
CHECKPOINTS = "checkpoints"
LATEST = "latest"
STATE_FILE = "state.json"
GATES_FILE = "gates.safetensors"
MANIFEST_FILE = "manifest.json"
_CHECKPOINT = re.compile(r"step-(0|[1-9][0-9]{0,17})")
# a start that a full disk or a signal ends before config.yaml is complete leaves at most these
_OF_A_START = re.compile(rf"{LOGS}|{re.escape(LEASE_FILE)}|\.(config\.yaml|lease\.json)\.partial-\d+")


def refuse_foreign(run: Path) -> None:
    """Raise UserError if `run` is neither a run's folder nor can become one, because it has other contents.

    A folder that a failed start has left without a configuration is completed by the next start.
    """
    names = [path.name for path in run.iterdir()] if run.is_dir() else []
    if names and all(map(_OF_A_START.fullmatch, names)):
        return
    refuse_existing(run, overwrite=True, marker=CONFIG_FILE)


def checkpoint_path(run: Path, step: int) -> Path:
    """Return the folder of the checkpoint after `step` updates."""
    return run / CHECKPOINTS / f"step-{step}"


def run_of(checkpoint: Path) -> Path:
    """Return the run's folder that contains `checkpoint`."""
    return checkpoint.parent.parent


def list_checkpoints(folder: Path) -> list[Path]:
    """Return the checkpoints in `folder` (``checkpoints/``), oldest step first, without unfinished ones.

    Resume verifies them from the newest down, so it does not depend on `newest_step`.
    """
    return sorted(filter(is_checkpoint, folder.glob("step-*")), key=step_of)


def is_checkpoint(path: Path) -> bool:
    """Return whether `path` is a folder with the name of a checkpoint; a partial checkpoint has another name."""
    return _CHECKPOINT.fullmatch(path.name) is not None and path.is_dir()


def step_of(checkpoint: Path) -> int:
    """Return the number of updates done when `checkpoint` was saved."""
    return int(checkpoint.name.removeprefix("step-"))


def newest_step(run: Path) -> int:
    """Return the step of the newest checkpoint, which ``checkpoints/latest`` names; 0 without one.

    If that file is missing, damaged or names no checkpoint, the newest is the one of the highest step. For status and
    requeueing, which must answer at once: nothing is verified.
    """
    # imported here because pydantic and rich are slow to import, and `--help` imports this module
    from fusiontree.run.state_files import DamagedError, read_line, read_or_none

    steps = {path.name: step_of(path) for path in list_checkpoints(run / CHECKPOINTS)}
    highest = max(steps.values(), default=0)

    def read_latest(path: Path) -> int:
        name = read_line(path)
        if name not in steps:
            raise DamagedError("it names no checkpoint")
        return steps[name]

    fallback = f"the newest checkpoint is step-{highest}" if steps else "there is no checkpoint"
    step = read_or_none(run / CHECKPOINTS / LATEST, read_latest, fallback)
    return highest if step is None else step
