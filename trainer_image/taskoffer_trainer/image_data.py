"""Pairs of a picture and a caption, from a zip archive or a folder: read, checked and split. No heavy library.

Nothing is ever unpacked onto a disk, and every size is limited before something is read, so an archive can
neither write anywhere nor fill the memory. All that is wrong with a picture or a caption shows here, before the
model is loaded.
"""

from __future__ import annotations

import hashlib
import io
import re
import stat
import struct
import warnings
import zipfile
import zlib
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import Any

from taskoffer.api.contract import DataConfig, ExitCode, ImageColumns, RunConfig
from taskoffer_trainer.data import bad_data, held_out_keys
from taskoffer_trainer.failures import TrainerError

__all__ = ["Limits", "Pair", "PairSplit", "open_picture", "read_pair_split", "read_pairs", "split_pairs", "square"]

PICTURES = (".png", ".jpg", ".jpeg")
"""Endings of picture files, in any case."""
CAPTION = ".txt"
"""Ending of caption files."""

_BROKEN = (OSError, SyntaxError, ValueError, EOFError, struct.error, zlib.error)
"""What Pillow raises for files that are cut short or damaged; which one depends on the place of the damage."""


@dataclass(frozen=True)
class Limits:
    """The largest input that is read; what is larger is refused and never cut.

    Attributes:
        files: Members of an archive or files of a folder.
        picture_bytes: Size of a picture file.
        caption_bytes: Size of a caption file.
        total_bytes: Size of all pictures together, which are kept in memory until they are encoded.
        pixels: Width times height of a picture; 8192 x 8192 take 192 MiB while one is decoded.
    """

    files: int = 20_000
    picture_bytes: int = 64 << 20
    caption_bytes: int = 64 << 10
    total_bytes: int = 2 << 30
    pixels: int = 8192 * 8192


@dataclass(frozen=True)
class Pair:
    """A picture, as its file is, and its caption with the trigger word."""

    name: str
    content: bytes
    caption: str
    width: int
    height: int

    @property
    def digest(self) -> str:
        """SHA-256 of picture and caption; equal pairs have equal digests, whatever their names are."""
        return hashlib.sha256(hashlib.sha256(self.content).digest() + self.caption.encode()).hexdigest()


@dataclass(frozen=True)
class PairSplit:
    """Training and held-out pairs; no picture is in both."""

    train: list[Pair]
    held_out: list[Pair]


@dataclass(frozen=True)
class _File:
    """A file of an archive or a folder that has not been read yet."""

    name: str
    size: int
    source: Any

    def read(self, most: int) -> bytes:
        """Read the file, at most one byte more than allowed, so that the caller sees that it is too large."""
        with self.source() as file:
            return bytes(file.read(most + 1))


def read_pairs(data: DataConfig, columns: ImageColumns, limits: Limits | None = None) -> list[Pair]:
    """Read all pairs in the order of their names, each picture decoded once to see that it is whole.

    Args:
        data: where the archive or the folder is.
        columns: the trigger word.
        limits: the largest input that is read.

    Raises:
        TrainerError: ``BAD_DATA`` with the file and the remedy.
    """
    limits = limits or Limits()
    with _opened(Path(data.path), limits) as (where, files):
        pictures, captions = _by_stem(where, files)
        pairs = [
            _pair(where, picture, captions[stem], columns, limits)
            for stem, picture in _in_order(where, pictures, captions)
        ]
    if len(pairs) < data.min_rows:
        raise bad_data(
            "TooFewRows",
            f"{where} holds {len(pairs)} pairs of picture and caption; data.minRows asks for at least {data.min_rows}",
        )
    return pairs


