"""How few of the experts that a router chooses compute a row; needs no torch."""

from dataclasses import dataclass

from expertstore.errors import SettingError


@dataclass(frozen=True, slots=True)
class FewerExperts:
    """Which of the experts that a router chooses for a row are kept.

    The ``most`` of greatest weight, and of these none whose share of the weights of all that were
    chosen is below ``least_share``; that of the greatest weight is kept in any case.
    """

    most: int
    least_share: float = 0.0

    @classmethod
    def of(
        cls, experts_per_token: int | None, expert_threshold: float | None
    ) -> "FewerExperts | None":
        """By the settings of these names; None where they leave all."""
        if experts_per_token is None and not expert_threshold:
            return None
        return cls(experts_per_token or ALL_EXPERTS.most, expert_threshold or 0.0)

    @property
    def salt(self) -> str:
        """Keys and values that were computed so are not shared with others."""
        return f"\0experts {self.most} {self.least_share!r}"


ALL_EXPERTS = FewerExperts(1 << 30)
"""More than any router chooses."""


def check_fewer(experts_per_token: int | None, expert_threshold: float | None) -> None:
    """Raises SettingError for a value that makes no sense for any model."""
    if experts_per_token is not None and experts_per_token < 1:
        raise SettingError(
            f"experts_per_token is {experts_per_token}; give at least 1.",
            setting="experts_per_token",
        )
    if expert_threshold is not None and not 0 <= expert_threshold <= 1:
        raise SettingError(
            f"expert_threshold is {expert_threshold}; give 0 to 1, a share of a token's router "
            "weights.",
            setting="expert_threshold",
        )
