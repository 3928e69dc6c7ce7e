"""What the pages of a parquet file unpack to: a reader sets aside as much memory as each page's header names.

The footer's total_uncompressed_size is another number, and may say something else. pyarrow does not show page headers. They are Thrift
structures in the compact protocol: https://parquet.apache.org/docs/file-format/data-pages/
"""

import mmap

from common import UserError

UNCOMPRESSED, COMPRESSED = 2, 3  # fields of a page header that hold its sizes
TRUE, FALSE, BYTE, I16, I32, I64, DOUBLE, BINARY = range(1, 9)  # types of fields
STRUCT = 12
DEEPEST = 16  # structures inside one another; a page header has three
LONGEST = 10  # bytes of a number


def count_page_bytes(path, chunks):
    """Add up the uncompressed sizes in the page headers of some column chunks.

    Args:
        path: parquet file.
        chunks: list of pyarrow.parquet.ColumnChunkMetaData of this file.

    Returns:
        Bytes.

    Raises:
        UserError: a chunk does not consist of pages.
    """
    total = 0
    with open(path, "rb") as file, mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as content:
        for chunk in chunks:
            start = chunk.data_page_offset
            if chunk.has_dictionary_page and chunk.dictionary_page_offset:
                start = min(start, chunk.dictionary_page_offset)
            end = start + chunk.total_compressed_size
            reader = _Reader(content)
            reader.place = start
            try:
                while reader.place < end:
                    sizes = reader.structure()
                    if min(sizes[UNCOMPRESSED], sizes[COMPRESSED]) < 0:
                        raise ValueError
                    total += sizes[UNCOMPRESSED]
                    reader.place += sizes[COMPRESSED]
            except (IndexError, KeyError, ValueError) as error:
                where = f"in column {chunk.path_in_schema}, no page begins at byte {reader.place:,}"
                raise UserError(f"{path} is damaged: {where}. Make this part again.") from error
    return total


class _Reader:
    """Reads Thrift's compact protocol from bytes."""

    def __init__(self, content):
        self.content, self.place = content, 0

    def structure(self, depth=0):
        """Read a structure. Returns dict of field number to value for its 32-bit numbers."""
        if depth > DEEPEST:
            raise ValueError
        fields, number = {}, 0
        while head := self.byte():
            number = number + (head >> 4) if head >> 4 else self.integer()
            kind = head & 15
            if kind == I32:
                fields[number] = self.integer()
            else:
                self.skip(kind, depth)
        return fields

    def skip(self, kind, depth):
        """Read past a value of a field."""
        if kind in (I16, I32, I64):
            self.integer()
        elif kind == BYTE:
            self.byte()
        elif kind == DOUBLE:
            self.place += 8
        elif kind == BINARY:
            size = self.unsigned()  # which moves the place itself
            self.place += size
        elif kind == STRUCT:
            self.structure(depth + 1)
        elif kind not in (TRUE, FALSE):
            raise ValueError  # a page header has no lists, sets or maps

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
