"""Entries and stamps in Redis, and the embedded server."""
