"""What exists at DigitalOcean: teams, their tokens, snapshots and other resources.

Pure: no I/O and no clock; randomness is a seed, so that equal seeds make equal worlds. Scopes are held
here; what they allow is decided in `api.py`.
"""

import random
import uuid
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from datetime import UTC, datetime
from typing import Any, Literal, Self

from proxy.simulator.answers import encode

DROPLET_SNAPSHOT_ID = "6372321"
VOLUME_SNAPSHOT_ID = "fbe805e8-866b-11e6-96bf-000f53315a41"
DROPLET_ID = "200776916"
"""A Droplet of the default team: asked for as a snapshot it is a 400, not a 404."""
VOLUME_ID = "89bcc42f-85cf-11e6-a004-000f53315871"

FULL_ACCESS = frozenset(
    {
        "account:read",
        "block_storage_snapshot:create",
        "block_storage_snapshot:delete",
        "block_storage_snapshot:read",
        "cdn:read",
        "droplet:read",
        "image:delete",
        "image:read",
        "image:update",
        "snapshot:delete",
        "snapshot:read",
        "ssh_key:read",
        "tag:create",
        "tag:delete",
        "tag:read",
    }
)
READ_ONLY = frozenset(scope for scope in FULL_ACCESS if scope.endswith(":read"))

UNKNOWN_TOKEN = "unknown"  # noqa: S105 - a label in the log, not a secret
NO_TOKEN = "none"  # noqa: S105 - the same

ResourceType = Literal["droplet", "volume"]

_REGIONS = ("nyc1", "nyc3", "sfo3", "ams3", "fra1", "lon1", "sgp1", "tor1", "blr1", "syd1")
# Names and sizes as varied as those that were recorded: `&` arrives escaped, sizes are 0, whole or not.
_NAMES = ("web-01", "db & backups", "pvc-9f", "büro-größe", "スナップショット", "nightly <auto>", 'say "hi"')
_SIZES: tuple[float, ...] = (0, 10, 0.1008, 2.34, 25.0, 137.5)
_TAGS: tuple[list[str] | None, ...] = ([], ["web", "env:prod"], ["k8s"], None, ["backup"])

_DOCUMENTED: tuple[dict[str, Any], ...] = (
    {
        "id": DROPLET_SNAPSHOT_ID,
        "name": "web-01-1595954862243",
        "created_at": "2020-07-28T16:47:44Z",
        "regions": ["nyc3", "sfo3"],
        "resource_id": DROPLET_ID,
        "resource_type": "droplet",
        "min_disk_size": 25,
        "size_gigabytes": 2.34,
        "tags": ["web", "env:prod"],
    },
    {
        "id": VOLUME_SNAPSHOT_ID,
        "name": "pvc-01-1595954862243",
        "created_at": "2019-09-28T23:14:30Z",
        "regions": ["nyc1"],
        "resource_id": VOLUME_ID,
        "resource_type": "volume",
        "min_disk_size": 2,
        "size_gigabytes": 0.1008,
        "tags": ["k8s"],
    },
)


@dataclass(frozen=True, slots=True)
class Token:
    """A bearer token of one team. The label stands for it wherever something is printed or logged."""

    value: str = field(repr=False)
    label: str
    team: str
    scopes: frozenset[str]


@dataclass(frozen=True, slots=True)
class Snapshot:
    """A snapshot as its JSON object, with both ways of seeing it written out already."""

    id: str
    team: str
    document: Mapping[str, Any] = field(repr=False)
    tagged: bytes = field(repr=False)
    untagged: bytes = field(repr=False)

    @classmethod
    def of(cls, document: Mapping[str, Any], team: str) -> Self:
        """Take any JSON object with an `id`: unknown keys and odd types stay, for tests that need them."""
        untagged = {**document, "tags": None} if "tags" in document else document
        return cls(str(document["id"]).lower(), team, document, encode(document), encode(untagged))

    @property
    def resource_type(self) -> ResourceType:
        """What it was made of."""
        return "volume" if self.document.get("resource_type") == "volume" else "droplet"

    @property
    def resource_id(self) -> str:
        """Which Droplet or volume it was made of."""
        return str(self.document.get("resource_id")).lower()

    def fragment(self, token: Token) -> bytes:
        """Return the JSON object as `token` sees it: `tags` are null without `tag:read`."""
        return self.tagged if "tag:read" in token.scopes else self.untagged


