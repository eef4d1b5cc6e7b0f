"""The trainers that `verify` knows: our loop, TRL as it is and patched, and a user's function.

loop                our own training loop
trainer             transformers' Trainer with `FusedDPOMixin`
trl                 TRL's DPOTrainer as it is installed
trl-patched         the same under `patch_trl()`
package.module:name   a function or class of the user's (`docs/verify.md`)
"""

from __future__ import annotations

import contextlib
import hashlib
import importlib
import io
import json
import os
import sys
from collections.abc import Iterator, Mapping
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from .contract import Case, NotApplicable, Row, Target, Trained
from .processes import train_on_two


def versions_of(*packages: str) -> str:
    found = []
    for package in packages:
        with contextlib.suppress(PackageNotFoundError):
            found.append(f"{package} {version(package)}")
    return ", ".join(found)


def full(x: Tensor) -> Tensor:
    """A tensor of its own, gathered where it is sharded."""
    x = x.full_tensor() if hasattr(x, "full_tensor") else x
    return x.detach().clone()


def load_weights(folder: str | Path) -> dict[str, Tensor]:
    import transformers

    model = transformers.AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    return {name: full(x) for name, x in model.state_dict().items()}


def shard(model: Any, sharding: str) -> Any:
    """The model cut up by FSDP2 over the processes of the group."""
    import torch.distributed as dist
    from torch.distributed.fsdp import fully_shard

    mesh = dist.init_device_mesh("cpu", (dist.get_world_size(),), mesh_dim_names=("shard",))
    for layer in model.model.layers:
        fully_shard(layer, mesh=mesh)
    if sharding == "fsdp2, head apart":
        fully_shard(model.lm_head, mesh=mesh)
    return fully_shard(model, mesh=mesh)


class Loop:
    """`dpo-kernels train`."""

    name = "loop"

    def __init__(self) -> None:
        self.versions = versions_of("dpo-kernels", "torch", "transformers")

    def train(self, case: Case) -> Trained:
        return train_on_two(self, case) if case.processes > 1 else self.train_here(case)

    def train_here(self, case: Case) -> Trained:
        from ..train.console import Console
        from ..train.job import run_job

        folder = Path(case.folder)
        folder.parent.mkdir(parents=True, exist_ok=True)
        data = {"dataset_name": case.rows, "eval_file": case.eval_rows or case.rows}
        options: dict[str, Any] = {
            "model_name_or_path": case.model,
            "output_dir": case.folder,
            "lr_scheduler_type": "constant",
            "max_grad_norm": 0.0,
            "per_device_eval_batch_size": 1,
            "sample_max_new_tokens": 0,
            "logging_steps": 1,
            **case.options,
        }
        # A step has as many pairs as these say, on any number of processes.
        options["per_device_train_batch_size"] *= case.processes
        if options.pop("disable_dropout", True) is False:
            raise NotApplicable("the loop trains without dropout")
        options.pop("precompute_ref_log_probs", None)  # it always does
        if case.layout != "padded":
            options["layout"] = case.layout
        if case.resume_from is not None:
            options["resume_from_checkpoint"] = case.resume_from
        for name, rows in data.items():
            path = folder.parent / f"{folder.name}-{name}.jsonl"
            own = path.with_suffix(f".{os.getpid()}")  # of a process; both write the same
            own.write_text("".join(json.dumps(dict(row)) + "\n" for row in rows))
            own.replace(path)
            options[name] = str(path)
        said = io.StringIO()
        with contextlib.redirect_stdout(said), contextlib.redirect_stderr(said):
            run_job(options, Console())
        lines = [json.loads(x) for x in (folder / "metrics.jsonl").read_text().splitlines()]
        last: dict[str, float] = {}
        for line in lines:
            last |= {k: v for k, v in line.items() if k.startswith("eval_")}
        found = (folder / "checkpoints").glob("step-*")
        checkpoints = {int(p.name.removeprefix("step-")): str(p) for p in found}
        return Trained(load_weights(folder / "model"), last, checkpoints)

    def gradients(self, case: Case, sharding: str) -> dict[str, Tensor]:
        """Through the seam that the loop and the integrations share."""
        import torch.distributed as dist
        import transformers

        from ..integrations import plain

        model = transformers.AutoModelForCausalLM.from_pretrained(case.model, dtype=torch.float32)
        tokens = transformers.AutoTokenizer.from_pretrained(case.model)
        from . import plain_trainer

        half = len(case.rows) // 2
        rows = case.rows[dist.get_rank() * half :][:half]
        examples: list[Mapping[str, Any]] = []
        for row in rows:
            (chosen, n), (rejected, _) = plain_trainer.encode(row, tokens, None)
            examples.append(
                {"prompt_ids": chosen[:n], "chosen_ids": chosen[n:], "rejected_ids": rejected[n:]}
            )
        batch = plain.PreferenceCollator(tokens.pad_token_id)(examples)
        plain.attach(model)
        reference = plain.reference_logps(model, batch)
        out = plain.dpo_step(
            shard(model, sharding), batch, ref_logps=reference, beta=case.options["beta"]
        )
        assert out.loss is not None
        out.loss.backward()
        return {name: full(p.grad) for name, p in model.named_parameters() if p.grad is not None}


