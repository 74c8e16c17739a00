"""Memory in large pages for computing on a CPU, where glibc and the kernel offer them.

Every training step takes a few GB for its intermediate results from the kernel and gives them back. In pages of 4 KiB
that costs a twentieth of the step, in pages of 2 MiB a quarter of this. A step of decoding reads all weights once, and
of large pages the processor has to look up fewer. The kernel hands them out to whoever asks, and glibc reads whether it
is to ask when a process starts, and never again.
"""

import contextlib
import os
import sys
from pathlib import Path

_TUNABLES = "GLIBC_TUNABLES"
_KERNEL = Path("/sys/kernel/mm/transparent_hugepage/enabled")


def environment() -> dict[str, str]:
    """Returns the variables with which a process gets large pages; none where it gets them anyway, or never."""
    with contextlib.suppress(OSError):  # another system, or a kernel without them
        if _TUNABLES not in os.environ and "[madvise]" in _KERNEL.read_text():
            return {_TUNABLES: "glibc.malloc.hugetlb=1"}
    return {}


def restart() -> None:
    """Starts the running program anew, as the same process, if it would then get large pages; else returns."""
    if (variables := environment()) and sys.executable:
        with contextlib.suppress(OSError):
            os.execve(sys.executable, [sys.executable, *sys.orig_argv[1:]], os.environ | variables)
