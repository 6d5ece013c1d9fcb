"""Which texts an answer may be: calls that are required or strict, and content of a format."""

from collections.abc import Iterable, Iterator
from dataclasses import dataclass, replace

from expertd_inference.grammar import GrammarKind, GrammarSpec, pattern_of
from expertd_inference.server.chat.call_grammar import (
    SpecialTokens,
    any_until,
    at_special,
    pieces_of,
    spelled,
)
from expertd_inference.server.chat.families import Family
from expertd_inference.server.chat.forced_calls import CallRules
from expertd_inference.server.chat.regions import Kind, Region

_OF_TOOLS = "grammar of the tools' schemas"
_HEAD = "%llguidance {}"
_GAP = r"/\n{0,2}/"
"""What models write between reasoning and the rest."""


@dataclass(frozen=True, kw_only=True)
class Reasoning:
    """``region`` may come first; it ``has_begun`` if the prompt ends in it."""

    region: Region
    has_begun: bool


@dataclass(frozen=True, kw_only=True)
class AnswerGrammar:
    """Grammars of answers in a family's format."""

    family: Family
    special_tokens: SpecialTokens
    reasoning: Reasoning | None = None
    continues: bool = False
    """Whether the prompt has the beginning of the content already."""

    def of_calls(self, calls: CallRules) -> GrammarSpec:
        """Calls, and nothing else."""
        lines = [_HEAD, "start: prelude calls", *self._prelude(), *calls.rules]
        return GrammarSpec(GrammarKind.LARK, "\n".join(lines), name=_OF_TOOLS)

    def of_content(self, content: GrammarSpec, calls: CallRules | None = None) -> GrammarSpec:
        """Content of a grammar, or calls instead if there may be some."""
        before = "" if self.continues else self.family.before_content
        if calls is None and not before and self.reasoning is None:
            return content
        body = f"{spelled(before, self.special_tokens)} @inner"
        rules = () if calls is None else calls.rules
        body = body if calls is None else f"({body} | calls)"
        lines = [_HEAD, f"start: prelude {body}", *self._prelude(), *rules]
        return replace(content, frame="\n".join(lines))

    def of_text_with_calls(self, calls: CallRules) -> GrammarSpec:
        """Any text, in which calls are as they should be."""
        return GrammarSpec(
            GrammarKind.LARK, "\n".join([_HEAD, *self._text_with(calls)]), name=_OF_TOOLS
        )

    def _prelude(self) -> Iterator[str]:
        """Rule ``prelude``: reasoning, if there may be some."""
        if self.reasoning is None:
            yield 'prelude: ""'
            return
        region = self.reasoning.region
        gap = spelled(self.family.after_reasoning, self.special_tokens) or _GAP
        if self.reasoning.has_begun:
            yield f"prelude: reasoning {gap}"
        else:
            yield f"prelude: ({spelled(region.opens[0], self.special_tokens)} reasoning {gap})?"
        yield any_until("reasoning", region.closes[0], self.special_tokens)

    def _text_with(self, calls: CallRules) -> Iterator[str]:
        """Rules of text in which all that the parser takes for a call is one of ``calls``."""
        special = self.special_tokens
        regions = [one for one in self.family.regions if one.kind is Kind.CALLS]
        openers = {one for region in regions if not region.at_start for one in region.opens}
        openers |= {calls.lead} - {""}
        opened = rf"(.|\n)*({_any_of(openers)})(.|\n)*"
        yield rf"TEXT: /(.|\n)+/ & ~/{opened}/"
        rests: dict[str, list[str]] = {}
        for opener in sorted(openers):
            _, marker = at_special(opener, special)
            if marker:
                token, *rest = pieces_of(marker, special)
                rests.setdefault(token, []).append("".join(rest))
        parts = []
        for number, (token, begun) in enumerate(rests.items()):
            if all(begun):
                parts.append(f"{spelled(token, special)} AFTER_{number}?")
                yield rf"AFTER_{number}: /(.|\n)+/ & ~/({_any_of(begun)})(.|\n)*|{opened}/"
        if others := sorted(id_ for one, id_ in special.items() if one not in rests):
            parts.append(f"<[{','.join(map(str, others))}]> TEXT?")
        if not calls.lead:
            at_start = {one for region in regions for one in region.opens} - openers
            yield rf"BEGUN: /(.|\n)+/ & ~/\s*({_any_of(at_start)})(.|\n)*|{opened}/"
            after = f"({' | '.join(parts)})*" if parts else ""
            yield f"start: calls | BEGUN? {after}"
            yield from calls.rules
            return
        _, marker = at_special(calls.lead, special)
        if marker:
            parts.append(f"{spelled(marker, special)} calls TEXT?")
        else:
            parts.append("LEAD calls TEXT?")
            yield rf"LEAD: (/(.|\n)*/ & ~/{opened}/) /{pattern_of(calls.lead)}/"
        yield f"start: TEXT? ({' | '.join(parts)})*"
        yield from calls.without_lead


def _any_of(texts: Iterable[str]) -> str:
    return "|".join(map(pattern_of, sorted(texts)))
