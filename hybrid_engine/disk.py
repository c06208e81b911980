"""A file on the disk with direct I/O, into and out of tensors' own memory."""

import ctypes
import errno
import os
import shutil
from pathlib import Path

import torch

BLOCK = 4096
"""What direct I/O wants sizes, offsets and addresses to be multiples of."""


class DiskError(OSError):
    """The disk cannot be used, or is full."""


class File:
    """`size` bytes on the disk that vanish with the process. Raises DiskError where they cannot be had."""

    def __init__(self, folder: Path, size: int) -> None:
        self.folder, self.fd = folder, -1
        try:
            folder.mkdir(parents=True, exist_ok=True)
            self.fd = os.open(folder, os.O_TMPFILE | os.O_RDWR | os.O_DIRECT, 0o600)
            os.posix_fallocate(self.fd, 0, max(size, BLOCK))
        except OSError as error:
            if self.fd >= 0:
                os.close(self.fd)
            free = f", {shutil.disk_usage(folder).free / 2**30:.2f} GiB are free" if folder.is_dir() else ""
            text = f"memory.disk: {folder}: {error.strerror}; {size / 2**30:.2f} GiB are needed{free}"
            raise DiskError(error.errno, text) from error

    def write(self, page: torch.Tensor, offset: int) -> None:
        """Write a page, or the first blocks of one."""
        try:
            if os.pwrite(self.fd, _memory(page), offset) < len(page):
                raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        except OSError as error:
            raise DiskError(error.errno, f"memory.disk: {self.folder}: {error.strerror}, while writing") from error

    def read(self, page: torch.Tensor, offset: int) -> None:
        """Read into a page, or the first blocks of one."""
        if os.preadv(self.fd, [_memory(page)], offset) < len(page):
            raise DiskError(errno.EIO, f"memory.disk: {self.folder}: it holds less than was written")


def _memory(page: torch.Tensor) -> ctypes.Array[ctypes.c_char]:
    """The bytes themselves; `page.numpy()` would fix the size of its storage for good."""
    return (ctypes.c_char * len(page)).from_address(page.data_ptr())
