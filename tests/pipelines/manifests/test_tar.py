"""WebDataset tars: what is found in them, and what damaged and hostile ones cost."""

import io
import json
import random
import tarfile
from collections.abc import Mapping
from pathlib import Path

import pytest

from aai import storage
from aai.errors import UserError
from pipelines.manifests.table import read_manifest
from pipelines.manifests.tar import REST, tar_rows
from tests.pipelines.manifests.test_table import write

NAMES = [
    "a.mp4",
    "-b,1,2.mp4",
    "dir/#c ♪.MKV",
    f"{'long/' * 60}d.webm",
    "x.tar#1,2,e.mp4",
    "http://h/f.mp4",
    "g h\n.mp4",
]


def make_tar(members: Mapping[str, bytes], format: int = tarfile.PAX_FORMAT) -> bytes:
    """A tar in memory with these files."""
    sink = io.BytesIO()
    with tarfile.open(fileobj=sink, mode="w", format=format) as tar:
        for name, data in members.items():
            info = tarfile.TarInfo(name)
            info.size = len(data)
            tar.addfile(info, io.BytesIO(data))
    return sink.getvalue()


def put(path: Path, data: bytes) -> str:
    path.write_bytes(data)
    return str(path)


@pytest.mark.parametrize("format", [tarfile.PAX_FORMAT, tarfile.GNU_FORMAT], ids=["pax", "gnu"])
@pytest.mark.parametrize("where", ["local", "s3"])
def test_every_member_is_read_as_it_was_written(
    tmp_path: Path, where: str, format: int, request: pytest.FixtureRequest
) -> None:
    base = str(tmp_path) if where == "local" else request.getfixturevalue("s3")
    contents = {name: random.Random(name).randbytes(1000 + len(name)) for name in NAMES}
    for number in range(3):
        storage.write_bytes(storage.join(base, f"{number}.tar"), make_tar(contents, format))
    rows = read_manifest(base)
    assert len(rows) == 3 * len(NAMES)
    for row, name in zip(rows, 3 * NAMES, strict=True):
        assert row.uri.endswith(f",{name}")
        assert storage.read_bytes(row.uri, max_bytes=2000) == contents[name]


def test_notes_go_to_the_media_of_their_key(tmp_path: Path) -> None:
    more = {"text": "of json", "labels": ["dog", "rain"], "split": "test", "start_s": 1, "end_s": "2.5"}
    tar = make_tar(
        {
            "s/1.json": json.dumps(more).encode(),
            "s/1.mp4": b"v",
            "s/1.wav": b"its sound, no clip of its own",
            "s/2.mp4": b"v",
            "s/2.txt": " zwei ♪\n".encode(),
            "s/2.json": b'{"caption": "not this", "label": 7}',
            "3.flac": b"a",
            "3.cls": b"42\n",
            "v.one.mp4": b"v",
            "v.two.mp4": b"v",
            "v.two.txt": b"two",
            "v.txt": b"both",
            "t/1.mp4": b"another folder, another key",
            "readme.md": b"",
        }
    )
    rows = {row.uri.rsplit(",", 1)[1]: row for row in read_manifest(put(tmp_path / "a.tar", tar))}
    assert list(rows) == ["s/1.mp4", "s/2.mp4", "3.flac", "v.one.mp4", "v.two.mp4", "t/1.mp4"]
    one = rows["s/1.mp4"]
    assert (one.caption, one.labels, one.split) == ("of json", ("dog", "rain"), "test")
    assert (one.start_s, one.end_s) == (1.0, 2.5)
    assert (rows["s/2.mp4"].caption, rows["s/2.mp4"].labels) == ("zwei ♪", ("7",))
    assert (rows["3.flac"].caption, rows["3.flac"].labels, rows["3.flac"].split) == ("", ("42",), "train")
    assert (rows["v.one.mp4"].caption, rows["v.two.mp4"].caption) == ("both", "two")
    assert rows["t/1.mp4"].caption == ""


