"""The record of what has run on a GPU: drawn from the results files, and true of the sources."""

import json
import shutil
from pathlib import Path

import pytest

from dpo_kernels import verification
from dpo_kernels.verification import KERNELS, digest, sources

ROOT = Path(__file__).parent.parent
RESULTS = ROOT / "benchmarks" / "results"
HASHES = {"cuda/device.h": "d", "cuda/pair_loss.cu": "p"}


def results(
    folder, date, kernel="cuda/pair_loss", passed=5, failed=0, hashes=HASHES, complete=True
):
    result = {"passed": passed, "failed": failed, "sources": hashes}
    run = {
        "complete": complete,
        "device": "GPU",
        "date": date,
        "commit": "c" * 40,
        "kernels": {kernel: result},
    }
    (folder / f"gpu-{date}.json").write_text(json.dumps(run))


def test_every_kernel_is_listed():
    cuda = {f"cuda/{p.stem}" for p in (ROOT / "csrc/cuda").glob("*.cu")}
    folder = Path(verification.__file__).parent / "backends/triton"
    triton = {f"triton/{p.stem}" for p in folder.glob("*.py") if "@triton.jit" in p.read_text()}
    assert set(KERNELS) == cuda | triton


def test_record_is_drawn_from_the_results_files():
    drawn = verification.draw_record(RESULTS)
    assert verification.read_record() == drawn, "run tools/gpu_check.py --draw-record"


def test_state_of_every_kernel():
    state = verification.state()
    for kernel in state:
        print(kernel)
    assert [kernel.kernel for kernel in state] == list(KERNELS)


@pytest.mark.parametrize("kernel", [k for k in KERNELS if sources(k)])
def test_a_changed_source_is_not_verified(kernel, tmp_path, monkeypatch):
    monkeypatch.setattr(verification, "RECORD", tmp_path / "record.json")

    def of_kernel():
        return next(k for k in verification.state() if k.kernel == kernel)

    verification.RECORD.write_text("{}")
    assert of_kernel().why == "has not passed all its tests on a GPU"
    results(tmp_path, "2026-01-01", kernel, hashes=sources(kernel))
    verification.RECORD.write_text(json.dumps(verification.draw_record(tmp_path)))
    assert of_kernel().verified and "GPU, 2026-01-01, commit cccccccccccc" in of_kernel().why
    edited, *_ = sources(kernel)
    results(tmp_path, "2026-01-01", kernel, hashes=sources(kernel) | {edited: "other"})
    verification.RECORD.write_text(json.dumps(verification.draw_record(tmp_path)))
    assert not of_kernel().verified and of_kernel().why.startswith(f"{edited} changed since GPU")


def test_editing_a_triton_source_shows(tmp_path, monkeypatch):
    before = sources("triton/pair_loss")
    shutil.copytree(verification.HERE / "backends" / "triton", tmp_path / "backends" / "triton")
    monkeypatch.setattr(verification, "HERE", tmp_path)
    assert sources("triton/pair_loss") == before
    with (tmp_path / "backends/triton/pair_loss.py").open("a") as file:
        file.write("\n")
    assert digest(sources("triton/pair_loss")) != digest(before)


def test_what_a_triton_kernel_imports_counts():
    assert set(sources("triton/token_kl")) == {
        f"triton/{name}.py" for name in ("token_kl", "token_logps", "launch")
    }


def test_the_newest_pass_counts(tmp_path):
    results(tmp_path, "2026-01-02", hashes={"a": "2"})
    results(tmp_path, "2026-01-01", hashes={"a": "1"})
    results(tmp_path, "2026-01-03", failed=1, hashes={"a": "3"})
    results(tmp_path, "2026-01-04", passed=0, hashes={"a": "4"})
    results(tmp_path, "2026-01-05", complete=False, hashes={"a": "5"})
    record = verification.draw_record(tmp_path)
    assert record["cuda/pair_loss"]["sources"] == {"a": "2"}
    assert record["cuda/pair_loss"]["results"] == "gpu-2026-01-02.json"


def test_the_build_lists_its_sources():
    import hashlib

    from dpo_kernels import _C

    if not _C.cuda_source_hashes:
        pytest.skip("this build has no CUDA kernels (no nvcc)")
    for file, sha in (h for k in KERNELS if k.startswith("cuda/") for h in sources(k).items()):
        now = hashlib.sha256((ROOT / "csrc" / file).read_bytes()).hexdigest()
        assert sha == now, f"csrc/{file} was edited after the package was built: build it again"
