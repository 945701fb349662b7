"""The wrong edits of `mutate.py` in what families bring: (file, old, new, tests)."""

GOLDEN = "tests/families/test_golden.py"

ATTENTION = (
    # norms of q and k
    (
        "abi_py/model/layers/attention.py",
        "            self.qk_norm[1].in_place(k, a.raw_k, a.r_k)\n",
        "            self.qk_norm[0].in_place(k, a.raw_k, a.r_k)\n",
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
    ("kernels/attention.py", "- (window - 1)", "- window", GOLDEN),
    (
        "kernels/cached_attention.py",
        "        start = max(end - window, 0)",
        "        start = max(end - window - 1, 0)",
        "tests/kernels/test_cached_attention.py",
    ),
)

EXPERTS = (
    # the load-balancing loss is told, and has no gradient
    (
        "abi_py/model/layers/experts.py",
        "penalties.weight * self.balance * b)",
        "0 * b)",
        GOLDEN,
    ),
    # one of the two rules of renormalisation for both families
    (
        "abi_py/model/layers/experts.py",
        "= routing.experts, chosen, renormalised",
        "= routing.experts, chosen, True",
        GOLDEN,
    ),
    # the experts of the blocks before do not reach the penalty
    (
        "abi_py/model/layers/experts.py",
        "np.sum([each.load for each in self.layers.values()], axis=0)",
        "routed.load * len(self.layers)",
        GOLDEN,
    ),
)

FOLDERS = (
    # GPT-2's matrices are stored (in, out)
    (
        "abi_py/formats/forms.py",
        "raw.swapaxes(-1, -2) if form.transposed else raw",
        "raw",
        GOLDEN,
    ),
    # positions go on from sample to sample
    (
        "abi_py/model/stack.py",
        "np.arange(shape[1], dtype=np.int32) - starts",
        "np.arange(shape[1], dtype=np.int32) - 0 * starts",
        GOLDEN,
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

FAMILIES = (*ATTENTION, *EXPERTS, *FOLDERS, *PRETRAINING)