def test_links_devices_and_hidden_files_are_no_clips(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    sink = io.BytesIO()
    with tarfile.open(fileobj=sink, mode="w") as tar:
        for name, kind in (("l.mp4", tarfile.SYMTYPE), ("h.mp4", tarfile.LNKTYPE), ("d.mp4", tarfile.CHRTYPE)):
            info = tarfile.TarInfo(name)
            info.type, info.linkname = kind, "/etc/passwd"
            tar.addfile(info)
        directory = tarfile.TarInfo("dir.mp4")
        directory.type = tarfile.DIRTYPE
        for info in (directory, tarfile.TarInfo("._a.mp4"), tarfile.TarInfo("/../../a.mp4")):
            tar.addfile(info)
    rows = read_manifest(put(tmp_path / "a.tar", sink.getvalue()))
    assert [row.uri.split(",", 2)[2] for row in rows] == ["/../../a.mp4"]
    assert "4 hidden, linked or sparse members are passed over" in caplog.text


def damaged() -> dict[str, tuple[bytes, int]]:
    """Tars of three members of 1,000 bytes with a damage, and how many members can still be read."""
    good = make_tar({f"{n}.mp4": bytes([n]) * 1000 for n in (1, 2, 3)})
    step, end = 512 + 1024, 3 * (512 + 1024)
    negative = bytearray(good)
    negative[2 * step + 124 : 2 * step + 136] = b"\xff" * 11 + b"\x00"
    forged = bytearray(good)
    forged[2 * step + 124 : 2 * step + 136] = b"77777777777\0"
    for header in (negative, forged):
        header[2 * step + 148 : 2 * step + 156] = b" " * 8
        header[2 * step + 148 : 2 * step + 156] = b"%06o\0 " % sum(header[2 * step : 2 * step + 512])
    pax = tarfile.TarInfo("pax")
    pax.type, pax.size = tarfile.XHDTYPE, 2**33
    return {
        "cut within content": (good[: 2 * step + 600], 2),
        "cut within a header": (good[: 2 * step + 100], 2),
        "cut between members": (good[: 2 * step], 2),
        "no end mark": (good[:end], 3),
        "broken header": (good[:step] + b"\1" * 512 + good[step + 512 :], 1),
        "two in one": (good + good, 3),
        "negative size": (bytes(negative), 2),
        "giant size": (bytes(forged), 2),
        "giant extended header": (good[:end] + pax.tobuf() + b"x" * 2**22, 3),
        "nested extended headers": (good[:end] + make_chain(), 3),
    }


def make_chain() -> bytes:
    """Thousands of extended headers, each before the next."""
    info = tarfile.TarInfo("pax")
    info.type = tarfile.XHDTYPE
    return info.tobuf() * 5000


@pytest.mark.parametrize("kind", damaged())
def test_a_damaged_tar_keeps_what_is_readable_and_tells_of_the_rest(tmp_path: Path, kind: str) -> None:
    data, readable = damaged()[kind]
    path = put(tmp_path / "a.tar", data)
    *rows, rest = tar_rows(path)
    assert [storage.read_bytes(row.uri) for row in rows] == [bytes([n]) * 1000 for n in range(1, readable + 1)]
    part = storage.member(rest.uri)
    assert part is not None
    assert part.name == REST
    assert part.offset + part.size == len(data), "the rest reaches to the end of the tar"
    assert len(read_manifest(path)) == readable + 1


@pytest.mark.accept
def test_b5_bit_flips_in_tars_lose_no_member_unseen(tmp_path: Path) -> None:
    check_bit_flips(tmp_path, 2000)


def test_bit_flips_in_tars_lose_no_member_unseen(tmp_path: Path) -> None:
    check_bit_flips(tmp_path, 60)


def check_bit_flips(tmp_path: Path, count: int) -> None:
    """Each member is found, or a warning row or a changed name tells that something is wrong; nothing is raised."""
    good = make_tar({f"{n}.mp4": bytes([n]) * 100 for n in range(8)})
    for seed in range(count):
        chance, data = random.Random(seed), bytearray(good)
        for _ in range(3):
            data[chance.randrange(8 * 1024)] ^= 1 << chance.randrange(8)
        rows = tar_rows(put(tmp_path / "a.tar", bytes(data)))
        assert len(rows) >= 8 or str(rows[-1].uri).endswith(REST)


def test_mistakes_are_named(tmp_path: Path) -> None:
    for name, data, message in (
        ("a.tar.gz", b"x", "is a compressed tar"),
        ("a.tgz", b"x", "is a compressed tar"),
        ("b.tar", b"\x1f\x8b\x08 not a tar", "holds no media files"),
        ("c.tar", b"", "holds no media files"),
        ("d.tar", make_tar({"a.md": b"x"}), "holds no media files"),
        ("e.tar", make_tar({"a.mp4": b"", "a.json": b"{"}), r"the \.json of a\.mp4 is not JSON"),
        ("f.tar", make_tar({"a.mp4": b"", "a.json": b"[]"}), r"the \.json of a\.mp4 is no JSON object"),
        ("g.tar", make_tar({"a.mp4": b"", "a.txt": b"\xff"}), r"the \.txt of a\.mp4 is not UTF-8"),
        ("h.tar", make_tar({"a.mp4": b"", "a.txt": b"x" * 2**21}), r"a\.txt has 2097152 bytes"),
        ("i.tar", make_tar({"a.mp4": b"", "a.json": b'{"start_s": "soon"}'}), "start_s is 'soon'"),
    ):
        with pytest.raises(UserError, match=message) as caught:
            read_manifest(put(tmp_path / name, data))
        assert str(tmp_path / name) in str(caught.value)
    write(tmp_path / "z" / "a.mp4", "x")
    put(tmp_path / "z" / "b.tar", b"no tar")
    assert [row.uri.rsplit("/", 1)[1] for row in read_manifest(str(tmp_path / "z"))] == [
        "a.mp4",
        f"b.tar#0,6,{REST}",
    ]


def test_a_picture_beside_a_sound_alone_is_its_still(tmp_path: Path) -> None:
    tar = make_tar(
        {
            "s/1.jpg": b"first",
            "s/1.flac": b"sound",
            "s/2.wav": b"sound",
            "s/2.0.jpg": b"a frame of an export",
            "s/3.mp4": b"video",
            "s/3.jpg": b"its thumbnail",
            "s/4.mp3": b"sound",
            "s/4.PNG": b"later",
            "t/1.webp": b"another folder, and no sound",
        }
    )
    uri = put(tmp_path / "a.tar", tar)
    rows = {row.uri.rsplit(",", 1)[1]: row.image_uri for row in read_manifest(uri)}
    assert list(rows) == ["s/1.flac", "s/2.wav", "s/3.mp4", "s/4.mp3"]
    assert (rows["s/2.wav"], rows["s/3.mp4"]) == (None, None)
    stills = [rows[name] or "" for name in ("s/1.flac", "s/4.mp3")]
    assert [still.rsplit(",", 1)[1] for still in stills] == ["s/1.jpg", "s/4.PNG"]
    assert [storage.read_bytes(still) for still in stills] == [b"first", b"later"]
