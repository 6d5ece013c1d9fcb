"""Who may have how much of the arena: minima, maxima and pins of models under one budget.

Only sums; where the bytes lie is :mod:`expertd.hosting.slots`' business.
"""

from collections.abc import Mapping, Sequence

from expertd.hosting.hosted_model import HostedModel
from expertd.settings.limits import ModelLimits
from expertstore.errors import CapacityError, ConfigError
from expertstore.pack.manifest import Manifest
from expertstore.sizes import format_bytes, parse_bytes, size_to_give


class Budget:
    """``num_bytes`` for all of ``models``. Raises :class:`CapacityError` for what does not fit."""

    def __init__(self, num_bytes: int, models: Mapping[str, HostedModel]) -> None:
        self.num_bytes = num_bytes
        self._models = models

    def __repr__(self) -> str:
        return f"Budget({self.num_bytes}: {' + '.join(self._terms())})"

    @property
    def pinned_bytes(self) -> int:
        """The size of all pinned records, resident or not."""
        return sum(model.pinned.num_bytes for model in self._models.values())

    @property
    def free_to_pin(self) -> int:
        """What may still be pinned: all but what is, and what each model must keep to itself."""
        kept = sum(_term(model)[0] for model in self._models.values())
        return self.num_bytes - kept - self.pinned_bytes

    def max_fetch_records(self, model: HostedModel, taken_bytes: int = 0) -> int:
        """How many of the model's records one fetch can make resident together.

        As many as pinned records, the others' minima and its own maximum leave room for, and what
        is taken besides.
        """
        room = self.num_bytes - self.pinned_bytes - taken_bytes
        for other in self._models.values():
            if other is not model:
                room -= max(0, other.guarded_bytes - other.pinned.num_bytes)
        if model.limits.max_bytes is not None:
            room = min(room, model.limits.max_bytes - model.pinned.num_bytes)
        return max(0, room) // model.max_record_bytes

    def over_max(self, model: HostedModel, num_bytes: int) -> int:
        """By how much the model would exceed its maximum, had it ``num_bytes`` more."""
        most = model.limits.max_bytes
        return 0 if most is None else max(0, model.arena_bytes + num_bytes - most)

    def check_model(self, name: str, manifest: Manifest, limits: ModelLimits, pinned: int) -> None:
        """Whether a model fits beside the others, if it has ``pinned`` bytes pinned.

        Raises :class:`ConfigError` too, for a minimum that the model cannot have.
        """
        all_of_it = size_to_give(manifest.expert_bytes)
        if limits.min_bytes > parse_bytes(all_of_it):
            raise ConfigError(
                f"the minimum of {name!r} is {format_bytes(limits.min_bytes)}, and all its experts "
                f"together take {format_bytes(manifest.expert_bytes)} (the RAM budget is "
                f"{format_bytes(self.num_bytes)}); give --min {all_of_it} or less."
            )
        working_set, guarded = manifest.working_set_bytes, limits.guarded_bytes(manifest)
        if limits.max_bytes is not None and working_set + pinned > limits.max_bytes:
            raise CapacityError(
                f"the maximum of {name!r} is {format_bytes(limits.max_bytes)}, but one token uses "
                f"{format_bytes(working_set)} of experts and {format_bytes(pinned)} are pinned; "
                f"give --max {size_to_give(working_set + pinned)} or more.",
                requested=working_set + pinned,
                available=limits.max_bytes,
                unit="bytes",
            )
        terms = [_describe(name, working_set, guarded)]
        if pinned:
            terms.append(f"{format_bytes(pinned)} pinned of {name!r}")
        terms += self._terms(besides=name)
        needed = max(guarded, working_set) + pinned
        for model in self._models.values():
            if model.name != name:
                needed += _term(model)[0] + model.pinned.num_bytes
        if needed > self.num_bytes:
            sum_of = "; ".join(terms)
            raise CapacityError(
                f"the RAM budget of {format_bytes(self.num_bytes)} is too small for {name!r}: "
                f"{sum_of}, in all {format_bytes(needed)}; give --ram {size_to_give(needed)} or "
                f"more (all experts of {name!r}: {format_bytes(manifest.expert_bytes)}), or lower "
                "a minimum, unpin or unload.",
                requested=needed,
                available=self.num_bytes,
                unit="bytes",
            )

    def check_pins(self, model: HostedModel, entries: Sequence[int]) -> None:
        """Whether those records, which nobody pins yet, may be pinned too."""
        asked = sum(map(model.record_bytes, entries))
        room, why = self.free_to_pin, "what each model must keep"
        if model.limits.max_bytes is not None:
            own = model.limits.max_bytes - model.manifest.working_set_bytes
            own -= model.pinned.num_bytes
            if own < room:
                room, why = own, f"one token's experts within the maximum of {model.name}"
        if asked > room:
            most = max(0, room) // model.max_record_bytes
            raise CapacityError(
                f"{len(entries)} experts cannot be pinned: beside {why} ("
                f"{'; '.join(self._terms())}; budget {format_bytes(self.num_bytes)}) there is "
                f"room for {most}.",
                requested=len(entries),
                available=most,
                unit="records",
            )

    def _terms(self, besides: str = "") -> list[str]:
        terms = []
        for model in self._models.values():
            if model.name == besides:
                continue
            terms.append(_term(model)[1])
            if pinned := model.pinned.num_bytes:
                terms.append(f"{format_bytes(pinned)} pinned of {model.name!r}")
        return terms


def _term(model: HostedModel) -> tuple[int, str]:
    """What a model must keep to itself, and why."""
    working_set = model.manifest.working_set_bytes
    kept = max(model.guarded_bytes, working_set)
    return kept, _describe(model.name, working_set, model.guarded_bytes)


def _describe(name: str, working_set: int, minimum: int) -> str:
    if minimum > working_set:
        return f"{format_bytes(minimum)}, the minimum of {name!r}"
    return f"one token of {name!r} uses {format_bytes(working_set)} of experts"
