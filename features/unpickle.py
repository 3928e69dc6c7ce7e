"""Read a pickle without running anything in it.

Feature files come from strangers, and a pickle may name any function for its reader to call. This reader admits what a feature file
is made of (tensors, arrays, plain containers, pandas rows) and refuses the rest by name. A plainly pickled tensor carries its
bytes as another pickle inside; that one is read by torch with weights_only.
"""

import importlib
import io
import pickle

# Plain names: constructors and rebuilders that only make data. numpy moved its core package in version 2; files name either.
_ADMITTED = {
    "collections": {"OrderedDict"},
    "builtins": {"slice", "set", "frozenset", "complex", "bytearray", "range"},
    "_codecs": {"encode"},
    "numpy": {"ndarray", "dtype"},
    "numpy.core.multiarray": {"_reconstruct", "scalar"},
    "numpy._core.multiarray": {"_reconstruct", "scalar"},
    "numpy.core.numeric": {"_frombuffer"},
    "numpy._core.numeric": {"_frombuffer"},
    "pandas": {"Series", "DataFrame", "Index", "RangeIndex", "StringDtype"},
    "pandas.arrays": {"ArrowStringArray"},
    "pyarrow.lib": {"type_for_alias", "py_buffer", "chunked_array"},
    "pandas.core.series": {"Series"},
    "pandas.core.frame": {"DataFrame"},
    "pandas.core.indexes.base": {"Index", "_new_Index"},
    "pandas.core.indexes.range": {"RangeIndex"},
    "pandas.core.internals.managers": {"SingleBlockManager", "BlockManager"},
    "pandas.core.internals.blocks": {"new_block"},
    "pandas._libs.internals": {"_unpickle_block"},
    "pandas._libs.arrays": {"__pyx_unpickle_NDArrayBacked"},
    "pandas.core.arrays.string_": {"StringArray", "StringDtype"},
    "pandas.core.dtypes.dtypes": {"PandasExtensionDtype"},
    "torch": {"Size", "FloatStorage", "HalfStorage", "DoubleStorage", "BFloat16Storage", "LongStorage", "IntStorage", "Tensor"}
    | {"float32", "float16", "float64", "bfloat16", "int64", "int32"},
    "torch.storage": {"UntypedStorage", "TypedStorage"},
}
_MOVED = {"numpy.core": "numpy._core"}


class RefusedPickle(ValueError):
    """The pickle asks for something a feature file has no use for; the message names it."""


def _load_storage(content):
    """Read the storage inside a plainly pickled tensor: a torch file of its own, here read with weights_only."""
    import torch

    try:
        return torch.load(io.BytesIO(content), map_location="cpu", weights_only=True)
    except pickle.UnpicklingError as error:
        raise RefusedPickle("more than numbers in the bytes of a tensor") from error


def _rebuild_tensor(storage, storage_offset, size, stride, *rest):
    """Rebuild a tensor over its storage; a shape that reaches past the storage would make torch grow it, and is refused."""
    import torch

    if not isinstance(storage, torch.storage.TypedStorage):
        raise RefusedPickle("a tensor without a storage")
    numbers = (storage_offset, *size, *stride)
    if not all(isinstance(number, int) and number >= 0 for number in numbers) or len(size) != len(stride):
        raise RefusedPickle("a tensor whose shape is not made of whole numbers")
    last = storage_offset + sum((n - 1) * step for n, step in zip(size, stride)) if all(size) else -1
    available = storage._untyped_storage.nbytes() // storage.dtype.itemsize
    if last >= available:
        raise RefusedPickle(f"a tensor of shape {tuple(size)} over {available} numbers")
    return torch._utils._rebuild_tensor_v2(storage, storage_offset, size, stride, False, None)


def _restore_arrow(state):
    """Rebuild an arrow array (pandas 3 keeps strings so) and check every offset in it against its buffers."""
    from pyarrow.lib import _restore_array

    array = _restore_array(state)
    array.validate(full=True)
    return array


class _FeatureUnpickler(pickle.Unpickler):
    def find_class(self, module, name):
        if (module, name) == ("torch.storage", "_load_from_bytes"):
            return _load_storage
        if module == "torch._utils" and name in ("_rebuild_tensor_v2", "_rebuild_tensor"):
            return _rebuild_tensor
        if (module, name) == ("pyarrow.lib", "_restore_array"):
            return _restore_arrow
        if name not in _ADMITTED.get(module, ()):
            raise RefusedPickle(f"{module}.{name}")
        for old, new in _MOVED.items():
            if module.startswith(old + "."):
                module = new + module[len(old) :]
        return getattr(importlib.import_module(module), name)


def read_pickle(file):
    """Read one pickle from an open binary file → the object.

    Raises RefusedPickle naming what the pickle asked for and does not get; pickle.UnpicklingError, EOFError and other exceptions of a
    damaged pickle pass through.
    """
    return _FeatureUnpickler(file).load()
