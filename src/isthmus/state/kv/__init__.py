"""Blocks and state snapshots in tiers: DRAM, then a log on NVMe."""
