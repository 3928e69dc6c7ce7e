"""The beginning of a download, and what shows that the rest on the server belongs to it."""

import json
import re

from common import replace_file, resolve_output

CONTENT_RANGE = re.compile(r"bytes (\d{1,18})-(\d{1,18})/(\d{1,18})")  # first and last byte, bytes of the whole file


class Part:
    """The beginning of a download: {target}.part, and {target}.part.json with what the server said of the whole file.

    Attributes:
        path: Path of the part.
        validator: ETag or Last-Modified of the file that it is a part of, None where the server gave neither.
        total: bytes of the whole file, None where unknown.
    """

    def __init__(self, address, target):
        """Name the files. Parts of another address, or without a record, are not used."""
        self.address = address
        self.path = resolve_output(target.with_name(target.name + ".part"))
        self.record = target.with_name(target.name + ".part.json")
        self.validator = self.total = None
        try:
            found = json.loads(self.record.read_bytes())
            if found["address"] == address and isinstance(found["total"], int | None) and isinstance(found["validator"], str | None):
                self.validator, self.total = found["validator"], found["total"]
                return
        except (OSError, ValueError, RecursionError, KeyError, TypeError):
            pass
        self.remove()

    def length(self):
        """Return the bytes that are there."""
        return self.path.stat().st_size if self.path.is_file() else 0

    def remove(self):
        """Remove both files, the record first: a part without one is never used."""
        for path in (self.record, self.path):
            path.unlink(missing_ok=True)
        self.validator = self.total = None

    def begin(self, headers, total):
        """Begin with an empty part of the file that `headers` are about, `total` bytes long."""
        self.remove()
        self.path.touch()
        self.validator, self.total = find_validator(headers), total
        with replace_file(self.record) as temporary:
            temporary.write_text(json.dumps({"address": self.address, "validator": self.validator, "total": total}), encoding="utf-8")

    def is_continued(self, headers):
        """Whether a 206 answer with these headers is the rest of the same file."""
        span = CONTENT_RANGE.fullmatch(headers.get("Content-Range", ""))
        return bool(
            span
            and int(span[1]) == self.length() <= int(span[2]) < int(span[3])
            and self.total in (None, int(span[3]))
            and self.validator in (None, find_validator(headers))
        )


def find_validator(headers):
    """Return what If-Range compares: a strong ETag, else Last-Modified, else None."""
    tag = headers.get("ETag", "")
    return tag if tag.startswith('"') else headers.get("Last-Modified")
