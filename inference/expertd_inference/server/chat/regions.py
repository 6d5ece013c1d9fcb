"""Cuts an answer's text into regions by their markers, while it comes."""

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from enum import Enum, auto


class Kind(Enum):
    """What the text of a region is."""

    CONTENT = auto()
    REASONING = auto()
    CALLS = auto()
    MARK = auto()
    """No text: a marker that means nothing to clients."""


@dataclass(frozen=True)
class Region:
    """Text between one of ``opens`` and one of ``closes``, or before one of ``until``, or the end.

    ``until`` are markers of what follows: they close the region and are read again. A region
    ``at_start`` opens only where nothing but spaces came before, and its marker is part of it.
    """

    kind: Kind
    opens: tuple[str, ...]
    closes: tuple[str, ...] = ()
    until: tuple[str, ...] = ()
    at_start: bool = False
    of_tools: bool = False
    """Whether it is one only where a request has tools."""


@dataclass(frozen=True, slots=True)
class Opened:
    """A region begins."""

    region: Region


@dataclass(frozen=True, slots=True)
class Text:
    """More text of the region that is open; of the content, if none is."""

    text: str


@dataclass(frozen=True, slots=True)
class Closed:
    """The region ends. ``body`` is all of its text, ``raw`` the same with its markers.

    It is not ``complete`` if the text ended before it did.
    """

    region: Region
    body: str
    raw: str
    complete: bool = True


Event = Opened | Text | Closed


class Scanner:
    """Finds regions. What may be the beginning of a marker waits for what follows it.

    Where several markers are found the first one counts, and of several there the longest.
    """

    def __init__(self, regions: Sequence[Region]) -> None:
        self._regions = [region for region in regions if not region.at_start]
        self._all = regions
        self._buffer = ""
        self._region: Region | None = None
        self._opening = ""
        self._body: list[str] = []
        self._blank = True

    @property
    def region(self) -> Region | None:
        """The one that is open; None in content."""
        return self._region

    @property
    def num_held(self) -> int:
        """How many characters wait."""
        return len(self._buffer)

    def feed(self, text: str) -> Iterator[Event]:
        """What is certain with ``text``."""
        self._buffer += text
        yield from self._scan(at_end=False)

    def finish(self) -> Iterator[Event]:
        """The rest; the region that is open ends."""
        yield from self._scan(at_end=True)
        if self._region is not None:
            yield self._close("", complete=not self._region.closes)

    def _scan(self, *, at_end: bool) -> Iterator[Event]:
        while True:
            markers = self._markers()
            at, marker = _first(self._buffer, markers)
            held = len(self._buffer) if at_end else _first_unsure(self._buffer, markers)
            if marker is None or held <= at:
                if held:
                    yield self._text(held)
                return
            if at:
                yield self._text(at)
                continue  # A region that opens only at the start can no more.
            yield from self._pass(marker, markers[marker])

    def _pass(self, marker: str, region: Region | None) -> Iterator[Event]:
        """The marker that the buffer begins with; ``region`` is what it opens."""
        if self._region is not None and marker in self._region.until:
            yield self._close("")
            return
        self._buffer = self._buffer[len(marker) :]
        if self._region is not None:
            yield self._close(marker)
            return
        assert region is not None
        self._region, self._opening = region, marker
        self._blank = False
        yield Opened(region)
        if region.at_start:
            self._body = [marker]
            yield Text(marker)
        if region.kind is Kind.MARK:
            yield self._close("")

    def _markers(self) -> dict[str, Region | None]:
        """What to look for, and what it opens."""
        if self._region is not None:
            return dict.fromkeys((*self._region.closes, *self._region.until))
        regions = self._all if self._blank else self._regions
        return {marker: region for region in regions for marker in region.opens}

    def _text(self, length: int) -> Text:
        text, self._buffer = self._buffer[:length], self._buffer[length:]
        self._blank = self._blank and text.isspace()
        if self._region is not None:
            self._body.append(text)
        return Text(text)

    def _close(self, marker: str, *, complete: bool = True) -> Closed:
        region = self._region
        assert region is not None
        body = "".join(self._body)
        opening = "" if region.at_start else self._opening
        self._region, self._body = None, []
        return Closed(region, body, opening + body + marker, complete)


def _first(text: str, markers: Iterable[str]) -> tuple[int, str | None]:
    """Where the first marker is, and which."""
    found = [(at, -len(one), one) for one in markers if (at := text.find(one)) >= 0]
    at, _, marker = min(found, default=(len(text), 0, None))
    return at, marker


def _first_unsure(text: str, markers: Iterable[str]) -> int:
    """Where the first marker may begin of which the end is not there yet."""
    most = max(map(len, markers), default=1) - 1
    for at in range(max(0, len(text) - most), len(text)):
        if any(len(one) > len(text) - at and one.startswith(text[at:]) for one in markers):
            return at
    return len(text)
