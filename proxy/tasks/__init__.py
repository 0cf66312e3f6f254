"""Work in this process: one fetch for many callers, deadlines, the drain."""
