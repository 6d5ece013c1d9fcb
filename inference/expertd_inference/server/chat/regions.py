"""Cuts an answer's text into regions by their markers, while it comes."""

import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
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
    in_json: bool = False
    """Whether its text is JSON: in JSON's strings markers are text, unless a string has no end."""


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
        self._outside = _Markers.opening(region for region in regions if not region.at_start)
        self._at_start = _Markers.opening(regions)
        self._markers = self._at_start
        """To look for; what opens a region outside, and what closes it inside."""
        self._buffer = ""
        self._region: Region | None = None
        self._opening = ""
        self._body: list[str] = []
        self._in_json = False
        """Whether markers in JSON's strings are text."""
        self._passed_over = False
        """Whether there was one in the region that is open."""

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
        while self._region is not None and self._passed_over:
            # The string has no end, so that the first marker was one after all.
            self._buffer, self._body = "".join(self._body), []
            self._in_json = self._passed_over = False
            yield from self._scan(at_end=True)
        if self._region is not None:
            yield self._close("", complete=not self._region.closes)

    def _scan(self, *, at_end: bool) -> Iterator[Event]:
        while True:
            at, marker = self._markers.first(self._buffer)
            held = len(self._buffer) if at_end else self._markers.first_unsure(self._buffer)
            if marker is None or held <= at:
                if held:
                    yield self._text(held)
                return
            if at:
                yield self._text(at)
                continue  # A region that opens only at the start can no more.
            yield from self._pass(marker)

    def _pass(self, marker: str) -> Iterator[Event]:
        """The marker that the buffer begins with."""
        if self._in_json and _in_string("".join(self._body)):
            self._passed_over = True
            yield self._text(len(marker))
            return
        if self._region is not None and marker in self._region.until:
            yield self._close("")
            return
        opened = self._markers.opens[marker]
        self._buffer = self._buffer[len(marker) :]
        if opened is None:
            yield self._close(marker)
            return
        self._region, self._opening = opened, marker
        self._in_json, self._passed_over = opened.in_json, False
        self._markers = _Markers(dict.fromkeys((*opened.closes, *opened.until)))
        yield Opened(opened)
        if opened.at_start:
            self._body = [marker]
            yield Text(marker)
        if opened.kind is Kind.MARK:
            yield self._close("")

    def _text(self, length: int) -> Text:
        text, self._buffer = self._buffer[:length], self._buffer[length:]
        if self._region is not None:
            self._body.append(text)
        elif not text.isspace():
            self._markers = self._outside
        return Text(text)

    def _close(self, marker: str, *, complete: bool = True) -> Closed:
        region = self._region
        assert region is not None
        body = "".join(self._body)
        opening = "" if region.at_start else self._opening
        self._region, self._body = None, []
        self._in_json = self._passed_over = False
        self._markers = self._outside
        return Closed(region, body, opening + body + marker, complete)


def _in_string(text: str) -> bool:
    """Whether JSON that begins so is within a string."""
    return re.sub(r"\\.", "", text, flags=re.DOTALL).count('"') % 2 == 1


class _Markers:
    """Texts to look for, and the regions that they open; None is for those that close one."""

    def __init__(self, opens: Mapping[str, Region | None]) -> None:
        self.opens = opens
        self._beginnings = {one[0] for one in opens}
        self._longest = max(map(len, opens), default=1)

    @classmethod
    def opening(cls, regions: Iterable[Region]) -> "_Markers":
        return cls({marker: region for region in regions for marker in region.opens})

    def first(self, text: str) -> tuple[int, str | None]:
        """Where the first one is, and which; of several there the longest."""
        found = [(at, -len(one), one) for one in self.opens if (at := text.find(one)) >= 0]
        at, _, marker = min(found, default=(len(text), 0, None))
        return at, marker

    def first_unsure(self, text: str) -> int:
        """Where the first one may begin of which the end is not there yet."""
        for at in range(max(0, len(text) - self._longest + 1), len(text)):
            if text[at] in self._beginnings:
                rest = text[at:]
                if any(len(one) > len(rest) and one.startswith(rest) for one in self.opens):
                    return at
        return len(text)
