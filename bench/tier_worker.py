"""Workers of :mod:`bench.tiers`, in a process of their own: each line of stdin has one decode.

It computes from a daemon's memory or, to compare, from the pack's files mapped into its own: the
same trunk, kernels and routing, and only the loading differs.

Several may be one process, by name; they take turns, as the lines of stdin ask them to.

Example: python -m bench.tier_worker '{"mapped": {"pack": "/tmp/pack", "mapped": true}}'
"""

import json
import random
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
import transformers
from torch import Tensor

from bench.mapped import MappedSource
from expertd_inference import load_model
from expertd_inference.execution.batch import Batch, Span, Wanted
from expertd_inference.execution.choose import choose_for
from expertd_inference.execution.room import Room
from expertd_inference.experts.call import ExpertsCall, ExpertsRunner, has_seat, seat_of
from expertd_inference.experts.cpu import connect
from expertd_inference.experts.recovery import Recovery
from expertd_inference.kernels.cpu.choice import ReferenceKernels, cpu_kernels
from expertd_inference.kernels.cpu.linear import linear_kernels
from expertd_inference.kernels.cpu.native import NativeKernels
from expertd_inference.kv.pool import BLOCK_TOKENS
from expertd_inference.model.loading import load_trunk
from expertd_inference.model.native_linear import use_native_linears
from expertd_inference.settings import DeviceSettings
from expertstore.pack.manifest import read_manifest

_BLOCKS, _ROWS = 64, 512
"""Room for a text of 4,096 tokens, and for a prompt of 512."""

Row = list[list[int]]
"""One token's experts, by MoE layer in order."""


class Routing:
    """Before a layer's runner: the experts are the row's, or, without one, are noted."""

    def __init__(self, runner: ExpertsRunner, place: int, state: "Decoder") -> None:
        self._runner, self._place, self._state = runner, place, state

    def run(self, call: ExpertsCall, /) -> Tensor:
        """As :meth:`expertd_inference.experts.call.ExpertsRunner.run`."""
        state, routed = self._state, call.routed
        if len(routed) == 1:
            if state.row is not None:
                # In place: a prepared call knows where it lies.
                routed.index.copy_(torch.tensor([state.row[self._place]]))
            state.noted.append(routed.index[0].tolist())
            if state.whole_layers:
                for lease in state.source.waves(call.layer, range(call.num_experts)):
                    lease.release()
        return self._runner.run(call)

    def prepare(self, call: ExpertsCall, /) -> ExpertsCall:
        """As the runner."""
        return self._runner.prepare(call)


class Guesses:
    """In the place of a layer's router that is asked ahead: right as often as ``recall`` says.

    A wrong guess is an expert that the layer uses for another of the tokens: as likely one of its
    hot ones as real routers' are.
    """

    def __init__(self, place: int, num_experts: int, recall: float, state: "Decoder") -> None:
        self.num_experts = num_experts
        self._place, self._state = place, state
        self._recall, self._chance = recall, random.Random(place)

    def foreseen(self, _: Tensor) -> list[int]:
        """As :meth:`~expertd_inference.experts.routers.LayerRouter.foreseen`, of this token."""
        state, chance = self._state, self._chance
        if state.row is None:
            return []
        guessed = [
            expert
            if chance.random() < self._recall
            else chance.choice(chance.choice(state.rows)[self._place])
            for expert in state.row[self._place]
        ]
        return list(dict.fromkeys(guessed))

    def chosen(self, hidden: Tensor) -> Tensor:  # [1, k]
        """As :meth:`expertd_inference.experts.routers.LayerRouter.chosen`."""
        return torch.tensor([self.foreseen(hidden)], dtype=torch.int64)

    def likeliest(self, hidden: Tensor, num: int) -> Tensor:  # [num]
        """As :meth:`expertd_inference.experts.routers.LayerRouter.likeliest`."""
        return self.chosen(hidden)[0, :num]


