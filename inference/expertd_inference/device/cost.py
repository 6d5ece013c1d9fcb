"""Whether a miss is copied to the device or computed on the CPU: which is done sooner.

A layer's misses are split so that link and CPU end together (as FreeToken does). Both read the
same RAM: while copies run, the CPU has what they leave of the rate that it has alone, so the
ratio is the link's rate to the CPU's rate less the link's. By that the CPU alone would be done as
soon, but what is copied is in the cache for the next tokens: of splits that take about the same
time, the one that copies most. Pure: rates in, a number out.
"""

from dataclasses import dataclass

SLACK = 0.05
"""So much longer may a layer take for what is copied, which the next tokens may find."""
WEIGHT = 0.1
"""Of a new measurement against all before, in the running mean."""
MIN_SHARE = 0.1
"""What is left of the CPU's rate while copies run, at the least: caches, and links below it."""


@dataclass(frozen=True)
class Rates:
    """What was measured at the start. Bytes of records per second, and what a call costs."""

    link_bytes_per_second: float
    copy_seconds: float
    """From queueing a copy to its arrival, beside its bytes."""
    cpu_bytes_per_second: float
    cpu_seconds: float
    """Of one call of the CPU's kernel and of bringing its result to the device."""
    device_bytes_per_second: float
    """The device's kernels'."""


TYPICAL = Rates(
    link_bytes_per_second=25e9,
    copy_seconds=10e-6,
    cpu_bytes_per_second=20e9,
    cpu_seconds=50e-6,
    device_bytes_per_second=1e12,
)
"""Of a host with a GPU on PCIe 4, where nothing was measured."""


class CostModel:
    """Predicts both ways, and learns from what came of it."""

    def __init__(self, rates: Rates) -> None:
        self.rates = rates
        self.cpu_correction = 1.0
        """Measured over predicted, in the mean."""
        self.link_correction = 1.0

    def __repr__(self) -> str:
        return (
            f"<CostModel link {self.rates.link_bytes_per_second / 1e9:.1f} GB/s "
            f"x{self.link_correction:.2f} cpu {self.rates.cpu_bytes_per_second / 1e9:.1f} GB/s "
            f"x{self.cpu_correction:.2f}>"
        )

    def copy_seconds(self, num_bytes: int) -> float:
        """Until copies of so many bytes have been copied and computed."""
        rates = self.rates
        link = num_bytes / rates.link_bytes_per_second * self.link_correction
        return rates.copy_seconds + link + num_bytes / rates.device_bytes_per_second

    def cpu_seconds(self, num_bytes: int, *, copying: bool) -> float:
        """Until so many bytes of records have been computed on the CPU."""
        rates = self.rates
        rate = rates.cpu_bytes_per_second
        if copying:
            rate = max(rate - rates.link_bytes_per_second, MIN_SHARE * rate)
        return rates.cpu_seconds + num_bytes / rate * self.cpu_correction

    def num_on_cpu(self, num_misses: int, record_bytes: int) -> int:
        """How many of a layer's misses to compute on the CPU: the fewest that cost no time."""

        def seconds(num: int) -> float:
            copied = num_misses - num
            copy = self.copy_seconds(copied * record_bytes) if copied else 0.0
            cpu = self.cpu_seconds(num * record_bytes, copying=copied > 0) if num else 0.0
            return max(copy, cpu)

        times = [seconds(num) for num in range(num_misses + 1)]
        return next(num for num, time in enumerate(times) if time <= (1 + SLACK) * min(times))

    def observe_cpu(self, num_bytes: int, seconds: float) -> None:
        """The CPU's kernel took so long, call included."""
        predicted = num_bytes / self.rates.cpu_bytes_per_second
        measured = seconds - self.rates.cpu_seconds
        if predicted > 0:
            self.cpu_correction = _mean(self.cpu_correction, measured / predicted)

    def observe_copies(self, num_bytes: int, seconds: float) -> None:
        """So many bytes took so long from one arrival to a later one."""
        predicted = num_bytes / self.rates.link_bytes_per_second
        if predicted > 0:
            self.link_correction = _mean(self.link_correction, seconds / predicted)


def _mean(before: float, measured: float) -> float:
    # A process that was stopped, or a clock that stands still, is no measurement.
    bounded = min(max(measured, 0.1), 10.0)
    return (1 - WEIGHT) * before + WEIGHT * bounded
