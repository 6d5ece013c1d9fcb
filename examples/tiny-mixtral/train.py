"""Train the tiny Mixtral on this Python's standard library; the same command resumes.

    python examples/tiny-mixtral/train.py --minutes 85 --work-dir /tmp/tiny-mixtral

The learning rate follows the clock and not the step count, so a run always ends with an annealed
model, however busy the machine is. SIGUSR1 starts the final decay at once.
"""

# mypy: disable-error-code="no-untyped-call"

from __future__ import annotations

import argparse
import signal
import sys
import time
from dataclasses import asdict, dataclass, field, fields
from pathlib import Path
from typing import Any

import corpus
import numpy as np
import torch
from export import export
from model import balance_losses, build_model, language_loss, use_training_kernels
from rich.console import Console
from rich.progress import Progress
from torch import Tensor

WARM_UP_STEPS = 80
DECAY_FROM = 0.75  # share of the budget after which the rate falls to zero
RATE_BEFORE_DECAY = 0.6  # of the peak: what a slow decline reaches by then
CHECKPOINT_SECONDS = 240.0
LOG_STEPS = 20
EVALUATION_STEPS = 200
EVALUATION_ROWS = 24


@dataclass(frozen=True)
class TrainConfig:
    """What a run depends on. A checkpoint resumes only under the same shape and seed."""

    minutes: float = field(default=85.0, metadata={"help": "wall-clock budget, over all resumes"})
    work_dir: Path = field(
        default=Path("/tmp/tiny-mixtral"), metadata={"help": "token cache and checkpoints"}
    )
    rows: int = field(default=8, metadata={"help": "rows a step; half of them from the tests"})
    context: int = field(default=1024, metadata={"help": "tokens a row"})
    learning_rate: float = field(default=2e-3, metadata={"help": "peak"})
    balance_weight: float = field(default=0.005, metadata={"help": "of each layer's Switch loss"})
    threads: int = field(default=2, metadata={"help": "of torch"})
    seed: int = field(default=1, metadata={"help": "of the weights and of the order of the data"})

    def __post_init__(self) -> None:
        if self.minutes <= 0 or self.rows < 2 or self.rows % 2 or self.context < 64:
            raise ValueError(
                "needs minutes > 0, an even number of rows, and a context of 64 or more"
            )

    @classmethod
    def from_arguments(cls) -> TrainConfig:
        """The command line: one option per field."""
        parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
        for item in fields(cls):
            parser.add_argument(
                "--" + item.name.replace("_", "-"),
                type=type(item.default),
                default=item.default,
                help=f"{item.metadata['help']} (default: {item.default})",
            )
        return cls(**vars(parser.parse_args()))

    def identity(self) -> dict[str, Any]:
        """What a checkpoint cannot be resumed without."""
        return {name: asdict(self)[name] for name in ("rows", "context", "seed")}


