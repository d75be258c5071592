"""Pixels on their way to the model: decode, resize, patch rows in window order, a tile at a time."""

from __future__ import annotations

import os
import warnings
from io import BufferedReader, FileIO
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

import numpy as np
import numpy.typing as npt
import torch

from planner.errors import ImageError, PlanFileError
from planner.plan.shapes import Image

if TYPE_CHECKING:
    from PIL.Image import Image as PillowImage

UInt8 = npt.NDArray[np.uint8]
Int64 = npt.NDArray[np.int64]

# CLIP's, as in every published preprocessor_config.json
IMAGE_MEAN = (0.48145466, 0.4578275, 0.40821073)
IMAGE_STD = (0.26862954, 0.26130258, 0.27577711)
MERGE = 2  # a merge unit is 2x2 patches, one image token
TEMPORAL = 2  # a still image is shown as two equal frames
TILE_ROWS = 256  # patch rows made at once
STRIP_PIXELS = 2**16  # pixels resized at once


class Pixels(Protocol):
    """Where patch_embed gets its rows from."""

    def rows(self, start: int, stop: int, out: torch.Tensor) -> None:
        """Write patch rows `[start, stop)` in window order into `out` (stop - start, patch_values)."""


# --- order --------------------------------------------------------------------------------------------------------


