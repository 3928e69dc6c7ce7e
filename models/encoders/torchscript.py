"""Read the tensors of a TorchScript archive, such as OpenAI publishes CLIP in, without running its code.

torch.jit.load runs what an archive holds. Here its pickle is read into inert records; only tensors are taken out of them.
"""

import io
import math
import pickle
import zipfile

from models.tensors import refuse_compressed

DTYPES = {
    "DoubleStorage": "float64", "FloatStorage": "float32", "HalfStorage": "float16", "BFloat16Storage": "bfloat16",
    "LongStorage": "int64", "IntStorage": "int32", "ShortStorage": "int16", "CharStorage": "int8", "ByteStorage": "uint8",
    "BoolStorage": "bool",
}  # fmt: skip
# The opcodes that TorchScript's pickler writes. Others are refused: some allocate whatever they say.
OPCODES = (
    pickle.PROTO, pickle.GLOBAL, pickle.MARK, pickle.STOP, pickle.NONE, pickle.NEWTRUE, pickle.NEWFALSE, pickle.BININT, pickle.BININT1,
    pickle.BININT2, pickle.LONG1, pickle.BINFLOAT, pickle.BINUNICODE, pickle.BINPUT, pickle.LONG_BINPUT, pickle.BINGET,
    pickle.LONG_BINGET, pickle.EMPTY_TUPLE, pickle.TUPLE, pickle.TUPLE1, pickle.TUPLE2, pickle.TUPLE3, pickle.EMPTY_LIST, pickle.APPEND,
    pickle.APPENDS, pickle.EMPTY_DICT, pickle.SETITEMS, pickle.NEWOBJ, pickle.BUILD, pickle.REDUCE, pickle.BINPERSID,
)  # fmt: skip
MOST_MODULES = 100_000  # in a model; a few records that hold one another could otherwise stand for any number


class _Record:
    """Stands for an object of any class of the archive: it keeps its attributes."""

    def __init__(self, *_):
        self.attributes = {}

    def __setstate__(self, state):
        self.attributes = state if isinstance(state, dict) else {}


def is_torchscript(path):
    """Tell whether a file is a TorchScript archive."""
    if not zipfile.is_zipfile(path):
        return False
    with zipfile.ZipFile(path) as archive:
        return any(member.endswith("/constants.pkl") for member in archive.namelist())


def read_torchscript(path):
    """Read the state dict of a TorchScript archive.

    Args:
        path: the archive.

    Returns:
        dict of tensors on the CPU.

    Raises:
        UserError: compressed or overlapping tensors.
        One of models.tensors.READ_ERRORS: anything else that is wrong.
    """
    with zipfile.ZipFile(path) as archive:
        root = next(name for name in archive.namelist() if name.endswith("/constants.pkl")).removesuffix("constants.pkl")
        refuse_compressed(path, lambda name: name == f"{root}data.pkl" or name.startswith(f"{root}data/"))
        module = _Unpickler(archive, root).load()
    if not isinstance(module, _Record):
        raise ValueError("a TorchScript archive without a module")
    return _collect_tensors(module)


class _Unpickler(pickle._Unpickler):  # written in Python: its memory grows with the file, not with the sizes that the file states
    """Reads data.pkl of a TorchScript archive; classes become records."""

    dispatch = {code[0]: pickle._Unpickler.dispatch[code[0]] for code in OPCODES}

    def __init__(self, archive, root):
        super().__init__(io.BytesIO(archive.read(f"{root}data.pkl")))
        self.archive, self.root, self.storages = archive, root, {}

    def find_class(self, module, name):
        if module.startswith("__torch__"):
            return _Record
        if module == "torch" and name in DTYPES:
            return name
        if (module, name) == ("torch._utils", "_rebuild_tensor_v2"):
            return self.rebuild
        if (module, name) == ("collections", "OrderedDict"):
            return _Record
        if module == "torch.jit._pickle":  # marks lists and dicts with their types
            return lambda value, *_: value
        raise pickle.UnpicklingError(f"asks for {module}.{name}")

    def persistent_load(self, saved):
        """Read a storage: ("storage", type, key, device, length) to a flat tensor."""
        import torch

        _, kind, key, _, _ = saved
        if key not in self.storages:
            data = bytearray(self.archive.read(f"{self.root}data/{key}"))
            dtype = getattr(torch, DTYPES[kind])
            self.storages[key] = torch.frombuffer(data, dtype=dtype) if data else torch.empty(0, dtype=dtype)
        return self.storages[key]

    def rebuild(self, storage, offset, size, stride, *_):
        """Make a tensor of a storage, which must hold all of it."""
        steps = [*size, *stride, offset]
        if len(size) != len(stride) or not all(type(step) is int and 0 <= step < 2**48 for step in steps):
            raise ValueError(f"a tensor of size {size} and stride {stride}")
        last = offset + sum((length - 1) * step for length, step in zip(size, stride))
        count = math.prod(size)
        if count and (last >= len(storage) or count > len(storage)):
            raise ValueError(f"a tensor of size {size} in {len(storage)} numbers")
        return storage.as_strided(size, stride, offset)


def _collect_tensors(module):
    """Collect the tensors of nested records under their dotted names."""
    import torch

    state, waiting, seen = {}, [("", module)], 0
    while waiting:
        prefix, record = waiting.pop()
        seen += 1
        if seen > MOST_MODULES or len(prefix) > 1000:
            raise ValueError(f"more than {MOST_MODULES:,} modules")
        for name, value in record.attributes.items():
            if isinstance(value, torch.Tensor) and name != "attn_mask":  # no weight: the model makes it
                state[f"{prefix}{name}"] = value
            elif isinstance(value, _Record):
                waiting.append((f"{prefix}{name}.", value))
    return state