class HfTrainer:
    """transformers' Trainer, with the package's loss (`FusedDPOTrainer`)."""

    name = "trainer"

    def __init__(self) -> None:
        try:
            importlib.import_module("accelerate")
        except ImportError:
            raise NotApplicable("pip install accelerate") from None
        self.versions = versions_of("transformers", "accelerate", "torch")

    def train(self, case: Case) -> Trained:
        return train_on_two(self, case) if case.processes > 1 else self.train_here(case)

    def train_here(self, case: Case) -> Trained:
        with contextlib.redirect_stdout(io.StringIO()):
            trainer = self._trainer(case)
            trainer.train(resume_from_checkpoint=case.resume_from)
            evaluation = trainer.evaluate() if case.eval_rows else {}
        return Trained(_weights_of(trainer), evaluation, _checkpoints(case))

    def _trainer(self, case: Case) -> Any:
        import transformers

        from ..integrations.transformers import FusedDPOTrainer, PreferenceCollator

        tokens = transformers.AutoTokenizer.from_pretrained(case.model)
        options = {**_TRAINER, **case.options, **_of_hf(case)}
        loss: dict[str, Any] = {
            n: options.pop(n) for n in ("beta", "loss_type", "ld_alpha") if n in options
        }
        limit = options.pop("max_length", None)
        fused: dict[str, Any] = {"layout": case.layout}
        if options.pop("precompute_ref_log_probs", False):  # what is there in its place
            fused["reference_cache"] = str(Path(case.model).parent / "reference")
        options.pop("disable_dropout", None)  # it trains with what the model has
        policy, reference = (
            transformers.AutoModelForCausalLM.from_pretrained(case.model, dtype=torch.float32)
            for _ in range(2)
        )
        return FusedDPOTrainer(
            model=policy,
            ref_model=reference,
            args=transformers.TrainingArguments(case.folder, **options),
            train_dataset=_examples(case.rows, tokens),
            eval_dataset=_examples(case.eval_rows, tokens) if case.eval_rows else None,
            data_collator=PreferenceCollator(tokens.pad_token_id, limit),
            loss_options=loss,
            fused=fused,
        )

    def gradients(self, case: Case, sharding: str) -> dict[str, Tensor]:
        return _sharded(self._trainer(_share_of(case)), sharding)


_TRAINER = {
    "lr_scheduler_type": "constant",
    "max_grad_norm": 0.0,
    "per_device_eval_batch_size": 1,
    "logging_steps": 1,
    "report_to": [],
    "use_cpu": True,
    "bf16": False,
    "disable_tqdm": True,
}


def _of_hf(case: Case) -> dict[str, Any]:
    return {
        "save_strategy": "steps" if "save_steps" in case.options else "no",
        "ddp_backend": "gloo" if case.processes > 1 else None,
    }


def _checkpoints(case: Case) -> dict[int, str]:
    found = Path(case.folder).glob("checkpoint-*")
    return {int(p.name.removeprefix("checkpoint-")): str(p) for p in found}


def _weights_of(trainer: Any) -> dict[str, Tensor]:
    model = trainer.accelerator.unwrap_model(trainer.model)
    return {name: full(x) for name, x in model.state_dict().items()}


def _examples(rows: tuple[Row, ...], tokenizer: Any) -> list[dict[str, list[int]]]:
    """Token ids by the package's own rule."""
    from ..data import LeftOut, PreferencePair, tokenize_pairs

    pairs = [PreferencePair(r["prompt"], r["chosen"], r["rejected"], "row") for r in rows]
    found = tokenize_pairs(pairs, tokenizer, None, LeftOut(strict=True), warn=lambda text: None)
    return [
        {f"{side}_ids": list(getattr(p, side)) for side in ("prompt", "chosen", "rejected")}
        for p in found
    ]


def _share_of(case: Case) -> Case:
    """The rows of this rank, of two."""
    import torch.distributed as dist

    half = len(case.rows) // 2
    return Case(case.model, case.rows[dist.get_rank() * half :][:half], case.folder, case.options)


