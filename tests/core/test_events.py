"""The records that the rooms emit: their words are the labels of the contract."""

import dataclasses
from typing import get_args

import pytest

from proxy.core.cache_status import Outcome
from proxy.core.events import (
    OTHER_CALLER,
    Cause,
    Invalidation,
    RequestDone,
    Route,
    StoreOperation,
    UpstreamCall,
)

CONTRACT_ROUTES = {"snapshot", "list", "collection", "delete", "passthrough", "other"}
CONTRACT_CAUSES = {"delete", "purge", "unauthorized", "passthrough"}


def test_the_words_are_labels_of_the_contract() -> None:
    """Nothing is called what section 6 does not name."""
    assert set(Route) <= CONTRACT_ROUTES
    assert set(get_args(Cause)) <= CONTRACT_CAUSES
    assert OTHER_CALLER == "other"


@pytest.mark.parametrize(
    "record",
    [
        RequestDone(Route.SNAPSHOT, Outcome.HIT, 200, OTHER_CALLER, 0.001, "request-1"),
        UpstreamCall(Route.SNAPSHOT, "timeout", OTHER_CALLER, 8.0),
        StoreOperation("lookup", "ok"),
        Invalidation("delete"),
    ],
    ids=lambda record: type(record).__name__,
)
def test_records_do_not_change(record: object) -> None:
    """Whoever watches cannot alter what another watcher sees, nor add to it."""
    for field in dataclasses.fields(record):
        with pytest.raises(dataclasses.FrozenInstanceError):
            setattr(record, field.name, None)
    assert not hasattr(record, "__dict__")
