"""The engine: core loop, scheduler, block pool, prefix tree, runner and sampler. The only home of torch."""
