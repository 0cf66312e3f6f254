"""What the machine gives: descriptors, addresses, files, certificates."""
