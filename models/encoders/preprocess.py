"""From an image file to a tensor: reading, then the transform of the encoder's own library."""

import dataclasses

from models.encoders.images import read_image

# Scaling up the short side of a 1 x 8000 image makes it enormous. Beyond this many pixels its ends, which the crop drops, go first.
MOST_RESIZED_PIXELS = 2**26


@dataclasses.dataclass
class Preprocess:
    """An image (path, bytes or PIL) to float32 [3, H, W]. It holds no weights: every loader worker gets a copy.

    Attributes:
        transform: an RGB PIL image to a tensor.
        short_side: pixels that the shorter side is scaled to before a crop; None where there is no crop.
        fast_decode: read JPEGs scaled down, to no less than short_side, which must be set.
    """

    transform: object
    short_side: int | None = None
    fast_decode: bool = False

    def __call__(self, image):
        """Preprocess one image. Raises UnreadableImage when it cannot be read."""
        return self.transform(self._without_far_ends(read_image(image, self.short_side if self.fast_decode else None)))

    def _without_far_ends(self, image):
        """Crop an extremely long image around its middle, so that scaling it up stays affordable."""
        if self.short_side is None:
            return image
        short, long = sorted(image.size)
        longest = short * max(1, MOST_RESIZED_PIXELS // self.short_side**2)
        longest += (long - longest) % 2  # so that the middle stays the middle
        if long <= longest:
            return image
        start = (long - longest) // 2
        box = (start, 0, start + longest, short) if image.width == long else (0, start, short, start + longest)
        return image.crop(box)
