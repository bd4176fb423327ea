"""Time: elapsed time, and an estimate of the store's clock (design 009, rules L5 and L10)."""

from __future__ import annotations

import sys
import time
from dataclasses import dataclass, field
from typing import NamedTuple

SECOND = 1_000_000
"""Microseconds per second: times of the log are integers, in microseconds since the epoch."""
SAMPLE_AGE = 600.0
"""Seconds after which the store's time is read again, because clocks drift."""

_BOOT: int | None = getattr(time, "CLOCK_BOOTTIME", None)
if sys.platform == "darwin":
    _BOOT = time.CLOCK_MONOTONIC  # `time.monotonic` reads another clock there


def boot_time() -> float:
    """Return the seconds since some fixed point, including the time of suspensions."""
    return time.monotonic() if _BOOT is None else time.clock_gettime(_BOOT)


class Moment(NamedTuple):
    """A moment by all clocks of the machine; none is trusted alone."""

    monotonic: float
    boot: float
    wall: float

    @classmethod
    def now(cls) -> Moment:
        """Return the present moment."""
        return cls(time.monotonic(), boot_time(), time.time())

    def age(self) -> float:
        """Return the seconds since then, by the clock that shows the longest time (L5)."""
        now = Moment.now()
        return max(each - then for each, then in zip(now, self, strict=True))


@dataclass(slots=True)
class StoreClock:
    """An estimate of the store's clock that is never ahead of it (L10).

    The modification time of a created object was the store's time at some earlier moment. So each
    sample is a lower bound, a good one if the object is new, and the largest sample is the best.
    Since the machine's clock may drift relative to the store's, samples expire.
    """

    _offset: float | None = None
    _since: float = field(default_factory=boot_time)

    @property
    def due(self) -> bool:
        """Whether a new sample is needed."""
        return self._offset is None or boot_time() - self._since > SAMPLE_AGE

    def sample(self, modified_at: float, created: float | None = None) -> None:
        """Add the store's time of an object that this process has just created.

        Args:
            modified_at: seconds since the epoch, by the store's clock.
            created: the `boot_time` at which its creation was confirmed; None for now.
        """
        offset = modified_at - (boot_time() if created is None else created)
        if self._offset is None or self.due:
            self._offset, self._since = offset, boot_time()
        else:
            self._offset = max(self._offset, offset)

    def now(self) -> int:
        """Return the time in microseconds since the epoch; without a sample, the machine's own."""
        seconds = time.time() if self._offset is None else self._offset + boot_time()
        return int(seconds * SECOND)
