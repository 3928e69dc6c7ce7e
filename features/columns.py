"""Columns of a stranger's parquet file. What is read stays in proportion to the file's size, whatever the file says of itself."""

import os
import stat
from pathlib import Path

from common import KINDS, UserError
from features.parquet_pages import count_page_bytes, list_chunks

EXPANSION, SPARE = 64, 2**24  # content may have this many times the file's bytes, and so many more
AGAIN = "Make this part again."


def check_regular(path):
    """Check that a path is a regular file: reading a FIFO never ends. Returns its size in bytes."""
    try:
        found = os.stat(path)
    except OSError as error:
        raise UserError(f"cannot read {path}: {error.strerror}. {AGAIN}") from error
    if not stat.S_ISREG(found.st_mode):
        raise UserError(f"{path} is {KINDS.get(stat.S_IFMT(found.st_mode), 'something else')}; expected a regular file. {AGAIN}")
    return found.st_size


def read_schema(path):
    """Read which columns a parquet file has.

    Returns:
        pyarrow.Schema, and the number of rows.

    Raises:
        UserError: it is no regular file, or no parquet.
    """
    return _guarded(path, lambda file: (file.schema_arrow, file.metadata.num_rows))


def read_columns(path, wanted):
    """Read columns of a parquet file.

    Args:
        path: the file.
        wanted: names of columns, all of which exist.

    Returns:
        dict of name to Arrow array.

    Raises:
        UserError: the file is damaged, or its content is far larger than the file.
    """
    import pyarrow as pa
    import pyarrow.parquet as pq

    most = EXPANSION * check_regular(path) + SPARE

    def read(file):
        chunks = [chunk for chunk in list_chunks(path) if chunk.path.split(".")[0] in wanted]
        for size in (count_page_bytes(path, chunks), sum(8 * chunk.values for chunk in chunks)):
            _check_size(path, size, most)
        # Text stays a dictionary at first: a page may say "this megabyte, a million times".
        texts = list({chunk.path for chunk in chunks if chunk.is_text})
        source = pq.ParquetFile(path, metadata=file.metadata, read_dictionary=texts)
        parts = {name: [] for name in wanted}
        held = 0
        # One row group at a time: pyarrow cannot join lists whose texts have several dictionaries.
        for number in range(max(1, source.num_row_groups)):
            table = source.read_row_groups([number] if source.num_row_groups else [], columns=list(wanted))
            columns = {name: table[name].combine_chunks() for name in wanted}
            held += sum(map(_expanded_size, columns.values()))
            _check_size(path, held, most)
            for name, column in columns.items():
                parts[name].append(_expand(column))
        return {name: pa.concat_arrays(several) for name, several in parts.items()}

    return _guarded(path, read)


def is_text(kind):
    """Whether an Arrow type is text; the type of a column of nulls passes."""
    import pyarrow as pa

    if pa.types.is_dictionary(kind):
        return is_text(kind.value_type)
    return pa.types.is_string(kind) or pa.types.is_large_string(kind) or pa.types.is_null(kind)


def is_text_list(kind):
    """Whether an Arrow type is a list of texts; the type of a column of nulls passes."""
    import pyarrow as pa

    return pa.types.is_null(kind) or (pa.types.is_list(kind) or pa.types.is_large_list(kind)) and is_text(kind.value_type)


def _guarded(path, read):
    """Call `read` with the opened file; what pyarrow raises becomes one line."""
    import pyarrow as pa
    import pyarrow.parquet as pq

    check_regular(path)
    try:
        return read(pq.ParquetFile(path))
    except UserError:
        raise
    except (pa.ArrowException, OSError, ValueError, TypeError, KeyError, OverflowError, MemoryError, RecursionError) as error:
        raise UserError(f"{path} cannot be read as parquet ({' '.join(str(error).split())[:120]}). {AGAIN}") from error
    finally:
        pa.default_memory_pool().release_unused()


def _check_size(path, size, most):
    if size > most:
        raise UserError(f"{path} says it holds {size:,} bytes, far more than a file of {Path(path).stat().st_size:,} can. {AGAIN}")


def _expanded_size(column):
    """Count the bytes of an array's texts without its dictionary."""
    import pyarrow as pa
    import pyarrow.compute as pc

    if pa.types.is_list(column.type) or pa.types.is_large_list(column.type):
        return _expanded_size(column.flatten())
    if not pa.types.is_dictionary(column.type):
        return column.nbytes
    lengths = pc.binary_length(column.dictionary).take(column.indices)
    return pc.sum(lengths.cast(pa.int64())).as_py() or 0


def _expand(column):
    """Turn dictionaries into plain text."""
    import pyarrow as pa

    if pa.types.is_list(column.type) and pa.types.is_dictionary(column.type.value_type):
        return column.cast(pa.list_(column.type.value_type.value_type))
    if pa.types.is_dictionary(column.type):
        return column.cast(column.type.value_type)
    return column
