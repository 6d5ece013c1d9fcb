"""Routing traces: which experts each token, layer after layer, has used. A CSV file.

::

    # layers: 48
    # experts_per_layer: 128
    # experts_per_token: 6
    phase,step,layer,experts
    prefill,0,0,49 19 58 29 16 70
    decode,28,0,60 49 78 50 106 32

A row is one access: the experts, each once, that a worker asked for together. ``phase`` is
``prefill`` (a prompt, token by token or merged into the set it used) or ``decode``; ``step``
numbers the tokens (or prompts). Comments before the header say what the model is; layers that
differ have a number each (``# experts_per_layer: 64 128``), and ``# layer_ids`` lists the
layers' numbers where they are not 0, 1, 2... Comments between rows: ``# session: 7`` says whose
the rows below are, ``# gap: 7 120`` that 120 accesses of session 7 are missing here.

A trace that ``expert-run trace`` writes has a row for each token and one field more, ``weights``:
``prefill,0,0,49 19,0.31 0.12``, how much each expert added to the token.

Read and written as a stream: a line is in memory at a time, and none may be longer than
:data:`MAX_LINE_BYTES`.
"""

import math
import os
import tempfile
from collections.abc import Iterator, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from enum import StrEnum
from pathlib import Path
from types import TracebackType
from typing import BinaryIO, NamedTuple, Self

from expertstore.errors import TraceError

MAX_LINE_BYTES = 1 << 16
"""More than any row has: a prompt that uses all of 10 000 experts takes 60 KiB."""
MAX_LAYERS = 1 << 12
MAX_EXPERTS = 1 << 14
HEADER = "phase,step,layer,experts"
WEIGHTED_HEADER = f"{HEADER},weights"


class Phase(StrEnum):
    """What a row's token belongs to."""

    PREFILL = "prefill"
    DECODE = "decode"


class Row(NamedTuple):
    """One access. ``layer`` counts the MoE layers from 0; ``session`` is 0 unless told.

    ``weights`` has one for each of ``experts`` if the trace is weighted.
    """

    phase: Phase
    step: int
    layer: int
    experts: tuple[int, ...]
    session: int = 0
    weights: tuple[float, ...] = ()


@dataclass(frozen=True)
class TraceModel:
    """The model that was traced; the tuples have an element per MoE layer."""

    num_experts: tuple[int, ...]
    experts_per_token: tuple[int, ...]
    layer_ids: tuple[int, ...]
    notes: dict[str, str] = field(default_factory=dict)
    """Other comments at the file's head, such as ``model`` and ``source``."""
    weighted: bool = False
    """Whether rows say how much each expert added to a token."""

    @property
    def num_entries(self) -> int:
        """Experts of all layers."""
        return sum(self.num_experts)

    @property
    def touches_per_token(self) -> int:
        """Experts that one token uses: below so many records LRU never hits."""
        return sum(self.experts_per_token)


