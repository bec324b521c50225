"""Opening a disk: whose file it is, what is left when it fails, races, block devices."""

import errno
import mmap
import os
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest
from tests.support.disk import FailingCalls, descriptors

from isthmus.contracts.errors import DiskFailed, InvalidInput, StoreFull, StoreLocked
from isthmus.state.kv.io.calls import Calls
from isthmus.state.kv.io.disk import SECTOR, Op, Transfer, open_disk

CAPACITY = 16 * SECTOR
CALLS = Calls()


@pytest.fixture
def path(tmp_path: Path) -> Iterator[Path]:
    """Of a file to be; nothing that is opened may stay open."""
    before = descriptors()
    yield tmp_path / "log"
    assert descriptors() == before


def make(path: Path, capacity: int | None = CAPACITY, calls: Calls = CALLS) -> None:
    open_disk(path, capacity=capacity, create=True, calls=calls).close()


def test_a_new_file_is_private_reserved_and_whole(path: Path) -> None:
    make(path)
    status = path.stat()
    assert (status.st_mode & 0o777, status.st_size) == (0o600, CAPACITY)
    assert status.st_blocks * 512 >= CAPACITY
    disk = open_disk(path)
    assert disk.capacity == CAPACITY
    disk.close()


def test_a_file_has_no_size_before_it_has_its_room(path: Path) -> None:
    class Watching(Calls):
        """What a crash after any of these calls would leave."""

        def fallocate(self, fd: int, mode: int, offset: int, length: int) -> None:
            super().fallocate(fd, mode, offset, length)
            left.append((path.stat().st_size, path.stat().st_blocks * 512 >= CAPACITY))

        def fsync(self, fd: int) -> None:
            left.append((path.stat().st_size, path.stat().st_blocks * 512 >= CAPACITY))
            super().fsync(fd)

    left: list[tuple[int, bool]] = []
    make(path, calls=Watching())
    assert left == [(0, True), (CAPACITY, True), (CAPACITY, True)]


@pytest.mark.parametrize("capacity", [0, SECTOR - 1, SECTOR + 512, -SECTOR, 1 << 62])
def test_a_capacity_is_whole_sectors(path: Path, capacity: int) -> None:
    with pytest.raises(InvalidInput) as caught:
        make(path, capacity)
    assert caught.value.field == "capacity"
    assert not path.exists()


def test_another_capacity_than_the_files_is_refused(path: Path) -> None:
    make(path)
    with pytest.raises(InvalidInput, match=f"has {CAPACITY} bytes, not {2 * CAPACITY}"):
        make(path, 2 * CAPACITY)
    assert path.stat().st_size == CAPACITY


def test_what_is_not_there_is_made_only_when_asked(path: Path) -> None:
    with pytest.raises(DiskFailed, match="open") as caught:
        open_disk(path, capacity=CAPACITY)
    assert caught.value.errno == errno.ENOENT
    with pytest.raises(InvalidInput, match="needs a capacity"):
        make(path, None)
    assert not path.exists()
    with pytest.raises(DiskFailed, match="open"):
        make(path / "deeper")


def test_an_empty_file_is_a_new_one(path: Path) -> None:
    path.touch(0o644)
    with pytest.raises(InvalidInput, match="multiple"):
        make(path, None)
    make(path)
    assert (path.stat().st_mode & 0o777, path.stat().st_size) == (0o600, CAPACITY)


def test_a_file_of_part_of_a_sector_is_refused(path: Path) -> None:
    path.write_bytes(b"x" * 5000)
    with pytest.raises(InvalidInput, match="multiple"):
        make(path, None)
    assert path.read_bytes() == b"x" * 5000


def test_holes_are_filled(path: Path) -> None:
    path.touch(0o600)
    os.truncate(path, CAPACITY)
    assert path.stat().st_blocks == 0
    make(path)
    assert path.stat().st_blocks * 512 >= CAPACITY


def test_links_and_other_things_are_refused(path: Path, tmp_path: Path) -> None:
    make(path)
    link, pipe = tmp_path / "link", tmp_path / "pipe"
    link.symlink_to(path)
    os.mkfifo(pipe)
    for wrong, reason in [
        (link, "symbolic link"),
        (pipe, "neither"),
        (tmp_path, "neither"),
        (Path("/dev/null"), "neither"),
    ]:
        with pytest.raises(InvalidInput, match=reason) as caught:
            make(wrong)
        assert caught.value.field == "path"


@pytest.mark.skipif(os.geteuid() != 0, reason="NOT RUN: only root can make a file of somebody else's")
def test_somebody_elses_file_is_refused(path: Path) -> None:
    make(path)
    os.chown(path, 65534, -1)
    with pytest.raises(InvalidInput, match="belongs to user 65534"):
        make(path)


def test_a_link_put_there_meanwhile_is_not_followed(path: Path, tmp_path: Path) -> None:
    class Swapping(Calls):
        """Replaces the file by a link to a victim between the look and the opening."""

        def open(self, path: Path, flags: int, mode: int = 0o600) -> int:
            if path.name == "log":
                path.unlink()
                path.symlink_to(victim)
            return super().open(path, flags, mode)

    victim = tmp_path / "victim"
    make(victim)
    make(path)
    with pytest.raises(InvalidInput, match="symbolic link"):
        make(path, calls=Swapping())


