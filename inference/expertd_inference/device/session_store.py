"""What a step that runs on the device alone has to do with the session, at its ends."""

from collections.abc import Callable, Mapping, Sequence

from expertd_inference.device.gpu_driven import StepCounts
from expertd_inference.device.runner import DeviceExpertsRunner
from expertd_inference.device.stats import DeviceStats
from expertd_inference.device.transaction import StepLostError, StepTransaction
from expertd_inference.experts.recovery import SESSION_ENDED
from expertd_inference.experts.source import HeldSource


class SessionStore:
    """:class:`~expertd_inference.device.whole.StepStore` for one device.

    The slots are ``runner``'s: what it has cached is forgotten once the device uses them by
    itself, and ``forget`` is called when what the device knows of them is void.
    """

    def __init__(
        self,
        source: HeldSource,
        transaction: StepTransaction,
        runner: DeviceExpertsRunner,
        stats: DeviceStats,
        record_bytes: Mapping[int, int],
        forget: Callable[[], None],
    ) -> None:
        self._source, self._transaction, self._runner = source, transaction, runner
        self._stats, self._record_bytes = stats, record_bytes
        self._forget = forget
        self._first_layer = min(record_bytes)

    @property
    def arena_address(self) -> int:
        """Registered anew if the session has attached to another."""
        return self._runner.engine.device_address

    def hold(self) -> int:
        """Begins to hold, unless what was brought is held."""
        if not self._runner.cache.is_empty:
            # A prompt was computed meanwhile, or this is the first step.
            self._runner.cache.clear()
            self._forget()
        try:
            self._transaction.hold.find(self._first_layer, [])
        except SESSION_ENDED as error:
            self._lose(error)
        # Should the session turn out to be lost, no slot is to be believed.
        self._transaction.hold.reads(self._runner.device.mark(), self._forget)
        return self._source.directory_address

    def bring(self, absent: Mapping[int, Sequence[int]]) -> None:
        """Fetches them, layer by layer; the last lot stays held."""
        for layer, experts in absent.items():
            try:
                for _ in self._transaction.hold.fetch(layer, experts, in_arena=True):
                    pass
            except SESSION_ENDED as error:
                self._lose(error)
            self._stats.nvme_misses += len(experts)

    def finished(self, counts: StepCounts) -> None:
        """Counts, and tells the daemon what the device has read of the arena."""
        self._transaction.verify()
        self._stats.device_hits += counts.num_hits
        for layer, experts in counts.copied.items():
            self._transaction.hold.find(layer, experts)
            self._stats.host_hits += len(experts)
            self._stats.copies += len(experts)
            self._stats.bytes_copied += len(experts) * self._record_bytes[layer]

    def _lose(self, error: Exception) -> None:
        self._transaction.recover(error)
        raise StepLostError(str(error)) from error
