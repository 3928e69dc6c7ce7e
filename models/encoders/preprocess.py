"""Picture file → tensor: reading, then the transform of the encoder's own library."""

from models.encoders.images import read_image

# A 1 x 8000 picture grows enormous when its short side is scaled up; beyond this many pixels its ends, cropped later anyway, go first.
MOST_RESIZED_PIXELS = 2**26


class Preprocess:
    """Picture (path, bytes or PIL) → float32 [3, H, W]. Holds no weights: loader workers get a copy of it."""

    def __init__(self, transform, short_side=None):
        """transform: PIL RGB → tensor; short_side: what it scales a picture's shorter side to, in pixels, before a crop; None: no crop."""
        self.transform = transform
        self.short_side = short_side
        self.fast_decode = False  # read JPEGs no larger than short_side asks for; needs one

    def __call__(self, picture):
        """Raises UnreadableImage when the picture cannot be read."""
        return self.transform(self._without_far_ends(read_image(picture, self.short_side if self.fast_decode else None)))

    def _without_far_ends(self, image):
        """Crop an extremely long picture around its middle so that scaling it up stays affordable."""
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
