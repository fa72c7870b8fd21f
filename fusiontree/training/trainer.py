"""The training loop: fetch, update, judge, record, validate, save, roll back, stop."""

import contextlib
import logging
import statistics
from collections import Counter, deque
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import torch

from fusiontree.checkpoint import store
from fusiontree.checkpoint.saver import Retention, Saver
from fusiontree.config import RunConfig, deepspeed_json, to_yaml
from fusiontree.console import console
from fusiontree.data.batch import Batch
from fusiontree.data.sources import Ledger
from fusiontree.data.stream import TrainStream, validation_batches
from fusiontree.device import device_name, peak_memory, utilization
from fusiontree.distributed import collectives, signals
from fusiontree.distributed.collectives import World
from fusiontree.errors import LOST_PEER, HungError, RunError, StoppedError, short_cause
from fusiontree.evaluate.held_out import HeldOutLoss
from fusiontree.kernels import check_precision
from fusiontree.model.flops import update_flops
from fusiontree.run import incidents
from fusiontree.run.datasets import Data, open_data, open_stream
from fusiontree.run.folder import CONFIG_FILE, step_of
from fusiontree.run.records import summarize
from fusiontree.training.health import Health, Trouble, Watchdog, format_rows, rows_of_failing_ranks
from fusiontree.training.layer_watch import LayerWatch
from fusiontree.training.logs import log_to_file
from fusiontree.training.metrics import Lap, Metrics
from fusiontree.training.resume import newest_verified, prepare_folder, read_position
from fusiontree.training.step import TrainingStep, Update

log = logging.getLogger(__name__)


def train(config: RunConfig, allow_changed: Sequence[str] = (), trust: bool = False) -> dict[str, Any]:
    """Train to the end of the schedule, from the newest checkpoint in the run's folder if there is one.

    Collective: every rank calls it. The launcher sets RANK, WORLD_SIZE and the other variables of torch.distributed.

    Args:
        config: the run.
        allow_changed: dotted keys, tables of keys, `data` or `tokenizer` that may differ from the checkpoint's.
        trust: unpickle any object in the checkpoint, which can execute code.

    Returns:
        The run's summary: steps, first and last validation loss (nats per token), tokens/s (median), peak memory.

    Raises:
        UserError: the data, the batch or the run's folder does not fit the configuration; or the checkpoint contains
            more than tensors and `trust` is off.
        RunError: a checkpoint could not be written or read, a rank was lost, or memory ran out.
        HungError: a collective timed out.
        StoppedError: a signal asked to stop; the run is saved. (Before the first step, a signal ends the process.)
    """
    deepspeed_json(config)
    data = open_data(config)
    world = collectives.start()
    try:
        check_precision(config.precision, world.device)
        stream = open_stream(config, data.train, world.rank, world.size, config.data.workers)
        resume_from = prepare_folder(config, data.train, allow_changed, trust)
        with log_to_file(config, world), contextlib.closing(stream):
            trainer = Trainer(config, world, data, stream, resume_from, trust)
            trainer.run()
        collectives.leave()
    except StoppedError:
        collectives.leave()
        raise
    except torch.OutOfMemoryError as error:
        hint = "lower batch.micro_rows or set activation_checkpointing=full"
        raise RunError(f"out of GPU memory: {short_cause(error)}; {hint}") from None
    except RuntimeError as error:
        if collectives.is_lost_peer(error):
            raise RunError(LOST_PEER) from None
        if collectives.is_timeout(error):
            limit = f"{config.health.timeout_seconds:.0f} s (health.timeout_seconds)"
            raise HungError(f"a rank has waited {limit} for the others; start again to resume") from None
        raise
    return {
        "run": str(config.run_dir),
        "steps": trainer.step,
        "tokens": trainer.tokens,
        **summarize(config.run_dir),
        "checkpoint_wait_seconds": trainer.saver.waited,
        "peak_memory_bytes": peak_memory(world.device),
    }


