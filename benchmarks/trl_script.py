"""A DPO script as TRL's users write it; it knows nothing of dpo_kernels.

`compare_trl.py` runs it as it is and after `patch_trl()`. The model has random weights and the
vocabulary of a small real one (SmolLM2: 49152, tied), the pairs have the prompt and completion
lengths asked for. The last line it prints is its own measurement.
"""

import argparse
import json
import random
import resource
import tempfile
import time

import torch
from datasets import Dataset
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast, TrainerCallback
from trl import DPOConfig, DPOTrainer

parser = argparse.ArgumentParser()
parser.add_argument("--prompt", type=int, default=128, help="mean tokens of a prompt")
parser.add_argument("--completion", type=int, default=64, help="mean tokens of a completion")
parser.add_argument("--pairs", type=int, default=4, help="pairs a step")
parser.add_argument("--steps", type=int, default=4)
parser.add_argument("--layers", type=int, default=6)
parser.add_argument("--hidden", type=int, default=576)
parser.add_argument("--vocabulary", type=int, default=49152)
parser.add_argument("--threads", type=int, default=2)
options = parser.parse_args()

torch.set_num_threads(options.threads)
V = options.vocabulary
words = Tokenizer(models.WordLevel({f"w{i}": i for i in range(V)}, unk_token="w0"))
words.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
tokenizer = PreTrainedTokenizerFast(tokenizer_object=words, pad_token="w0", eos_token="w1")

torch.manual_seed(0)
config = LlamaConfig(
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
folder = tempfile.mkdtemp()
LlamaForCausalLM(config).save_pretrained(folder)
tokenizer.save_pretrained(folder)

draw = random.Random(0)


def text(mean: int) -> str:
    n = draw.randint(mean // 2, mean * 3 // 2)
    return " ".join(f"w{draw.randrange(2, V)}" for _ in range(n))


rows = [
    {
        "prompt": text(options.prompt),
        "chosen": " " + text(options.completion),
        "rejected": " " + text(options.completion),
    }
    for _ in range(options.pairs * 4)
]


class Clock(TrainerCallback):
    """Seconds of each step: of the clock, and of all cores together."""

    def __init__(self):
        self.seconds, self.cpu_seconds = [], []

    def on_step_begin(self, *_, **__):
        self.start = time.perf_counter(), time.process_time()

    def on_step_end(self, *_, **__):
        self.seconds.append(time.perf_counter() - self.start[0])
        self.cpu_seconds.append(time.process_time() - self.start[1])


clock = Clock()
trainer = DPOTrainer(
    model=folder,
    args=DPOConfig(
        folder,
        max_steps=options.steps,
        per_device_train_batch_size=options.pairs,
        learning_rate=1e-5,
        logging_steps=1,
        report_to=[],
        use_cpu=True,
        bf16=False,
        save_strategy="no",
        disable_tqdm=True,
        seed=0,
    ),
    train_dataset=Dataset.from_list(rows),
    callbacks=[clock],
)
counted = [0]  # tokens that the policy's trunk is given
trainer.model.get_input_embeddings().register_forward_hook(
    lambda module, args, output: counted.__setitem__(0, counted[0] + args[0].numel())
)
before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
trainer.train()
after = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
losses = [row["loss"] for row in trainer.state.log_history if "loss" in row]
result = {
    "seconds": clock.seconds,
    "cpu_seconds": clock.cpu_seconds,
    "peak_mb": after // 1024,
    "peak_before_mb": before // 1024,
    "tokens": counted[0] / options.steps,
    "losses": losses,
}
print(json.dumps(result))
