"""How sources of the CPU kernels are compiled, by what their names end in."""

_AVX512 = ["-mavx512f", "-mavx512bw", "-mavx512vl", "-mavx512dq", "-mfma", "-mf16c"]
FLAGS_OF = {
    "_avx2": ["-mavx2", "-mfma", "-mf16c"],
    "_avx512": _AVX512,
    "_avx512bf16": [*_AVX512, "-mavx512bf16"],
}


def flags_of(source):
    """The flags of a source's instruction set; none for the baseline."""
    return next((flags for end, flags in FLAGS_OF.items() if source.stem.endswith(end)), [])
