"""Where the fields of a struct lie: as the kernels' compiler has them, and as NumPy has them."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

import emulation
import numpy as np


def compiled_layout(folder: Path, header: str, structs: Mapping[str, np.dtype]) -> list[int]:
    """Offsets of all fields and then the sizes, for the emulated machine; a probe is built in `folder`.

    structs: by their names in `header`, of kernels/, dtypes whose fields are named as theirs.
    """
    places = [f"offsetof({name}, {field})" for name, dtype in structs.items() for field in dtype.names or ()]
    places += [f"sizeof({name})" for name in structs]
    stores = "".join(f"store_global<int>(p.out + {i}, {place});\n" for i, place in enumerate(places))
    probe = folder / "probe.cu"
    probe.write_text(
        f'#include <cstddef>\n#include "device.cuh"\n#include "{header}"\n'
        "struct Probe { int* out; long long unused[2]; };\n"
        f'extern "C" void probe(Probe p) {{\nif (threadIdx.x != 0) return;\n{stores}}}\n',
        encoding="utf-8",
    )
    out = np.zeros(len(places), np.int32)
    params = np.array([out.ctypes.data, 0, 0], np.uint64).tobytes()
    library = emulation.build(probe, {"DTYPE_BF16": 1})
    library.launch("probe", params, grid=(1, 1, 1), threads=32, shared_bytes=16)
    return [int(place) for place in out]


def numpy_layout(structs: Mapping[str, np.dtype]) -> list[int]:
    """The same numbers of the dtypes themselves."""
    offsets = [field[1] for dtype in structs.values() for field in (dtype.fields or {}).values()]
    return [*offsets, *(dtype.itemsize for dtype in structs.values())]
