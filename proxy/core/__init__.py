"""Pure: no I/O, no clock, no randomness, no logging; time comes in as an argument."""
