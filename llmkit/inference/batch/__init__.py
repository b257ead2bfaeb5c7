"""Batch jobs over millions of rows: read, computed, and kept in shards, so that a killed job goes on where it was."""