class Trainer:
    """Model, optimizer, data and clock of one run, as one thing that can be saved and restored."""

    def __init__(self, config: TrainConfig) -> None:
        torch.manual_seed(config.seed)
        self.config = config
        self.model = build_model(config.context, config.balance_weight).train()
        use_training_kernels(self.model)
        self.optimizer = self._build_optimizer()
        streams = corpus.load_streams(config.work_dir / "cache")
        self.windows = {
            "library": corpus.Windows(streams.library, config.context, config.seed),
            "tests": corpus.Windows(streams.tests, config.context, config.seed),
        }
        self.heldout = self._heldout_rows()
        self.step, self.seconds = 0, 0.0
        self.budget_seconds = config.minutes * 60
        self.checkpoint = config.work_dir / "ckpt" / "last.pt"
        if self.checkpoint.exists():
            self._restore()

    def _build_optimizer(self) -> torch.optim.Optimizer:
        """AdamW; norms and the (tied) embedding are not decayed."""
        decayed: list[Tensor] = []
        kept: list[Tensor] = []
        for name, parameter in self.model.named_parameters():
            (kept if parameter.ndim < 2 or "embed" in name else decayed).append(parameter)
        groups = [{"params": decayed, "weight_decay": 0.1}, {"params": kept, "weight_decay": 0.0}]
        return torch.optim.AdamW(groups, lr=0.0, betas=(0.9, 0.95), fused=True)

    def _heldout_rows(self) -> Tensor:
        """A fixed part of the held-out text, spread over all of it."""
        tokens = corpus.encode_modules(corpus.load_tokenizer(), corpus.read_heldout())
        length = self.config.context + 1
        starts = np.linspace(0, len(tokens) - length, EVALUATION_ROWS).astype(int)
        return torch.from_numpy(np.stack([tokens[s : s + length] for s in starts]).astype(np.int64))

    def learning_rate(self) -> float:
        """Warm-up by steps, a slow decline, then down to zero at the end of the budget."""
        done = min(1.0, self.seconds / self.budget_seconds)
        if done < DECAY_FROM:
            factor = 1 - (1 - RATE_BEFORE_DECAY) * done / DECAY_FROM
        else:
            factor = RATE_BEFORE_DECAY * (1 - done) / (1 - DECAY_FROM)
        return self.config.learning_rate * factor * min(1.0, (self.step + 1) / WARM_UP_STEPS)

    def decay_now(self) -> None:
        """Shorten the budget so that the final decay begins at this moment."""
        self.budget_seconds = min(self.budget_seconds, self.seconds / DECAY_FROM)

    def _forward(self, batch: Tensor) -> tuple[Tensor, Tensor]:
        """Loss per token and each layer's balance loss of (rows, context + 1) tokens."""
        with torch.autocast("cpu", torch.bfloat16):
            output = self.model.model(
                input_ids=batch[:, :-1], output_router_logits=True, use_cache=False
            )
        loss = language_loss(
            output.last_hidden_state, self.model.lm_head.weight, batch[:, 1:].contiguous()
        )
        return loss, balance_losses(output.router_logits)

    def train_step(self) -> tuple[float, Tensor]:
        """One update; returns the loss and the layers' balance losses."""
        started = time.monotonic()
        half = self.config.rows // 2
        rows = [self.windows[name].next() for name in ("library", "tests") for _ in range(half)]
        for group in self.optimizer.param_groups:
            group["lr"] = self.learning_rate()
        loss, balance = self._forward(torch.from_numpy(np.stack(rows)))
        (loss + self.config.balance_weight * balance.sum()).backward()
        torch.nn.utils.clip_grad_norm_(self.model.parameters(), 1.0)
        self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)
        self.step += 1
        self.seconds += time.monotonic() - started
        return float(loss.detach()), balance.detach()

    def evaluate(self) -> float:
        """Held-out loss per token of the fixed rows."""
        started = time.monotonic()
        self.model.eval()
        with torch.no_grad():
            losses = [float(self._forward(rows)[0]) for rows in self.heldout.split(8)]
        self.model.train()
        self.seconds += time.monotonic() - started
        return sum(losses) / len(losses)

    def save(self) -> None:
        """Write the checkpoint beside its place, then move it there."""
        self.checkpoint.parent.mkdir(parents=True, exist_ok=True)
        partial = self.checkpoint.with_suffix(".partial")
        state = {
            "identity": self.config.identity(),
            "model": self.model.state_dict(),
            "optimizer": self.optimizer.state_dict(),
            "windows": {name: windows.state() for name, windows in self.windows.items()},
            "random": torch.get_rng_state(),
            "step": self.step,
            "seconds": self.seconds,
            "balance_weight": self.config.balance_weight,
        }
        torch.save(state, partial)
        partial.replace(self.checkpoint)

    def _restore(self) -> None:
        state = torch.load(self.checkpoint, weights_only=True)
        if state["identity"] != self.config.identity():
            raise SystemExit(
                f"{self.checkpoint} is of another run ({state['identity']}): "
                "use its values, or another --work-dir"
            )
        self.model.load_state_dict(state["model"])
        self.optimizer.load_state_dict(state["optimizer"])
        for name, windows in self.windows.items():
            windows.restore(state["windows"][name])
        torch.set_rng_state(state["random"])
        self.step, self.seconds = state["step"], state["seconds"]


def run(trainer: Trainer) -> None:
    """Train until the budget is used, then export."""
    signal.signal(signal.SIGUSR1, lambda *_: trainer.decay_now())
    tokens_per_step = trainer.config.rows * trainer.config.context
    saved_at, logged_at, logged_step = trainer.seconds, trainer.seconds, trainer.step
    losses: list[float] = []
    with Progress(console=Console(stderr=True), disable=not sys.stderr.isatty()) as progress:
        bar = progress.add_task("training", total=trainer.budget_seconds)
        while trainer.seconds < trainer.budget_seconds:
            loss, balance = trainer.train_step()
            losses.append(loss)
            progress.update(bar, completed=trainer.seconds, total=trainer.budget_seconds)
            if trainer.step % LOG_STEPS == 0:
                speed = (trainer.step - logged_step) * tokens_per_step
                print(
                    f"step {trainer.step} loss {sum(losses) / len(losses):.3f} "
                    f"balance {balance.mean():.3f} (worst layer {balance.max():.3f}) "
                    f"rate {trainer.learning_rate():.2e} "
                    f"{speed / (trainer.seconds - logged_at):.0f} tokens/s, "
                    f"{(trainer.budget_seconds - trainer.seconds) / 60:.1f} min left",
                    flush=True,
                )
                logged_at, logged_step, losses = trainer.seconds, trainer.step, []
            if trainer.step % EVALUATION_STEPS == 0:
                print(f"step {trainer.step} held-out {trainer.evaluate():.4f}", flush=True)
            if trainer.seconds - saved_at > CHECKPOINT_SECONDS:
                trainer.save()
                saved_at = trainer.seconds
    trainer.save()
    print(f"done: {trainer.step} steps, {trainer.step * tokens_per_step} tokens,", end=" ")
    print(f"{trainer.seconds / 60:.1f} minutes, held-out {trainer.evaluate():.4f}")
    export(trainer.checkpoint)


def main() -> None:
    """Train, or resume."""
    config = TrainConfig.from_arguments()
    torch.set_num_threads(config.threads)
    if not corpus.TOKENIZER_PATH.exists():
        corpus.main()
    run(Trainer(config))


if __name__ == "__main__":
    main()
