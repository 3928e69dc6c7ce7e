"""Splits of a data set by image, so that no image's captions stand on both sides."""

import hashlib

from common import UserError


def split_by_image(image_ids, shares, seed=0):
    """Deal images out to splits → dict of split name → set of image ids.

    image_ids: any iterable of ids, repeats allowed; shares: dict of split name → share, which add up to 1; every split with a share
    above 0 gets at least one image. The draw depends on the seed and the set of ids alone, not on their order.
    Raises UserError when there are fewer images than splits that want one.
    """
    wanted = [name for name, share in shares.items() if share > 0]
    if not wanted or any(share < 0 for share in shares.values()) or abs(sum(shares.values()) - 1) > 1e-6:
        raise UserError(f"shares of a split are {shares}; expected numbers from 0 on that add up to 1.")

    def place(image_id):
        return hashlib.blake2b(f"{seed} {image_id}".encode("utf-8", "surrogateescape"), digest_size=8).digest()

    order = sorted({str(image_id): image_id for image_id in image_ids}.values(), key=place)
    if len(order) < len(wanted):
        raise UserError(f"{len(order)} images cannot be split into {', '.join(wanted)}. Give more images, or fewer splits.")
    splits, start, share_so_far = {name: set() for name in shares}, 0, 0.0
    for number, name in enumerate(wanted, 1):
        share_so_far += shares[name]
        end = len(order) if number == len(wanted) else round(share_so_far * len(order))
        end = min(max(end, start + 1), len(order) - (len(wanted) - number))  # one at least for this split, and for each that follows
        splits[name] = set(order[start:end])
        start = end
    return splits
