"""Images of a request: what is let in, checked before anything is computed of them. No torch.

A file may be small and its picture as large as memory: so a picture's size is read first, and
formats are the few that are common.
"""

import warnings
from collections.abc import Sequence
from io import BytesIO
from typing import Any

from expertstore.errors import InvalidInputError, PreconditionError
from expertstore.sizes import format_bytes

MAX_BYTES = 20 << 20
"""Of one image's file."""
MAX_PIXELS = 40_000_000
"""Of one image: a camera's, and 120 MB as bytes of three colours."""
MAX_IMAGES = 32
"""Of one request."""
FORMATS = ("PNG", "JPEG", "WEBP", "GIF", "BMP")


def check_images(images: Sequence[tuple[str, bytes]]) -> None:
    """Raises InvalidInputError for what cannot be looked at; each has the name of its field."""
    if len(images) > MAX_IMAGES:
        raise InvalidInputError(
            f"{images[MAX_IMAGES][0]} is image {MAX_IMAGES + 1}, and a request may have "
            f"{MAX_IMAGES}; send fewer."
        )
    for where, data in images:
        open_image(data, where)


def open_image(data: bytes, where: str = "The image") -> Any:  # noqa: ANN401 - a PIL.Image.Image
    """The picture in red, green and blue, upright as its file says; of several the first.

    Raises InvalidInputError for what is no image, is cut off, or is too large, PreconditionError
    where Pillow is not installed.
    """
    try:
        from PIL import Image, ImageOps, UnidentifiedImageError
    except ModuleNotFoundError as error:
        raise PreconditionError(
            "Images need Pillow, which is not installed: pip install 'expertd[images]'."
        ) from error
    if len(data) > MAX_BYTES:
        raise InvalidInputError(
            f"{where} has {format_bytes(len(data))}, and an image may have "
            f"{format_bytes(MAX_BYTES)}; send a smaller one."
        )
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of odd metadata, and of sizes that are refused here
        try:
            image = Image.open(BytesIO(data), formats=FORMATS)
            width, height = image.size
            if width * height > MAX_PIXELS:
                raise InvalidInputError(
                    f"{where} is {width} x {height} pixels, and an image may have {MAX_PIXELS:,} "
                    "in all; send a smaller one."
                )
            upright: Any = ImageOps.exif_transpose(image)
            return upright.convert("RGB")
        except InvalidInputError:
            raise
        except (UnidentifiedImageError, Image.DecompressionBombError) as error:
            bomb = isinstance(error, Image.DecompressionBombError)
            reason = f"has more than {MAX_PIXELS:,} pixels" if bomb else "is no image"
            raise InvalidInputError(f"{where} {reason}; send {_formats()}.") from error
        except Exception as error:  # decoders fail in many ways at broken files
            raise InvalidInputError(
                f"{where} cannot be read as a whole ({error}): it is cut off or damaged; send "
                f"{_formats()}."
            ) from error


def _formats() -> str:
    return f"{', '.join(FORMATS[:-1])} or {FORMATS[-1]}"