def _sharded(trainer: Any, sharding: str) -> dict[str, Tensor]:
    """Gradients of a trainer's own loss on its model, which FSDP2 has cut up."""
    batch = next(iter(trainer.get_train_dataloader()))
    model = shard(trainer.accelerator.unwrap_model(trainer.model), sharding).train()
    trainer.compute_loss(model, batch).backward()
    return {name: full(p.grad) for name, p in model.named_parameters() if p.grad is not None}


class Trl:
    """TRL's DPOTrainer, as it is or under `patch_trl()`."""

    def __init__(self, patched: bool) -> None:
        self.name = "trl-patched" if patched else "trl"
        self.patched = patched
        try:
            importlib.import_module("trl")
        except ImportError:
            raise NotApplicable("pip install trl") from None
        self.versions = versions_of("trl", "transformers", "accelerate", "torch")

    @contextlib.contextmanager
    def _active(self, layout: str) -> Iterator[None]:
        if not self.patched:
            if layout != "padded":
                raise NotApplicable("DPOTrainer ignores padding_free")
            yield
            return
        from ..integrations.trl import patch_trl

        with patch_trl(layout=layout):
            yield

    def train(self, case: Case) -> Trained:
        return train_on_two(self, case) if case.processes > 1 else self.train_here(case)

    def train_here(self, case: Case) -> Trained:
        with self._active(case.layout), contextlib.redirect_stdout(io.StringIO()):
            trainer = self._trainer(case)
            trainer.train(resume_from_checkpoint=case.resume_from)
            evaluation = trainer.evaluate() if case.eval_rows else {}
        return Trained(_weights_of(trainer), evaluation, _checkpoints(case))

    def _trainer(self, case: Case) -> Any:
        import transformers
        from trl import DPOConfig, DPOTrainer

        options: dict[str, Any] = {**_TRAINER, **_of_hf(case), **case.options}
        model = transformers.AutoModelForCausalLM.from_pretrained(case.model, dtype=torch.float32)
        return DPOTrainer(
            model=model,
            args=DPOConfig(case.folder, **options),
            train_dataset=_dataset(case, "train", case.rows),
            eval_dataset=_dataset(case, "eval", case.eval_rows) if case.eval_rows else None,
            processing_class=transformers.AutoTokenizer.from_pretrained(case.model),
        )

    def gradients(self, case: Case, sharding: str) -> dict[str, Tensor]:
        """Of the trainer's own loss on a model that FSDP2 has cut up."""
        with self._active("padded"), contextlib.redirect_stdout(io.StringIO()):
            return _sharded(self._trainer(_share_of(case)), sharding)


def _dataset(case: Case, split: str, rows: tuple[Row, ...]) -> Any:
    """From a file, as users have it: `datasets` caches what is made of it."""
    import datasets

    folder = Path(case.model).parent
    text = "".join(json.dumps(dict(row)) + "\n" for row in rows)
    file = folder / f"{split}-{hashlib.sha256(text.encode()).hexdigest()[:8]}.jsonl"
    if not file.exists():  # as it is: a cache goes by the time of its file
        file.write_text(text)
    cache = str(folder / "datasets")
    return datasets.load_dataset("json", data_files=str(file), split="train", cache_dir=cache)


class Callable_:
    """A function `train(case) -> Trained | dict`, or an object with `train` and `gradients`."""

    def __init__(self, place: str) -> None:
        module, _, name = place.partition(":")
        sys.path.insert(0, "")
        made: Any = importlib.import_module(module)
        for part in name.split("."):
            made = getattr(made, part)
        self.made = made() if isinstance(made, type) else made
        self.name = place
        self.versions = getattr(self.made, "versions", "")

    def train(self, case: Case) -> Trained:
        train = getattr(self.made, "train", self.made)
        got = train(case)
        return got if isinstance(got, Trained) else Trained(**got)

    def gradients(self, case: Case, sharding: str) -> dict[str, Tensor]:
        if not hasattr(self.made, "gradients"):
            raise NotApplicable("it offers no gradients(case, sharding)")
        return self.made.gradients(case, sharding)


NAMES = ("loop", "trl", "trl-patched", "trainer")


def named(name: str) -> Target:
    """The target of a name, or of `module:function`; `ValueError` for another."""
    if name == "loop":
        return Loop()
    if name == "trainer":
        return HfTrainer()
    if name in ("trl", "trl-patched"):
        return Trl(patched=name == "trl-patched")
    if ":" in name:
        try:
            return Callable_(name)
        except Exception as error:  # whatever the user's module raises
            said = " ".join(str(error).split()) or "no message"
            raise ValueError(f"target {name!r}: {type(error).__name__}: {said}") from None
    raise ValueError(f"target must be one of {', '.join(NAMES)} or module:function, got {name!r}")
