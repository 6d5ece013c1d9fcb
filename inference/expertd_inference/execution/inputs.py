"""What a model's modules are given of a step's rows."""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from expertd_inference.execution.batch import Span


def rows_of(
    model: Any,  # noqa: ANN401 - transformers is untyped
    spans: Sequence[Span],
    num_texts: int,
) -> dict[str, Any]:
    """The rows of ``spans``, one after the other, as ``num_texts`` texts of equal length.

    Tokens [texts, length]; where there are images, embeddings [texts, length, H] in their place.
    Positions [texts, length], or [3, texts, length] where a row of an image has three.
    """
    device = model.device
    tokens = [token for span in spans for token in span.tokens]
    ids = torch.tensor(tokens, device=device).view(num_texts, -1)
    positions = torch.cat([_positions(span) for span in spans], -1) if _any_three(spans) else None
    if positions is None:
        usual = [span.position + span.shift + row for span in spans for row in range(span.num_rows)]
        positions = torch.tensor(usual)
    shape = (*positions.shape[:-1], num_texts, -1)
    given: dict[str, Any] = {"position_ids": positions.to(device).view(shape)}
    if all(span.seen is None for span in spans):
        return {"input_ids": ids, **given}
    embedded = model.get_input_embeddings()(ids)
    flat = embedded.view(len(tokens), -1)
    mask = torch.zeros(len(tokens), dtype=torch.bool, device=device)
    deep: list[list[Tensor]] = []
    first = 0
    for span in spans:
        if span.seen is not None:
            begin, end = span.seen.within(span.position, span.position + span.num_rows)
            places = torch.tensor(span.seen.places[begin:end], device=device)
            places = places - span.position + first
            flat[places] = span.seen.rows[begin:end].to(flat)
            mask[places] = True
            deep.append([each[begin:end].to(flat) for each in span.seen.deep])
        first += span.num_rows
    given["inputs_embeds"] = embedded
    if getattr(model.config, "hidden_size_per_layer_input", 0):
        # Gemma's tables of each layer have no rows of images.
        text = ids.masked_fill(mask.view(num_texts, -1), model.config.pad_token_id)
        given["per_layer_inputs"] = model.model.get_per_layer_inputs(text)
    if deep[0]:
        given["visual_pos_masks"] = mask.view(num_texts, -1)
        given["deepstack_visual_embeds"] = [torch.cat(parts) for parts in zip(*deep, strict=True)]
    return given


def _any_three(spans: Sequence[Span]) -> bool:
    return any(span.seen is not None and span.seen.positions is not None for span in spans)


def _positions(span: Span) -> Tensor:  # [3, rows]
    found = None
    if span.seen is not None:
        found = span.seen.angles(span.position, span.position + span.num_rows)
    if found is not None:
        return found
    first = span.position + span.shift
    return torch.arange(first, first + span.num_rows).expand(3, -1)
