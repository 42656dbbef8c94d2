"""Pairs of pictures and captions: what is read, what is refused with which words, and what is held out."""

from __future__ import annotations

import io
import random
import stat
import struct
import zipfile
import zlib
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from PIL import Image, ImageOps

from taskoffer.api.contract import DataConfig, ImageColumns
from taskoffer_trainer.failures import TrainerError
from taskoffer_trainer.image_data import Limits, Pair, open_picture, read_pairs, split_pairs, square

pytestmark = pytest.mark.trainer

Files = dict[str, bytes]


def picture(size: tuple[int, int] = (8, 8), mode: str = "RGB", kind: str = "PNG", colour: Any = 0, **how: Any) -> bytes:
    file = io.BytesIO()
    Image.new(mode, size, colour).save(file, kind, **how)
    return file.getvalue()


def noise(kind: str) -> bytes:
    """A picture that cannot be compressed."""
    file = io.BytesIO()
    Image.frombytes("RGB", (20, 20), random.Random(1).randbytes(1200)).save(file, kind)
    return file.getvalue()


def pairs_of(count: int) -> Files:
    """As many pairs of unlike pictures."""
    files: Files = {}
    for number in range(count):
        files[f"{number}.png"] = picture(colour=(number, 0, 0))
        files[f"{number}.txt"] = f"picture {number}".encode()
    return files


def archive(path: Path, files: Files, **how: Any) -> Path:
    with zipfile.ZipFile(path, "w", **how) as target:
        for name, content in files.items():
            target.writestr(name, content)
    return path


def read(path: Path, trigger_word: str | None = None, limits: Limits | None = None, **data: Any) -> list[Pair]:
    config = DataConfig.model_validate({"path": str(path), "fileFormat": "zip", "minRows": 2, **data})
    return read_pairs(config, ImageColumns(trigger_word=trigger_word), limits)


def test_an_archive_and_a_folder_of_the_same_files_give_the_same_pairs(tmp_path: Path) -> None:
    files = pairs_of(3)
    zipped = read(archive(tmp_path / "data.zip", files, compression=zipfile.ZIP_DEFLATED))
    folder = tmp_path / "folder" / "below"
    folder.mkdir(parents=True)
    for name, content in files.items():
        (folder / name).write_bytes(content)
    found = read(folder)
    assert [(pair.name, pair.caption) for pair in zipped] == [(f"{n}.png", f"picture {n}") for n in range(3)]
    assert found == zipped
    assert [pair.name for pair in read(folder.parent)] == [f"below/{n}.png" for n in range(3)]


def test_a_folder_with_a_single_archive_stands_for_it(tmp_path: Path) -> None:
    archive(tmp_path / "data.zip", pairs_of(2))
    assert len(read(tmp_path)) == 2


def test_what_file_managers_leave_behind_is_not_looked_at(tmp_path: Path) -> None:
    files = {**pairs_of(2), "__MACOSX/._0.png": b"x", ".DS_Store": b"x", "notes.md": b"x", "sub/": b""}
    assert len(read(archive(tmp_path / "data.zip", files))) == 2


@pytest.mark.parametrize(
    ("written", "trigger_word", "read_as"),
    [
        ("a red box", None, "a red box"),
        ("\ufeff a red\n box ", None, "a red box"),
        ("a red box", "sks", "sks, a red box"),
        ("Sks on a table", "sks", "Sks on a table"),
        ("", "sks", "sks"),
        ("sksy thing", "sks", "sks, sksy thing"),
    ],
)
def test_the_trigger_word_comes_before_the_caption(
    tmp_path: Path, written: str, trigger_word: str | None, read_as: str
) -> None:
    files = {**pairs_of(2), "0.txt": written.encode()}
    assert read(archive(tmp_path / "data.zip", files), trigger_word)[0].caption == read_as


