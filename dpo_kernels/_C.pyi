cuda_architectures: str
cuda_source_hashes: str

class TokenLogps:
    def __init__(
        self, logits: int, stride_r: int, stride_t: int, targets: int, R: int, T: int, V: int,
        ignore_index: int, dtype: int, transform: list[float], logps: int, lse: int, entropy: int,
        mean_logits: int, is_top1: int, log_sum_sq_probs: int,
    ) -> None: ...  # fmt: skip

class TokenLogpsBackward:
    def __init__(
        self, grad: int, logits: int, stride_r: int, stride_t: int, targets: int, lse: int, R: int,
        T: int, V: int, ignore_index: int, dtype: int, transform: list[float], out: int,
        out_stride_r: int, out_stride_t: int, out_dtype: int,
    ) -> None: ...  # fmt: skip

class TokenKl:
    def __init__(
        self, logits: int, stride_r: int, stride_t: int, ref_logits: int, ref_stride_r: int,
        ref_stride_t: int, targets: int, R: int, T: int, V: int, ignore_index: int, dtype: int,
        ref_dtype: int, transform: list[float], logps: int, lse: int, ref_logps: int, ref_lse: int,
        kl: int,
    ) -> None: ...  # fmt: skip

class TokenKlBackward:
    def __init__(
        self, grad_logps: int, grad_kl: int, logits: int, stride_r: int, stride_t: int,
        ref_logits: int, ref_stride_r: int, ref_stride_t: int, targets: int, lse: int,
        ref_lse: int, R: int, T: int, V: int, ignore_index: int, dtype: int, ref_dtype: int,
        transform: list[float], out: int, out_stride_r: int, out_stride_t: int,
    ) -> None: ...  # fmt: skip

class SequenceSum:
    def __init__(
        self, targets: int, starts: int, S: int, ignore_index: int, tail_weight: float,
        values: int, sums: int, counts: int, grad: int, d_values: int,
    ) -> None: ...  # fmt: skip

def token_logps(params: TokenLogps) -> None: ...
def token_logps_backward(params: TokenLogpsBackward) -> None: ...
def token_kl(params: TokenKl) -> None: ...
def token_kl_backward(params: TokenKlBackward) -> None: ...
def sequence_sum(params: SequenceSum) -> None: ...
def sequence_sum_backward(params: SequenceSum) -> None: ...
def pair_loss(
    u: int, v: int, beta: int, offset: int, phis: list[int], terms: list[float], B: int,
    loss: int, slopes: int,
) -> None: ...  # fmt: skip
def instruction_sets() -> str: ...
def use_instruction_set(name: str) -> bool: ...
def num_threads() -> int: ...
def has_bf16_products() -> bool: ...
def bf16_product(
    a: int, a_row: int, a_column: int, b: int, b_row: int, b_column: int, out: int, stride: int,
    M: int, N: int, K: int, add: bool,
) -> None: ...  # fmt: skip
