"""From images to what a language model is given of them: preparation, vision part, positions."""

import threading
from collections import OrderedDict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from hashlib import blake2b
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import AutoImageProcessor

from expertd_inference.images import open_image
from expertd_inference.model.seen import Seen
from expertd_inference.process.reasons import reason_of
from expertstore.errors import InvalidInputError, PackError

KEPT_BYTES = 256 << 20
"""Of embeddings of images that were looked at: a chat sends its images with each turn again."""


@dataclass(frozen=True)
class _Look:
    """One image, looked at."""

    name: bytes
    rows: Tensor  # [n, H]
    deep: tuple[Tensor, ...]
    prepared: Mapping[str, Tensor]
    """What tells of its size."""

    @property
    def num_bytes(self) -> int:
        """Of memory."""
        return sum(each.nbytes for each in (self.rows, *self.deep))


class Sight:
    """The eyes of a model. Threads may look at a time: they take turns."""

    def __init__(self, model: Any, pack: Path) -> None:  # noqa: ANN401 - transformers is untyped
        """``model`` sees (:mod:`expertstore.pack.seeing`). Raises PackError."""
        self._model = model
        self._pack = pack
        try:
            self._processor: Any = AutoImageProcessor.from_pretrained(
                pack, local_files_only=True, trust_remote_code=False, backend="pil"
            )
        except Exception as error:  # whatever transformers meets in the settings
            raise PackError(
                f"The image processor of {pack} cannot be used: {reason_of(error)}; install Pillow "
                "(pip install 'expertd[images]'), or pack the model with --text-only."
            ) from error
        self.image_token: int = model.config.image_token_id
        """It stands in a prompt for one image."""
        self._around = _around(model.config)
        self._kept: OrderedDict[bytes, _Look] = OrderedDict()
        self._lock = threading.Lock()

    @torch.no_grad()
    def see(self, tokens: Sequence[int], images: Sequence[bytes]) -> tuple[list[int], Seen]:
        """The tokens with as many image tokens as the images have, and what is in their places.

        ``tokens`` have one image token for each image. Raises InvalidInputError.
        """
        num = sum(token == self.image_token for token in tokens)
        if num != len(images):
            raise InvalidInputError(
                f"The prompt has {num} places for images (token {self.image_token}) and "
                f"{len(images)} images; leave that token out of the text."
            )
        with self._lock:
            looks = [self._look(data) for data in images]
        before, after = self._around
        expanded: list[int] = []
        keys: list[int] = []
        places: list[int] = []
        rest = iter(looks)
        for token in tokens:
            if token != self.image_token:
                expanded.append(token)
                keys.append(token)
                continue
            look = next(rest)
            num = len(look.rows)
            places += range(len(expanded) + len(before), len(expanded) + len(before) + num)
            expanded += [*before, *[token] * num, *after]
            # No token has such a number.
            keys += [*before, *[-1 - int.from_bytes(look.name[:7], "little")] * num, *after]
        positions = self._positions(expanded, looks)
        deep = [torch.cat(parts) for parts in zip(*(look.deep for look in looks), strict=True)]
        rows = torch.cat([look.rows for look in looks])
        mutual = _is_mutual(self._model.config.get_text_config())
        num_more = len(expanded) - len(tokens)
        seen = Seen(places, rows, deep, positions, keys, num_more, mutual=mutual)
        return expanded, seen

    def _look(self, data: bytes) -> _Look:
        name = blake2b(data, digest_size=16).digest()
        look = self._kept.pop(name, None)
        if look is None:
            look = self._looked_at(name, data)
        self._kept[name] = look
        while len(self._kept) > 1 and sum(x.num_bytes for x in self._kept.values()) > KEPT_BYTES:
            self._kept.popitem(last=False)
        return look

    def _looked_at(self, name: bytes, data: bytes) -> _Look:
        image = open_image(data)
        try:
            prepared = dict(self._processor(images=[image], return_tensors="pt"))
        except ValueError as error:  # such as of a picture a hundred times as wide as high
            raise InvalidInputError(
                f"The image of {image.width} x {image.height} pixels cannot be prepared for this "
                f"model: {reason_of(error)}; send another shape."
            ) from error
        device = self._model.device
        given = {key: value.to(device) for key, value in prepared.items() if key in _GIVEN}
        found = self._model.model.get_image_features(**given, return_dict=True)
        deep = getattr(found, "deepstack_features", None) or ()
        return _Look(
            name,
            _whole(found.pooler_output),
            tuple(_whole(each) for each in deep),
            {key: value for key, value in prepared.items() if key == _GRID},
        )

    def _positions(self, tokens: Sequence[int], looks: Sequence[_Look]) -> Tensor | None:
        """[3, tokens], of models whose image tokens have a time, a row and a column."""
        if not hasattr(self._model.model, "get_rope_index"):
            return None
        ids = torch.tensor([tokens])
        positions, _ = self._model.model.get_rope_index(
            ids,
            mm_token_type_ids=(ids == self.image_token).int(),
            image_grid_thw=torch.cat([look.prepared[_GRID] for look in looks]),
        )
        found: Tensor = positions[:, 0]
        return found


_GRID = "image_grid_thw"
_GIVEN = {"pixel_values", _GRID, "image_position_ids"}
"""What of a processor's results goes to the vision part."""


def _around(config: Any) -> tuple[list[int], list[int]]:  # noqa: ANN401 - transformers is untyped
    """The tokens that a processor puts before and after those of an image, of its own accord."""
    if config.model_type == "gemma4":
        return [config.boi_token_id], [config.eoi_token_id]
    return [], []


def _is_mutual(text: Any) -> bool:  # noqa: ANN401 - a configuration
    return getattr(text, "use_bidirectional_attention", None) == "vision"


def _whole(features: Any) -> Tensor:  # noqa: ANN401 - a tensor, or one for each image
    """[n, H]."""
    rows = features if isinstance(features, Tensor) else torch.cat([*features])
    return rows.flatten(0, -2)