class TraceReader:
    """Reads a trace: its :attr:`model` at once, then its rows. A context manager.

    Raises :class:`TraceError`, which names file and line.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self.num_lost = 0
        """Accesses that the trace says are missing, as far as it was read."""
        self._line = 0
        self._session = 0
        try:
            self._file: BinaryIO = path.open("rb")
        except OSError as error:
            raise TraceError(f"{path} cannot be read: {error.strerror}.") from error
        try:
            self.size_bytes = os.fstat(self._file.fileno()).st_size
            self.model = self._read_head()
        except BaseException:
            self._file.close()
            raise

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self._file.close()

    @property
    def position_bytes(self) -> int:
        """How far in the file it is, of :attr:`size_bytes`."""
        return self._file.tell()

    def __iter__(self) -> Iterator[Row]:
        places = {number: place for place, number in enumerate(self.model.layer_ids)}
        while (line := self._next_line()) is not None:
            if line.startswith("#"):
                self._take_comment(line)
            elif line:
                yield self._row(line, places)

    def _read_head(self) -> TraceModel:
        notes: dict[str, str] = {}
        while (line := self._next_line()) is not None:
            if line.startswith("#"):
                key, _, value = line[1:].partition(":")
                if len(notes) < 100:
                    notes[key.strip()] = value.strip()
            elif line in (HEADER, WEIGHTED_HEADER):
                return self._model(notes, weighted=line == WEIGHTED_HEADER)
            elif line:
                raise self._error(f"here must be the header {HEADER!r}")
        raise self._error(f"it ends before its header {HEADER!r}")

    def _model(self, notes: dict[str, str], *, weighted: bool) -> TraceModel:
        (num_layers,) = self._numbers(notes, "layers", 1, MAX_LAYERS)
        num_experts = self._numbers(notes, "experts_per_layer", num_layers, MAX_EXPERTS)
        per_token = self._numbers(notes, "experts_per_token", num_layers, MAX_EXPERTS)
        ids = tuple(range(num_layers))
        if "layer_ids" in notes:
            ids = self._numbers(notes, "layer_ids", num_layers, 1 << 20, least=0)
            if list(ids) != sorted(set(ids)):
                raise self._error("layer_ids above does not rise")
        if any(used > num for used, num in zip(per_token, num_experts, strict=True)):
            raise self._error("experts_per_token above is more than experts_per_layer")
        return TraceModel(num_experts, per_token, ids, notes, weighted)

    def _numbers(
        self, notes: dict[str, str], key: str, count: int, most: int, *, least: int = 1
    ) -> tuple[int, ...]:
        """``count`` numbers out of a comment, where one may stand for all."""
        if key not in notes:
            raise self._error(f"a comment '# {key}: N' must stand above the header")
        texts = notes.pop(key).split()
        if len(texts) == 1:
            texts *= count
        if len(texts) != count:
            raise self._error(f"{key} above has {len(texts)} numbers for {count} layers")
        return tuple(self._number(text, f"{key} above", least, most) for text in texts)

    def _row(self, line: str, places: dict[int, int]) -> Row:
        parts = line.split(",")
        header = WEIGHTED_HEADER if self.model.weighted else HEADER
        if len(parts) != header.count(",") + 1:
            raise self._error(
                f"a row has {header.count(',') + 1} fields ({header}), this one {len(parts)}"
            )
        try:
            phase = Phase(parts[0])
        except ValueError:
            raise self._error(
                f"the phase is {_shorten(parts[0])!r}; it is prefill or decode"
            ) from None
        step = self._number(parts[1], "the step", 0, 1 << 62)
        number = self._number(parts[2], "the layer", 0, 1 << 20)
        if number not in places:
            raise self._error(f"there is no layer {number} among those that the comments tell")
        layer = places[number]
        most = self.model.num_experts[layer] - 1
        experts = tuple(self._number(text, "an expert", 0, most) for text in parts[3].split())
        if not experts:
            raise self._error("the row names no expert")
        if len(set(experts)) < len(experts):
            raise self._error("an expert stands twice in the row")
        if not self.model.weighted:
            return Row(phase, step, layer, experts, self._session)
        weights = tuple(self._weight(text) for text in parts[4].split())
        if len(weights) != len(experts):
            raise self._error(f"the row has {len(experts)} experts and {len(weights)} weights")
        return Row(phase, step, layer, experts, self._session, weights)

    def _take_comment(self, line: str) -> None:
        key, _, value = line[1:].partition(":")
        if key.strip() == "session":
            self._session = self._number(value.strip(), "the session", 0, 1 << 62)
        elif key.strip() == "gap":
            _, _, count = value.strip().partition(" ")
            self.num_lost += self._number(count, "the gap", 0, 1 << 62)

    def _number(self, text: str, what: str, least: int, most: int) -> int:
        # Not what int() takes beyond that: signs, underscores, other scripts' digits.
        if not (text.isascii() and text.isdigit() and len(text) < 20):
            raise self._error(f"{what} is {_shorten(text)!r}, which is no number")
        if not least <= int(text) <= most:
            raise self._error(f"{what} is {int(text)}; it must be {least} to {most}")
        return int(text)

    def _weight(self, text: str) -> float:
        try:
            weight = float(text)
        except ValueError:
            weight = -1.0
        if not 0 <= weight < math.inf:
            raise self._error(f"a weight is {_shorten(text)!r}; it must be a number from 0 on")
        return weight

    def _next_line(self) -> str | None:
        """The next line without its end; None after the last."""
        self._line += 1
        try:
            raw = self._file.readline(MAX_LINE_BYTES + 1)
        except OSError as error:
            raise TraceError(f"{self.path} cannot be read: {error.strerror}.") from error
        if not raw:
            return None
        if len(raw) > MAX_LINE_BYTES:
            raise self._error(f"the line is longer than {MAX_LINE_BYTES} bytes")
        try:
            return raw.decode().strip()
        except UnicodeDecodeError:
            raise self._error("the line is not text") from None

    def _error(self, problem: str) -> TraceError:
        return TraceError(f"{self.path}, line {self._line}: {problem}.")


class TraceWriter:
    """Writes a trace: into a temporary file beside ``path``, which is renamed by :meth:`commit`.

    A context manager; left without a commit, nothing is there. Raises :class:`TraceError`.
    """

    def __init__(self, path: Path, model: TraceModel) -> None:
        self.path, self.model = path, model
        self.num_rows = 0
        self._session = 0
        try:
            descriptor, name = tempfile.mkstemp(prefix=f".{path.name}.", dir=path.parent)
        except OSError as error:
            raise self._error(error) from error
        self._temporary = Path(name)
        self._file = os.fdopen(descriptor, "w", encoding="utf-8")
        lines = {
            **{key: " ".join(value.split()) for key, value in model.notes.items()},
            "layers": str(len(model.num_experts)),
            "experts_per_layer": _join(model.num_experts),
            "experts_per_token": _join(model.experts_per_token),
        }
        if model.layer_ids != tuple(range(len(model.num_experts))):
            lines["layer_ids"] = " ".join(map(str, model.layer_ids))
        self._write("".join(f"# {key}: {value}\n" for key, value in lines.items()))
        self._write((WEIGHTED_HEADER if model.weighted else HEADER) + "\n")

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        with suppress(OSError):  # a full disk, which was told when it was met
            self._file.close()
        self._temporary.unlink(missing_ok=True)

    def write(self, row: Row) -> None:
        """Appends a row, below a comment that names its session if that is another."""
        if row.session != self._session:
            self._session = row.session
            self._write(f"# session: {row.session}\n")
        experts = " ".join(map(str, row.experts))
        weights = " ".join(f"{weight:.4g}" for weight in row.weights)
        more = f",{weights}" if self.model.weighted else ""
        self._write(f"{row.phase},{row.step},{self.model.layer_ids[row.layer]},{experts}{more}\n")
        self.num_rows += 1

    def write_gap(self, session: int, num_lost: int) -> None:
        """Says that accesses of a session are missing here."""
        self._write(f"# gap: {session} {num_lost}\n")

    def commit(self) -> None:
        """Gives the file, complete and on disk, its name."""
        try:
            self._file.flush()
            os.fchmod(self._file.fileno(), 0o600)  # what a user asked shows in the routing
            os.fsync(self._file.fileno())
            self._file.close()
            self._temporary.replace(self.path)
        except OSError as error:
            raise self._error(error) from error

    def _write(self, text: str) -> None:
        try:
            self._file.write(text)
        except OSError as error:
            raise self._error(error) from error

    def _error(self, error: OSError) -> TraceError:
        return TraceError(f"{self.path} cannot be written: {error.strerror}.")


def _join(numbers: Sequence[int]) -> str:
    """One number if all are the same, as most models have it."""
    return " ".join(map(str, numbers if len(set(numbers)) > 1 else numbers[:1]))


def _shorten(text: str) -> str:
    return text if len(text) <= 40 else text[:40] + "..."
