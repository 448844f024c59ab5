"""Sources behind a URL: moto's S3 server and a plain HTTP server on the loopback."""

import contextlib
import errno
import http.server
import io
import re
import socket
import tarfile
import threading
import zipfile
from collections import Counter
from collections.abc import Iterator
from functools import partial
from pathlib import Path
from typing import NoReturn

import pytest

from pipeline.errors import UserError
from pipeline.folders import Left
from tests.tools.packing.test_build_dataset import command, fill
from tests.tools.packing.test_parquet import shards
from tests.tools.packing.test_run import Killed
from tools import build_dataset
from tools.packing import remote
from tools.packing import run as packing
from tools.packing.journal import Journal
from tools.packing.remote import Remote
from tools.packing.sources import SOURCES
from train.run.cli import as_function

pytest.importorskip("aiohttp")

SECRET = "s3cr3t"
KINDS = ("folder", "list", "parquet", "webdataset")


def pack(kind: str, root: str | Path, out: Path, *options: str) -> None:
    build_dataset.main([kind, "--root", str(root), "--out", str(out), "--workers", "3", *options])


def data_set(root: Path) -> Path:
    """A folder with everything: files, a tar, a zip; shards of the two other sources; a list."""
    fill(root / "folder", "a b.jpg", "deep/c%20.jpg", "deep/é.png", ".hidden.jpg", "notes.txt")
    names = [f"{i:02d}.jpg" for i in range(9)]
    fill(root / "loose", *names)
    with tarfile.open(root / "folder" / "t.tar", "w") as archive:
        archive.add(root / "loose", "in")
    with zipfile.ZipFile(root / "folder" / "z.zip", "w", zipfile.ZIP_DEFLATED) as archive:
        for name in names:
            archive.write(root / "loose" / name, name)
    (root / "webdataset").mkdir()
    for shard in range(2):
        with tarfile.open(root / f"webdataset/s-{shard}.tar", "w") as archive:
            for name in names:
                archive.add(root / "loose" / name, name)
                info = tarfile.TarInfo(name.replace(".jpg", ".cls"))
                info.size = 1
                archive.addfile(info, io.BytesIO(str(shard).encode()))
    shards(root / "parquet", count=2)
    (root / "list").mkdir()
    fill(root / "list", "x/1.jpg", "x/2.jpg")
    return root


def options_of(kind: str, folder: Path) -> list[str]:
    if kind != "list":
        return []
    (folder / "list.csv").write_text("path,label\nx/2.jpg,5\nx/1.jpg,3\n")
    return ["--list", str(folder / "list.csv")]


