"""The log lines of a Redis that is not usable: one when that is found, one when it is usable again.

If it changes again and again, there is one such pair of lines in QUIET_S.
"""

import logging

from proxy.core.incident import Incident
from proxy.logs import event
from proxy.storage.readiness import Refusal

QUIET_S = 10.0
_LOG = logging.getLogger(__name__)


class Outage:
    """The outages of the Redis at `address`, one after the other. Times are seconds of one clock."""

    def __init__(self, address: str) -> None:
        self._address = address
        self._incident = Incident()
        self._logged: Refusal | None = None
        self._logged_at = self._usable_at = -QUIET_S

    @property
    def attempts(self) -> int:
        """Give how often Redis was found unusable since it last was usable."""
        return self._incident.count

    def unusable(self, trouble: Refusal, now: float) -> None:
        """Record that Redis is not usable, or still not. A new cause is logged, too."""
        if self._incident.sign(now):
            self._logged = None
        if not trouble.reason or trouble.cause == "lost":
            return  # the next connection says more
        known = self._logged is not None and (self._logged.cause, self._logged.command) == (
            trouble.cause,
            trouble.command,
        )
        if known or now - self._logged_at < QUIET_S:
            return
        self._logged, self._logged_at = trouble, now
        event(
            _LOG,
            logging.WARNING,
            "redis-unusable",
            cause=trouble.cause,
            address=self._address,
            command=trouble.command,
            reason=trouble.reason,
            mend=trouble.mend,
            consequence="every request goes upstream, within this replica's share of the quota",
        )

    def usable(self, now: float) -> None:
        """Record that Redis is usable.

        It is logged at the start, after an outage that was logged, and else once in QUIET_S.
        """
        over = self._incident.end(now)
        if over is None or self._logged is not None or now - self._usable_at >= QUIET_S:
            self._usable_at = now
            event(
                _LOG,
                logging.INFO,
                "redis-usable",
                address=self._address,
                seconds=0.0 if over is None else round(over.seconds, 3),
                attempts=0 if over is None else over.count,
            )
        self._logged = None
