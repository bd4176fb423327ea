"""Decides which of several contending writers is next (design 009, rule L1)."""

from __future__ import annotations

import time
from dataclasses import dataclass, field

SHORT = 0.3
"""The most round trips for which a writer pauses if others have waited longer."""
QUIET = 4.0
"""Round trips without an entry after which no writer contends."""
STREAK = 8
"""How many entries a writer appends in a row before it lets others have a turn."""
TURN = 1.5
"""Round trips that the others need for their turn: they read its entry and send theirs."""
LONGEST = 1.0
"""The longest pause in seconds, however slow the store is."""


@dataclass(slots=True)
class Turns:
    """Lets the writer that has waited longest be next: each entry contains how long it took to append.

    A writer that is refused reads the entry that was faster and tries the next position. Without more
    rules, the writer of that entry would always be faster, since it need not read the entry. So a
    writer that has waited less than the last one had to pauses for a fraction of a round trip. Writers
    that have waited longer then send first.
    """

    round_trip: float = 0.01
    _waited: float = 0.0
    _seen_at: float = field(default=float("-inf"))
    _won_at: float = field(default=float("-inf"))
    _streak: int = 0

    @property
    def contended(self) -> bool:
        """Whether the last entry had to wait, so that others may still be waiting."""
        quiet = time.monotonic() - self._seen_at > QUIET * self.round_trip
        return not quiet and self._waited > self.round_trip / 2

    def saw(self, waited: float) -> None:
        """Note an entry of any writer, and for how many seconds it had waited."""
        self._waited, self._seen_at = waited, time.monotonic()

    def won(self, waited: float) -> None:
        """Note an entry of this writer, and for how many seconds it had waited."""
        self.saw(waited)
        self._won_at = self._seen_at
        self._streak += 1

    def pause(self, waited: float) -> float:
        """Return the seconds to wait before the next attempt.

        Args:
            waited: seconds since the first attempt of this entry; 0 before it.
        """
        if time.monotonic() - self._won_at > self.round_trip / 2:
            self._streak = 0
        elif self._streak >= STREAK:
            self._streak = 0
            return min(TURN * self.round_trip, LONGEST)
        if not self.contended:
            return 0.0
        return min(SHORT * self.round_trip * max(0.0, 1 - waited / self._waited), LONGEST)
