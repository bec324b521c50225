"""The store's DRAM tier: shared memory that engines may read and only the store writes."""
