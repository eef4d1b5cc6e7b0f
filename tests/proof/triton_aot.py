"""Compile every Triton kernel ahead of time at its real launch configuration; prints JSON.

Run as a program without TRITON_INTERPRET (the test suite sets it for its own process, where
kernels are interpreted). No GPU is needed. What it prints, per kernel and target: registers, shared
memory and spills (NVIDIA, from cuobjdump), what the model of its speed finds (`speed_model.py`), or
that it compiled (AMD).
"""

from __future__ import annotations

import importlib
import json
import os
import re
import subprocess
import sys
import tempfile

import speed_model
import torch
import triton
from triton.backends import backends
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

# The package's attributes of these names are the functions; the modules are asked for by name.
launch, pair_loss, scaled_copy, sequence_sum, token_kl, token_logps = (
    importlib.import_module(f"dpo_kernels.backends.triton.{name}")
    for name in ("launch", "pair_loss", "scaled_copy", "sequence_sum", "token_kl", "token_logps")
)
DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}

VERSION = tuple(int(n) for n in triton.__version__.split(".")[:2])
TARGETS = {
    "sm_80": GPUTarget("cuda", 80, 32),
    "sm_90": GPUTarget("cuda", 90, 32),
    "sm_100": GPUTarget("cuda", 100, 32),
    "gfx942": GPUTarget("hip", "gfx942", 64),
}


def _gradients(dtype: str) -> tuple[str, ...]:
    """Dtypes of the gradient: the logits', and that of a linear head's products."""
    return (dtype, "bf16") if dtype == "fp32" else (dtype,)


def kernels():
    """name -> (function, {argument: type}, {constexpr: value}, warps)."""
    row = {
        "stride_r": "i64",
        "stride_t": "i64",
        "T": "i32",
        "V": "i32",
        "ignore_index": "i32",
        "shift": "i32",
        "inner": "fp32",
        "outer": "fp32",
        "k": "fp32",
        "unit_hi": "fp32",
        "unit_lo": "fp32",
    }
    for dtype in ("fp32", "bf16", "fp16"):
        like = torch.empty(0, dtype=DTYPES[dtype])
        vector = launch.vector(like)
        types = {
            "logits": f"*{dtype}",
            "targets": "*i64",
            "logps": "*fp32",
            "lse": "*fp64",
            "stats": "*fp32",
            **row,
            "rows": "i32",
        }
        for softcap, stats in ((False, False), (True, False), (False, True), (True, True)):
            forward = token_logps.FORWARD_STATS if stats else token_logps.FORWARD
            forward = launch.lanes(like, forward)
            forward_warps = forward.pop("num_warps")
            constants = {"SOFTCAP": softcap, "STATS": stats, "VEC": vector, **forward}
            name = f"forward_{dtype}{'_softcap' * softcap}{'_stats' * stats}"
            yield name, token_logps._forward, types, constants, forward_warps
        types = {
            "grad": "*fp32",
            "logits": f"*{dtype}",
            "targets": "*i64",
            "lse": "*fp64",
            **row,
            "out_stride_r": "i64",
            "out_stride_t": "i64",
            "out_shift": "i32",
            "rows": "i32",
            "tiles": "i32",
            "inv_hi": "fp32",
            "inv_lo": "fp32",
            "chain": "fp32",
        }
        backward = dict(token_logps.BACKWARD)
        backward_warps = backward.pop("num_warps")
        backward["VEC"] = vector
        for softcap in (False, True):
            constants = {"SOFTCAP": softcap, "SAME_PHASE": True, **backward}
            for out in _gradients(dtype):
                name = f"backward_{dtype}{f'_{out}' * (out != dtype)}{'_softcap' * softcap}"
                outs = {**types, "out": f"*{out}"}
                yield name, token_logps._backward, outs, constants, backward_warps
    backward = dict(token_kl.BACKWARD)
    backward_warps = backward.pop("num_warps")
    row |= {"ref_shift": "i32", "ref_stride_r": "i64", "ref_stride_t": "i64"}
    for dtype, ref_dtype in (
        ("fp32", "fp32"),
        ("bf16", "bf16"),
        ("fp16", "fp16"),
        ("bf16", "fp32"),
    ):
        forward = launch.lanes(torch.empty(0, dtype=DTYPES[dtype]), token_kl.FORWARD)
        forward_warps = forward.pop("num_warps")
        pointers = {
            "logits": f"*{dtype}",
            "ref_logits": f"*{ref_dtype}",
            "targets": "*i64",
            "lse": "*fp64",
            "ref_lse": "*fp64",
        }
        for softcap in (False, True):
            name = f"kl_{{}}_{dtype}_{ref_dtype}{'_softcap' * softcap}"
            types = {**pointers, "logps": "*fp32", "ref_logps": "*fp32", "kl": "*fp32", **row}
            constants = {"SOFTCAP": softcap, "SAME_PHASE": True, **forward}
            yield name.format("forward"), token_kl._forward, types, constants, forward_warps
            types = {
                **pointers,
                "grad_logps": "*fp32",
                "grad_kl": "*fp32",
                **row,
                "out_shift": "i32",
                "out_stride_r": "i64",
                "out_stride_t": "i64",
                "inv_hi": "fp32",
                "inv_lo": "fp32",
                "chain": "fp32",
            }
            constants = {"SOFTCAP": softcap, "SAME_PHASE": True, **backward}
            for out in _gradients(dtype):
                into = f"backward_{out}" if out != dtype else "backward"
                outs = {**types, "out": f"*{out}"}
                yield name.format(into), token_kl._backward, outs, constants, backward_warps
    for tail in (False, True):
        for back in (False, True):
            types = {
                "targets": "*i64",
                "cu_seqlens": "*i64",
                "T": "i32",
                "N": "i32",
                "S": "i32",
                "ignore_index": "i32",
                "tail_weight": "fp32",
            }
            pointers = (
                {"grad": "*fp64", "d_values": "*fp32"}
                if back
                else {"values": "*fp32", "sums": "*fp64", "counts": "*i64"}
            )
            absent = {"values": None, "sums": None, "counts": None, "grad": None, "d_values": None}
            constants = {
                "PACKED": True,
                "TAIL": tail,
                "BACKWARD": back,
                "BLOCK": sequence_sum.BLOCK,
            }
            constants |= {n: None for n in absent if n not in pointers}
            name = f"sequence_sum{'_tail' * tail}{'_backward' * back}"
            yield name, sequence_sum._kernel, {**types, **pointers}, constants, 4
    types = {n: "*fp64" for n in ("u", "v", "beta", "offset", "numbers", "loss", "slopes")}
    for kind in range(7):
        constants = {
            "PHI0": kind,
            "PHI1": 0,
            "PHI2": -1,
            "HAS_OFFSET": True,
            "BLOCK": pair_loss.BLOCK,
        }
        yield f"pair_loss_phi{kind}", pair_loss._kernel, {**types, "B": "i32"}, constants, 4
    copy = dict(scaled_copy.CONFIG)
    warps = copy.pop("num_warps")
    for out in ("bf16", "fp16"):
        types = {"x": "*fp32", "g": "*fp32", "out": f"*{out}", "N": "i64"}
        yield f"scaled_copy_{out}", scaled_copy._kernel, types, copy, warps


