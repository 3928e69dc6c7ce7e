"""What the pages of a parquet file unpack to: a reader sets aside as much memory as each page's header names.

The footer's total_uncompressed_size is another number, and may say something else. pyarrow does not show page headers, and its view of the
footer (`metadata.row_group(0).column(0)`) ends the process where some of the numbers contradict each other. Both are Thrift structures in
the compact protocol: https://parquet.apache.org/docs/file-format/
"""

import mmap
from dataclasses import dataclass

from common import UserError

MAGIC = b"PAR1"
BYTE_ARRAY = 6  # the physical type of texts
# Numbers of fields: of the footer, a row group, a column chunk, the chunk's own metadata, and a page header.
ROW_GROUPS, COLUMNS, CHUNK = 4, 1, 3
TYPE, PATH, VALUES, SIZE, DATA_PAGE, DICTIONARY_PAGE = 1, 3, 5, 7, 9, 11
UNCOMPRESSED, COMPRESSED = 2, 3

TRUE, FALSE, BYTE, I16, I32, I64, DOUBLE, BINARY, LIST, SET, MAP, STRUCT = range(1, 13)  # types of fields
DEEPEST = 16  # structures and lists inside one another; a footer has six
LONGEST = 10  # bytes of a number


@dataclass(frozen=True)
class Chunk:
    """The pages of one column in one row group.

    Attributes:
        path: names from the column down to the values, joined by dots.
        is_text: whether the values are byte strings.
        values: how many there are, nulls among them.
        start, end: bytes of the file.
    """

    path: str
    is_text: bool
    values: int
    start: int
    end: int


def list_chunks(path):
    """List the column chunks of a parquet file. Returns a list of Chunk.

    Raises:
        UserError: the file does not end in a footer.
    """
    with open(path, "rb") as file, mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as content:
        size = int.from_bytes(content[-8:-4], "little")
        try:
            if content[-4:] != MAGIC or size > len(content) - 8:
                raise ValueError
            footer = _Reader(content, len(content) - 8 - size).structure()
            return [_describe(column[CHUNK]) for group in footer.get(ROW_GROUPS, []) for column in group[COLUMNS]]
        except (IndexError, KeyError, ValueError, TypeError, AttributeError) as error:
            raise UserError(f"{path} is damaged: it does not end in a parquet footer. Make this part again.") from error


def count_page_bytes(path, chunks):
    """Add up the uncompressed sizes in the page headers of some column chunks.

    Args:
        path: parquet file.
        chunks: list of Chunk of this file.

    Returns:
        Bytes.

    Raises:
        UserError: a chunk does not consist of pages.
    """
    total = 0
    with open(path, "rb") as file, mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as content:
        for chunk in chunks:
            reader = _Reader(content, chunk.start)
            try:
                while reader.place < chunk.end:
                    sizes = reader.structure()
                    if min(sizes[UNCOMPRESSED], sizes[COMPRESSED]) < 0:
                        raise ValueError
                    total += sizes[UNCOMPRESSED]
                    reader.place += sizes[COMPRESSED]
            except (IndexError, KeyError, ValueError, TypeError) as error:
                where = f"in column {chunk.path}, no page begins at byte {reader.place:,}"
                raise UserError(f"{path} is damaged: {where}. Make this part again.") from error
    return total


def _describe(fields):
    """Make a Chunk of a column chunk's metadata."""
    start = min(fields[DATA_PAGE], fields.get(DICTIONARY_PAGE) or fields[DATA_PAGE])
    path = b".".join(fields[PATH]).decode(errors="replace")
    return Chunk(path, fields[TYPE] == BYTE_ARRAY, fields[VALUES], start, start + fields[SIZE])


class _Reader:
    """Reads Thrift's compact protocol from bytes. What it makes of them stays in proportion to the bytes read."""

    def __init__(self, content, place):
        self.content, self.place = content, place

    def structure(self, depth=0):
        """Read a structure. Returns dict of field number to value."""
        fields, number = {}, 0
        while head := self.byte():
            number = number + (head >> 4) if head >> 4 else self.integer()
            kind = head & 15
            fields[number] = kind == TRUE if kind in (TRUE, FALSE) else self.value(kind, depth + 1)
        return fields

    def value(self, kind, depth):
        """Read a value of a field, or of a list."""
        if depth > DEEPEST:
            raise ValueError
        if kind in (I16, I32, I64):
            return self.integer()
        if kind in (BYTE, TRUE, FALSE):
            return self.byte()
        if kind in (DOUBLE, BINARY):
            return self.bytes(8 if kind == DOUBLE else self.unsigned())
        if kind in (LIST, SET):
            head = self.byte()
            size = self.unsigned() if head >> 4 == 15 else head >> 4
            return [self.value(head & 15, depth + 1) for _ in range(size)]
        if kind == STRUCT:
            return self.structure(depth)
        raise ValueError  # parquet has no maps

    def bytes(self, size):
        if self.place < 0 or size > len(self.content) - self.place:
            raise IndexError
        self.place += size
        return self.content[self.place - size : self.place]

    def byte(self):
        if self.place < 0:
            raise IndexError
        self.place += 1
        return self.content[self.place - 1]

    def unsigned(self):
        value = 0
        for shift in range(0, 7 * LONGEST, 7):
            byte = self.byte()
            value |= (byte & 127) << shift
            if byte < 128:
                return value
        raise ValueError

    def integer(self):
        """Read a zigzag number: 0, -1, 1, -2 ... are stored as 0, 1, 2, 3 ..."""
        value = self.unsigned()
        return (value >> 1) ^ -(value & 1)
