"""HTTP towards DigitalOcean."""