def source_of(fn, types: dict, constants: dict, aligned: list[str]) -> ASTSource:
    """What `triton.compile` takes, in the words of this release."""
    names = list(fn.arg_names)
    if VERSION < (3, 3):  # constants are no arguments, alignment is an object of the backend
        from triton.backends.compiler import AttrsDescriptor

        places = {"tt.divisibility": [names.index(a) for a in aligned], "tt.equal_to": []}
        attrs = AttrsDescriptor.from_dict({"arg_properties": places, "cls": "AttrsDescriptor"})
        signature = {a: types[a] for a in names if a not in constants}
        return ASTSource(fn, signature, constants=constants, attrs=attrs)
    attrs = {(names.index(a),): [["tt.divisibility", 16]] for a in aligned}
    signature = {a: "constexpr" if a in constants else types[a] for a in names}
    return ASTSource(fn, signature, constexprs=constants, attrs=attrs)


def cuobjdump(cubin: bytes, option: str) -> str:
    program = os.path.join(os.path.dirname(triton.__file__), "backends/nvidia/bin/cuobjdump")
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(cubin)
        file.flush()
        return subprocess.run(
            [program, option, file.name], capture_output=True, text=True, check=True
        ).stdout


def resources(compiled) -> dict:
    """Registers a thread and bytes of local memory (spills) that ptxas settled on."""
    text = cuobjdump(compiled.asm["cubin"], "-res-usage")
    usage = dict(re.findall(r"(REG|STACK|LOCAL):(\d+)", text))
    wide = len(re.findall(r"ld\.global[\w.:]*\.v4\.b32", compiled.asm["ptx"]))
    return {
        "registers": int(usage["REG"]),
        "shared": compiled.metadata.shared,
        "spills": int(usage["LOCAL"]) + int(usage["STACK"]),
        "wide_loads": wide,
    }


def speed(name: str, compiled, warps: int, found: dict, target: str) -> dict:
    """What the model says of the kernel, and has to complain of."""
    kernel = speed_model.triton_kernel(
        name,
        cuobjdump(compiled.asm["cubin"], "-sass"),
        warps,
        found["registers"],
        found["shared"],
    )
    if kernel is None:
        return {}
    said = speed_model.complaints(kernel, target == "sm_90")
    return {"complaints": said, "speed": {} if said else speed_model.record([kernel])}


def without_amd_linker() -> None:
    """Triton 3.2 to 3.4 link AMD's code with ROCm's lld; where there is none, assembly is all."""
    amd = backends["amd"].compiler
    try:
        getattr(amd, "path_to_rocm_lld", lambda: "built in")()
    except Exception:
        amd.make_hsaco = staticmethod(lambda assembly, metadata, options: b"")
        amd.hash = lambda self: f"not linked, {self.target}"  # asks for lld's version


def main(targets: list[str]) -> None:
    without_amd_linker()
    for name, fn, types, constants, warps in kernels():
        # Pointers and row strides as torch gives them: 16-byte aligned, not multiples of 16.
        aligned = [a for a, t in types.items() if t.startswith("*") and a not in constants]
        source = source_of(fn, types, constants, aligned)
        for target in targets:
            compiled = triton.compile(source, target=TARGETS[target], options={"num_warps": warps})
            result: dict = {"compiled": True}
            if "cubin" in compiled.asm:
                result = resources(compiled)
                result |= speed(name, compiled, warps, result, target)
            print(json.dumps({"kernel": name, "target": target, **result}), flush=True)


if __name__ == "__main__":
    main(sys.argv[1:] or list(TARGETS))