class World:
    """All teams. The two documented snapshots always belong to the first one.

    `snapshots_per_team` are made in addition to these, half of Droplets and half of volumes.
    """

    def __init__(
        self, seed: int = 1, *, teams: Sequence[str] = ("default", "other"), snapshots_per_team: int = 28
    ) -> None:
        if not teams:
            raise ValueError("a world needs at least one team")
        self.teams = tuple(teams)
        self._random = random.Random(seed)
        self._latest_id = 10_000_000
        self._tokens: dict[str, Token] = {}
        self._issued = 0
        self._snapshots: dict[str, dict[str, Snapshot]] = {team: {} for team in teams}
        self._resources: dict[str, set[str]] = {team: set() for team in teams}
        for document in _DOCUMENTED:
            self.put(document, team=self.teams[0])
        for team in teams:
            for number in range(snapshots_per_team):
                self.put(self._invented("volume" if number % 2 else "droplet"), team=team)

    # Tokens

    def token(
        self,
        *,
        team: str | None = None,
        scopes: Iterable[str] = FULL_ACCESS,
        value: str | None = None,
        label: str | None = None,
    ) -> Token:
        """Issue a token: unless given, of the first team, with full access, a real-looking value, a label.

        Raises ValueError for an unknown team, for a value or a label that is taken.
        """
        team = self._known(self.teams[0] if team is None else team)
        value = f"dop_v1_{self._random.getrandbits(256):064x}" if value is None else value
        self._issued += 1
        label = f"{team}-{self._issued}" if label is None else label
        if value in self._tokens:
            raise ValueError("there is a token of this value already")
        if label in {UNKNOWN_TOKEN, NO_TOKEN, *(token.label for token in self._tokens.values())}:
            raise ValueError(f"the label {label!r} is taken")
        token = self._tokens[value] = Token(value, label, team, frozenset(scopes))
        return token

    def revoke(self, token: Token) -> None:
        """Make `token` unknown, which is a 401 from now on. Does nothing the second time."""
        self._tokens.pop(token.value, None)

    def authenticate(self, value: str) -> Token | None:
        """Return the token of this value, or None."""
        return self._tokens.get(value)

    def labelled(self, label: str) -> Token | None:
        """Return the token of this label, or None."""
        return next((token for token in self._tokens.values() if token.label == label), None)

    # Snapshots

    def find(self, snapshot_id: str, *, team: str) -> Snapshot | None:
        """Return the snapshot of `team` with this id, in any case of letters, or None."""
        return self._snapshots[team].get(snapshot_id.lower())

    def snapshots(
        self,
        *,
        team: str | None = None,
        resource_type: ResourceType | None = None,
        resource_id: str | None = None,
    ) -> list[Snapshot]:
        """Return the snapshots of `team` (the first one), in the order in which they were put, filtered."""
        return [
            snapshot
            for snapshot in self._snapshots[self.teams[0] if team is None else team].values()
            if resource_type in {None, snapshot.resource_type} and resource_id in {None, snapshot.resource_id}
        ]

    def put(self, document: Mapping[str, Any], *, team: str | None = None) -> Snapshot:
        """Add or replace the snapshot with the `id` of `document`; what it was made of exists from now on.

        Raises ValueError for an unknown team or a document without `id`.
        """
        team = self._known(self.teams[0] if team is None else team)
        if "id" not in document:
            raise ValueError("a snapshot needs an id")
        snapshot = Snapshot.of(document, team)
        self._snapshots[team][snapshot.id] = snapshot
        self.add_resource(snapshot.resource_id, team=team)
        return snapshot

    def change(self, snapshot: Snapshot, **fields: Any) -> Snapshot:
        """Replace fields of a snapshot, for instance `name` or `tags`."""
        return self.put({**snapshot.document, **fields}, team=snapshot.team)

    def delete(self, snapshot: Snapshot) -> None:
        """Remove a snapshot. Does nothing the second time."""
        self._snapshots[snapshot.team].pop(snapshot.id, None)

    def create(self, *, team: str, volume_id: str, name: str, tags: list[str] | None, now: float) -> Snapshot:
        """Make a snapshot of a volume at `now` (Unix seconds)."""
        created_at = datetime.fromtimestamp(now, UTC).strftime("%Y-%m-%dT%H:%M:%SZ")
        invented = self._invented("volume")
        chosen = {"name": name, "tags": tags, "resource_id": volume_id.lower(), "created_at": created_at}
        return self.put({**invented, **chosen}, team=team)

    # Other resources

    def add_resource(self, resource_id: str, *, team: str | None = None) -> None:
        """Let something exist that is not a snapshot: a Droplet, a volume, an image."""
        self._resources[self._known(self.teams[0] if team is None else team)].add(resource_id.lower())

    def has_resource(self, resource_id: str, *, team: str) -> bool:
        """Tell whether `team` has something with this id that is not a snapshot."""
        return resource_id.lower() in self._resources[team]

    def _known(self, team: str) -> str:
        if team not in self._snapshots:
            raise ValueError(f"no team {team!r}; there are {', '.join(self.teams)}")
        return team

    def _invented(self, resource_type: ResourceType) -> dict[str, Any]:
        pick = self._random
        of_droplet = resource_type == "droplet"
        self._latest_id += pick.randrange(1, 1_000)
        return {
            "id": str(self._latest_id) if of_droplet else self._uuid(),
            "name": f"{pick.choice(_NAMES)}-{pick.randrange(10**12, 10**13)}",
            "created_at": f"20{pick.randrange(16, 26)}-{pick.randrange(1, 13):02}-{pick.randrange(1, 29):02}T"
            f"{pick.randrange(24):02}:{pick.randrange(60):02}:{pick.randrange(60):02}Z",
            "regions": pick.sample(_REGIONS, pick.randrange(1, 4) if of_droplet else 1),
            "resource_id": str(pick.randrange(10**8, 10**9)) if of_droplet else self._uuid(),
            "resource_type": resource_type,
            "min_disk_size": pick.choice((1, 2, 10, 25, 80)),
            "size_gigabytes": pick.choice(_SIZES),
            "tags": pick.choice(_TAGS),
        }

    def _uuid(self) -> str:
        return str(uuid.UUID(int=self._random.getrandbits(128), version=4))