class Decoder:
    """The model, and what becomes of its routing."""

    def __init__(self, job: dict[str, Any]) -> None:
        self.row: Row | None = None
        self.rows: Sequence[Row] = ()
        self.noted: list[list[int]] = []
        self.whole_layers: bool = job.get("whole_layers", False)
        pack = Path(job["pack"])
        self.manifest = read_manifest(pack).manifest
        self._io = Path(f"/proc/{job.get('reader', 'self')}/io")
        self.source: Any
        self._ahead: Any = None
        if job.get("mapped"):
            self.source = MappedSource(pack, self.manifest)
            kernels = cpu_kernels("auto", self.manifest)
            native = not isinstance(kernels, ReferenceKernels)
            loaded = load_trunk(pack, self.manifest, linear=kernels.linear if native else None)
            recovery = Recovery(self.source, reattach_seconds=0)
            connect(loaded.experts, self.manifest, self.source, recovery, kernels)
            self.model = loaded.model
            self.kernels = kernels
            if native and (steps := linear_kernels()) is not None:
                use_native_linears(self.model, steps)
        else:
            settings = DeviceSettings(speculate_layers=job.get("speculate_layers", 0))
            self.model = load_model("m", socket=job["socket"], device=settings)
            self.source = self.model.expertd.session
            self._ahead = self.model.expertd._ahead
            self.kernels = self.model.expertd.kernels
        seats = {
            seat_of(module).layer: seat_of(module)
            for module in self.model.modules()
            if has_seat(module)
        }
        self._layers = sorted(seats)
        for place, layer in enumerate(self._layers):
            seats[layer].runner = Routing(seats[layer].runner, place, self)
        self._num_experts = {layer.layer: layer.num_experts for layer in self.manifest.layers}
        if self._ahead is not None and "recall" in job:
            self._ahead._routers = {
                layer: Guesses(place, self._num_experts[layer], job["recall"], self)
                for place, layer in enumerate(self._layers)
            }
        self._executor = choose_for(
            self.model,
            Room(_BLOCKS, 1, _ROWS),
            lambda message: print(message, file=sys.stderr),
            kernels=self.kernels if isinstance(self.kernels, NativeKernels) else None,
        )

    def fill(self, num_bytes: int) -> None:
        """Brings so many bytes of experts into memory, of all layers alike and in order."""
        share = min(1.0, num_bytes / self.manifest.expert_bytes)
        for layer in self._layers:
            self._touch(layer, range(int(self._num_experts[layer] * share)))

    def warm(self, rows: Sequence[Row]) -> None:
        """What these tokens would bring into memory, without computing them."""
        for row in rows:
            for layer, experts in zip(self._layers, row, strict=True):
                self._touch(layer, sorted(experts))

    @torch.no_grad()
    def decode(
        self,
        ids: Sequence[int],
        context: int = 1,
        rows: Sequence[Row] | None = None,
        forget: bool = False,
        announced: bool = False,
        seconds: float = 1e9,
    ) -> dict[str, Any]:
        """Decodes ``ids`` after the first ``context`` of them, by ``rows`` if there are some.

        ``rows`` begin with the last token of the context. ``forget``: before each token all that
        it needs is absent. ``announced``: as :attr:`MappedSource.announces`. Stops when so many
        seconds have passed.
        """
        if announced:
            self.source.announces = True
            try:
                return self.decode(ids, context, rows, seconds=seconds)
            finally:
                self.source.announces = False
        if forget and rows is None:
            self._run(ids, context, None, forget=False, seconds=seconds)
            rows = self._noted_rows(len(ids) - context + 1)
        return self._run(ids, context, rows, forget=forget, seconds=seconds)

    def _run(
        self,
        ids: Sequence[int],
        context: int,
        rows: Sequence[Row] | None,
        *,
        forget: bool,
        seconds: float,
    ) -> dict[str, Any]:
        self.noted = []
        self.row, self.rows = None, rows or ()
        stats = self._hints()
        taken, num_bytes, waited, tokens = [], [], [], []
        if context > 1:
            self._step(ids[: context - 1], 0)
        end = time.perf_counter() + seconds
        for number, token in enumerate(ids[context - 1 :]):
            self.row = None if rows is None else rows[number]
            if forget and self.row is not None:
                self._forget(self.row)
            missed, read = self._missed(), self._bytes_read()
            began = time.perf_counter()
            tokens.append(self._step([token], context - 1 + number))
            taken.append(time.perf_counter() - began)
            num_bytes.append(self._bytes_read() - read)
            waited.append(self._missed() - missed)
            if time.perf_counter() > end and number:
                break
        hints = {name: value - stats.get(name, 0) for name, value in self._hints().items()}
        # The first belongs to the context.
        return {
            "seconds": taken[1:],
            "bytes": num_bytes[1:],
            "waited": waited[1:],
            "hints": hints,
            "executor": self._executor.name,
            "tokens": tokens,
        }

    def _step(self, tokens: Sequence[int], position: int) -> int:
        """The likeliest token after these, the first of which has that position."""
        blocks = range(-(-(position + len(tokens)) // BLOCK_TOKENS))
        span = Span(0, tokens, position, blocks, None, Wanted.LAST)
        return int(self._executor.forward(Batch((span,)))[0].argmax())

    def _noted_rows(self, tokens: int) -> list[Row]:
        count = len(self._layers)
        rows = [self.noted[start : start + count] for start in range(0, len(self.noted), count)]
        return rows[-tokens:]

    def _forget(self, row: Row) -> None:
        """Has others take the place of this token's experts; for a budget of as many."""
        for layer, experts in zip(self._layers, row, strict=True):
            others = [e for e in range(self._num_experts[layer]) if e not in experts]
            self._touch(layer, others[: len(experts)])

    def _touch(self, layer: int, experts: Sequence[int]) -> None:
        if isinstance(self.source, MappedSource):
            self.source.touch(layer, experts)
            return
        for lease in self.source.waves(layer, experts):
            lease.release()

    def _missed(self) -> int:
        return 0 if isinstance(self.source, MappedSource) else self.source.nvme_misses

    def _bytes_read(self) -> int:
        """From disks, by the process that reads the experts."""
        rows = self._io.read_text().splitlines()
        return next(int(row.split()[1]) for row in rows if row.startswith("read_bytes:"))

    def _hints(self) -> dict[str, int]:
        if self._ahead is None:
            return {}
        stats = self._ahead.stats
        return {name: getattr(stats, name) for name in ("issued", "useful", "late", "wasted")}


def main() -> None:
    """Loads, then answers each line: whom it is for, a verb and its arguments."""
    transformers.utils.logging.disable_progress_bar()
    decoders = {name: Decoder(job) for name, job in json.loads(sys.argv[1]).items()}
    print(json.dumps({"ready": True}), flush=True)
    for line in sys.stdin:
        name, verb, arguments = json.loads(line)
        action = {"fill": Decoder.fill, "warm": Decoder.warm, "decode": Decoder.decode}[verb]
        print(json.dumps(action(decoders[name], **arguments)), flush=True)


if __name__ == "__main__":
    main()