@pytest.mark.parametrize(
    ("content", "colour"),
    [
        (picture(mode="L", colour=100), (100, 100, 100)),
        (picture(mode="1", colour=1), (255, 255, 255)),
        (picture(mode="P"), (0, 0, 0)),
        (picture(mode="RGBA", colour=(9, 9, 9, 0)), (255, 255, 255)),
        (picture(mode="LA", colour=(9, 255)), (9, 9, 9)),
        (picture(mode="RGB", colour=(1, 2, 3)), (1, 2, 3)),
        (picture(mode="CMYK", kind="JPEG", colour=(0, 0, 0, 0)), (255, 255, 255)),
    ],
    ids=["grey", "black-and-white", "palette", "transparent", "grey-alpha", "rgb", "cmyk"],
)
def test_every_usual_mode_becomes_rgb_on_white(tmp_path: Path, content: bytes, colour: tuple[int, int, int]) -> None:
    pair = read(archive(tmp_path / "data.zip", {**pairs_of(2), "0.png": content}))[0]
    opened = open_picture(pair)
    assert opened.mode == "RGB"
    assert opened.getpixel((4, 4)) == colour


def test_a_photograph_is_turned_as_its_camera_says(tmp_path: Path) -> None:
    exif = Image.Exif()
    exif[0x0112] = 6  # Turned by 90 degrees.
    content = picture((8, 4), kind="JPEG", exif=exif)
    pair = read(archive(tmp_path / "data.zip", {**pairs_of(2), "0.png": content}))[0]
    assert (pair.width, pair.height) == open_picture(pair).size == (4, 8)


@pytest.mark.parametrize("turned", range(10))
def test_every_turn_is_the_one_that_the_library_makes(turned: int) -> None:
    exif = Image.Exif()
    exif[0x0112] = turned
    file = io.BytesIO()
    Image.frombytes("RGB", (24, 16), random.Random(1).randbytes(1152)).save(file, "PNG", exif=exif)
    with Image.open(file) as opened:
        wanted = ImageOps.exif_transpose(opened)
    found = open_picture(Pair("0.png", file.getvalue(), "", 24, 16))
    assert (found.size, found.tobytes()) == (wanted.size, wanted.tobytes())


def test_a_whole_photograph_with_odd_metadata_is_read_and_turned(tmp_path: Path) -> None:
    """Its resolution is said to be a text, which Pillow reads and cannot write again."""
    entries = [(0x0112, 3, 1, struct.pack("<I", 6)), (0x011A, 2, 3, b"72\0\0")]
    exif = b"Exif\0\0II*\0" + struct.pack("<IH", 8, len(entries))
    exif += b"".join(struct.pack("<HHI", *entry[:3]) + entry[3] for entry in entries) + bytes(4)
    content = picture((8, 4), kind="JPEG", exif=exif)
    with Image.open(io.BytesIO(content)) as opened, pytest.raises(TypeError):
        ImageOps.exif_transpose(opened)
    pair = read(archive(tmp_path / "data.zip", {**pairs_of(2), "0.png": content}))[0]
    assert (pair.width, pair.height) == open_picture(pair).size == (4, 8)


@pytest.mark.parametrize(
    ("size", "edge", "cut"),
    [((100, 50), 50, (0, 25)), ((50, 100), 50, (25, 0)), ((30, 20), 40, (0, 10)), ((8, 8), 8, (0, 0))],
)
def test_a_picture_is_scaled_and_its_middle_cut_out(size: tuple[int, int], edge: int, cut: tuple[int, int]) -> None:
    made, offsets = square(Image.new("RGB", size), edge)
    assert made.size == (edge, edge)
    assert offsets == cut


def broken_crc(files: Files, path: Path) -> Path:
    archive(path, files)
    data = path.read_bytes()
    place = data.index(files["0.png"]) + 20
    path.write_bytes(data[:place] + bytes([data[place] ^ 0xFF]) + data[place + 1 :])
    return path


def linked(files: Files, path: Path) -> Path:
    archive(path, files)
    link = zipfile.ZipInfo("2.png")
    link.external_attr = (stat.S_IFLNK | 0o777) << 16
    with zipfile.ZipFile(path, "a") as target:
        target.writestr(link, "/etc/passwd")
    return path


def encrypted(files: Files, path: Path) -> Path:
    """Set the flag of encryption in both headers of the first member."""
    data = bytearray(archive(path, files).read_bytes())
    for magic, offset in ((b"PK\x03\x04", 6), (b"PK\x01\x02", 8)):
        data[data.index(magic) + offset] |= 1
    path.write_bytes(data)
    return path


