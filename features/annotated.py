"""What every form of caption annotations becomes."""

import dataclasses
from typing import NamedTuple


class Annotated(NamedTuple):
    """An image and its captions.

    Attributes:
        image_id: int or str, as the file has it; of a file without ids, what features.image_ids makes of the file name.
        file_name: of the picture or sound, as the file has it; None where it gives none.
        captions: list of dicts with caption, and with id and domain (nocaps) where the file has them.
        split: its own split, where the file gives one for each image.
    """

    image_id: object
    file_name: str | None
    captions: list
    split: str | None = None


@dataclasses.dataclass
class Annotations:
    """A file of annotations.

    Attributes:
        form: "coco", "nocaps", "list", "karpathy", "clotho" or "flickr".
        images: list of Annotated, one per image, in the order of the file.
        left_out: dict from a reason, such as "rejected captions", to how many.
        bad: list of (image_id, place, reason) of lines that could not be used.
    """

    form: str
    images: list
    left_out: dict = dataclasses.field(default_factory=dict)
    bad: list = dataclasses.field(default_factory=list)
