"""What the daemon says about a model, as plain frozen values."""

from collections.abc import Mapping
from dataclasses import dataclass
from enum import StrEnum
from pathlib import Path

from expertstore.pack.manifest import RecordLayout
from expertstore.shared.row_cache import RowPlaces


class ModelState(StrEnum):
    """Whether a model can be used."""

    SERVING = "serving"
    UNLOADING = "unloading"


@dataclass(frozen=True, slots=True)
class ModelSummary:
    """One line of :meth:`Client.list_models`; ``record_bytes`` is the largest record's.

    ``min_bytes`` of RAM are left to it by other models, ``max_bytes`` it never exceeds (0: no limit
    but the budget), and ``num_pinned`` records stay resident.
    """

    name: str
    architecture: str
    scheme: str
    num_experts: int
    num_resident: int
    record_bytes: int
    expert_bytes: int
    pack_path: Path
    state: ModelState
    min_bytes: int
    max_bytes: int
    num_pinned: int


@dataclass(frozen=True, slots=True)
class MoeLayer:
    """One MoE layer; ``first_entry`` is its first expert's in the directory."""

    layer: int
    num_experts: int
    experts_per_token: int
    layout: RecordLayout
    first_entry: int


@dataclass(frozen=True, slots=True)
class TableInfo:
    """One table of rows, and where in the arena those are that are there.

    ``max_rows`` is how many of them one call can name.
    """

    name: str
    num_rows: int
    row_bytes: int
    max_rows: int
    places: RowPlaces


@dataclass(frozen=True, slots=True)
class ModelInfo:
    """One model: where its pack lies and how its records are laid out.

    ``layers`` by their index in the model. ``max_fetch_records`` is how many records the
    daemon can make resident at once for one session, ``record_bytes`` the size of the
    largest, ``expert_bytes`` that of all. ``fingerprint`` identifies the content,
    ``incarnation`` the daemon that said so.
    """

    name: str
    architecture: str
    scheme: str
    pack_path: Path
    fingerprint: str
    layers: Mapping[int, MoeLayer]
    layouts: tuple[RecordLayout, ...]
    max_fetch_records: int
    num_experts: int
    record_bytes: int
    expert_bytes: int
    incarnation: str
    tables: tuple[TableInfo, ...] = ()
