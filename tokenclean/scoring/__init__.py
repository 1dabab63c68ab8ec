"""Per-token losses of one model over a pool, and the tables they are kept in."""
