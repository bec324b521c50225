"""Addresses: what counts as this machine alone."""

import ipaddress


def is_loopback(host: str) -> bool:
    """Whether a server bound to `host` (a name or an IP address) only takes connections from this machine."""
    if host == "localhost":
        return True
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return False
