"""The pairs of `trl_script.py` through our own training loop; the last line is its measurement.

The model, the lengths and the learning rate are those of that script; the reference is computed
before the first step, as the loop does.
"""

import argparse
import json
import random
import resource
import statistics
import sys
import time
from pathlib import Path

import torch
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

sys.path.insert(0, str(Path(__file__).parent.parent))

from dpo_kernels.data import TokenPair
from dpo_kernels.models.falling import FallingWatch
from dpo_kernels.train.config import load_config
from dpo_kernels.train.console import Console
from dpo_kernels.train.loop import _gradients
from dpo_kernels.train.metrics import PairMeter
from dpo_kernels.train.model import prepare_policy
from dpo_kernels.train.optim import Stepper
from dpo_kernels.train.order import step_indices
from dpo_kernels.train.reference import with_reference
from dpo_kernels.train.step_loss import PairLoss

parser = argparse.ArgumentParser()
parser.add_argument("--prompt", type=int, default=128)
parser.add_argument("--completion", type=int, default=64)
parser.add_argument("--pairs", type=int, default=4)
parser.add_argument("--steps", type=int, default=4)
parser.add_argument("--layers", type=int, default=6)
parser.add_argument("--hidden", type=int, default=576)
parser.add_argument("--vocabulary", type=int, default=49152)
parser.add_argument("--threads", type=int, default=2)
parser.add_argument("--layout", default="auto")
options = parser.parse_args()

torch.set_num_threads(options.threads)
V = options.vocabulary
words = Tokenizer(models.WordLevel({f"w{i}": i for i in range(V)}, unk_token="w0"))
words.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
tokenizer = PreTrainedTokenizerFast(tokenizer_object=words, pad_token="w0", eos_token="w1")
torch.manual_seed(0)
model = LlamaForCausalLM(
    LlamaConfig(
        vocab_size=V,
        hidden_size=options.hidden,
        intermediate_size=options.hidden * 8 // 3,
        num_hidden_layers=options.layers,
        num_attention_heads=9,
        num_key_value_heads=3,
        tie_word_embeddings=True,
        pad_token_id=0,
        eos_token_id=1,
        bos_token_id=None,
    )
)
draw = random.Random(0)


def ids(mean: int) -> tuple[int, ...]:
    n = draw.randint(mean // 2, mean * 3 // 2)
    return tuple(draw.randrange(2, V) for _ in range(n))


pairs = [
    TokenPair(ids(options.prompt), (*ids(options.completion), 1), (*ids(options.completion), 1), "")
    for _ in range(options.pairs * 4)
]
config = load_config(
    {
        "device": "cpu",
        "learning_rate": 1e-5,
        "per_device_train_batch_size": options.pairs,
        "max_steps": options.steps,
        "layout": options.layout,
        "gradient_checkpointing": True,  # TRL's default
        "seed": 0,
    }
)
policy = prepare_policy(model, tokenizer, config, lambda text: print(text, file=sys.stderr))
before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
data = with_reference(policy, pairs, config, Console(quiet=True), "pairs")
loss, stepper = PairLoss(policy, config), Stepper(policy.model, config, options.steps)
seconds, cpu_seconds, tokens, losses = [], [], [], []
falling = FallingWatch(said=True)
for indices, _ in step_indices(len(pairs), config, options.steps):
    began, cpu = time.perf_counter(), time.process_time()
    total, work = _gradients(loss, data, indices, config, PairMeter(), falling)
    stepper.step(total, "step", [])
    seconds.append(time.perf_counter() - began)
    cpu_seconds.append(time.process_time() - cpu)
    tokens.append(work.computed)
    losses.append(float(total))
after = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
result = {
    "seconds": seconds,
    "cpu_seconds": cpu_seconds,
    "peak_mb": after // 1024,
    "peak_before_mb": before // 1024,
    "tokens": statistics.mean(tokens[1:] or tokens),
    "losses": losses,
}
print(json.dumps(result))