def huge_png(width: int, height: int) -> bytes:
    """A PNG whose header says a size and that holds no such picture."""
    header = struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)
    whole = picture()
    start = whole.index(b"IHDR")
    chunk = b"IHDR" + header
    return whole[:start] + chunk + struct.pack(">I", zlib.crc32(chunk)) + whole[start + 4 + 13 + 4 :]


SMALL = Limits(files=6, picture_bytes=2000, caption_bytes=100, total_bytes=10_000, pixels=1000)
BOMB = {**pairs_of(2), "0.png": bytes(1 << 20)}

REFUSED: dict[str, tuple[Files, str, list[str]]] = {
    "no pictures": ({"0.txt": b"x"}, "DataEmpty", ["no picture", "N.png"]),
    "nothing": ({}, "DataEmpty", ["no picture"]),
    "picture without caption": ({**pairs_of(2), "9.png": picture()}, "PairIncomplete", ["picture 9.png", "9.txt"]),
    "caption without picture": ({**pairs_of(2), "9.txt": b"x"}, "PairIncomplete", ["caption 9.txt", "9.png"]),
    "two pictures": ({**pairs_of(2), "0.jpg": picture()}, "DataAmbiguous", ["0.png", "0.jpg"]),
    "empty caption": ({**pairs_of(2), "0.txt": b" "}, "CaptionEmpty", ["0.txt", "triggerWord"]),
    "caption is no text": ({**pairs_of(2), "0.txt": b"\xff\xfe\x00"}, "DataUnreadable", ["0.txt", "UTF-8"]),
    "caption too long": ({**pairs_of(2), "0.txt": b"x" * 101}, "DataTooLarge", ["0.txt"]),
    "too few": (pairs_of(1), "TooFewRows", ["1 pairs", "data.minRows", "at least 2"]),
    "no picture inside": ({**pairs_of(2), "0.png": b"hello"}, "PictureBroken", ["0.png"]),
    "a gif named png": ({**pairs_of(2), "0.png": picture(kind="GIF")}, "PictureBroken", ["0.png", "PNG or JPEG"]),
    "cut short": ({**pairs_of(2), "0.png": noise("PNG")[:600]}, "PictureBroken", ["0.png"]),
    "jpeg cut short": (
        {**pairs_of(2), "0.png": noise("JPEG")[:-200]},
        "PictureBroken",
        ["0.png", "truncated"],
    ),
    "sixteen bits": ({**pairs_of(2), "0.png": picture(mode="I;16")}, "PictureUnusable", ["0.png", "I;16", "RGB"]),
    "too many pixels": ({**pairs_of(2), "0.png": picture((40, 40))}, "PictureUnusable", ["0.png", "40 x 40", "1000"]),
    "a bomb of pixels": ({**pairs_of(2), "0.png": huge_png(60_000, 60_000)}, "DataTooLarge", ["0.png"]),
    "picture too large": ({**pairs_of(2), "0.png": picture() + bytes(2500)}, "DataTooLarge", ["0.png"]),
    "a bomb of bytes": (BOMB, "DataTooLarge", ["unpacked"]),
    "too many files": (pairs_of(4), "DataTooLarge", ["8 files", "at most 6"]),
    "up and out": ({**pairs_of(2), "../../etc/0.png": picture()}, "DataUnsafe", ["../../etc/0.png", "out of"]),
    "from the root": ({**pairs_of(2), "/etc/0.png": picture()}, "DataUnsafe", ["/etc/0.png"]),
    "windows path": ({**pairs_of(2), "..\\0.png": picture()}, "DataUnsafe", ["0.png"]),
}


@pytest.mark.parametrize(("files", "reason", "words"), REFUSED.values(), ids=REFUSED)
def test_what_cannot_be_used_is_refused_by_name(tmp_path: Path, files: Files, reason: str, words: list[str]) -> None:
    path = archive(tmp_path / "data.zip", files, compression=zipfile.ZIP_DEFLATED)
    with pytest.raises(TrainerError) as refusal:
        read(path, limits=SMALL)
    assert (refusal.value.code, refusal.value.reason) == (65, reason), refusal.value.message
    for word in words:
        assert word in refusal.value.message


