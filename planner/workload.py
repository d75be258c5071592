"""What is asked, in tokens and pixels: image sizes, windows, prompt length.

Light on purpose: Pillow and tokenizers are imported inside the functions that need them, so that a plan for `WxH`
and `--prompt-tokens` reads no image and no vocabulary.
"""

from __future__ import annotations

import math
import os
import re
import unicodedata
import warnings
from collections.abc import Sequence
from io import BufferedReader, FileIO
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

from planner.errors import CheckpointError, ImageError, InputError
from planner.plan.shapes import Image, WindowRun, Workload

if TYPE_CHECKING:
    from PIL.Image import Image as PillowImage

MAX_ASPECT = 200  # transformers: smart_resize
# Pillow's own limit for "decompression bombs" (twice Image.MAX_IMAGE_PIXELS); 716 MB when decoded
MAX_SOURCE_PIXELS = 178_956_970
TEMPLATE_TOKENS = 19  # Qwen2.5-VL's chat template without image and text, in its own tokenizer
TOKENS_AROUND_IMAGE = 2  # <|vision_start|> and <|vision_end|>
DEFAULT_TEXT_TOKENS = 64
SYSTEM_TEXT = "system\nYou are a helpful assistant."
USER_TEXT = "user\n"
ASSISTANT_TEXT = "assistant\n"

_SIZE = re.compile(r"([0-9]{1,9})x([0-9]{1,9})")


# --- images -------------------------------------------------------------------------------------------------------


def smart_resize(
    height: int, width: int, *, min_pixels: int, max_pixels: int, factor: int = 28
) -> tuple[int, int]:
    """(height, width) that the model sees: multiples of `factor` with min_pixels <= area <= max_pixels where possible.

    Source: transformers 5.23, models/qwen2_vl/image_processing_pil_qwen2_vl.py. Halves round to even, and both scales
    come from the original size, not from the rounded one. ImageError beyond an aspect ratio of 200.
    """
    if height < 1 or width < 1:
        raise ImageError(f"wanted an image of at least 1x1 pixels, found {width}x{height}")
    if not 1 <= min_pixels <= max_pixels:
        raise InputError(
            f"wanted 1 <= min pixels <= max pixels, found {min_pixels} and {max_pixels}; raise --max-pixels"
        )
    if max(height, width) / min(height, width) > MAX_ASPECT:
        raise ImageError(
            f"wanted an image whose sides differ at most {MAX_ASPECT} times, found {width}x{height}; crop it"
        )
    rows = round(height / factor) * factor
    cols = round(width / factor) * factor
    if rows * cols > max_pixels:
        shrink = math.sqrt((height * width) / max_pixels)
        rows = max(factor, math.floor(height / shrink / factor) * factor)
        cols = max(factor, math.floor(width / shrink / factor) * factor)
    elif rows * cols < min_pixels:
        grow = math.sqrt(min_pixels / (height * width))
        rows = math.ceil(height * grow / factor) * factor
        cols = math.ceil(width * grow / factor) * factor
    return rows, cols


def window_runs(rows: int, cols: int, *, window: int) -> tuple[WindowRun, ...]:
    """The windows of a grid of patches, grouped: full, cut at the right edge, at the bottom edge, the corner.

    `window` is the side of a full window in patches; groups without windows are left out.
    """
    down, rest_rows = divmod(rows, window)
    across, rest_cols = divmod(cols, window)
    groups = (
        WindowRun(count=down * across, rows=window * window),
        WindowRun(count=down if rest_cols else 0, rows=window * rest_cols),
        WindowRun(count=across if rest_rows else 0, rows=rest_rows * window),
        WindowRun(count=1 if rest_rows and rest_cols else 0, rows=rest_rows * rest_cols),
    )
    return tuple(group for group in groups if group.count)


def plan_image(
    name: str,
    width_px: int,
    height_px: int,
    *,
    min_pixels: int,
    max_pixels: int,
    patch_px: int = 14,
    merge: int = 2,
    window_px: int = 112,
) -> Image:
    """The image as planned: resized size, patch grid and windows. `width_px`, `height_px` are the source's."""
    try:
        height, width = smart_resize(
            height_px,
            width_px,
            min_pixels=min_pixels,
            max_pixels=max_pixels,
            factor=patch_px * merge,
        )
    except ImageError as error:
        raise ImageError(f"{name}: {error}") from None
    rows, cols = height // patch_px, width // patch_px
    window = window_px // (patch_px * merge) * merge
    return Image(
        name=name,
        source_width_px=width_px,
        source_height_px=height_px,
        width_px=width,
        height_px=height,
        rows=rows,
        cols=cols,
        windows=window_runs(rows, cols, window=window),
    )


