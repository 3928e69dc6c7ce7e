"""Make values from the records of a pickle: arrays, tensors and rows of pandas, from bytes whose size was checked.

Every function takes the builder, which makes plain values of a record's parts, and the record. It raises RefusedPickle for anything that
the library of that name does not write for plain numbers and texts.
"""

import io
import math
import re
import zipfile

import numpy as np

from common import ARCHIVE_ERRORS
from features.inert import DTYPES, STORAGES, Record, build_as, check, is_class, is_kind, read_records, whole_numbers
from features.opcodes import RefusedPickle, check_opcodes
from features.rebuild_rows import ROWS

_MAGIC, _PROTOCOL = 0x1950A86A20F9469CFC6C, 1001  # of torch's former file format


def _no_value(builder, record):
    raise RefusedPickle(f"{record.origin} where a value belongs")


def _ordered_dict(builder, record):
    pairs = build_as(builder, record.args[0], list) if record.args else []
    check(all(type(pair) in (tuple, list) and len(pair) == 2 for pair in pairs), f"{record.origin} of something else than pairs")
    pairs = [*map(tuple, pairs), *record.items]
    check(builder.are_atoms([key for key, _ in pairs]), f"{record.origin} with keys of other types")
    return build_as(builder, dict(pairs), dict)


def _set(builder, record):
    items = build_as(builder, record.args[0], list) if len(record.args) == 1 else []
    check(builder.are_atoms(items), f"{record.origin} of other things")
    return set(items)


def _encoded(builder, record):
    check(len(record.args) == 2 and record.args[1] in ("latin1", "latin-1"), f"{record.origin} of another encoding than latin1")
    return build_as(builder, record.args[0], str).encode("latin-1")


def _bytes(builder, record):
    if len(record.args) == 2:
        return _encoded(builder, record)
    return bytes(build_as(builder, record.args[0], bytes, bytearray)) if record.args else b""


# numpy


def _dtype(record):
    """Read a plain dtype. Returns (kind, bytes per item, byte order); the kind of Python objects is "O"."""
    check(is_kind(record, "dtype") and record.args and isinstance(record.args[0], str), "an array without a dtype")
    match = re.fullmatch(r"([<>|=]?)([biufUSO])(\d{1,9})", record.args[0])
    check(match and type(record.state) in (tuple, type(None)), f"the dtype {record.args[0][:20]!r}")
    order, kind, size = match[1] or "=", match[2], int(match[3])
    if record.state is not None:
        check(5 <= len(record.state) <= 9, "a dtype of an unknown form")
        check(all(part is None for part in record.state[2:5]), "a dtype with fields")
        order = record.state[1]
    plain = kind + str(size) in ("b1", "i1", "i2", "i4", "i8", "u1", "u2", "u4", "u8", "f2", "f4", "f8", "O8", "O4")
    check(plain or kind in "US", f"the dtype {record.args[0][:20]!r}")
    check(order in ("<", ">", "|", "="), "a dtype of an unknown byte order")
    return kind, size * 4 if kind == "U" else size, "<" if order in "|=" else order


def _array_of(builder, dtype, shape, data, order="C"):
    """Make an array from its bytes; of texts or objects a list, which is nested where the shape is."""
    kind, size, byte_order = _dtype(dtype)
    shape = whole_numbers(shape)
    count = math.prod(shape)
    if kind == "O":
        values = build_as(builder, data, list)
        check(len(values) == count and len(shape) == 1, f"an array of shape {shape} over {len(values)} objects")
        return values
    data = bytes(build_as(builder, data, bytes, bytearray))
    check(len(data) == count * size and max(shape, default=0) < 2**40, f"an array of shape {shape} over {len(data)} bytes")
    if kind in "US":
        check(len(shape) < 2, "an array of texts in rows")
        encoding = "latin-1" if kind == "S" else "utf-32-le" if byte_order == "<" else "utf-32-be"
        texts = [data[at : at + size].decode(encoding, "surrogatepass").rstrip("\0") for at in range(0, len(data), size or 1)]
        texts = texts if size else [""] * min(count, len(data))
        return texts if shape else texts[0] if texts else ""
    array = np.frombuffer(data, "u1" if kind == "b" else f"{byte_order}{kind}{size}")
    array = array != 0 if kind == "b" else array.astype(f"={kind}{size}")  # a copy: its own, aligned, of this machine's byte order
    return array.reshape(shape, order=order)