class Trainer:
    """One rank's part of a run: its training step, its data stream and the loop over both."""

    def __init__(
        self,
        config: RunConfig,
        world: World,
        data: Data,
        stream: TrainStream,
        resume_from: Path | None,
        trust: bool = False,
    ):
        """Build the engine and resume from the checkpoint `resume_from`, if any.

        Args:
            config: the run.
            world: the ranks.
            data: the run's datasets.
            stream: this rank's batches.
            resume_from: the checkpoint; None starts the run.
            trust: unpickle any object in the checkpoint.
        """
        self.config, self.world, self.data, self.stream, self.resume_from = config, world, data, stream, resume_from
        self.trust = trust
        self.step = 0  # updates done
        self.tokens = 0  # tokens in these updates, padding included
        splits = [split for split in data if split is not None]
        self.ledger = Ledger(config.data.max_bad_rows, config.data.max_bad_share, splits)
        self.training = TrainingStep(config, world, resuming=resume_from is not None)
        collectives.set_timeout(config.health.timeout_seconds)
        retention = Retention(config.checkpoint.keep_last, config.checkpoint.keep_every)
        self.saver = Saver(self.training.engine, world, config.run_dir, retention, config.health.timeout_seconds)
        self.health = Health(config.health)
        self.watchdog = Watchdog(config.health, config.run_dir, world)
        self.skipped_ranges: list[tuple[int, int]] = []  # ranges of rows consumed that rollbacks skip
        self.rollbacks: Counter[Path] = Counter()
        self.wandb_id: str | None = None
        self.metrics: Metrics | None = None  # on the main rank, while the loop runs
        self.lap = Lap(0)
        self.step_seconds: deque[float] = deque(maxlen=20)  # seconds per update in the last laps
        if resume_from is not None:
            self._resume(resume_from, at_start=True)

    def run(self) -> None:
        """Train to the end of the schedule, rolling back to the newest verified checkpoint when `Health` demands it."""
        signals.defer()  # from the first step on there is something to save
        with self.watchdog:
            while (trouble := self._train()) is not None:
                self._roll_back(trouble)
        self.saver.finish()

    def _train(self) -> Trouble | None:
        """Train until the schedule ends (None) or until trouble asks for a rollback."""
        steps = self.config.schedule.steps
        with self._open_metrics():
            if self.step == 0:
                self._validate()
            self.lap = Lap(self.step)
            while self.step < steps:
                with self.watchdog.step(self.step):
                    update = self._update(self._fetch())
                self.step += 1
                self.tokens += self.config.batch.tokens
                trouble = self.health.judge(update, self._last_rows)
                if trouble is not None:
                    self._report(trouble, update)
                    if trouble.action == "rollback":
                        return trouble
                if self._due(self.config.logging.every) and not update.skipped:
                    self._record(update)
                if self._due(self.config.validation.every):
                    self._validate()
                if self._due(self.config.checkpoint.every) or update.stop:
                    self._save()
                if update.stop and self.step < steps:
                    self._stop()
        return None

    def _fetch(self) -> list[Batch]:
        """Return this rank's batches of the next update.

        Raises:
            RunError: the sources are exhausted, or have too many bad rows.
        """
        try:
            batches = next(self.stream)
        except StopIteration:
            raise RunError(
                f"the sources are exhausted after step {self.step:,}, because rollbacks skipped some rows; lower "
                "schedule.steps or raise max_epochs"
            ) from None
        self.ledger.record(batches)
        self.lap.documents += (length for batch in batches for length in batch.lengths)
        return batches

    @property
    def _last_rows(self) -> tuple[int, int]:
        """Rows consumed before and after the last step."""
        return self.stream.rows_consumed - self.stream.recipe.batch_rows, self.stream.rows_consumed

    def _report(self, trouble: Trouble, update: Update) -> None:
        """Print and record the trouble with an update and its rows.

        Raises:
            RunError: the action is to stop.
        """
        rows = rows_of_failing_ranks(self.stream, self._last_rows[0], bool(update.loss_share.isfinite()))
        message = f"step {self.step:,}: {trouble.message}; rows: {format_rows(rows)}"
        if self.world.is_main:
            console.print(message)
            incidents.record(self.config.run_dir, trouble.kind, self.step, message, rows=rows)
        if trouble.action == "stop":
            self.saver.wait()
            raise RunError(
                f"{message}; inspect the rows, then start again with other values of health.* or optimizer.lr"
            )

    def _roll_back(self, trouble: Trouble) -> None:
        """Resume from the newest verified checkpoint and skip the rows of the trouble.

        Raises:
            RunError: there is no checkpoint, or this one has been rolled back to too often.
        """
        self.saver.wait()
        path = collectives.on_main(lambda: newest_verified(self.config.run_dir))
        hint = "inspect the rows, then start again with other values of health.* or optimizer.lr"
        if path is None:
            raise RunError(f"step {self.step:,}: {trouble.message}, and there is no checkpoint to roll back to; {hint}")
        self.rollbacks[path] += 1
        limit = self.config.health.max_rollbacks
        if self.rollbacks[path] > limit:
            raise RunError(
                f"step {self.step:,}: {trouble.message}, rolled back to {path} more than {limit} times; {hint}"
            )
        if self.world.is_main:
            message = f"rolled back from step {self.step:,} to {step_of(path):,}, skipping the failing rows"
            console.print(message)
            incidents.record(self.config.run_dir, "rollback", self.step, message, rows_consumed=trouble.rows)
        ranges = [*self.skipped_ranges, trouble.rows]
        self._resume(path, at_start=False)
        self._skip_ranges(ranges)
        self.health.bad.clear()  # restored from a checkpoint saved between bad updates, whose rows are skipped now

    def _skip_ranges(self, ranges: list[tuple[int, int]]) -> None:
        self.skipped_ranges = ranges
        self.stream.skip_ranges(ranges)

    def _stop(self) -> None:
        """Stop after the checkpoint of this step.

        Raises:
            StoppedError: always.
        """
        self.saver.finish()
        (name, *_) = [number.name for number in collectives.gather(signals.requested()) if number is not None]
        if self.world.is_main:
            incidents.record(self.config.run_dir, "signal", self.step, f"stopped by {name} after saving")
        raise StoppedError(f"stopped by {name} after step {self.step:,}, which is saved; start again to resume")

    def _update(self, batches: list[Batch]) -> Update:
        """Run the next update; when due, also record its layers."""
        stop = signals.requested() is not None
        if not self._due(self.config.logging.layers_every, self.step + 1):
            return self.training.update(batches, self.step, stop)
        with LayerWatch(self.training.engine, self.world) as watch:
            update = self.training.update(batches, self.step, stop, watch)
        figures = watch.figures(update.gates)
        if self.metrics is not None:
            lengths = [length for batch in batches for length in batch.lengths]
            self.metrics.record_layers(self.step + 1, figures, lengths)
        return update

    def _due(self, every: int, step: int | None = None) -> bool:
        """Return whether an action is due after `step` (default: now): each `every` steps (0: never) and at the end."""
        step = self.step if step is None else step
        return every > 0 and (step % every == 0 or step == self.config.schedule.steps)

    def _record(self, update: Update) -> None:
        """Record the update's figures. This waits for the device; other updates wait for their `HostSum` alone."""
        self._share_bad_rows()
        own_flops = float(sum(update_flops(self.config.model, self.lap.documents).values()))
        shares = torch.stack([update.gates.mean(), update.loss_share.new_tensor(own_flops), *update.parts.values()])
        gate_mean, flops, *parts = collectives.sum_over_ranks(shares).tolist()
        memory = torch.tensor(peak_memory(self.world.device), device=self.world.device)
        memory_bytes = collectives.max_over_ranks(memory).item()
        updates, lap_seconds = self.lap.elapsed(self.step)
        self.lap = Lap(self.step)
        seconds = lap_seconds / updates
        self.step_seconds.append(seconds)
        if self.metrics is None:
            return
        self.metrics.record(
            {
                "step": self.step,
                "tokens": self.tokens,
                "loss": update.loss,
                "lr": self.training.lr,
                "grad_norm": float(update.grad_norm),
                "gate_mean": gate_mean,
                "tokens_per_s": self.config.batch.tokens / seconds,
                **utilization(flops / lap_seconds / self.world.size, device_name(self.world.device)),
                "memory_gib": memory_bytes / 2**30,
                **self.saver.figures(),
                **dict(zip(update.parts, parts, strict=True)),
            },
            eta_s=(self.config.schedule.steps - self.step) * statistics.median(self.step_seconds),
        )

    @torch.no_grad()
    def _validate(self) -> None:
        """Record the mean loss of the held-out tokens, in total and by subset; the same for any number of ranks."""
        if self.data.validation is None:
            return
        self.training.eval()
        held_out = HeldOutLoss(self.data.validation, self.world)
        micro_rows, limit = self.config.batch.micro_rows, self.config.validation.rows
        for batch in validation_batches(
            self.data.validation, self.config.data.seq_len, micro_rows, self.world.rank, self.world.size, limit
        ):
            self.ledger.record([batch])
            held_out.add(batch, self.training.token_losses(batch))
        self._share_bad_rows()
        figures = held_out.figures()
        if self.metrics is not None:
            self.metrics.record({"step": self.step, "tokens": self.tokens, **figures})
        self.lap = Lap(self.step)

    def _share_bad_rows(self) -> None:
        """Share each rank's bad stored rows with all ranks: over the limit, all raise the same error.

        Raises:
            RunError: there are more of them than `data.max_bad_rows` or `data.max_bad_share` allows.
        """
        if not collectives.sum_over_ranks(torch.tensor(len(self.ledger.unshared), device=self.world.device)).item():
            return
        for row in self.ledger.merge(collectives.gather(self.ledger.unshared)):
            log.warning("%s: replaced by a masked row", row)
            if self.world.is_main:
                console.print(f"{row}: replaced by a masked row (limit: data.max_bad_rows {self.ledger.limit})")
        self.ledger.check()

    def _save(self) -> None:
        self._share_bad_rows()
        manifest = self.data.train.datasets[0].manifest
        state = {
            "step": self.step,
            "tokens": self.tokens,
            "rows_consumed": self.stream.rows_consumed,
            "left_out": self.skipped_ranges,
            "bad_rows": self.ledger.to_json(),
            "health": self.health.to_json(),
            "world_size": self.world.size,
            "zero_stage": self.training.engine.zero_optimization_stage(),
            "data_fingerprint": self.data.train.fingerprint,
            "tokenizer_fingerprint": manifest.tokenizer_fingerprint,
            "eos_id": manifest.tokenizer.eos_id,
            "pad_id": manifest.tokenizer.pad_id,
            "wandb_id": self.metrics.wandb_id if self.metrics else None,
        }
        self.saver.save(state, {CONFIG_FILE: to_yaml(self.config)}, self.training.gates.mean())
        log.info("saving step %d", self.step)
        self.lap = Lap(self.step)

    def _resume(self, path: Path, at_start: bool) -> None:
        """Restore the checkpoint at `path`; `at_start`: no update has run in this process."""
        store.load(self.training.engine, self.world, path, self.trust)
        state = store.read_state(path)
        self.resume_from, self.wandb_id = path, state["wandb_id"]
        self.step, self.tokens = state["step"], state["tokens"]
        rows_consumed, skipped = read_position(self.config, path)
        self.stream.seek(rows_consumed)
        self._skip_ranges(skipped)
        self.ledger.restore(state["bad_rows"])
        self.health.restore(state["health"])
        self.training.gates.restore(store.read_gates(path, self.config.model))
        if self.world.is_main and at_start:
            saved = f"saved on {state['world_size']} ranks at ZeRO stage {state['zero_stage']}"
            message = f"resuming {self.config.run_dir} from step {self.step:,}"
            console.print(message)
            incidents.record(self.config.run_dir, "resume", self.step, f"{message}, {saved}")

    @contextlib.contextmanager
    def _open_metrics(self) -> Iterator[None]:
        if not self.world.is_main:
            yield
            return
        resumed_step = None if self.resume_from is None else self.step
        with Metrics(self.config, resumed_step, self.wandb_id) as self.metrics:
            yield
        self.metrics = None