def test_a_file_replaced_meanwhile_is_looked_at_again(path: Path) -> None:
    class Replacing(Calls):
        done = 0

        def open(self, path: Path, flags: int, mode: int = 0o600) -> int:
            if path.name == "log" and self.done < self.times:
                self.done += 1
                # Kept under another name, so that the inode's number is not taken again.
                path.rename(path.with_name(f"old{self.done}"))
                make(path)
            return super().open(path, flags, mode)

        def __init__(self, times: int) -> None:
            super().__init__()
            self.times = times

    make(path)
    make(path, calls=Replacing(2))
    with pytest.raises(StoreLocked, match="made and removed"):
        make(path, calls=Replacing(1_000_000))


def test_a_file_removed_by_its_maker_is_made_anew(path: Path) -> None:
    class Removing(Calls):
        """The other process found no room: it removes the file that we have just opened, and unlocks it."""

        done = False

        def flock(self, fd: int, operation: int) -> None:
            if not self.done:
                self.done = True
                path.unlink()
            super().flock(fd, operation)

    path.touch(0o600)
    make(path, calls=Removing())
    assert path.stat().st_size == CAPACITY


@pytest.mark.parametrize("number", [errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EIO, errno.EOPNOTSUPP])
@pytest.mark.parametrize("there", [False, True])
def test_no_room_leaves_no_file(path: Path, number: int, there: bool) -> None:
    if there:
        path.touch(0o600)
    full = number in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)
    calls = FailingCalls(lambda name, _: number if name == "fallocate" else 0, late=True)
    with pytest.raises(StoreFull if full else DiskFailed):
        make(path, calls=calls)
    assert path.exists() == there
    assert not there or (path.stat().st_size, path.stat().st_blocks) == (0, 0)


@pytest.mark.parametrize("call", ["set_direct", "preadv"])
def test_without_o_direct_it_goes_on_and_says_so(path: Path, call: str) -> None:
    calls = FailingCalls(lambda name, _: errno.EINVAL if name == call and call not in calls.made[:-1] else 0)
    disk = open_disk(path, capacity=CAPACITY, create=True, calls=calls)
    assert "no O_DIRECT: Invalid argument" in disk.backend_reason
    channel, view = disk.channel(1), memoryview(mmap.mmap(-1, SECTOR))
    view[:] = b"x" * SECTOR
    channel.submit([Transfer(Op.WRITE, 0, view, 0)])
    assert [completion.error for completion in channel.wait(1, 20.0)] == [0]
    disk.close()
    assert path.read_bytes() == b"x" * SECTOR + bytes(CAPACITY - SECTOR)


def test_the_reason_for_threads_is_told(path: Path) -> None:
    disk = open_disk(path, capacity=CAPACITY, create=True, backend="threads")
    assert (disk.backend, disk.backend_reason) == ("threads", "io_uring: threads were asked for")
    disk.close()


@pytest.fixture
def device(tmp_path: Path) -> Iterator[Path]:
    image = tmp_path / "image"
    image.touch()
    os.truncate(image, 8 << 20)
    command = ["losetup", "--find", "--show", str(image)]
    try:
        found = subprocess.run(command, check=True, capture_output=True, text=True, timeout=60).stdout.strip()
    except (OSError, subprocess.CalledProcessError) as error:
        pytest.skip(f"NOT RUN: no loop device is to be had: {error}")
    yield Path(found)
    subprocess.run(["losetup", "--detach", found], check=True, timeout=60)


@pytest.mark.parametrize("unsupported", [(), ("fallocate",), ("fallocate", "device_zero")])
def test_a_block_device_is_a_disk(device: Path, unsupported: tuple[str, ...]) -> None:
    disk = open_disk(device, calls=FailingCalls(lambda name, _: errno.EOPNOTSUPP if name in unsupported else 0))
    assert disk.capacity == 8 << 20
    channel, view = disk.channel(1), memoryview(mmap.mmap(-1, 4 * SECTOR))
    view[:] = b"x" * 4 * SECTOR
    offset = disk.capacity - 4 * SECTOR
    channel.submit([Transfer(Op.WRITE, offset, view, 0)])
    assert [completion.error for completion in channel.wait(1, 20.0)] == [0]
    disk.zero(offset + SECTOR, SECTOR)
    disk.sync()
    channel.submit([Transfer(Op.READ, offset, view, 0)])
    assert [completion.error for completion in channel.wait(1, 20.0)] == [0]
    assert view == b"x" * SECTOR + bytes(SECTOR) + b"x" * 2 * SECTOR
    with pytest.raises(StoreLocked, match="in use"):
        open_disk(device)
    disk.close()
    with pytest.raises(InvalidInput, match="has 8388608 bytes"):
        open_disk(device, capacity=16 << 20)
    part = open_disk(device, capacity=4 << 20)
    assert part.capacity == 4 << 20
    part.close()


def test_a_mounted_device_is_refused(device: Path, tmp_path: Path) -> None:
    folder = tmp_path / "mounted"
    folder.mkdir()
    subprocess.run(["mkfs.ext4", "-qF", str(device)], check=True, timeout=60)
    subprocess.run(["mount", str(device), str(folder)], check=True, timeout=60)
    try:
        with pytest.raises(StoreLocked, match="mounted"):
            open_disk(device)
    finally:
        subprocess.run(["umount", str(folder)], check=True, timeout=60)