@pytest.mark.parametrize(
    ("make", "reason", "words"),
    [
        (broken_crc, "DataUnreadable", ["0.png", "CRC"]),
        (linked, "DataUnsafe", ["2.png", "symbolic link"]),
        (encrypted, "DataUnreadable", ["0.png", "encrypted"]),
    ],
)
def test_a_damaged_or_hostile_archive_is_refused(
    tmp_path: Path, make: Callable[[Files, Path], Path], reason: str, words: list[str]
) -> None:
    with pytest.raises(TrainerError) as refusal:
        read(make(pairs_of(2), tmp_path / "data.zip"))
    assert (refusal.value.code, refusal.value.reason) == (65, reason), refusal.value.message
    for word in words:
        assert word in refusal.value.message


def test_what_is_no_archive_or_not_there_is_refused(tmp_path: Path) -> None:
    (tmp_path / "data.zip").write_bytes(b"PK no archive")
    with pytest.raises(TrainerError, match="not a zip archive"):
        read(tmp_path / "data.zip")
    with pytest.raises(TrainerError, match="does not exist"):
        read(tmp_path / "nothing.zip")
    archive(tmp_path / "data.zip", pairs_of(2))
    archive(tmp_path / "more.zip", pairs_of(2))
    with pytest.raises(TrainerError, match="several archives"):
        read(tmp_path)


def test_the_smallest_number_of_pairs_is_a_setting(tmp_path: Path) -> None:
    path = archive(tmp_path / "data.zip", pairs_of(5))
    assert len(read(path, minRows=5)) == 5
    with pytest.raises(TrainerError, match="at least 10"):
        read(path, minRows=10)


def test_the_same_pictures_are_held_out_whatever_they_are_called(tmp_path: Path) -> None:
    pairs = read(archive(tmp_path / "data.zip", pairs_of(20)))
    data = DataConfig(path="", eval_fraction=0.2)
    split = split_pairs(pairs, data, 1)
    assert (len(split.train), len(split.held_out)) == (16, 4)
    renamed = [Pair(f"x{pair.name}", pair.content, pair.caption, 8, 8) for pair in reversed(pairs)]
    again = split_pairs(renamed, data, 1)
    assert {pair.content for pair in again.held_out} == {pair.content for pair in split.held_out}
    assert {pair.content for pair in split_pairs(pairs, data, 2).held_out} != {pair.content for pair in split.held_out}


def test_a_picture_with_two_captions_is_not_both_trained_and_tested(tmp_path: Path) -> None:
    files = pairs_of(10)
    files |= {
        f"again-{name}": content + (b" again" if name.endswith("txt") else b"") for name, content in files.items()
    }
    split = split_pairs(read(archive(tmp_path / "data.zip", files)), DataConfig(path="", eval_fraction=0.2), 1)
    assert not {pair.content for pair in split.train} & {pair.content for pair in split.held_out}
    assert (len(split.train), len(split.held_out)) == (16, 4)
    alike = [Pair(str(number), b"x", f"caption {number}", 8, 8) for number in range(4)]
    with pytest.raises(TrainerError, match="at least two different pictures"):
        split_pairs(alike, DataConfig(path=""), 1)


def test_pictures_that_come_with_many_captions_each_stay_in_the_training() -> None:
    """A tenth of 96 pairs are ten; that many pictures would be nearly all of the twelve."""
    pairs = [Pair(str(number), bytes([number % 12]), f"caption {number}", 8, 8) for number in range(96)]
    for most in (400, 5):
        split = split_pairs(pairs, DataConfig(path="", eval_rows_max=most), 1)
        assert len({pair.content for pair in split.held_out}) == 1
        assert (len(split.train), len(split.held_out)) == (88, min(8, most))


def test_an_archive_with_a_member_that_has_lost_its_name_is_refused(tmp_path: Path) -> None:
    path = archive(tmp_path / "data.zip", {**pairs_of(2), "N": b""})
    content = bytearray(path.read_bytes())
    # In the last entry of the archive's list the letter becomes a comment: their lengths stand 28 and 32 bytes behind.
    entry = content.rindex(b"PK\x01\x02")
    content[entry + 28], content[entry + 32] = 0, 1
    path.write_bytes(content)
    with pytest.raises(TrainerError, match="a member without a name") as error:
        read(path)
    assert (error.value.code, error.value.reason) == (65, "DataUnreadable")