@pytest.fixture(scope="module")
def local(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The data set, and its betons as packed from the folder."""
    top = tmp_path_factory.mktemp("local")
    data_set(top / "set")
    for kind in KINDS:
        pack(kind, top / "set" / kind, top / f"{kind}.beton", *options_of(kind, top))
    return top


def is_same(local: Path, kind: str, beton: Path) -> bool:
    """Whether a beton and its manifest have the bytes of those from the folder."""
    return all(
        (local / f"{kind}.beton{end}").read_bytes() == Path(f"{beton}{end}").read_bytes()
        for end in ("", ".json")
    )


# --- HTTP ----------------------------------------------------------------------------------------


class Handler(http.server.SimpleHTTPRequestHandler):
    """Parts of files, as web servers send them, and on demand errors and lost connections."""

    protocol_version = "HTTP/1.1"
    ranges = True
    wants: tuple[str, str] | None = None
    """A header that each request must have, and its value."""
    failures: Counter[str]
    """How often each path still fails."""
    requests: list[str]

    def log_message(self, *_: object) -> None:
        pass

    def do_HEAD(self) -> None:
        self.answer()

    def do_GET(self) -> None:
        self.answer()

    def answer(self) -> None:
        path = self.path.partition("?")[0]
        self.requests.append(self.path)
        if self.failures["status " + path] > 0:
            self.failures["status " + path] -= 1
            self.send_error(503)
            return
        target = Path(self.translate_path(path))
        if target.is_dir() or not target.exists():
            http.server.SimpleHTTPRequestHandler.do_GET(self)
            return
        data = target.read_bytes()
        match = re.fullmatch(r"bytes=(\d+)-(\d*)", self.headers.get("Range", ""))
        whole = len(data)
        if match and self.ranges:
            stop = int(match[2] or whole - 1) + 1
            start, data = int(match[1]), data[int(match[1]) : stop]
            self.send_response(206)
            self.send_header("Content-Range", f"bytes {start}-{start + len(data) - 1}/{whole}")
        else:
            self.send_response(200)
        if self.ranges:
            self.send_header("Accept-Ranges", "bytes")
        self.send_header("Content-Length", str(len(data)))
        self.end_headers()
        if self.command == "HEAD":
            return
        if self.failures[path] > 0:  # the connection is lost half-way
            self.failures[path] -= 1
            self.wfile.write(data[: len(data) // 2])
            self.close_connection = True
            self.connection.shutdown(2)
            return
        self.wfile.write(data)


@contextlib.contextmanager
def served(root: Path, **settings: object) -> Iterator[tuple[str, type[Handler]]]:
    """The URL of a server of `root`, and its handler."""
    handler = type("H", (Handler,), {"failures": Counter(), "requests": [], **settings})
    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), partial(handler, directory=root))
    server.daemon_threads = True
    threading.Thread(target=server.serve_forever, daemon=True).start()
    try:
        yield f"http://127.0.0.1:{server.server_port}", handler
    finally:
        server.shutdown()
        server.server_close()


@pytest.fixture(autouse=True)
def impatient(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(remote, "WAITS", (0.01,) * 4)


@pytest.mark.parametrize("kind", KINDS)
def test_http_gives_the_same_beton(local: Path, tmp_path: Path, kind: str) -> None:
    """Also over connections that are lost half-way through every third file. Without it an image
    may be cut short, or another part of an archive."""
    with served(local / "set") as (url, handler):
        for k, path in enumerate(sorted((local / "set" / kind).rglob("*"))):
            handler.failures["/" + path.relative_to(local / "set").as_posix()] = 2 * (k % 3 == 0)
        handler.failures |= {"/folder/a%20b.jpg": 3, "status /folder/deep/": 2}
        pack(kind, f"{url}/{kind}", tmp_path / "a.beton", *options_of(kind, tmp_path))
    assert is_same(local, kind, tmp_path / "a.beton")


def test_patterns_and_single_files(local: Path) -> None:
    """A server that lists no folders has its shards named by a pattern, an archive by its URL. A
    small shard is asked for once, and once for its size: a label is not fetched on its own.
    """
    with served(local / "set") as (url, handler):
        pattern = f"{url}/webdataset/s-{{0..1}}.tar"
        names = build_dataset.SHARDED["webdataset"][0](Remote.of(pattern), None, None).names
        assert names[9] == "s-1.tar/00.jpg"
        assert Counter(handler.requests) == {f"/webdataset/s-{i}.tar": 2 for i in (0, 1)}
        zipped = SOURCES["folder"](Remote.of(f"{url}/folder/z.zip"))  # type: ignore[arg-type]
    assert zipped.names[0] == "z.zip/00.jpg"
    assert SOURCES["folder"](local / "set/folder/z.zip").names == zipped.names


def test_what_a_server_may_answer(local: Path, tmp_path: Path) -> None:
    """Each of these is one line without a traceback, and nothing is written. A server without
    ranges would give the beginning of an archive for every image in it.
    """
    out = tmp_path / "o.beton"
    with served(local / "set", ranges=False) as (url, _):
        with pytest.raises(UserError, match="does not send parts of a file"):
            pack("webdataset", f"{url}/webdataset/s-0.tar", out)
        pack("list", f"{url}/list", tmp_path / "a.beton", *options_of("list", tmp_path))
    with served(local / "set") as (url, handler):
        with pytest.raises(UserError, match="none: no such file"):
            pack("folder", f"{url}/none", out)
        handler.failures["status /folder/deep/"] = 99  # fsspec's own walk leaves the folder out
        with pytest.raises(UserError, match="folder/deep: HTTP status 503, 5 times"):
            pack("folder", f"{url}/folder", out)
        handler.failures["/list/x/1.jpg"] = 99
        with pytest.raises(UserError, match=r"x/1\.jpg: the connection failed .*, 5 times"):
            pack("list", f"{url}/list", out, *options_of("list", tmp_path))
        handler.failures["/list/x/1.jpg"] = 0
        handler.failures["status /list/x/1.jpg"] = 99
        with pytest.raises(UserError, match=r"x/1\.jpg: HTTP status 503, 5 times"):
            pack("list", f"{url}/list", out, *options_of("list", tmp_path))
    with pytest.raises(UserError, match="the connection failed"):  # nobody listens
        pack("folder", f"{url}/folder", out)
    assert not out.exists()


def test_large_files_are_refused_before_they_are_read(local: Path, tmp_path: Path) -> None:
    """Without it a hostile server fills the memory."""
    with served(local / "set") as (url, _), pytest.raises(UserError, match="the limit is 400"):
        pack(
            "list", f"{url}/list", tmp_path / "o.beton", *options_of("list", tmp_path),
            "--max-bytes", "400",
        )  # fmt: skip


def test_resumed_without_reading_again(
    local: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Without it a download of days starts over; also with a query that was signed anew."""
    monkeypatch.setattr(packing, "BATCH_IMAGES", 2)
    append, count = Journal.append, 0

    def die(journal: Journal, rows: list) -> None:
        nonlocal count
        append(journal, rows)
        count += 1
        if count == 2:
            raise Killed

    rows = "\n".join(f"{i:02d}.jpg" for i in range(9))
    (tmp_path / "l.txt").write_text(rows)
    options = ["--list", str(tmp_path / "l.txt")]
    pack("list", local / "set/loose", tmp_path / "a.beton", *options)
    with served(local / "set") as (url, handler):
        with monkeypatch.context() as patch, pytest.raises(Killed):
            patch.setattr(Journal, "append", die)
            pack("list", f"{url}/loose?signature=1", tmp_path / "b.beton", *options)
        handler.requests.clear()
        pack("list", f"{url}/loose?signature={SECRET}", tmp_path / "b.beton", *options)
        read = {path for path in handler.requests if path.endswith(f"?signature={SECRET}")}
    assert len(read) == 5
    for end in ("", ".json"):
        both = [(tmp_path / f"{name}.beton{end}").read_bytes() for name in "ab"]
        assert both[0] == both[1]


def test_no_secret_is_shown(
    local: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """A password or a signed query in a log or a manifest is given to whoever reads it."""
    with served(local / "set") as (url, handler):
        secret = url.replace("//", f"//user:{SECRET}@")
        handler.failures["status /list/x/1.jpg"] = 99
        options = options_of("list", tmp_path)
        with pytest.raises(UserError) as error:
            pack("list", f"{secret}/list?key={SECRET}", tmp_path / "o.beton", *options)
        capsys.readouterr()
        skip = ["--on-error", "skip"]
        pack("list", f"{secret}/list?key={SECRET}", tmp_path / "o.beton", *options, *skip)
        with pytest.raises(UserError) as other:
            pack("folder", f"{secret}/none?key={SECRET}", tmp_path / "p.beton", *skip)
    said = capsys.readouterr()
    texts = [str(error.value), str(other.value), said.out, said.err]
    texts += [path.read_text(errors="replace") for path in tmp_path.iterdir() if path.is_file()]
    assert not [text for text in texts if SECRET in text]
    assert any(SECRET in path for path in handler.requests)


@pytest.mark.parametrize(
    ("kind", "root", "message"),
    [
        ("coco", f"https://me:{SECRET}@host/coco?key={SECRET}", "https://host/coco: a URL"),
        ("folder", f"zip://*.jpg::https://me:{SECRET}@host/a.zip", "a chain of URLs"),
        ("folder", f"simplecache::https://me:{SECRET}@host/a", "a chain of URLs"),
        ("folder", f"http://me:{SECRET}@[::1/a", "no valid URL"),
        ("folder", f"http://me:{SECRET}@host:port/a", "no valid URL"),
        ("folder", f"http://:{SECRET}@/a", "no valid URL"),
    ],
)
def test_urls_that_cannot_be_read_show_no_secret(
    tmp_path: Path, kind: str, root: str, message: str
) -> None:
    """Without it the password is in the message of just those URLs, or a traceback is."""
    with as_function(), pytest.raises(UserError, match=message) as error:
        pack(kind, root, tmp_path / "o.beton")
    assert SECRET not in str(error.value)


def test_a_scheme_in_upper_case(local: Path, tmp_path: Path) -> None:
    """Schemes have no case (RFC 3986, section 3.1)."""
    with served(local / "set") as (url, _):
        pack("folder", url.replace("http:", "HTTP:") + "/folder", tmp_path / "a.beton")
    assert is_same(local, "folder", tmp_path / "a.beton")


def test_a_library_that_connects_at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    """Without it a server of ftp:// that is lost has the message "None", and is not tried again."""
    tries = []

    class Lost(remote.Server):
        def __call__(self) -> NoReturn:
            tries.append(1)
            raise ConnectionRefusedError(errno.ECONNREFUSED, "no")

    monkeypatch.setattr(remote, "WAITS", (0,))
    with pytest.raises(OSError, match="Connection refused") as error:
        remote.again(lambda fs: None, Lost("ftp://host/a"))
    assert len(tries) == 2
    assert SECRET not in str(error.value)


def test_a_server_that_is_gone_ends_the_command(
    local: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Without it each image of a server that has gone is waited for, half a minute and more: days
    for a large set.
    """
    monkeypatch.setattr(remote, "WAITS", (0,))
    out = tmp_path / "o.beton"
    (tmp_path / "many.txt").write_text("".join(f"x/{i}.jpg\n" for i in range(40)))
    with served(local / "set") as (url, handler):
        handler.failures = Counter({f"status /list/x/{i}.jpg": 9 for i in range(40)})
        with pytest.raises(UserError) as error:
            pack("list", f"{url}/list", out, "--list", str(tmp_path / "many.txt"))
        host = url.removeprefix("http://")
        expected = f"{host}: 4 requests in a row failed (HTTP status 503, 2 times): the server does"
        assert str(error.value) == f"{expected} not answer; the same command resumes"
        assert len(handler.requests) <= 2 * (4 + 8)
        server = remote.Server(url)
        for _ in range(3):
            server.note("lost")
        server.note()  # one that answers begins the count anew
        server.note("lost")
        assert server()
        for _ in range(4):  # the last was under way when the fourth failed
            server.note("lost")
        with pytest.raises(UserError, match=r": 4 requests in a row failed \(lost\)"):
            server()
    assert not out.exists()


def test_urls_where_no_source_is_meant(tmp_path: Path) -> None:
    """The output, the list and the sources of fixed layouts are files of this machine."""
    for arguments in (
        ["folder", "--root", str(tmp_path), "--out", "s3://bucket/a.beton"],
        ["coco", "--root", "s3://bucket/coco", "--out", "a.beton"],
        ["list", "--list", "https://host/a.csv", "--out", "a.beton"],
    ):
        with pytest.raises(UserError, match="a URL; give a path on this machine"):
            build_dataset.main(arguments)


def test_a_kind_of_url_that_is_not_installed(tmp_path: Path) -> None:
    """One line that names the package."""
    result = command(
        "tools.build_dataset", "folder", "--root", "nosuch://a/b", "--out", f"{tmp_path}/o.beton"
    )
    assert (result.returncode, result.stderr.count("\n")) == (2, 1)
    assert "nosuch" in result.stderr
    assert "slotstream[remote]" in result.stderr


# --- S3 ------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def bucket(local: Path) -> Iterator[str]:
    """moto's S3 server with the data set, which s3fs finds by botocore's own ways."""
    pytest.importorskip("s3fs")
    server = pytest.importorskip("moto.server").ThreadedMotoServer("127.0.0.1", port=0)
    server.start()
    try:
        host, port = server.get_host_and_port()
        patch = pytest.MonkeyPatch()
        for name, value in (
            ("AWS_ENDPOINT_URL", f"http://{host}:{port}"), ("AWS_ACCESS_KEY_ID", "key"),
            ("AWS_SECRET_ACCESS_KEY", SECRET), ("AWS_DEFAULT_REGION", "us-east-1"),
        ):  # fmt: skip
            patch.setenv(name, value)
        import s3fs

        files = s3fs.S3FileSystem()
        files.mkdir("images")
        files.put(f"{local}/set/", "images/set/", recursive=True)
        yield "s3://images/set"
    finally:
        patch.undo()
        server.stop()


@pytest.mark.parametrize("kind", KINDS)
def test_s3_gives_the_same_beton(bucket: str, local: Path, tmp_path: Path, kind: str) -> None:
    """Order, names and bytes are those of the folder."""
    pack(kind, f"{bucket}/{kind}", tmp_path / "a.beton", *options_of(kind, tmp_path))
    assert is_same(local, kind, tmp_path / "a.beton")
    text = (tmp_path / "a.beton.json").read_text()
    assert SECRET not in text


def test_s3_without_bucket_file_or_rights(bucket: str, tmp_path: Path) -> None:
    """One line each."""
    for url, message in (
        ("s3://nosuch/a", "no such file"),
        (f"{bucket}/none", "no such file"),
        (f"{bucket}/none/a.tar", "no such file"),
    ):
        with pytest.raises(UserError, match=message):
            pack("folder", url, tmp_path / "o.beton")


def test_a_silent_s3_server_is_given_up(monkeypatch: pytest.MonkeyPatch) -> None:
    """Without it the libraries' own repetitions multiply with ours: a server that takes connections
    and never answers holds a command for three hours.
    """
    pytest.importorskip("s3fs")
    import fsspec

    monkeypatch.setattr(remote, "WAITS", (0,))
    monkeypatch.setattr(remote, "_SILENCE", 0.2)
    with socket.create_server(("127.0.0.1", 0), backlog=50) as silent:
        monkeypatch.setenv("AWS_ENDPOINT_URL", f"http://127.0.0.1:{silent.getsockname()[1]}")
        monkeypatch.setenv("AWS_ACCESS_KEY_ID", "key")
        monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", SECRET)
        fsspec.get_filesystem_class("s3").clear_instance_cache()
        with pytest.raises(UserError, match="2 times"):
            list(Remote.of("s3://images/set").walk(Left()))
        fsspec.get_filesystem_class("s3").clear_instance_cache()
        silent.setblocking(False)
        connections = 0
        with contextlib.suppress(BlockingIOError):
            while silent.accept():
                connections += 1
    assert connections == 2
