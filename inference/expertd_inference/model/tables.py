"""Embeddings whose rows lie in a table of the pack: a step reads those that it needs.

Such a table (n-gram embeddings, per-layer embeddings) is larger than all else of a model, and a
token reads a few rows. In its place the model has a :class:`TableEmbedding`. Which rows a text
needs follows from its tokens alone, so they are hinted at when it arrives.
"""

import threading
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any, Protocol

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor, nn

from expertstore.errors import PackError
from expertstore.pack.manifest import Manifest, Table
from expertstore.pack.rows import decode_rows

Rows = npt.NDArray[np.int64]


class RowSource(Protocol):
    """Where rows come from: a session, and whatever it takes that it stays one."""

    def read(self, rows: Rows) -> npt.NDArray[np.uint8]:
        """Rows as the pack has them ``[n, row_bytes]``."""

    def expect(self, rows: Rows) -> None:
        """These are read soon; waits for nothing."""

    def close(self) -> None:
        """Nothing is asked any more."""


class TableEmbedding(nn.Module):
    """Takes the place of ``embedding``, an ``nn.Embedding`` of any kind, and has its result.

    ``weight`` is empty; it says where rows are computed with, which is on the CPU.
    """

    def __init__(self, embedding: Any, table: Table) -> None:  # noqa: ANN401 - transformers'
        super().__init__()
        del embedding.weight  # the parameter; from now on a tensor that no state dict has
        embedding.weight = torch.empty(0, table.num_columns)
        # Else transformers would draw random weights for what it takes for missing.
        embedding.weight._is_hf_initialized = True
        self.embedding = embedding
        self.table = table
        self.dtype = torch.get_default_dtype()
        self.source: RowSource | None = None
        self.hinting = threading.local()

    @property
    def weight(self) -> Tensor:
        """No rows, in the right type and place."""
        return torch.empty(0, self.table.num_columns, dtype=self.dtype)

    def forward(self, ids: Tensor) -> Tensor:  # [...] -> [..., num_columns]
        """The rows ``ids``, of any shape. Raises as the source does, PackError without one."""
        rows = ids.reshape(-1).cpu().numpy()
        if getattr(self.hinting, "now", False):
            assert self.source is not None
            self.source.expect(rows)
            return torch.zeros(*ids.shape, self.table.num_columns, dtype=self.dtype)
        if self.source is None:
            raise PackError(f"{self.table.name} has no daemon to read its rows from; attach first.")
        stored = torch.from_numpy(self.source.read(rows))
        values = decode_rows(stored, self.table.num_columns, self.table.encoding, self.table.dtype)
        # The module may do more than look rows up (Gemma scales them).
        embedding: Any = self.embedding
        nothing, embedding.weight = embedding.weight, values.to(ids.device, self.dtype)
        try:
            index = torch.arange(len(rows), device=ids.device).view(ids.shape)
            result: Tensor = embedding(index)
        finally:
            embedding.weight = nothing
        return result


@dataclass(frozen=True)
class Tables:
    """All table embeddings of a model, with what computes the rows of a text for each."""

    modules: Mapping[str, TableEmbedding]
    owners: Mapping[str, Callable[[Tensor], object]]

    def connect(self, open_source: Callable[[str], RowSource]) -> None:
        """Gives each its source of rows, by the table's name."""
        for name, module in self.modules.items():
            module.source = open_source(name)

    def close(self) -> None:
        """Ends what gives rows."""
        for module in self.modules.values():
            if module.source is not None:
                module.source.close()

    @torch.no_grad()
    def expect(self, tokens: Sequence[int]) -> None:
        """Hints at all rows of a text; any thread may."""
        for name, module in self.modules.items():
            module.hinting.now = True
            try:
                self.owners[name](torch.tensor([tokens]))
            finally:
                module.hinting.now = False


NO_TABLES = Tables({}, {})


def replace_tables(model: nn.Module, manifest: Manifest) -> Tables:
    """Puts a :class:`TableEmbedding` for each table. Raises PackError if it does not fit there."""
    modules: dict[str, TableEmbedding] = {}
    owners: dict[str, Callable[[Tensor], object]] = {}
    for table in manifest.tables:
        parent_name, _, leaf = table.name.removesuffix(".weight").rpartition(".")
        parent: Any
        try:
            parent = model.get_submodule(parent_name)
            found = parent.get_submodule(leaf)
        except AttributeError:
            found = None
        if not isinstance(found, nn.Embedding):
            raise PackError(
                f"{manifest.architecture} of this transformers has no embeddings for the table "
                f"{table.name}; make the pack again."
            )
        if found.weight.shape != (table.num_rows, table.num_columns):
            raise PackError(
                f"{table.name} has {table.num_rows} rows of {table.num_columns}, and config.json "
                f"of the pack asks for {' of '.join(map(str, found.weight.shape))}; copy or make "
                "the pack again."
            )
        modules[table.name] = TableEmbedding(found, table)
        setattr(parent, leaf, modules[table.name])
        # An n-gram embedding makes row numbers of tokens and those before them.
        of_tokens = hasattr(parent, "ngram_heads")
        owners[table.name] = partial(_n_grams, parent) if of_tokens else modules[table.name]
    return Tables(modules, owners)


def _n_grams(embedding: Any, ids: Tensor) -> object:  # noqa: ANN401 - transformers is untyped
    """Asks an n-gram embedding for those of a text from its beginning on."""
    return embedding(ids.to(embedding.layer_multipliers.device), None)