def image_size(path: Path) -> tuple[int, int]:
    """(width, height) of an image file as it is meant to be seen, from its header alone.

    EXIF orientation is applied, which transformers' own processor does not do: a photograph taken upright is shown to
    the model upright. ImageError for everything that is not a readable image of at most MAX_SOURCE_PIXELS.
    """
    from PIL import Image as Pillow
    from PIL import UnidentifiedImageError

    # os.path, not Path: a name that no file can have is no file
    if os.path.isdir(path):
        raise ImageError(f"{path}: wanted an image file, found a directory")
    if os.path.exists(path) and not os.path.isfile(path):
        raise ImageError(f"{path}: wanted an image file, found a pipe or a device")
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # ours is the only report on size and metadata
            with _NoLonger(path) as file, Pillow.open(file) as picture:
                width, height = picture.size
                turned = _orientation(picture) >= 5
    except FileNotFoundError:
        raise ImageError(
            f"{path}: no such file; wanted an image file or a size such as 3840x2160"
        ) from None
    except Pillow.DecompressionBombError:
        raise ImageError(
            f"{path}: wanted an image of at most {MAX_SOURCE_PIXELS / 1e6:.0f} megapixels; make it smaller first"
        ) from None
    except UnidentifiedImageError:
        raise ImageError(
            f"{path}: not an image that Pillow can read; convert it to JPEG or PNG"
        ) from None
    # what Pillow's readers raise on damaged headers
    except (OSError, ValueError, SyntaxError, EOFError, TypeError, IndexError, KeyError) as error:
        raise ImageError(
            f"{path}: cannot be read as an image ({error}); save it anew as JPEG or PNG"
        ) from None
    if width < 1 or height < 1:
        raise ImageError(f"{path}: wanted an image of at least 1x1 pixels, found {width}x{height}")
    check_source_pixels(str(path), width, height)
    return (height, width) if turned else (width, height)


class _NoLonger(BufferedReader):
    """A file whose reads ask for no more than it has: a length inside it must not decide how much memory is taken.

    executor/image.py has the same lines: packages share only the plan.
    """

    def __init__(self, path: Path) -> None:
        super().__init__(FileIO(path))

    def read(self, size: int | None = -1, /) -> bytes:
        left = os.fstat(self.fileno()).st_size - self.tell()
        return super().read(left if size is None or size < 0 else max(0, min(size, left)))


def check_source_pixels(name: str, width_px: int, height_px: int) -> None:
    """Nothing; ImageError where the image is larger than Stowplan decodes."""
    if width_px * height_px > MAX_SOURCE_PIXELS:
        raise ImageError(
            f"{name}: wanted an image of at most {MAX_SOURCE_PIXELS / 1e6:.0f} megapixels, "
            f"found {width_px}x{height_px}; make it smaller first"
        )