def _reconstructed(builder, record):
    """An array as pickle protocols below 5 write it: an empty one, and a state."""
    check(record.args and is_class(record.args[0], "ndarray"), f"{record.origin} of another class than numpy.ndarray")
    check(type(record.state) is tuple and len(record.state) in (4, 5), "an array without its numbers")
    shape, dtype, fortran, data = record.state[-4:]
    return _array_of(builder, dtype, shape, data, "F" if fortran is True else "C")


def _from_buffer(builder, record):
    """An array as pickle protocol 5 writes it."""
    check(len(record.args) == 4, f"{record.origin} of {len(record.args)} arguments")
    data, dtype, shape, order = record.args
    return _array_of(builder, dtype, shape, data, "F" if order == "F" else "C")


def _scalar(builder, record):
    """A single number of numpy, as a Python number."""
    check(len(record.args) == 2, f"{record.origin} of {len(record.args)} arguments")
    dtype, data = record.args
    check(_dtype(dtype)[0] != "O", "an object in place of a number")
    value = _array_of(builder, dtype, (), data)
    return value.item() if isinstance(value, (np.ndarray, np.generic)) else value


# torch


def _tensor(builder, record):
    """A tensor over its storage, as torch._utils._rebuild_tensor_v2 makes it: none of its numbers counts twice."""
    import torch

    check(len(record.args) >= 4, f"{record.origin} of {len(record.args)} arguments")
    storage, offset, size, stride = record.args[:4]
    check(is_kind(storage, "_load_from_bytes"), "a tensor without a storage")
    flat = builder.build(storage)
    size, stride = whole_numbers(size), whole_numbers(stride)
    check(len(size) == len(stride) and type(offset) is int and offset >= 0, "a tensor whose shape is not made of whole numbers")
    count = math.prod(size)
    if not count:
        check(max(size) < 2**31, f"a tensor of shape {size} over {len(flat)} numbers")
        return torch.empty(size, dtype=flat.dtype)
    last = offset + sum((length - 1) * step for length, step in zip(size, stride))
    check(last < len(flat) and count <= len(flat), f"a tensor of shape {size} over {len(flat)} numbers")
    builder.spend(count * flat.element_size() >> 6)
    return flat.as_strided(size, stride, offset)


def _parameter(builder, record):
    import torch

    check(record.args, f"{record.origin} without a tensor")
    return build_as(builder, record.args[0], torch.Tensor)


def _storage(builder, record):
    """The numbers inside a plainly pickled tensor: a file of torch of its own. Returns them as a flat tensor."""
    check(len(record.args) == 1, f"{record.origin} of {len(record.args)} arguments")
    content = bytes(build_as(builder, record.args[0], bytes, bytearray))
    try:
        name, count, data = _zip_storage(content) if content.startswith(b"PK") else _legacy_storage(content)
    except RefusedPickle as error:
        raise RefusedPickle(f"more than numbers in the bytes of a tensor ({error})") from error
    except (TypeError, *ARCHIVE_ERRORS) as error:
        raise RefusedPickle("something damaged in the bytes of a tensor") from error
    import torch

    dtype = STORAGES[name]
    numbers = torch.from_numpy(np.frombuffer(data, np.uint8).copy()) if len(data) else torch.empty(0, dtype=torch.uint8)
    numbers = numbers != 0 if dtype == "bool" else numbers.view(getattr(torch, dtype))
    check(len(numbers) == count, f"a storage of {count} numbers in {len(data)} bytes of a tensor")
    return numbers


