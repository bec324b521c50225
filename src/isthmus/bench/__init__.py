"""What `isthmus bench` measures with: workloads, targets, meters and reports. Nothing here serves."""
