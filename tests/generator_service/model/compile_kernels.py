"""Compiles every variant of the kernels for an H100, which needs no GPU; prints them. Run by test_paged_kernels."""

import itertools

import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from generator_service.decoding import top_kernels
from generator_service.decoding.picks import BANNED
from generator_service.model.paged import kernels, reads
from generator_service.model.paged.arena import PAGE_SLOTS

H100 = GPUTarget("cuda", 90, 32)
STATES = ("query", "keys", "values", "out")
POINTERS = {
    "tiles": "*i32",
    "pages": "*i32",
    "words": "*i32",
    "positions": "*i64",
    "slot_positions": "*i32",
    "bias": "*fp32",
}


def compiled(kernel, types, constants):
    signature = {n: types.get(n, "i32") for n in kernel.arg_names} | dict.fromkeys(constants, "constexpr")
    return triton.compile(ASTSource(kernel, signature, constexprs=constants), target=H100)


def attention(dtype, column, has_bias):
    constants = {
        "COLUMN": column,
        "TILE_COLUMNS": reads.TILE_COLUMNS,
        "PAGE_SLOTS": PAGE_SLOTS,
        "ROWS": reads.TILE_ROWS,
        "SLOTS": 32,
        "HEAD_DIM": 64,
        "HAS_WORDS": column == reads.SELF,
        "HAS_BIAS": has_bias,
    }
    types = POINTERS | dict.fromkeys(STATES, f"*{dtype}") | {"scale": "fp32"}
    return compiled(kernels._attend_kernel, types, constants)


def top_tokens(dtype):
    types = {"logits": f"*{dtype}"} | dict.fromkeys(("sums", "lse", "priors", "values"), "*fp32")
    types |= {"picks": "*i32", "keys": "*i64", "ids": "*i64"}
    yield "sums", compiled(top_kernels._sum_kernel, types, {"TILE": top_kernels.SUM_TILE})
    yield "sum of sums", compiled(top_kernels._sum_up_kernel, types, {"TILES": 16})
    for mixes in (False, True):
        constants = {"BANNED": BANNED, "KEEP": 8, "TILE": top_kernels.TOP_TILE, "MIXES": mixes}
        yield "mixture" if mixes else "tokens", compiled(top_kernels._top_kernel, types, constants)
    yield "merge", compiled(top_kernels._merge_kernel, types, {"KEEP": 8, "KEYS": 512})


for dtype, (column, has_bias) in itertools.product(
    ("bf16", "fp16", "fp32"), ((reads.CROSS, False), (reads.SELF, False), (reads.SELF, True))
):
    ptx = attention(dtype, column, has_bias).asm["ptx"]
    assert dtype == "fp32" or "mma" in ptx, "half precision goes through the tensor cores"
    print("attention", dtype, column, has_bias)

for dtype in ("bf16", "fp16", "fp32"):
    for name, _ in top_tokens(dtype):
        print("best tokens", dtype, name)