def _inner_pickle(content, position):
    """Read one of the pickles inside a file of torch. Returns (the object, the position behind it)."""
    end, _ = check_opcodes(content, position)
    return read_records(io.BytesIO(content[position:end]), references=True), end


def _reference(record):
    """Read a reference to a storage: ("storage", its class, key, location, count). Returns (class name, key, count)."""
    check(is_kind(record, "a storage") and type(record.args[0]) is tuple and len(record.args[0]) in (5, 6), "no storage")
    word, kind, key, _, count, *view = record.args[0]
    known = isinstance(kind, type) and issubclass(kind, Record) and kind.name in STORAGES and word == "storage"
    check(known and type(key) is str and type(count) is int and not any(view), "a storage of an unknown form")
    return kind.name, key, count


def _legacy_storage(content):
    """Read torch's former file format: five pickles, then each storage as a count and its bytes."""
    magic, position = _inner_pickle(content, 0)
    protocol, position = _inner_pickle(content, position) if magic == _MAGIC else (None, 0)
    check(protocol == _PROTOCOL, "no file of torch")
    system, position = _inner_pickle(content, position)
    check(type(system) is dict and system.get("little_endian") is True, "numbers in big-endian order")
    record, position = _inner_pickle(content, position)
    name, key, count = _reference(record)
    keys, position = _inner_pickle(content, position)
    check(keys == [key], "several storages")
    check(int.from_bytes(content[position : position + 8], "little") == count, "a storage of another size")
    return name, count, memoryview(content)[position + 8 :]


def _zip_storage(content):
    """Read torch's present file format: an uncompressed zip archive."""
    with zipfile.ZipFile(io.BytesIO(content)) as archive:
        members = archive.infolist()
        check(all(member.compress_type == zipfile.ZIP_STORED and not member.flag_bits & 1 for member in members), "a compressed archive")
        (description,) = (member for member in members if member.filename.endswith("/data.pkl"))
        top = description.filename.removesuffix("data.pkl")
        name, key, count = _reference(_inner_pickle(bytes(_member(content, description)), 0)[0])
        orders = [bytes(_member(content, member)[:10]) for member in members if member.filename == f"{top}byteorder"]
        check(b"big" not in orders, "numbers in big-endian order")
        return name, count, _member(content, archive.getinfo(f"{top}data/{key}"))


def _member(content, member):
    """Find the bytes of an uncompressed member inside the archive, without a copy."""
    header = content[member.header_offset : member.header_offset + 30]
    check(header[:4] == b"PK\3\4", "a damaged archive")
    start = member.header_offset + 30 + int.from_bytes(header[26:28], "little") + int.from_bytes(header[28:30], "little")
    check(0 <= start and start + member.file_size <= len(content), "an archive that is cut off")
    return memoryview(content)[start : start + member.file_size]


REBUILD = dict.fromkeys(["slice", "ndarray", "dtype", "Index", "RangeIndex", "Int64Index", "StringDtype", "SingleBlockManager", "new_block",
                         "_unpickle_block", "type_for_alias", "py_buffer", "a storage", "NA", *STORAGES, *DTYPES], _no_value)  # fmt: skip
REBUILD |= {"OrderedDict": _ordered_dict, "set": _set, "frozenset": _set, "bytearray": _bytes, "bytes": _bytes, "encode": _encoded}
REBUILD |= {"_reconstruct": _reconstructed, "_frombuffer": _from_buffer, "scalar": _scalar, "_rebuild_parameter": _parameter}
REBUILD |= {"_rebuild_tensor_v2": _tensor, "_rebuild_tensor": _tensor, "_load_from_bytes": _storage}
REBUILD |= {"Size": lambda builder, record: whole_numbers(record)} | ROWS
