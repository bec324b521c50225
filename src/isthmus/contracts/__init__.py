"""The ground: ids, keys, layouts, requests, events, ports, errors and the clock. Imports nothing of ours."""