def _orientation(picture: PillowImage) -> int:
    """EXIF orientation 1 to 8. executor/image.py has the same lines: packages share only the plan.

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


def parse_image(
    text: str,
    *,
    min_pixels: int,
    max_pixels: int,
    patch_px: int = 14,
    merge: int = 2,
    window_px: int = 112,
) -> Image:
    """The planned image for `3840x2160` (a size) or a path (`./3840x2160` for a file of that name)."""
    match = _SIZE.fullmatch(text)
    if match:
        name, (width, height) = text, (int(match[1]), int(match[2]))
        check_source_pixels(name, width, height)
    elif not text or "\0" in text:
        raise ImageError(f"--image: wanted a file or a size such as 3840x2160, found {text!r}")
    else:
        name, (width, height) = Path(text).name, image_size(Path(text))
    return plan_image(
        name,
        width,
        height,
        min_pixels=min_pixels,
        max_pixels=max_pixels,
        patch_px=patch_px,
        merge=merge,
        window_px=window_px,
    )


class HostBytes(NamedTuple):
    """Host memory of one opened image. `error_bytes`: how much more than `peak_bytes` some formats take."""

    peak_bytes: int  # while the file is decoded and resized
    kept_bytes: int  # afterwards, until the last patch has been read
    error_bytes: int


OPEN_TEMPORARY_BYTES = 2**20  # strips being resized; measured 0.3 to 1.0 MiB


def host_bytes(image: Image) -> HostBytes:
    """What executor.image.open_image holds for this image.

    Decoded pixels take 4 bytes each in Pillow (1 for grayscale and palettes), rows already resized horizontally 3 per
    pixel of the final width; the vertical pass works in the same array after the decoded image is gone. Measured on
    2160p and 24 megapixel files: baseline JPEG, PNG, BMP and TIFF -1.0 to +0.1 MiB. The error covers decoders that
    hold more while they decode: progressive JPEG up to 10 bytes a pixel in all, WebP 16.
    """
    source = image.source_width_px * image.source_height_px
    rows_and_source = 4 * source + 3 * image.width_px * image.source_height_px
    rows_alone = 3 * image.width_px * max(image.source_height_px, image.height_px)
    peak = max(rows_and_source, rows_alone) + OPEN_TEMPORARY_BYTES
    return HostBytes(
        peak_bytes=peak,
        kept_bytes=3 * image.width_px * image.height_px,
        error_bytes=max(16 * source - peak, 0) + 2 * OPEN_TEMPORARY_BYTES,
    )


# --- prompt -------------------------------------------------------------------------------------------------------


def prompt_tokens(
    text: str | None,
    n_text_tokens: int | None,
    tokenizer_json: Path | None,
    images: Sequence[Image],
) -> tuple[int, bool]:
    """(rows of the prompt, whether that is only an upper bound): template, images and text together.

    With `tokenizer_json` the text is counted exactly. Without, a byte-level tokenizer makes at most one token of each
    UTF-8 byte of the normalised text. Neither text nor number: 64 text tokens.
    """
    image_rows = sum(image.tokens + TOKENS_AROUND_IMAGE for image in images)
    if text is not None and n_text_tokens is not None:
        raise InputError("wanted a prompt or a number of prompt tokens, found both; leave one out")
    if n_text_tokens is not None and n_text_tokens < 1:
        raise InputError(f"--prompt-tokens: wanted at least 1, found {n_text_tokens}")
    size = None if text is None else _check_text(text)
    if tokenizer_json is None:
        if size is not None:
            return TEMPLATE_TOKENS + image_rows + size, True
        return TEMPLATE_TOKENS + image_rows + (n_text_tokens or DEFAULT_TEXT_TOKENS), False
    tokenizer = _load_tokenizer(tokenizer_json)
    tokenizer.encode_special_tokens = True  # what the user writes is text, never a control token

    def count(piece: str) -> int:
        try:
            return len(tokenizer.encode(piece, add_special_tokens=False).ids)
        except Exception as error:  # tokenizers raises nothing narrower
            raise CheckpointError(
                f"{tokenizer_json}: cannot encode text ({error}); download it again"
            ) from None

    # five control tokens: start and end of system, start and end of user, start of assistant
    template = 5 + count(SYSTEM_TEXT) + 2 * count("\n") + count(ASSISTANT_TEXT)
    if text is None:
        return template + count(USER_TEXT) + image_rows + (
            n_text_tokens or DEFAULT_TEXT_TOKENS
        ), False
    if images:
        return template + count(USER_TEXT) + image_rows + count(text), False
    return template + count(USER_TEXT + text), False  # no control token between them


def _check_text(text: str) -> int:
    """UTF-8 bytes of the text as the tokenizer normalises it (NFC); InputError where there is nothing to tokenise."""
    if not text.strip():
        raise InputError("--prompt: wanted a question, found an empty text")
    try:
        return len(unicodedata.normalize("NFC", text).encode("utf-8"))
    except UnicodeEncodeError:
        raise InputError("--prompt: wanted UTF-8 text, found bytes that are not") from None


def _load_tokenizer(path: Path) -> Any:
    from tokenizers import Tokenizer

    if not path.is_file():
        raise CheckpointError(f"{path}: no such file; download the checkpoint's tokenizer.json")
    try:
        return Tokenizer.from_file(str(path))
    except Exception as error:  # tokenizers raises nothing narrower
        raise CheckpointError(
            f"{path}: cannot be read as a tokenizer ({error}); download it again"
        ) from None


# --- all of it ----------------------------------------------------------------------------------------------------


def make_workload(
    images: Sequence[Image],
    *,
    min_pixels: int,
    max_pixels: int,
    text: str | None = None,
    n_text_tokens: int | None = None,
    tokenizer_json: Path | None = None,
    max_new_tokens: int = 128,
    context_tokens: int | None = None,
) -> Workload:
    """The workload of a request; InputError where `context_tokens` cannot hold the prompt and the answer."""
    if max_new_tokens < 1:
        raise InputError(f"--max-new-tokens: wanted at least 1, found {max_new_tokens}")
    rows, is_bound = prompt_tokens(text, n_text_tokens, tokenizer_json, images)
    needed = rows + max_new_tokens
    if context_tokens is not None and context_tokens < needed:
        raise InputError(
            f"--context-tokens: wanted at least {needed} ({rows} of the prompt + {max_new_tokens} new), "
            f"found {context_tokens}; raise it, or lower --max-pixels or --max-new-tokens"
        )
    return Workload(
        images=tuple(images),
        min_pixels=min_pixels,
        max_pixels=max_pixels,
        prompt_tokens=rows,
        prompt_is_bound=is_bound,
        max_new_tokens=max_new_tokens,
        context_tokens=needed if context_tokens is None else context_tokens,
    )
