"""The layout of a run's folder, and the one owner of its file names. Free of torch.

::

    runs/NAME/
      config.yaml        every value of the configuration, as the ranks read it
      metrics.jsonl      figures of updates and validations, one object per line
      layers.jsonl       figures of each layer
      incidents.jsonl    what went wrong or was out of the ordinary
      lease.json         which start of the run may write here
      attempts.json      the starts of a SLURM job
      tokenizer/         a copy of the dataset's
      logs/              output of the ranks
      checkpoints/
        latest           name of the newest checkpoint
        step-N/          DeepSpeed's files, config.yaml and:
          state.json           counters and fingerprints that a resume needs
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
    """Return the folder of the checkpoint that is saved after `step` updates."""
    return run / CHECKPOINTS / f"step-{step}"


def run_of(checkpoint: Path) -> Path:
    """Return the folder of the run that `checkpoint` belongs to."""
    return checkpoint.parent.parent


def list_checkpoints(folder: Path) -> list[Path]:
    """Return the checkpoints in `folder` (``checkpoints/``), oldest step first; unfinished ones are left out."""
    found = [path for path in folder.glob("step-*") if path.name[5:].isdigit() and path.is_dir()]
    return sorted(found, key=step_of)


def step_of(checkpoint: Path) -> int:
    """Return the number of updates before `checkpoint` was saved."""
    return int(checkpoint.name.removeprefix("step-"))


def newest_step(run: Path) -> int:
    """Return the step that ``checkpoints/latest`` names, 0 if the run has no checkpoint yet."""
    latest = run / CHECKPOINTS / LATEST
    return step_of(Path(latest.read_text().strip())) if latest.exists() else 0
