"""Reading annotation files of COCO's format."""

import json
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any


def read_coco(
    path: str | os.PathLike[str], wanted: Sequence[str] = ("images", "annotations")
) -> dict[str, Any]:
    """Read an annotation file and check that it lists the images of its annotations.

    Args:
        path: JSON file of instances or of panoptic segments.
        wanted: lists that it must have.

    Raises:
        ValueError: no such file, no JSON, a list is missing, or annotations of an image that the
            file does not list.
    """
    try:
        content = json.loads(Path(path).read_bytes())
    except (OSError, ValueError) as error:
        raise ValueError(f"wanted a COCO annotation file, got {path} ({error})") from error
    lacking = set(wanted) - set(content if isinstance(content, dict) else ())
    if lacking:
        raise ValueError(f"{path} lacks {' and '.join(sorted(lacking))} of a COCO file")
    listed = {image["id"] for image in content["images"]}
    stray = sorted({a["image_id"] for a in content["annotations"]} - listed, key=str)
    if stray:
        raise ValueError(
            f"{path} has annotations of {len(stray)} images that it does not list, ids "
            f"{', '.join(map(str, stray[:5]))}; add the images or remove the annotations"
        )
    return content
