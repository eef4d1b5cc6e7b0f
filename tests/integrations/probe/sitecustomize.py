"""Measures a training command from within: losses, fused calls, the trunk's dtype, memory, time.

On PYTHONPATH; writes JSON to the file that CLIENT_PROBE names, when `Trainer.train` has ended.
"""

import importlib.machinery
import json
import os
import sys
import time


def _status(name):
    """Kilobytes of /proc/self/status."""
    with open("/proc/self/status") as file:
        return next((int(line.split()[1]) for line in file if line.startswith(name)), 0)


def _trunk(model):
    """The first MLP's last projection: what it gives out tells what the trunk computes in."""
    return next((m for n, m in model.named_modules() if n.endswith("mlp.down_proj")), None)


def _base(model):
    return model.get_base_model() if hasattr(model, "get_base_model") else model


def _watch_training(module):
    import torch

    torch.manual_seed(0)  # axolotl makes its adapters before it seeds
    plain = module.Trainer.train

    def train(self, *args, **kwargs):
        losses, dtypes = [], set()
        backward = self.accelerator.backward

        def recorded(loss, **options):
            losses.append(float(loss.detach()))
            backward(loss, **options)

        self.accelerator.backward = recorded
        layer = _trunk(self.model)
        handle = layer and layer.register_forward_hook(lambda m, i, o: dtypes.add(str(o.dtype)))
        with open("/proc/self/clear_refs", "w") as file:
            file.write("5")  # the peak starts anew
        before, start, cpu = _status("VmRSS"), time.perf_counter(), time.process_time()
        try:
            return plain(self, *args, **kwargs)
        finally:
            seconds, cpu_seconds = time.perf_counter() - start, time.process_time() - cpu
            if handle:
                handle.remove()
            history = [r for r in self.state.log_history if not any(k in r for k in ("loss",))]
            values = {
                "losses": losses,
                "trunk": sorted(dtypes),
                "fused_calls": vars(_base(self.model)).get("_dpo_head_calls", 0),
                "kilobytes": _status("VmHWM") - before,
                "seconds": seconds,
                "cpu_seconds": cpu_seconds,  # of all threads: what a busy machine leaves alone
                "evaluations": [{k: v for k, v in r.items() if "loss" in k} for r in history],
            }
            with open(os.environ["CLIENT_PROBE"], "w") as file:
                json.dump(values, file)

    module.Trainer.train = train


class _Finder:
    @staticmethod
    def find_spec(name, path=None, target=None):
        if name != "transformers.trainer":
            return None
        spec = importlib.machinery.PathFinder.find_spec(name, path, target)
        execute = spec.loader.exec_module

        def exec_module(module):
            execute(module)
            _watch_training(module)

        spec.loader.exec_module = exec_module
        return spec


if "CLIENT_PROBE" in os.environ:
    sys.meta_path.insert(0, _Finder)
