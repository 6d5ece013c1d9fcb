"""A program for text, and the modules for rows of images: one step may have both."""

import torch
from torch import Tensor

from expertd_inference.execution.batch import Batch
from expertd_inference.execution.modules import ModulesExecutor
from expertd_inference.execution.program import ProgramExecutor


class SightedExecutor:
    """See :class:`~expertd_inference.execution.executor.Executor`.

    A chunk of a prompt that has a part of an image is computed by the modules, all else by the
    program; both keep keys and values in the same memory.
    """

    name = "program"
    shares_prefixes = True
    recurrent = False
    turning_point: int | None = None

    def __init__(self, program: ProgramExecutor, modules: ModulesExecutor) -> None:
        """``modules`` has the program's memory."""
        self.reason = f"{program.reason}; rows of images are computed by its modules"
        self._program, self._modules = program, modules
        self.tally = modules.tally = program.tally

    def fits(self, batch: Batch) -> bool:
        """Whether the program has room for the text of a step."""
        return self._program.fits(Batch(tuple(x for x in batch.spans if x.seen is None)))

    @torch.no_grad()
    def forward(self, batch: Batch) -> Tensor:
        """[batch.num_wanted, vocabulary]; good until the next step."""
        seen = Batch(tuple(span for span in batch.spans if span.seen is not None))
        if not seen.spans:
            return self._program.forward(batch)
        text = Batch(tuple(span for span in batch.spans if span.seen is None))
        whole = self._modules.fits(seen)
        batches = [seen] if whole else [Batch((span,)) for span in seen.spans]
        of_images = torch.cat([self._modules.forward(batch) for batch in batches])
        if not text.spans:
            return of_images
        of_text = self._program.forward(text)
        logits = of_text.new_empty(batch.num_wanted, of_text.shape[1])
        end = taken_images = taken_text = 0
        for span in batch.spans:
            begin, end = end, end + span.num_wanted
            if span.seen is not None:
                logits[begin:end] = of_images[taken_images : taken_images + span.num_wanted]
                taken_images += span.num_wanted
            else:
                logits[begin:end] = of_text[taken_text : taken_text + span.num_wanted]
                taken_text += span.num_wanted
        return logits

    def copy_block(self, source: int, target: int) -> None:
        """Of Executor."""
        self._program.copy_block(source, target)

    def close(self) -> None:
        """Gives keys and values back."""
        self._program.close()
