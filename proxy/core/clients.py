"""Which program sent a request, as a label of the metrics: a listed name, or `other`. Pure.

A header that the operator chose tells it, `User-Agent` if no other was chosen. Only the operator's list
makes labels: whatever a caller sends, it is one of them or `other`.
"""

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from types import MappingProxyType

from proxy.core.events import OTHER_CLIENT

_PRODUCT = re.compile(r"[!#$%&'*+.^_`|~0-9A-Za-z-]+")


@dataclass(frozen=True, slots=True)
class Clients:
    """The programs that are told apart: by `header`, and by the `names` that the operator listed."""

    header: str = "User-Agent"
    names: Sequence[str] = ()
    _listed: Mapping[str, str] = field(init=False, repr=False, compare=False)

    def __post_init__(self) -> None:
        listed = MappingProxyType({name.lower(): name for name in self.names})
        object.__setattr__(self, "_listed", listed)

    def of(self, value: str | None) -> str:
        """Give the label of a request whose header has this value; None: it has no such header.

        It is the first product's name without its version (RFC 9110 §10.1.5: the most significant product
        comes first), in the list's spelling, whatever the case of its letters.
        """
        product = _PRODUCT.match(value.lstrip()) if value and self._listed else None
        return OTHER_CLIENT if product is None else self._listed.get(product[0].lower(), OTHER_CLIENT)
