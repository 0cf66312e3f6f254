"""What gate and ledgers say of one token and one call of it: account, permit, settlement."""

from typing import NamedTuple

from proxy.core.identity import Partition
from proxy.core.operations import Operation
from proxy.core.quota import Admitted


class Account(NamedTuple):
    """One token. During a rotation of the secret it has a second partition, where its calls count, too."""

    partition: Partition
    caller: str
    previous: Partition | None = None

    @property
    def partitions(self) -> tuple[Partition, ...]:
        """The partitions under which the common ledger counts the token's calls, the current one last."""
        return (self.partition,) if self.previous is None else (self.previous, self.partition)


class Permit(NamedTuple):
    """A call that may be made. `common` are the common ledger's admissions; none if Redis did not answer.

    `remaining` are the calls left after it in the minute and in the hour, whose limit is `per_hour`.
    """

    own: Admitted
    common: tuple[Admitted, ...]
    known: bool
    remaining: tuple[int, int]
    per_hour: int


class Settlement(NamedTuple):
    """The outcome of a call, as the ledgers count it."""

    remaining_told: int | None = None
    """The upstream's `ratelimit-remaining`, where it can mean the hour."""

    limit_told: int | None = None
    """The upstream's `ratelimit-limit`, where it can be the hour's."""

    answered: bool = False
    """There was an answer other than 429."""

    known: bool | None = None
    """Whether the upstream accepted the token; None: its answer does not say."""

    refused: bool = False
    """The answer was 429, and was meant for the token."""

    refused_operation: Operation | None = None
    """The answer was 429, and was meant for this operation only."""

    retry_after_s: int | None = None
