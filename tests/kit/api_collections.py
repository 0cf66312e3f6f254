"""The collections of the API, as its specification has them, stated apart from the product's table."""

import inspect
import re

import pydo.operations._operations

_CALL = re.compile(r'_url = "/v2/([^"]*)"(?:(?!_url = ).)*?method="([A-Z]+)"', re.DOTALL)

DOCUMENTED = {
    (method, path) for path, method in _CALL.findall(inspect.getsource(pydo.operations._operations))
}
"""Methods and paths behind `/v2/` of DigitalOcean's own client, which is made from the specification."""

SHOWN: list[tuple[str, str, str]] = [
    # A document of the second shows something of the first: a field, or a path below it.
    ("droplets", "volumes", "volume.droplet_ids"),
    ("volumes", "droplets", "droplet.volume_ids"),
    ("snapshots", "droplets", "droplet.snapshot_ids"),
    ("snapshots", "images", "a Droplet's snapshot is an image"),
    ("images", "droplets", "droplet.image"),
    ("tags", "droplets", "droplet.tags"),
    ("tags", "volumes", "volume.tags"),
    ("tags", "images", "image.tags"),
    ("tags", "databases", "database.tags"),
    ("tags", "firewalls", "firewall.tags"),
    ("tags", "load_balancers", "load_balancer.tag"),
    ("tags", "kubernetes", "kubernetes_cluster.tags"),
    ("droplets", "tags", "tag.resources.droplets.count"),
    ("volumes", "tags", "tag.resources.volumes.count"),
    ("images", "tags", "tag.resources.images.count"),
    ("databases", "tags", "tag.resources.databases.count"),
    ("snapshots", "tags", "tag.resources.volume_snapshots.count"),
    ("droplets", "actions", "actions of Droplets"),
    ("volumes", "actions", "actions of volumes"),
    ("images", "actions", "actions of images"),
    ("reserved_ips", "actions", "actions of reserved addresses"),
    ("reserved_ips", "droplets", "droplet.networks"),
    ("droplets", "reserved_ips", "reserved_ip.droplet"),
    ("reserved_ips", "floating_ips", "two names of one thing"),
    ("floating_ips", "reserved_ips", "two names of one thing"),
    ("firewalls", "droplets", "GET /v2/droplets/{id}/firewalls"),
    ("droplets", "firewalls", "firewall.droplet_ids"),
    ("droplets", "load_balancers", "load_balancer.droplet_ids"),
    ("certificates", "domains", "records for Let's Encrypt"),
    ("kubernetes", "droplets", "nodes are Droplets"),
    ("kubernetes", "volumes", "volumes of claims"),
    ("droplets", "kubernetes", "node.droplet_id"),
    ("droplets", "vpcs", "GET /v2/vpcs/{id}/members"),
    ("droplets", "projects", "GET /v2/projects/{id}/resources"),
    ("domains", "projects", "GET /v2/projects/{id}/resources"),
    ("vpc_peerings", "vpcs", "GET /v2/vpcs/{id}/peerings"),
    ("registry", "registries", "two names of one thing"),
    ("registry", "kubernetes", "kubernetes_cluster.registry_enabled"),
]
"""Collections of which the second one's documents show something of the first, and where."""
