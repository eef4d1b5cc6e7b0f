"""Patches the DPO trainers of this process when they are imported, for `dpo-kernels run`.

Python imports this when it starts, in the command and in every Python below it. It loads nothing
but itself: most of those processes never see a trainer. A sitecustomize that was there before is
run too.
"""

import importlib.machinery
import importlib.util
import json
import os
import sys

OPTIONS = "DPO_KERNELS_RUN"
# `import_hook` knows what to patch in each.
TRAINERS = (
    "trl.trainer.dpo_trainer",
    "trl.trainer.online_dpo_trainer",
    "trl.experimental.online_dpo.online_dpo_trainer",
    "llamafactory.train.dpo.trainer",
    "swift.rlhf_trainers.dpo_trainer",
)


class _Finder:
    """Finds the modules of the trainers as the others do, and patches what they load."""

    @staticmethod
    def find_spec(name, path=None, target=None):
        if name not in TRAINERS:
            return None
        for finder in sys.meta_path:
            find = getattr(finder, "find_spec", None)
            spec = None if finder is _Finder or find is None else find(name, path, target)
            if spec is not None:
                if spec.loader is not None:
                    spec.loader = _Loader(spec.loader)
                return spec
        return None


class _Loader:
    """Another's loader, and the patch behind it."""

    def __init__(self, loader):
        self._loader = loader

    def create_module(self, spec):
        return self._loader.create_module(spec)

    def exec_module(self, module):
        self._loader.exec_module(module)
        try:
            from dpo_kernels.integrations import import_hook
        except ImportError as error:
            raise ImportError(
                f"dpo-kernels run: {sys.executable} cannot import dpo_kernels ({error}); install "
                "it where the command's Python finds it"
            ) from error
        import_hook.patch_module(module, json.loads(os.environ[OPTIONS]))

    def __getattr__(self, name):
        return getattr(self._loader, name)


def _hidden():
    """Run the sitecustomize that this one stands in front of."""
    here = os.path.dirname(os.path.abspath(__file__))
    sys.path[:] = [p for p in sys.path if os.path.abspath(p or ".") != here]
    spec = importlib.machinery.PathFinder.find_spec("sitecustomize", sys.path)
    if spec is not None and spec.loader is not None:
        module = importlib.util.module_from_spec(spec)
        sys.modules["sitecustomize"] = module
        spec.loader.exec_module(module)


if OPTIONS in os.environ:
    sys.meta_path.insert(0, _Finder)
_hidden()
