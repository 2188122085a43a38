"""What engines share of a training step: the settings of malloc."""

import platform
import subprocess
import sys

import pytest

PROGRAM = """
import ctypes
from mask2former.training import keep_freed_memory
print(keep_freed_memory())

class Info(ctypes.Structure):
    names = "arena ordblks smblks hblks hblkhd usmblks fsmblks uordblks fordblks keepcost"
    _fields_ = [(name, ctypes.c_size_t) for name in names.split()]

libc = ctypes.CDLL(None)
libc.malloc.restype, libc.malloc.argtypes, libc.free.argtypes = ctypes.c_void_p, [ctypes.c_size_t], [ctypes.c_void_p]
libc.mallinfo2.restype = Info
before = libc.mallinfo2()
block = libc.malloc(200 << 20)
print(libc.mallinfo2().hblks - before.hblks)
libc.free(block)
print(libc.mallinfo2().fordblks >= 200 << 20)
"""


def run(**environment: str) -> list[str]:
    command = [sys.executable, "-c", PROGRAM]
    return subprocess.run(command, env=environment, capture_output=True, text=True, check=True).stdout.split()


@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="only glibc's malloc has these settings")
def test_freed_memory_is_kept_unless_the_environment_says_otherwise() -> None:
    assert run() == ["True", "0", "True"]
    assert run(GLIBC_TUNABLES="glibc.malloc.arena_max=4") == ["False", "1", "False"]