@contextmanager
def _opened(path: Path, limits: Limits) -> Iterator[tuple[Path, list[_File]]]:
    """List the files of an archive or a folder; a folder that holds a single archive stands for that."""
    if path.is_dir():
        files = [
            _File(str(child.relative_to(path)), child.stat().st_size, lambda child=child: child.open("rb"))
            for child in sorted(path.rglob("*"))
            if child.is_file()
        ]
        archives = [file for file in files if file.name.lower().endswith(".zip")]
        if not archives or any(file.name.lower().endswith(PICTURES) for file in files):
            yield path, _limited(path, files, limits)
            return
        if len(archives) > 1:
            names = ", ".join(file.name for file in archives[:4])
            raise bad_data("DataUnreadable", f"data.path: {path} holds several archives ({names}); name one of them")
        path = path / archives[0].name
    if not path.is_file():
        raise bad_data("DataMissing", f"data.path: {path} does not exist")
    try:
        archive = zipfile.ZipFile(path)
    except (zipfile.BadZipFile, OSError, NotImplementedError) as error:
        raise bad_data("DataUnreadable", f"{path} is not a zip archive: {error}") from error
    with archive:
        yield (
            path,
            _limited(path, [_member(path, archive, one) for one in archive.infolist() if not _is_folder(one)], limits),
        )


def _is_folder(member: zipfile.ZipInfo) -> bool:
    # Before Python 3.12 ZipInfo.is_dir fails on a name that is empty.
    return member.filename.endswith("/")


def _member(path: Path, archive: zipfile.ZipFile, member: zipfile.ZipInfo) -> _File:
    name = member.orig_filename
    if not name:
        raise bad_data("DataUnreadable", f"{path} has a member without a name; is the archive whole?")
    parts = PurePosixPath(name).parts
    # Nothing is unpacked, so such a name could do no harm here. But whoever made it meant harm, or another tool will
    # trip over it.
    if name.startswith("/") or ".." in parts or "\\" in name or "\0" in name or ":" in name:
        raise bad_data("DataUnsafe", f"{path} has a member named {name!r}, which leads out of the archive")
    if stat.S_ISLNK(member.external_attr >> 16):
        raise bad_data("DataUnsafe", f"{path} has a symbolic link {name!r}; put the file itself into the archive")
    if member.flag_bits & 0x1:
        raise bad_data("DataUnreadable", f"{path}: {name} is encrypted; make an archive without a password")
    return _File(name, member.file_size, lambda: archive.open(member))


def _limited(path: Path, files: list[_File], limits: Limits) -> list[_File]:
    if len(files) > limits.files:
        raise bad_data("DataTooLarge", f"{path} holds {len(files)} files; at most {limits.files} are read")
    total = sum(file.size for file in files)
    if total > limits.total_bytes:
        raise bad_data(
            "DataTooLarge",
            f"the files in {path} have {total / 2**20:.0f} MiB unpacked; at most "
            f"{limits.total_bytes / 2**20:.0f} MiB are read",
        )
    return files


def _by_stem(where: Path, files: list[_File]) -> tuple[dict[str, _File], dict[str, _File]]:
    """Sort the files into pictures and captions, each by its path without the ending."""
    pictures: dict[str, _File] = {}
    captions: dict[str, _File] = {}
    other = []
    for file in files:
        path = PurePosixPath(file.name)
        # Hidden files and __MACOSX are what file managers leave behind.
        if any(part.startswith((".", "__MACOSX")) for part in path.parts):
            continue
        stem, ending = str(path.with_suffix("")), path.suffix.lower()
        kind = pictures if ending in PICTURES else captions if ending == CAPTION else None
        if kind is None:
            other.append(file.name)
        elif stem in kind:
            raise bad_data(
                "DataAmbiguous",
                f"{where} holds both {kind[stem].name} and {file.name}; a caption belongs to one picture",
            )
        else:
            kind[stem] = file
    if other:
        print(f"data: {len(other)} files are neither pictures nor captions, left out: {', '.join(sorted(other)[:4])}")
    if not pictures:
        raise bad_data(
            "DataEmpty", f"{where} holds no picture; name them N.png, N.jpg or N.jpeg, each with a caption in N.txt"
        )
    return pictures, captions


