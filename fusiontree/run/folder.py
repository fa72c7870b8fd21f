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

from pathlib import Path

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
    found = [path for path in folder.glob("step-*") if path.name[5:].isdigit() and path.is_dir()]
    return sorted(found, key=step_of)


def step_of(checkpoint: Path) -> int:
    """Return the number of updates done when `checkpoint` was saved."""
    return int(checkpoint.name.removeprefix("step-"))


def newest_step(run: Path) -> int:
    """Return the step that ``checkpoints/latest`` names; 0 without a checkpoint.

    For status and requeueing, which must answer at once: nothing is verified.
    """
    latest = run / CHECKPOINTS / LATEST
    return step_of(Path(latest.read_text().strip())) if latest.exists() else 0
