"""The dataset artifact as later stages read it: its schema, its tables, its shards."""