def _in_order(where: Path, pictures: dict[str, _File], captions: dict[str, _File]) -> list[tuple[str, _File]]:
    """Check that every picture has its caption and the other way round, and sort the pictures by name."""
    for name, there, missing in (("picture", pictures, captions), ("caption", captions, pictures)):
        alone = sorted(there[stem].name for stem in there.keys() - missing.keys())
        if alone:
            remedy = "write its caption into" if name == "picture" else "add its picture as"
            ending = CAPTION if name == "picture" else PICTURES[0]
            lacks = str(PurePosixPath(alone[0]).with_suffix(ending))
            more = f" and {len(alone) - 1} more" if len(alone) > 1 else ""
            raise bad_data("PairIncomplete", f"{where}: {name} {alone[0]}{more} stands alone; {remedy} {lacks}")
    return sorted(pictures.items())


def _read(where: Path, file: _File, most: int) -> bytes:
    """Read a file that may not be larger than said, nor larger than the archive's own list says."""
    try:
        content = file.read(most) if file.size <= most else None
    except (zipfile.BadZipFile, NotImplementedError, *_BROKEN) as error:
        raise bad_data("DataUnreadable", f"{where}: {file.name} cannot be read: {error}") from error
    if content is None or len(content) > most:
        raise bad_data(
            "DataTooLarge", f"{where}: {file.name} has more than {most / 2**20:.3g} MiB, the most that is read"
        )
    return content


def _pair(where: Path, picture: _File, caption: _File, columns: ImageColumns, limits: Limits) -> Pair:
    from PIL import Image

    text = _caption(where, caption, columns.trigger_word, limits)
    content = _read(where, picture, limits.picture_bytes)
    try:
        with warnings.catch_warnings():
            # Pillow's own limit is larger than ours; the warning below it would only say so a second time.
            warnings.simplefilter("ignore", Image.DecompressionBombWarning)
            decoded = _decoded(content, limits)
    except Image.DecompressionBombError as error:
        raise bad_data("DataTooLarge", f"{where}: {picture.name}: {error}") from error
    except _BROKEN as error:
        raise bad_data(
            "PictureBroken", f"{where}: {picture.name} is not a whole PNG or JPEG picture: {error}"
        ) from error
    if isinstance(decoded, str):
        raise bad_data("PictureUnusable", f"{where}: {picture.name} {decoded}")
    return Pair(picture.name, content, text, decoded.width, decoded.height)


def _caption(where: Path, file: _File, trigger_word: str | None, limits: Limits) -> str:
    try:
        text = " ".join(_read(where, file, limits.caption_bytes).decode("utf-8-sig").split())
    except UnicodeDecodeError as error:
        raise bad_data("DataUnreadable", f"{where}: {file.name} is not UTF-8 text: {error}") from error
    if not trigger_word:
        if not text:
            raise bad_data("CaptionEmpty", f"{where}: {file.name} is empty; write a caption, or set image.triggerWord")
        return text
    if re.match(rf"{re.escape(trigger_word)}(?!\w)", text, re.IGNORECASE):
        return text
    return f"{trigger_word}, {text}" if text else trigger_word


def _decoded(content: bytes, limits: Limits | None = None) -> Any:
    """Decode a picture as RGB, turned as its EXIF says, on white where it is transparent; or say why it is unusable."""
    from PIL import Image

    with Image.open(io.BytesIO(content), formats=("PNG", "JPEG")) as opened:
        if limits is not None and opened.width * opened.height > limits.pixels:
            return (
                f"has {opened.width} x {opened.height} pixels; at most {limits.pixels} are read, make it smaller "
                "(training scales it down anyway)"
            )
        opened.load()
        if opened.mode not in ("1", "L", "LA", "P", "PA", "RGB", "RGBA", "CMYK", "YCbCr"):
            return f"has the mode {opened.mode}, which is no colour or grey picture of 8 bits; save it as RGB"
        picture = _upright(opened)
        if "A" in picture.mode or "transparency" in picture.info:
            picture = picture.convert("RGBA")
            ground = Image.new("RGBA", picture.size, "white")
            picture = Image.alpha_composite(ground, picture)
        return picture.convert("RGB")


