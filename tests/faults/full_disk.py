"""Fills the disk at the n-th write of a run, and looks what is left and whether the same command goes on.

    python tests/faults/full_disk.py 200

From its n-th write to a file on, a run is told that there is no space left (ENOSPC), whoever writes: Python, torch or
safetensors. It must end in one message with exit status 2, every file that the manifest names must be whole, and when
there is room again the same command must end with the weights of an uninterrupted run. Needs a C compiler, for a
library that stands between the process and the system (LD_PRELOAD).
"""

from __future__ import annotations

import argparse
import ctypes
import os
import shutil
import subprocess
import sys
import tempfile
import time
from pathlib import Path

SHIM = r"""
#define _GNU_SOURCE
#include <dlfcn.h>
#include <errno.h>
#include <sys/stat.h>
#include <sys/uio.h>
#include <unistd.h>

static long left = -1;              /* writes until the disk is full; -1: it never is */
void fill_after(long writes) { left = writes; }

static int is_full(int fd) {
    struct stat about;
    if (left < 0 || fd <= 2 || fstat(fd, &about) || !S_ISREG(about.st_mode)) return 0;
    if (left > 0) { left--; return 0; }
    errno = ENOSPC;
    return 1;
}
#define NEXT(name) static __typeof__(name) *next; if (!next) next = dlsym(RTLD_NEXT, #name)
ssize_t write(int fd, const void *data, size_t size) {
    NEXT(write); return is_full(fd) ? -1 : next(fd, data, size);
}
ssize_t pwrite64(int fd, const void *data, size_t size, off64_t at) {
    NEXT(pwrite64); return is_full(fd) ? -1 : next(fd, data, size, at);
}
ssize_t pwrite(int fd, const void *data, size_t size, off_t at) {
    NEXT(pwrite); return is_full(fd) ? -1 : next(fd, data, size, at);
}
ssize_t writev(int fd, const struct iovec *parts, int count) {
    NEXT(writev); return is_full(fd) ? -1 : next(fd, parts, count);
}
"""


def compiler() -> str | None:
    """A C compiler, where there is one."""
    return shutil.which("cc") or shutil.which("gcc")


def build(directory: Path) -> Path:
    """The library that stands in between."""
    source, library = directory / "shim.c", directory / "shim.so"
    source.write_text(SHIM)
    subprocess.run([str(compiler()), "-shared", "-fPIC", "-O1", "-o", library, source, "-ldl"], check=True)
    return library


def fill(home: Path, library: Path, instants: list[int], family: str, schedule: str) -> list[str]:
    """Fill the disk at each of the instants; what went wrong. This process must have been started with the library."""
    import children
    import storm

    from lillama.base import manifest
    from lillama.base.files import sha256
    from lillama.cli import main as cli

    shim = ctypes.CDLL(str(library))
    case = storm.prepare(home, family, schedule, evaluate="")
    troubles = []

    def filled(after: int) -> int:
        shim.fill_after(ctypes.c_long(after))
        return cli.main(["run", str(case.recipe)])

    log = case.recipe.parent / "full.txt"
    for instant in instants:
        shutil.rmtree(case.out, ignore_errors=True)
        code = children.Child(lambda instant=instant: filled(instant), log).wait()
        text, what = log.read_text(), f"{case.name}, write {instant}"
        if code == 0:
            troubles.append(f"{what}: the run did not notice") if instant < 100 else None
        elif code != 2 or "Traceback" in text or "lillama: " not in text:
            troubles.append(f"{what}: ended with {code}: {text[-900:]}")
        if manifest.is_there(case.out):
            files = manifest.read(case.out).files
            gone = [n for n, digest in files.items() if not (case.out / n).is_file() or sha256(case.out / n) != digest]
            if [name for name in gone if not name.startswith(("model/", "finetuned/", "quantized/"))]:
                troubles.append(f"{what}: named as finished, and not whole: {gone}")
        code = children.run(case.recipe, log).wait()
        if code != 0:
            troubles.append(f"{what}: with room again it ended with {code}: {log.read_text()[-900:]}")
        elif wrong := storm.whole(case.out):
            troubles.append(f"{what}: {wrong}")
        elif children.results(case.out) != case.expected:
            troubles.append(f"{what}: other weights")
    return troubles


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("writes", type=int, nargs="?", default=200, help="at each of the first so many writes")
    parser.add_argument("--every", type=int, default=1, help="only every so-manieth of them")
    parser.add_argument("--family", default="llama")
    parser.add_argument("--schedule", default="sequential")
    args = parser.parse_args()
    if compiler() is None:
        sys.stdout.write("there is no C compiler here: not run\n")
        return 0
    with tempfile.TemporaryDirectory(prefix="lillama-full-") as home:
        library = build(Path(home))
        if "LILLAMA_SHIM" not in os.environ:  # again, with the library
            more = {"LD_PRELOAD": str(library), "LILLAMA_SHIM": str(library), "LILLAMA_CACHE": f"{home}/cache"}
            return subprocess.run([sys.executable, *sys.argv], env={**os.environ, **more}).returncode
        start = time.monotonic()
        instants = list(range(0, args.writes, args.every))
        troubles = fill(Path(home), Path(os.environ["LILLAMA_SHIM"]), instants, args.family, args.schedule)
    sys.stdout.write(
        f"disk full at {len(instants)} writes: {len(troubles)} troubles ({time.monotonic() - start:.0f} s)\n"
    )
    for trouble in troubles:
        sys.stdout.write(f"{trouble}\n")
    return 1 if troubles else 0


if __name__ == "__main__":
    sys.exit(main())