def window_order(image: Image, *, window: int = 8) -> Int64:
    """Row-major index of the merge unit at each place of window order, (P / 4,).

    `window` is the side of a full window in patches. Windows come in the groups of `Image.windows`: full, right edge,
    bottom edge, corner.
    """
    height, width, side = image.rows // MERGE, image.cols // MERGE, window // MERGE
    units = np.arange(height * width, dtype=np.int64).reshape(height, width)
    down, across = height - height % side, width - width % side
    parts = []
    for part in (
        units[:down, :across],
        units[:down, across:],
        units[down:, :across],
        units[down:, across:],
    ):
        rows, cols = part.shape
        if not part.size:
            continue
        tall, wide = min(side, rows), min(side, cols)
        # (windows down, unit row, windows across, unit col) -> windows first
        parts.append(
            part.reshape(rows // tall, tall, cols // wide, wide).swapaxes(1, 2).reshape(-1)
        )
    if sum(run.count * run.rows for run in image.windows) != image.patches:
        raise PlanFileError(
            f"{image.name}: its windows do not add up to its {image.patches} patches"
        )
    return np.concatenate(parts)


def patch_positions(image: Image, *, window: int = 8) -> tuple[Int64, Int64]:
    """(rows, cols) of each patch in window order, for the vision tower's rotary angles; (P,) each."""
    units = window_order(image, window=window)
    row, col = np.divmod(units, image.cols // MERGE)
    inner = np.arange(MERGE)
    rows = (row[:, None, None] * MERGE + inner[:, None]).repeat(MERGE, axis=2)  # (units, 2, 2)
    cols = (col[:, None, None] * MERGE + inner[None, :]).repeat(MERGE, axis=1)
    return rows.reshape(-1), cols.reshape(-1)


# --- sources of rows ----------------------------------------------------------------------------------------------


class PixelSource:
    """Patch rows made from one resized image as they are asked for. `array` (H, W, 3) is all that it keeps."""

    def __init__(self, array: UInt8, image: Image) -> None:
        patch = image.height_px // image.rows
        assert array.shape == (image.height_px, image.width_px, 3)
        self.image = image
        self.patch_values = 3 * TEMPORAL * patch * patch
        self._order = window_order(image)
        # (unit rows, 2, patch, unit cols, 2, patch, channel), a view
        self._units = array.reshape(
            image.rows // MERGE, MERGE, patch, image.cols // MERGE, MERGE, patch, 3
        )
        self._tables: dict[torch.dtype, torch.Tensor] = {}

    def rows(self, start: int, stop: int, out: torch.Tensor) -> None:
        """Write normalised patch rows `[start, stop)` in window order into `out` (stop - start, patch_values).

        A row is (channel, frame, row, col), both frames equal; values are transformers' (x / 255 - mean) / std in
        float32, rounded to `out.dtype`. Temporaries: at most 9 bytes per value of a 256-row tile without its second
        frame, 1.3 MiB with 14 px patches (1.9 MiB on a card, where the tile is laid out on the host first).
        """
        assert out.shape == (stop - start, self.patch_values)
        table = self._table(out.dtype)
        for begin in range(start, stop, TILE_ROWS):
            end = min(begin + TILE_ROWS, stop)
            target = out[begin - start : end - start]
            if target.device.type == "cpu":
                self._write(begin, end, target, table)
            else:
                # one contiguous transfer: a strided one would take scratch on the device
                staged = torch.empty(target.shape, dtype=out.dtype)
                self._write(begin, end, staged, table)
                target.copy_(staged)

    def _write(self, begin: int, end: int, target: torch.Tensor, table: torch.Tensor) -> None:
        per_unit = MERGE * MERGE
        first = begin // per_unit
        row, col = np.divmod(self._order[first : -(-end // per_unit)], self._units.shape[3])
        values = self._units[row, :, :, col]  # (units, 2, patch, 2, patch, 3)
        units, _, patch, _, _, _ = values.shape
        # which entry of the table each value is: channel * 256 + value
        index = np.empty((units, MERGE, MERGE, 3, patch, patch), dtype=np.int32)
        index[...] = values.transpose(0, 1, 3, 5, 2, 4)
        del values
        index += np.arange(0, 3 * 256, 256, dtype=np.int32)[:, None, None]
        skip = begin - first * per_unit
        chosen = index.reshape(units * per_unit, -1)[skip : skip + end - begin]
        looked_up = table.index_select(0, torch.from_numpy(chosen.reshape(-1)))
        # (rows, channel, frame, row x col): the same values for both frames
        frames = target.view(end - begin, 3, TEMPORAL, patch * patch)
        frames.copy_(looked_up.view(end - begin, 3, 1, patch * patch).expand_as(frames))

    def _table(self, dtype: torch.dtype) -> torch.Tensor:
        """The 3 x 256 values that a normalised byte can have, with transformers' roundings."""
        if dtype not in self._tables:
            # transformers 5.23 image_transforms: rescale in float64, then float32
            scaled = (np.arange(256, dtype=np.float64) * (1 / 255)).astype(np.float32)
            mean = np.array(IMAGE_MEAN, dtype=np.float32)[:, None]
            std = np.array(IMAGE_STD, dtype=np.float32)[:, None]
            values = torch.from_numpy(((scaled[None] - mean) / std).reshape(-1))
            self._tables[dtype] = values.to(dtype)
        return self._tables[dtype]


class ArrayPixels:
    """Patch rows from a processor's `pixel_values` (P, patch_values), which are in block order."""

    def __init__(self, array: npt.NDArray[Any] | torch.Tensor, image: Image) -> None:
        self.image = image
        values = torch.as_tensor(array)
        patch = image.height_px // image.rows
        self.patch_values = 3 * TEMPORAL * patch * patch
        wanted = (image.patches, self.patch_values)
        if tuple(values.shape) != wanted:
            raise ImageError(
                f"{image.name}: wanted pixel values of {wanted[0]} patches, {wanted[1]} each, "
                f"found shape {tuple(values.shape)}; make them for this image as resized in the plan"
            )
        per_unit = MERGE * MERGE
        units = torch.from_numpy(window_order(image))
        self._rows = (units[:, None] * per_unit + torch.arange(per_unit)).view(-1)
        self._values = values

    def rows(self, start: int, stop: int, out: torch.Tensor) -> None:
        """Write patch rows `[start, stop)` in window order into `out`; temporaries of at most 256 rows."""
        for begin in range(start, stop, TILE_ROWS):
            end = min(begin + TILE_ROWS, stop)
            chosen = self._values.index_select(0, self._rows[begin:end]).to(out.dtype)
            out[begin - start : end - start].copy_(chosen)


# --- files --------------------------------------------------------------------------------------------------------


def open_image(path: Path, image: Image) -> PixelSource:
    """The file decoded and resized to the plan's size; ImageError where it cannot be, PlanFileError where it is another image.

    Alpha is laid on white, EXIF orientation applied, 16 bits become the upper 8. Bicubic as Pillow resizes (transformers'
    PIL backend), bit for bit, but in strips: host memory at its peak is 4 bytes per source pixel (decoded) plus
    3 * width * source height (rows already resized horizontally; 3 * source width * height, much the same, where Pillow
    begins with the other pass) plus 2 MiB; the decoded image is closed before the second pass, which works in place.
    Afterwards 3 bytes per pixel of the resized image remain.
    """
    from PIL import Image as Pillow
    from PIL import UnidentifiedImageError

    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # Pillow's remarks on metadata and size
            with _NoLonger(path) as file, Pillow.open(file) as picture:
                orientation = _orientation(picture)
                width, height = picture.size
                found = (height, width) if orientation >= 5 else (width, height)
                wanted = (image.source_width_px, image.source_height_px)
                if found != wanted:
                    raise PlanFileError(
                        f"{path}: the plan is for an image of {wanted[0]}x{wanted[1]} pixels, this one has "
                        f"{found[0]}x{found[1]}; make a plan for this image"
                    )
                _check_mode(path, picture)
                picture.load()
                columns_first = _columns_first(image)
                first_pass = _columns_of_file if columns_first else _rows_of_file
                array = first_pass(picture, orientation, image)
    except UnidentifiedImageError:
        raise ImageError(
            f"{path}: not an image that Pillow can read; convert it to JPEG or PNG"
        ) from None
    except FileNotFoundError:
        raise ImageError(f"{path}: no such file; wanted the image that the plan is for") from None
    except Pillow.DecompressionBombError as error:
        raise ImageError(f"{path}: {error}; make it smaller first") from None
    # what Pillow's readers raise on damaged files
    except (OSError, ValueError, SyntaxError, EOFError, TypeError, IndexError, KeyError) as error:
        raise ImageError(
            f"{path}: damaged or cut short ({error}); wanted a whole image file, get it again"
        ) from None
    (_resize_rows if columns_first else _resize_columns)(array, image)
    # shrinks where it lies (mremap); nobody else holds it yet
    array.resize((image.height_px, image.width_px, 3), refcheck=False)
    return PixelSource(array, image)


class _NoLonger(BufferedReader):
    """A file whose reads ask for no more than it has: a length inside it must not decide how much memory is taken.

    planner/workload.py has the same lines: packages share only the plan.
    """

    def __init__(self, path: Path) -> None:
        super().__init__(FileIO(path))

    def read(self, size: int | None = -1, /) -> bytes:
        left = os.fstat(self.fileno()).st_size - self.tell()
        return super().read(left if size is None or size < 0 else max(0, min(size, left)))


def _columns_first(image: Image) -> bool:
    """Whether Pillow's resize runs its vertical pass first. Bytes are rounded between the passes, so the order shows.

    From version 13 on it does where the height loses more than twice as many pixels as the width; before, never.
    Source: src/libImaging/Resample.c, `horizontal_first`; python-pillow/Pillow#9549.
    """
    from PIL import __version__

    lost_rows = image.source_height_px - image.height_px
    lost_cols = image.source_width_px - image.width_px
    return int(__version__.partition(".")[0]) >= 13 and lost_rows > max(0, 2 * lost_cols)


def _rows_of_file(picture: PillowImage, orientation: int, image: Image) -> UInt8:
    """Upright rows of the source at the final width, (max(source height, height), width, 3).

    A pass works on each row, or each column, by itself, so that bands of rows and strips of columns give the same bits
    as the whole.
    """
    from PIL import Image as Pillow

    height = image.source_height_px
    array = np.empty((max(height, image.height_px), image.width_px, 3), dtype=np.uint8)
    band_rows = max(1, STRIP_PIXELS // max(image.source_width_px, image.width_px))
    for start in range(0, height, band_rows):
        stop = min(start + band_rows, height)
        band = _upright(picture, orientation, (0, start, image.source_width_px, stop))
        array[start:stop] = np.asarray(
            band.resize((image.width_px, stop - start), Pillow.Resampling.BICUBIC)
        )
    return array


def _columns_of_file(picture: PillowImage, orientation: int, image: Image) -> UInt8:
    """Upright columns of the source at the final height, (height, max(source width, width), 3)."""
    from PIL import Image as Pillow

    width = image.source_width_px
    array = np.empty((image.height_px, max(width, image.width_px), 3), dtype=np.uint8)
    strip_cols = max(1, STRIP_PIXELS // max(image.source_height_px, image.height_px))
    for start in range(0, width, strip_cols):
        stop = min(start + strip_cols, width)
        strip = _upright(picture, orientation, (start, 0, stop, image.source_height_px))
        array[:, start:stop] = np.asarray(
            strip.resize((stop - start, image.height_px), Pillow.Resampling.BICUBIC)
        )
    return array


def _upright(picture: PillowImage, orientation: int, box: tuple[int, int, int, int]) -> PillowImage:
    """The part (left, top, right, bottom) of the picture as it is meant to be seen, as RGB."""
    left, top, right, bottom = box
    width, height = picture.size
    # where the part is stored, by EXIF orientation
    stored = {
        1: (left, top, right, bottom),
        2: (width - right, top, width - left, bottom),
        3: (width - right, height - bottom, width - left, height - top),
        4: (left, height - bottom, right, height - top),
        5: (top, left, bottom, right),
        6: (top, height - right, bottom, height - left),
        7: (width - bottom, height - right, width - top, height - left),
        8: (width - bottom, left, width - top, right),
    }
    part = _to_rgb(picture.crop(stored[orientation]))
    turn = _TURNS.get(orientation)
    return part if turn is None else part.transpose(turn)


def _resize_columns(array: UInt8, image: Image) -> None:
    """Resize the columns of `array` from the source's height to the image's, strip by strip, in place."""
    from PIL import Image as Pillow

    height, width = image.source_height_px, image.width_px
    if height == image.height_px:
        return
    strip_cols = max(1, STRIP_PIXELS // max(height, image.height_px))
    for start in range(0, width, strip_cols):
        stop = min(start + strip_cols, width)
        strip = Pillow.fromarray(np.ascontiguousarray(array[:height, start:stop]))
        resized = strip.resize((stop - start, image.height_px), Pillow.Resampling.BICUBIC)
        del strip
        array[: image.height_px, start:stop] = np.asarray(resized)


def _resize_rows(array: UInt8, image: Image) -> None:
    """Resize the rows of `array` from the source's width to the image's, band by band, in place, and close them up."""
    from PIL import Image as Pillow

    width, flat = image.source_width_px, array.reshape(-1)
    band_rows = max(1, STRIP_PIXELS // max(width, image.width_px))
    row_bytes = 3 * image.width_px
    for start in range(0, image.height_px, band_rows):
        stop = min(start + band_rows, image.height_px)
        band = Pillow.fromarray(np.ascontiguousarray(array[start:stop, :width]))
        resized = band.resize((image.width_px, stop - start), Pillow.Resampling.BICUBIC)
        del band
        # never beyond the rows just read: these lie at least as far apart
        flat[start * row_bytes : stop * row_bytes] = np.asarray(resized).reshape(-1)


# EXIF orientation -> Pillow's Transpose, as in PIL.ImageOps.exif_transpose
_TURNS: dict[int, Any] = {2: 0, 3: 3, 4: 1, 5: 5, 6: 4, 7: 6, 8: 2}


def _orientation(picture: PillowImage) -> int:
    """EXIF orientation 1 to 8. planner/workload.py has the same lines: packages share only the plan.

    Pillow turns TIFF itself. A PNG whose EXIF block follows its pixels counts as upright: reading on would decode it.
    """
    if picture.format == "TIFF":
        return 1
    from PIL import Image as Pillow

    try:
        value: Any = Pillow.Image.getexif(picture).get(0x0112, 1)
    except Exception:  # damaged metadata raises anything; the picture is still a picture
        return 1
    return value if isinstance(value, int) and 1 <= value <= 8 else 1


def _check_mode(path: Path, picture: PillowImage) -> None:
    """Nothing; ImageError for pixels whose range is unknown (floats, 32-bit integers)."""
    if picture.mode in ("F", "I"):
        raise ImageError(
            f"{path}: wanted 8 or 16 bits per channel, found pixels of kind {picture.mode!r} (32 bits); "
            "save it as an 8-bit image"
        )


def _to_rgb(band: PillowImage) -> PillowImage:
    from PIL import Image as Pillow

    if band.mode.startswith("I;16"):
        return Pillow.fromarray((np.asarray(band) >> 8).astype(np.uint8)).convert("RGB")
    if band.has_transparency_data:
        white = Pillow.new("RGBA", band.size, (255, 255, 255, 255))
        return Pillow.alpha_composite(white, band.convert("RGBA")).convert("RGB")
    return band if band.mode == "RGB" else band.convert("RGB")
