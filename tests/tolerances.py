"""How far two computations of one thing may be apart, for ``assert_allclose`` and ``assert_close``.

float32 rounds by 2^-24 = 6e-8 of a value. What differs is how many roundings there are between the two, and that sums
of opposite signs leave an absolute part. float16 and bfloat16 round by 2^-11 and 2^-8, which the tests of precision/
count themselves; kernels have their own table by type (trt_plugins/test_kernels.py).
"""

SAME_ARITHMETIC = {"rtol": 1e-6, "atol": 1e-6}
"""float32, PyTorch on both sides, the same operations in another grouping: some ten roundings."""
ONE_SRU = {"rtol": 1e-5, "atol": 1e-6}
"""float32, a few layers in another runtime, which adds up a group or a kernel in another order: a hundred roundings."""
SMALL_NETWORK = {"rtol": 1e-5, "atol": 1e-5}
"""The same for outputs that are sums over features of size 1 to 10: the absolute part grows with these."""
NETWORK = {"rtol": 1e-4, "atol": 1e-5}
"""float32, layer after layer in another runtime: each passes on what the ones before it rounded."""
HALF_STEP = {"rtol": 2**-9, "atol": 1e-2}
"""float16, data of size 1 to 10 that two computations round to neighbours: a step of 2^-10 each, before a sum."""
