"""What a model sees in one prompt, as an executor puts it in the place of image tokens."""

from bisect import bisect_left
from collections.abc import Sequence

import torch
from torch import Tensor


class Seen:
    """Of one prompt: the embeddings of its image tokens, and the angles of its positions.

    The scheduler carries it and asks for numbers alone. It lives as long as its sequence, so that
    one that gave way, or whose step was lost, looks at no image again.
    """

    def __init__(
        self,
        places: Sequence[int],
        rows: Tensor,  # [image tokens, H]
        deep: Sequence[Tensor] = (),  # each [image tokens, H]
        positions: Tensor | None = None,  # [3, prompt], int64
        keys: Sequence[int] = (),
        num_more: int = 0,
        *,
        mutual: bool = False,
    ) -> None:
        """``places`` are those of the image tokens in the prompt, in order.

        ``deep`` is added to what the first layers give. ``positions`` are those that angles are
        taken of, where they are others than the tokens' own. ``keys`` stand for the prompt's tokens
        where two prompts are compared: images of other content have others. In windowed layers, the
        tokens of an image see one another if they are ``mutual``: one step has all of them.
        """
        self.num_more = num_more
        """Tokens that the prompt has more than one for each image."""
        self.places = [*places]
        self.rows = rows
        self.deep = tuple(deep)
        self.positions = positions
        self.keys = [*keys]
        self._num_prompt = len(self.keys)
        there = {*self.places} if mutual else set()
        begins = [at for at in sorted(there) if at - 1 not in there]
        ends = [at + 1 for at in sorted(there) if at + 1 not in there]
        self.wholes = [*zip(begins, ends, strict=True)]
        """Where the images begin and end that are to be in one step."""
        self._text_positions = [] if positions is None else positions[0].tolist()
        self._next = 0 if positions is None else int(positions.max()) + 1

    def within(self, begin: int, end: int) -> tuple[int, int]:
        """Which of the image tokens are among these of the sequence."""
        return bisect_left(self.places, begin), bisect_left(self.places, end)

    def shift(self, begin: int, end: int) -> int | None:
        """By how much the positions of these tokens differ from their places.

        None if an image token is among them, whose rows are to be put in.
        """
        first, last = self.within(begin, end)
        if first != last:
            return None
        if self.positions is None:
            return 0
        if begin >= self._num_prompt:
            return self._next - self._num_prompt
        return int(self._text_positions[begin]) - begin

    def cut(self, begin: int, end: int) -> int:
        """Where a chunk of these tokens ends so that it parts no image that is to be whole."""
        for first, last in self.wholes:
            if begin < end and first < end < last:
                return first if first > begin else last
        return end

    def angles(self, begin: int, end: int) -> Tensor | None:
        """The positions [3, end - begin] of these tokens; None if they are usual."""
        if self.positions is None:
            return None
        of_prompt = self.positions[:, begin:end]
        new = torch.arange(max(begin, self._num_prompt), max(end, self._num_prompt))
        return torch.cat((of_prompt, (new + self._next - self._num_prompt).expand(3, -1)), dim=1)
