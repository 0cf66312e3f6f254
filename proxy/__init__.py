"""snapshot-proxy: a caching read-through proxy for DigitalOcean's snapshot API."""

__version__ = "0.1.0"
