"""The wrong edits of `mutate.py` in what families bring: (file, old, new, tests)."""

GOLDEN = "tests/families/test_golden.py"

ATTENTION = (
    # norms of q and k
    (
        "abi_py/model/layers/attention.py",
        "            self.qk_norm[1].forward(k, a.r_k, a.raw_k)\n",
        "            self.qk_norm[0].forward(k, a.r_k, a.raw_k)\n",
        GOLDEN,
    ),
    (
        "abi_py/model/layers/attention.py",
        "            self.qk_norm[1].backward(s.dk, s.dk, a.raw_k, a.r_k, False)\n",
        "",
        GOLDEN,
    ),
    (
        "abi_py/model/layers/attention.py",
        "            self.qk_norm[1].forward(s.k, s.r_k, s.k)\n",
        "",
        GOLDEN,
    ),
    # windows
    ("kernels/attention.py", "- (window - 1)", "- window", "tests/kernels/test_attention.py"),
    (
        "kernels/cached_attention.py",
        "        start = max(end - window, 0)",
        "        start = max(end - window - 1, 0)",
        "tests/kernels/test_cached_attention.py",
    ),
)

PRETRAINING = (
    # the end of wsd
    (
        "abi_py/training/schedule.py",
        "max(0, since - (decay - length)) / length)",
        "max(0, since + 1 - (decay - length)) / length)",
        "tests/training/test_schedule.py",
    ),
)

FAMILIES = (*ATTENTION, *PRETRAINING)
