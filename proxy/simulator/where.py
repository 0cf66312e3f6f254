"""Which requests are meant: one filter for faults, gates, counters and waiting. Knows no sockets."""

from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class Where:
    """Requests by method, path and label of their token; None means any.

    A path is compared raw and without query; one that ends in `*` means all that begin so.
    """

    method: str | None = None
    path: str | None = None
    token: str | None = None

    def includes(self, method: str, path: str, token: str) -> bool:
        """Tell whether a request is meant."""
        if self.method not in {None, method} or self.token not in {None, token}:
            return False
        if self.path is None:
            return True
        return path.startswith(self.path[:-1]) if self.path.endswith("*") else path == self.path


def without_query(target: str) -> str:
    """Return the path of a raw target."""
    return target.partition("?")[0]
