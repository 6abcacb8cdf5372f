"""The first look at every picture, in worker processes: a file of its own, so that they start without torch."""

import pyarrow as pa

from mova_core.images import ImageError, ImageRef

INSPECTED = pa.schema([("image", pa.string()), ("key", pa.string()), ("error", pa.string())])


def inspect_images(rows: pa.Table) -> pa.Table:
    """Rows with `image` paths to rows with `key` (sha256 of the file) and, for a picture that cannot be read, its `error`."""
    out = []
    for path in rows["image"].to_pylist():
        image, key, reason = ImageRef(path=path), None, None
        try:
            key = image.key
            image.decode()
        except ImageError as error:
            reason = str(error).removeprefix(f"{path}: ")  # the path stands beside it
        out.append({"image": path, "key": key, "error": reason})
    return pa.Table.from_pylist(out, schema=INSPECTED)
