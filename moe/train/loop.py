"""The training loop of one rank: begin or resume, step, evaluate, save, and leave cleanly.

A signal only raises a flag; the ranks agree on it between two steps, save, and leave together.
"""

import json
import logging
import math
import signal
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict
from pathlib import Path
from types import FrameType

import safetensors.torch
import torch
import torch.distributed as dist

from moe.config import RunConfig
from moe.data.corpus import Corpus, prepare
from moe.hf.places import CHECKPOINTS
from moe.rules import validate
from moe.telemetry.progress import Progress
from moe.telemetry.report import summary, write_report
from moe.telemetry.rows import replace_file
from moe.train import start, state
from moe.train.counting import Sampling
from moe.train.environment import environment
from moe.train.evaluate import evaluate, perplexity, rounds
from moe.train.record import ROUTING, Recorder
from moe.train.sample import sample
from moe.train.step import StepResult, local_batch_size, make_trainer, open_loader, read_batches
from moe.train.tuning import trained_share
from moe.train.world import world
from parallel.checkpoint import Checkpoint, open_checkpoint, open_latest
from parallel.collectives import all_reduce, barrier
from parallel.cpu import products_by
from parallel.errors import UserError
from parallel.groups import Groups, build_groups
from parallel.saving import Saver

DONE, ENDED_BADLY, INTERRUPTED = 0, 1, 130

logger = logging.getLogger(__name__)


def train(config: RunConfig, run: Path) -> int:
    """Train in the run's folder, from its last good checkpoint if it has one; the exit code.

    Every rank of the layout calls, with torch's rank variables set when there are several.
    """
    with world(deterministic=config.train.deterministic) as device:
        groups = build_groups(validate(config, dist.get_world_size() if dist.is_initialized() else 1))
        return _Run(config, run, groups, device).train()