def _upright(picture: Any) -> Any:
    """Turn a picture as its metadata say; those that cannot be read turn nothing.

    Pillow's own ``exif_transpose`` writes the metadata anew as well, which fails on what some cameras and programs
    make of them, although the picture is whole.
    """
    from PIL import ExifTags, Image

    turns = {
        2: Image.Transpose.FLIP_LEFT_RIGHT,
        3: Image.Transpose.ROTATE_180,
        4: Image.Transpose.FLIP_TOP_BOTTOM,
        5: Image.Transpose.TRANSPOSE,
        6: Image.Transpose.ROTATE_270,
        7: Image.Transpose.TRANSVERSE,
        8: Image.Transpose.ROTATE_90,
    }
    try:
        turn = turns.get(picture.getexif().get(ExifTags.Base.Orientation))
    except Exception:  # noqa: BLE001 - which error it is depends on the place of the damage.
        turn = None
    return picture if turn is None else picture.transpose(turn)


def open_picture(pair: Pair) -> Any:
    """Decode the picture of a pair, which was found whole when it was read, as a Pillow image in RGB."""
    return _decoded(pair.content)


def square(picture: Any, edge: int) -> tuple[Any, tuple[int, int]]:
    """Scale a picture until its shorter side has ``edge`` pixels and cut the middle out of it.

    All pictures get one shape, so any rows of a step can go through the model together, however it is cut; buckets
    of several shapes would tie the micro-batch to the pictures. SDXL is told the original size and what was cut off
    (SDXL paper, section 2.2), so the cut does not teach it cut-off pictures.

    Returns:
        The square picture, and how many pixels were cut off at the top and at the left.
    """
    from PIL import Image

    scale = edge / min(picture.width, picture.height)
    width, height = (max(edge, round(side * scale)) for side in picture.size)
    resized = picture if (width, height) == picture.size else picture.resize((width, height), Image.Resampling.LANCZOS)
    left, top = (width - edge) // 2, (height - edge) // 2
    return resized.crop((left, top, left + edge, top + edge)), (top, left)


def split_pairs(pairs: list[Pair], data: DataConfig, seed: int) -> PairSplit:
    """Hold pairs out: the same ones in every attempt and every process, whatever their names are.

    Which ones says :func:`taskoffer_trainer.data.held_out_keys`, by a hash of seed and picture: all pairs of a
    picture are trained, or all are held out.

    Raises:
        TrainerError: ``BAD_DATA`` when nothing would be left to train on.
    """
    keys = [hashlib.sha256(f"{seed}:".encode() + hashlib.sha256(pair.content).digest()).digest() for pair in pairs]
    if len(set(keys)) == 1:
        raise bad_data(
            "DataEmpty",
            f"{len(pairs)} pairs of one picture leave nothing to train on after holding it out; at least two different "
            "pictures are needed",
        )
    chosen = held_out_keys(keys, data)
    held_out = [pair for pair, key in zip(pairs, keys, strict=True) if key in chosen]
    train = [pair for pair, key in zip(pairs, keys, strict=True) if key not in chosen]
    return PairSplit(train, held_out[: data.eval_rows_max])


def read_pair_split(config: RunConfig) -> PairSplit:
    """Read the pairs of a run and hold some out. Needs none of the heavy libraries.

    Raises:
        TrainerError: ``BAD_DATA``, or ``BAD_CONFIG`` without a description of the data.
    """
    columns = config.data.image
    if columns is None:
        raise TrainerError(ExitCode.BAD_CONFIG, "ConfigInvalid", "data.image: the description of the data is missing")
    split = split_pairs(read_pairs(config.data, columns), config.data, config.train.seed)
    pairs = [*split.train, *split.held_out]
    small = sum(min(pair.width, pair.height) < columns.resolution for pair in pairs)
    if small:
        print(f"data: {small} of {len(pairs)} pictures are smaller than {columns.resolution} pixels and are enlarged")
    return split
