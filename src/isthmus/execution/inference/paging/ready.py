"""What was loaded for sequences that have not started yet. Pure.

It is leased, so that other loads do not push it out again; whoever needs the room to compute gets it.
"""

from isthmus.execution.inference.lease import Lease


class Ready:
    """Leases by the serial of their sequence."""

    def __init__(self) -> None:
        self._leases: dict[int, Lease] = {}

    @property
    def blocks(self) -> int:
        """How many are leased."""
        return sum(len(lease.blocks) for lease in self._leases.values())

    def keep(self, serial: int, lease: Lease) -> None:
        """Hold `lease` until `drop`, or until it gives way."""
        self._leases[serial] = lease

    def drop(self, serial: int) -> None:
        """The sequence runs, or ended."""
        lease = self._leases.pop(serial, None)
        if lease is not None:
            lease.close()

    def give_way(self, blocks: int, serial: int) -> bool:
        """The sequence `serial` needs room: let at least so many blocks go, if there are, the latest loaded first, its
        own last (where it cannot use them all, they may be what it lacks). Whether any went.
        """
        given = 0
        others = [one for one in reversed(self._leases) if one != serial]
        for one in [*others, *(self._leases.keys() & {serial})]:
            if given >= blocks:
                break
            given += len(self._leases[one].blocks)
            self.drop(one)
        return given > 0
