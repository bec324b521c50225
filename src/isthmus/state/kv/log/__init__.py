"""The segment log: records on one disk, durable, verified on every read, forgotten for good."""
