"""Downloads from a server on the loopback: whole, broken off, wrong, twice at once."""

import errno
import os
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from mask2former import download
from mask2former.download import Download, DownloadError, cache_folder
from tests.file_server import FileServer, hash_prefix, running

CONTENT = np.random.default_rng(0).bytes(1_000_000)
PREFIX = hash_prefix(CONTENT)


@pytest.fixture(autouse=True)
def _no_proxy(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("http_proxy", "HTTP_PROXY", "all_proxy", "ALL_PROXY"):
        monkeypatch.delenv(name, raising=False)


@pytest.fixture
def server() -> Iterator[FileServer]:
    with running(FileServer({"/a/file.pkl": CONTENT})) as server:
        yield server


def of(server: FileServer, folder: Path, **changes: Any) -> Download:
    values = {"url": server.url("/a/file.pkl"), "path": folder / "cache/file.pkl", "sha256_prefix": PREFIX}
    return Download(**values | {"pause": 0.0, "timeout": 10.0} | changes)


def leave_part(wanted: Download, content: bytes) -> None:
    wanted.path.parent.mkdir(parents=True, exist_ok=True)
    wanted.path.with_name("file.pkl.part").write_bytes(content)


def left_in(folder: Path) -> dict[str, bytes]:
    """Everything in the cache folder."""
    return {path.name: path.read_bytes() for path in (folder / "cache").iterdir()}


def error_of(wanted: Download) -> str:
    with pytest.raises(DownloadError) as caught:
        wanted.fetch()
    assert isinstance(caught.value, OSError)
    assert "\n" not in str(caught.value)
    return str(caught.value)


# ---- success


@pytest.mark.parametrize("chunked", [False, True])
def test_file_arrives_under_its_name_alone(server: FileServer, tmp_path: Path, chunked: bool) -> None:
    server.chunked = chunked
    wanted = of(server, tmp_path)
    assert wanted.fetch() == wanted.path
    assert left_in(tmp_path) == {"file.pkl": CONTENT}
    assert server.requests == [("/a/file.pkl", "")]


def test_file_that_is_there_needs_no_request(server: FileServer, tmp_path: Path) -> None:
    of(server, tmp_path).fetch()
    of(server, tmp_path).fetch()
    assert len(server.requests) == 1


def test_damaged_file_is_replaced_when_the_right_one_is_there(server: FileServer, tmp_path: Path, capsys: Any) -> None:
    wanted = of(server, tmp_path)
    wanted.path.parent.mkdir()
    wanted.path.write_bytes(CONTENT[:-1])
    server.status = 503
    assert "503" in error_of(wanted)
    assert left_in(tmp_path)["file.pkl"] == CONTENT[:-1]
    assert f"{wanted.path} is damaged" in capsys.readouterr().err
    server.status = None
    wanted.fetch()
    assert left_in(tmp_path) == {"file.pkl": CONTENT}


def test_proxy_of_the_environment_is_asked(server: FileServer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    url = "http://models.invalid/a/file.pkl"
    server.files[url] = CONTENT  # a proxy gets the whole address
    monkeypatch.setenv("http_proxy", server.address)
    of(server, tmp_path, url=url).fetch()
    assert server.requests == [(url, "")]


def test_cache_folder_follows_the_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", "/home/somebody")
    monkeypatch.setenv("MASK2FORMER_CACHE", "~/models")
    assert cache_folder() == Path("/home/somebody/models")
    monkeypatch.setenv("MASK2FORMER_CACHE", "")
    assert cache_folder() == Path("/home/somebody/.cache/mask2former")


# ---- broken off


def test_broken_transfer_goes_on_where_it_ended(server: FileServer, tmp_path: Path) -> None:
    server.closes_after = [400_000, 100_000]
    of(server, tmp_path).fetch()
    assert left_in(tmp_path) == {"file.pkl": CONTENT}
    assert [wanted for _, wanted in server.requests] == ["", "bytes=400000-", "bytes=500000-"]


def test_server_without_ranges_starts_over(server: FileServer, tmp_path: Path) -> None:
    server.has_ranges, server.closes_after = False, [400_000, 1]
    of(server, tmp_path).fetch()
    assert left_in(tmp_path) == {"file.pkl": CONTENT}
    assert [wanted for _, wanted in server.requests] == ["", "bytes=400000-", "bytes=1-"]


def test_server_that_sends_another_part_is_asked_for_all(server: FileServer, tmp_path: Path) -> None:
    server.range_shift = 7
    wanted = of(server, tmp_path)
    leave_part(wanted, CONTENT[:1000])
    wanted.fetch()
    assert left_in(tmp_path) == {"file.pkl": CONTENT}
    assert [wanted for _, wanted in server.requests] == ["bytes=1000-", ""]


def test_partial_file_is_kept_when_the_server_breaks_off_again_and_again(server: FileServer, tmp_path: Path) -> None:
    server.closes_after = [300_000, 0, 200_000]
    message = error_of(of(server, tmp_path, attempts=3))
    assert f"{server.url('/a/file.pkl')} broke off 3 times, at last after 0.5 MB" in message
    assert "try again, which goes on from there" in message
    assert left_in(tmp_path) == {"file.pkl.part": CONTENT[:500_000]}
    of(server, tmp_path).fetch()
    assert server.requests[3:] == [("/a/file.pkl", "bytes=500000-")]
    assert left_in(tmp_path) == {"file.pkl": CONTENT}


def test_silent_server_is_not_waited_for(server: FileServer, tmp_path: Path) -> None:
    server.stalls_after = 1000
    message = error_of(of(server, tmp_path, attempts=1, timeout=0.2))
    assert "timed out" in message
    assert left_in(tmp_path) == {"file.pkl.part": CONTENT[:1000]}


def test_complete_partial_file_needs_no_request(server: FileServer, tmp_path: Path) -> None:
    wanted = of(server, tmp_path)
    leave_part(wanted, CONTENT)
    wanted.fetch()
    assert left_in(tmp_path) == {"file.pkl": CONTENT}
    assert server.requests == []


@pytest.mark.parametrize("content", [b"another file", CONTENT + b"too long"], ids=["shorter", "longer"])
def test_partial_file_of_another_file_is_replaced(server: FileServer, tmp_path: Path, content: bytes) -> None:
    wanted = of(server, tmp_path)
    leave_part(wanted, content)
    wanted.fetch()
    assert left_in(tmp_path) == {"file.pkl": CONTENT}
    assert [wanted for _, wanted in server.requests] == [f"bytes={len(content)}-", ""]


def test_interrupted_download_leaves_its_part_only(
    server: FileServer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    server.stalls_after = 300_000
    main = threading.get_ident()

    def interrupt() -> None:
        server.has_stalled.wait()
        time.sleep(0.2)  # for the bytes to arrive
        signal.pthread_kill(main, signal.SIGINT)

    thread = threading.Thread(target=interrupt)
    before = signal.signal(signal.SIGINT, signal.default_int_handler)  # programs in the background may ignore it
    try:
        thread.start()
        with pytest.raises(KeyboardInterrupt):
            of(server, tmp_path).fetch()
        thread.join()
    finally:
        signal.signal(signal.SIGINT, before)
    left = left_in(tmp_path)
    assert left.keys() == {"file.pkl.part"}
    assert CONTENT.startswith(left["file.pkl.part"])


# ---- failure


def test_wrong_content_is_removed(server: FileServer, tmp_path: Path) -> None:
    server.files["/a/file.pkl"] = b"<html>log in to the network first</html>"
    message = error_of(of(server, tmp_path))
    assert f"gave 40 bytes whose SHA-256 begins with {hash_prefix(server.files['/a/file.pkl'])}" in message
    assert f"not with {PREFIX}" in message
    assert f"put it at {tmp_path / 'cache/file.pkl'}" in message
    assert left_in(tmp_path) == {}
    assert len(server.requests) == 1


@pytest.mark.parametrize("status", [403, 404, 500])
def test_refusal_says_what_to_do(server: FileServer, tmp_path: Path, status: int) -> None:
    server.status = status
    wanted = of(server, tmp_path)
    leave_part(wanted, CONTENT[:10])
    message = error_of(wanted)
    assert f"{wanted.url} was refused by the server ({status} " in message
    assert f"put it at {wanted.path}" in message
    assert left_in(tmp_path) == {"file.pkl.part": CONTENT[:10]}


def test_without_network(tmp_path: Path) -> None:
    with socket.socket() as closed:
        closed.bind(("127.0.0.1", 0))  # and no listen
        url = f"http://127.0.0.1:{closed.getsockname()[1]}/file.pkl"
        path = tmp_path / "cache/file.pkl"
        message = error_of(Download(url=url, path=path, sha256_prefix=PREFIX))
    assert message == (
        f"{url} cannot be reached (Connection refused): check the connection, or get the file elsewhere and put it at "
        f"{path}"
    )
    assert left_in(tmp_path) == {}


def test_full_disk_keeps_what_has_room(server: FileServer, tmp_path: Path) -> None:
    resource = pytest.importorskip("resource", reason="the system has no limits")
    wanted = of(server, tmp_path)
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (400_000, hard))
    try:
        message = error_of(wanted)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert message == (
        f"{wanted.path} cannot be stored ({os.strerror(errno.EFBIG)}): set MASK2FORMER_CACHE to a folder that has room "
        "and may be written to"
    )
    assert left_in(tmp_path) == {"file.pkl.part": CONTENT[:400_000]}
    wanted.fetch()
    assert left_in(tmp_path) == {"file.pkl": CONTENT}


def test_folder_that_cannot_be_made(server: FileServer, tmp_path: Path) -> None:
    (tmp_path / "cache").write_text("a file")
    assert "set MASK2FORMER_CACHE to a folder" in error_of(of(server, tmp_path))
    assert server.requests == []


@pytest.mark.skipif(os.name != "posix" or os.geteuid() == 0, reason="root may write everywhere")
def test_read_only_folder(server: FileServer, tmp_path: Path) -> None:
    of(server, tmp_path).fetch()
    (tmp_path / "cache").chmod(0o500)
    of(server, tmp_path).fetch()
    assert "Permission denied" in error_of(of(server, tmp_path, path=tmp_path / "cache/other.pkl"))
    (tmp_path / "cache").chmod(0o700)


# ---- several processes

# the module alone: importing the package would import PyTorch
_FETCH = f"""
import importlib.util, sys
spec = importlib.util.spec_from_file_location("download", {str(Path(download.__file__))!r})
module = importlib.util.module_from_spec(spec)
sys.modules["download"] = module
spec.loader.exec_module(module)
url, path = sys.argv[1:]
print(module.Download(url=url, path=module.Path(path), sha256_prefix={PREFIX!r}).fetch())
"""


def fetch_in_process(wanted: Download) -> subprocess.Popen[str]:
    command = [sys.executable, "-c", _FETCH, wanted.url, str(wanted.path)]
    return subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)


def test_second_process_waits_for_the_first(server: FileServer, tmp_path: Path) -> None:
    server.stalls_after = 300_000
    wanted = of(server, tmp_path)
    first = fetch_in_process(wanted)
    assert server.has_stalled.wait(60)
    second = fetch_in_process(wanted)
    assert second.stderr is not None
    assert "another process fetches" in second.stderr.readline()
    server.go_on.set()
    for process in (first, second):
        output, errors = process.communicate(timeout=60)
        assert process.returncode == 0, errors
        assert output == f"{wanted.path}\n"
    assert left_in(tmp_path) == {"file.pkl": CONTENT}
    assert len(server.requests) == 1


def test_killed_process_leaves_no_lock(server: FileServer, tmp_path: Path) -> None:
    server.stalls_after = 300_000
    wanted = of(server, tmp_path)
    process = fetch_in_process(wanted)
    assert server.has_stalled.wait(60)
    process.kill()
    process.communicate()
    server.stalls_after = None
    wanted.fetch()
    assert left_in(tmp_path) == {"file.pkl": CONTENT}
