"""In which order a packing does its steps, and when the files that they read must be here."""

from collections import Counter
from collections.abc import Container, Iterable, Iterator
from pathlib import Path

from expertd.packing.checkpoint import Checkpoint
from expertd.packing.plan import ExpertStep, PackingStep, PackPlan, TableStep
from expertd.packing.shards import Shards


class Feeder:
    """Gives out the steps that are left.

    Where files come one by one, a step waits for its own, and steps are ordered so that a file
    that has come is soon done with: it is dropped as soon as all that it is read for lasts.
    """

    def __init__(
        self, plan: PackPlan, checkpoint: Checkpoint, done: Container[int], shards: Shards | None
    ) -> None:
        """``done``: the steps that need not be done any more."""
        self._checkpoint = checkpoint
        self._shards = shards
        self._todo = [item for item in enumerate(plan.steps) if item[0] not in done]
        self._files: dict[int, list[Path]] = {}
        """Of each step that is left, in the order in which they come."""
        if shards is not None:
            self._order_by_files(plan, shards)
        self._readers = Counter(file for files in self._files.values() for file in files)
        """How many steps are left to read a file."""

    def __iter__(self) -> Iterator[tuple[int, PackingStep]]:
        """The steps with their numbers, each once what it reads is here. Raises CheckpointError."""
        for index, step in self._todo:
            if self._shards is not None:
                for file in self._files[index]:
                    self._shards.wait(file)
            yield index, step

    def lasting(self, steps: Iterable[int]) -> None:
        """These steps are done, and need not be done again after an interruption."""
        for index in steps:
            for file in self._files.get(index, ()):
                self._readers[file] -= 1
                if not self._readers[file]:
                    self._checkpoint.drop(file)

    def _order_by_files(self, plan: PackPlan, shards: Shards) -> None:
        def files_of(step: PackingStep) -> set[Path]:
            if isinstance(step, ExpertStep):
                return self._checkpoint.expert_files(step.module, step.expert)
            if isinstance(step, TableStep):
                return {source.file for source, _, _ in step.sources}
            return self._checkpoint.trunk_files(step.source)

        files = {index: sorted(files_of(step)) for index, step in enumerate(plan.steps)}
        self._files = {index: files[index] for index, _ in self._todo}
        self._todo.sort(key=lambda item: (self._files[item[0]][-1], item[0]))
        needed = {file for each in self._files.values() for file in each}
        for file in {file for each in files.values() for file in each} - needed:
            shards.drop(file)  # of an earlier run
        shards.fetch(sorted(needed))