class _Run:
    """One rank's part in a run. Rank 0 writes and shows; every rank computes and agrees."""

    def __init__(self, config: RunConfig, run: Path, groups: Groups, device: torch.device) -> None:
        self.config, self.folder, self.groups, self.device = config, run, groups, device
        self.corpus = self._prepare()
        saved = self._find_checkpoint()
        self.trainer = make_trainer(config, groups, len(self.corpus.domains), device, self._start(saved))
        self.loader, self.validation = (
            open_loader(shards, config) for shards in (self.corpus.train, self.corpus.validation)
        )
        self.position = state.load(self.trainer, saved) if saved else state.Position()
        step, begin = self.position.step, config.optim.begin_step
        if begin > step:
            raise UserError(
                f"`optim.begin_step` must not lie ahead of the run, which is at step {step}, but is {begin}: "
                f"use at most {step}"
            )
        self.saver = Saver(
            run / CHECKPOINTS,
            groups.world,
            keep_last=config.train.keep_checkpoints,
            keep_every=config.train.keep_every,
        )
        self.recorder: Recorder | None = None
        if groups.rank == 0:
            facts = environment(config.train.seed, groups.layout)
            replace_file(run / "environment.json", json.dumps(facts, indent=2).encode())
            step, ranks = self.position.step, groups.layout.world_size
            self.recorder = Recorder(run, config, self.corpus.domains, step, ranks)

    def _prepare(self) -> Corpus:
        """Rank 0 fills the cache, the others find it."""
        if self.groups.rank > 0:
            barrier(self.groups.world)
        corpus = prepare(self.config.data, self.config.model.vocab_size)
        if self.groups.rank == 0:
            barrier(self.groups.world)
        return corpus

    def _start(self, saved: Checkpoint | None) -> start.Start | None:
        """What the weights begin with; a new run notes it."""
        settings = self.config.train
        if saved:
            return start.resumed(self.folder, settings, saved.names)
        found = start.new(settings)
        if found and self.groups.rank == 0:
            start.note(self.folder, found)
        return found

    def _find_checkpoint(self) -> Checkpoint | None:
        """Rank 0 finds and verifies the newest good checkpoint; every rank opens that one."""
        root = self.folder / CHECKPOINTS
        step, saved = 0, None
        if self.groups.rank == 0:
            try:
                saved = open_latest(root, logger.warning)
                step = saved.state["step"] if saved else 0
            except UserError:
                step = -1
        step = int(all_reduce(torch.tensor(step, device=self.device), self.groups.world))
        if step < 0:  # every rank finds what rank 0 found, and leaves by itself
            open_latest(root, logger.warning)
        if step == 0:
            return None
        return saved or open_checkpoint(root / f"step-{step}", verify=False)

    def train(self) -> int:
        """Step until the end, a signal, or a loss that is no number."""
        steps, settings, tune = self.config.train.steps, self.config.train, self.config.tune
        shown = (
            Progress(steps, self.position.step, self.config.telemetry.log_every) if self.recorder else None
        )
        exact = settings.precision == "fp32" and self.device.type == "cpu"
        if shown and exact and products_by() != "default":
            shown.note(f"fp32 products by {products_by()}: faster on this CPU, and checked against fp64")
        if tune.is_partial:
            share = trained_share(self.trainer.model, self.groups, self.device)
            if shown:
                shown.note(share)
        if shown and self.position.step >= steps:
            shown.note(
                f"the run has finished its {self.position.step} steps: there is nothing to train; "
                "raise `train.steps` to go on"
            )
        with _stop_signals() as stop:
            while self.position.step < steps:
                result = self._step()
                if self.recorder and shown:
                    max_vio, alarms = self.recorder.step(self.position.step, self.position.tokens, result)
                    shown.update(self.position.step, result.loss, result.tokens / result.seconds, max_vio)
                    for alarm in alarms:
                        shown.note(alarm.line())
                if not math.isfinite(result.loss + result.grad_norm):
                    return self._end_badly(shown)
                at_end = self.position.step == steps
                if settings.eval_every and (at_end or self.position.step % settings.eval_every == 0):
                    self._evaluate(shown)
                stopping = self._agree(bool(stop))
                due = settings.save_every and self.position.step % settings.save_every == 0
                if stopping or due or (at_end and settings.save_every):
                    self._save()
                if stopping and not at_end:
                    self.saver.wait()
                    return self._leave(shown)
            self.saver.wait()
        self._finish(shown)
        return DONE

    def _step(self) -> StepResult:
        config, done = self.config, self.position
        batches = [
            batch.to(self.device) for batch in read_batches(self.loader, config, self.groups, done.sequences)
        ]
        sampling = Sampling.of(config.telemetry, done.step + 1)
        result = self.trainer.step(done.step, batches, sampling)
        if result.routing:
            place = self.folder / ROUTING / f"step-{done.step + 1}"
            place.mkdir(parents=True, exist_ok=True)
            replace_file(
                place / f"rank-{self.groups.rank}.safetensors", safetensors.torch.save(result.routing)
            )
        read = done.sequences + config.train.batch_size
        self.position = state.Position(done.step + 1, read, done.tokens + result.tokens)
        return result

    def _evaluate(self, shown: Progress | None) -> None:
        config = self.config
        if not self.validation.sequences_per_epoch:
            return
        losses = evaluate(
            self.trainer.engine,
            rounds(
                self.validation,
                self.groups,
                config.train.eval_sequences,
                local_batch_size(config, self.groups),
            ),
            self.corpus.domains,
            mask_documents=config.data.separate_documents,
        )
        if self.recorder and shown:
            self.recorder.evaluation(self.position.step, losses)
            loss = losses["all"]
            shown.note(
                f"step {self.position.step}: validation loss {loss:.3f}, perplexity {perplexity(loss):.4g}"
            )

    def _agree(self, wanted: bool) -> bool:
        """Whether any rank was told to stop."""
        return bool(all_reduce(torch.tensor(int(wanted), device=self.device), self.groups.world))

    def _save(self) -> None:
        """Begin a checkpoint; it is written while training goes on."""
        self.saver.save(self.position.step, state.owned(self.trainer), asdict(self.position))

    def _end_badly(self, shown: Progress | None) -> int:
        if self.recorder and shown:
            shown.close()
            self.recorder.close()
            logger.error(
                "step %d gave a loss or gradient that is no number: lower `optim.lr` and resume",
                self.position.step,
            )
        return ENDED_BADLY

    def _leave(self, shown: Progress | None) -> int:
        if self.recorder and shown:
            self.recorder.close()
            shown.note(
                f"saved at step {self.position.step}; continue with: switchyard train run={self.folder.name}"
            )
            shown.close()
        return INTERRUPTED

    def _finish(self, shown: Progress | None) -> None:
        text = self._sample()
        if self.recorder is None or shown is None:
            return
        shown.close()
        self.recorder.close()
        if text is not None:
            replace_file(self.folder / "sample.txt", text.encode())
        write_report(self.folder)
        facts = summary(self.folder)
        width = max(len(name) for name, _ in facts)
        print("\n" + "\n".join(f"  {name:<{width}}  {value}" for name, value in facts), flush=True)
        if text is not None:
            print(f"\n  a sample:\n\n{text}", flush=True)

    def _sample(self) -> str | None:
        settings = self.config.train
        if not settings.sample_tokens:
            return None
        tokenizer = self.corpus.tokenizer
        prompt = tokenizer.encode(settings.sample_prompt, add_special_tokens=False).ids or [self.corpus.eos]
        context = self.config.data.sequence_length
        tokens = sample(
            self.trainer.engine, prompt, settings.sample_tokens, context=context, seed=settings.seed
        )
        return tokenizer.decode(tokens)


@contextmanager
def _stop_signals() -> Iterator[list[int]]:
    """A list that is filled by SIGINT and SIGTERM instead of ending the process."""
    received: list[int] = []

    def note(number: int, frame: FrameType | None) -> None:
        received.append(number)

    before = {number: signal.signal(number, note) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield received
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
