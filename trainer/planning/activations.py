"""Predict the activation memory of a pass from the tensors that each operation saves; does not import torch.

The model is a Llama-like decoder. c is the size of the compute dtype, T the number of tokens in the micro-batch. The
formulas follow from the operations in the code (docs/memory.md); no constant is fitted.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Final, Literal, final

from trainer.planning.model_facts import OUTPUT_NORMS, ModelFacts

STATISTICS_BYTES: Final = 4
"""Norms, softmax and the loss are computed in float32."""
EAGER_MAX_TOKENS: Final = 384
"""Up to this length, attention on the CPU keeps its scores; as in `trainer.model.attention`."""
TILE_CELLS: Final = 256 * 49_152
GPU_TILE_ROWS: Final = 1024
CPU_BLOCK_ROWS: Final = 32
"""Sizes of the LM head's tiles; as in `trainer.model.lm_head`."""


Recomputed = bool | Literal["selective"]
"""Of gradient checkpointing: nothing, everything, or all but products and attention."""


@final
@dataclass(frozen=True)
class Pass:
    """A forward and backward pass over one micro-batch, for example of lengths [300, 300, 300, 124]."""

    facts: ModelFacts
    lengths: Sequence[int]
    """Length of each sequence in tokens."""
    num_trained: int
    """Tokens with a loss."""
    compute_bytes: int
    """c."""
    rank: int | None
    """Rank of the adapters; None in full-parameter training."""
    is_cpu: bool
    is_quantized: bool = False
    """Base weights are in 4 bits; each is dequantized for its matrix products."""
    ranks: int = 1
    """Ranks that compute the micro-batch together, each an equal slice of its tokens."""

    @property
    def tokens(self) -> int:
        """T, the tokens of all sequences that this rank has."""
        return -(-sum(self.lengths) // self.ranks)

    def kept(self, *, recomputed: Recomputed) -> float:
        """Return the bytes that all blocks keep until the backward pass.

        Args:
            recomputed: what is computed again there.
        """
        facts, c = self.facts, self.compute_bytes
        if recomputed is True:
            return float(facts.layers * self.tokens * facts.hidden * c)
        if recomputed == "selective":
            return facts.layers * self._selected()
        first_norm = (
            0 if self.rank is None else self.tokens * facts.hidden * self._norm_input()
        )  # its input needs no gradient
        return facts.layers * self.block() - first_norm

    def moments(self, *, recomputed: Recomputed) -> dict[str, float]:
        """Return the transient bytes at each candidate peak, in addition to `kept`.

        Args:
            recomputed: what is computed again in the backward pass.
        """
        again = {False: 0.0, True: self.block(), "selective": max(0.0, self.block() - self._selected())}[recomputed]
        return {
            "head": self._head(),
            "backward of the last norm": self._last_norm(),
            "backward of a block": self._block_backward() + again,
        }

    def block(self) -> float:
        """Return the bytes that one block keeps."""
        per_token = self._norms() + self._attention() + self._mlp() + self._adapters()
        return self.tokens * per_token + self._scores() + self._adapted_experts()

    def _selected(self) -> float:
        """Bytes that one block keeps with selective checkpointing: results of products and attention, and its input.

        The block's input and the output of the attention's last product; queries, keys and values before their norms
        and the rotary embedding; the attention's output and its statistics; gate and up.
        """
        facts, c = self.facts, self.compute_bytes
        values = 2 * facts.hidden + 2 * (facts.query_width + facts.key_width) + 2 * facts.intermediate
        return self.tokens * float(values * c + facts.heads * STATISTICS_BYTES + self._adapters())

    def _norms(self) -> int:
        """A norm keeps its input, and the following linear layer keeps the output of the norm.

        The outputs of query and key norms go into the rotary embedding, those of output norms into a sum: not kept.
        """
        facts = self.facts
        behind = 2 * facts.hidden * self._norm_input() if facts.model_type in OUTPUT_NORMS else 0
        inner = (facts.query_width + facts.key_width) * self._norm_input() if facts.has_inner_norms else 0
        return 2 * facts.hidden * (self._norm_input() + self.compute_bytes) + inner + behind

    def _norm_input(self) -> int:
        """Bytes per value that a norm keeps: our norm keeps its input, autograd a float32 copy of it.

        If the weight is trained, autograd also keeps the normalized value.
        """
        if self.facts.has_fused_norms:
            return self.compute_bytes
        return STATISTICS_BYTES + (self.compute_bytes if self.rank is None else 0)

    def _attention(self) -> int:
        """Queries, keys and values; the output; and, except in eager attention, the copy that the next layer keeps."""
        facts, c = self.facts, self.compute_bytes
        inputs = facts.query_width + 2 * facts.key_width * self.ranks  # keys and values are those of all ranks
        outputs = facts.query_width if self._is_eager(max(self.lengths)) else 2 * facts.query_width
        return (inputs + outputs) * c

    def _is_eager(self, length: int) -> bool:
        return self.is_cpu and (length <= EAGER_MAX_TOKENS or self.facts.has_eager_attention)

    def _scores(self) -> float:
        """Eager attention keeps its probabilities; with capped scores also float32 probabilities and the tanh."""
        c = self.compute_bytes
        if self.facts.has_eager_attention:
            return self._cells() * (self._softmax_bytes() + c)
        return self._cells() * c

    def _cells(self) -> float:
        """Number of attention scores that eager attention computes."""
        cells = sum(length * length for length in self.lengths if self._is_eager(length))
        return float(cells * self.facts.heads) / self.ranks

    def _softmax_bytes(self) -> int:
        """Bytes per score: float32, plus a copy in the compute dtype if that is smaller."""
        return STATISTICS_BYTES + (self.compute_bytes if self.compute_bytes < STATISTICS_BYTES else 0)

    def _mlp(self) -> int:
        """Gate, up, activation and product; experts also keep their inputs and outputs, because outputs are scaled."""
        facts, c = self.facts, self.compute_bytes
        if facts.num_experts == 1:
            return 4 * facts.intermediate * c
        per_expert = 4 * facts.intermediate + 2 * facts.hidden
        return (facts.active_experts * per_expert + 4 * facts.shared_intermediate) * c

    def _adapted_experts(self) -> float:
        """PEFT computes W + s B A of every expert, which is kept for the backward pass."""
        facts = self.facts
        if not facts.has_adapted_experts or self.rank is None:
            return 0.0
        return float(facts.num_experts * 3 * facts.intermediate * facts.hidden * self.compute_bytes)

    def _adapters(self) -> int:
        """A x of every adapter."""
        return 0 if self.rank is None else len(self.facts.adapted_linears()) * self.rank * self.compute_bytes

    def _head(self) -> float:
        """Final norm and LM head: the forward pass of a frozen head, the backward pass of a trained one."""
        facts, c = self.facts, self.compute_bytes
        hidden = self.tokens * facts.hidden * (self._norm_input() + c) + 2 * self.num_trained * facts.hidden * c
        full = max(16, (1 << (TILE_CELLS // facts.vocab).bit_length()) >> 1) if self.is_cpu else GPU_TILE_ROWS
        # A tile is computed while the previous one is alive; on a GPU its residual is apart from its logits.
        tiles = min(2 if self.is_cpu else 3, -(-self.num_trained // full) + (not self.is_cpu))
        rows = min(full, self.num_trained)
        block = min(rows, CPU_BLOCK_ROWS) if self.is_cpu else 0  # a GPU's float32 statistics stay in registers
        tile, statistics = rows * facts.vocab * c, 3 * block * facts.vocab * STATISTICS_BYTES
        forward = tiles * tile + statistics
        if self.rank is not None:
            return float(hidden + forward)
        weight = facts.vocab * facts.hidden  # its float32 gradient sum; and tiles, or one tile and its product
        return float(hidden + STATISTICS_BYTES * weight + max(forward, tile + c * weight))

    def _last_norm(self) -> float:
        """Temporaries of the final norm's backward, its kept input, and the gradient of a tied head held concurrently.

        Autograd creates five float32 tensors. Our norm creates four (normalized value, gradient times weight and two
        more) and one in the compute dtype.
        """
        facts, c = self.facts, self.compute_bytes
        temporaries = (4 if facts.has_fused_norms else 5) * STATISTICS_BYTES + (c if facts.has_fused_norms else 0)
        norm = self.tokens * facts.hidden * (temporaries + self._norm_input())
        return float(norm + self._tied_gradient())

    def _block_backward(self) -> float:
        """Gradients of product, gate, up, residual and one weight, the product itself being freed; or of attention.

        With context parallelism those of attention are of the keys and values of all ranks.
        """
        facts, c = self.facts, self.compute_bytes
        width = facts.intermediate * facts.active_experts + facts.shared_intermediate
        is_one_weight = self.rank is None or self.is_quantized
        weight = facts.intermediate * facts.hidden * c if is_one_weight else 2 * self._adapted_experts() / 3
        mlp = self.tokens * (facts.hidden + 2 * width) * c + weight + self._tied_gradient()
        return max(mlp, self._exchange() + self._tied_gradient())

    def _exchange(self) -> float:
        """Gradients of the keys and values of all ranks: in the compute dtype, in float32, and once more to be sent."""
        if self.ranks == 1:
            return 0.0
        values = 2 * self.facts.key_width * self.tokens * self.ranks
        return float(values * (2 * self.compute_bytes + STATISTICS_BYTES))

    def _tied_gradient(self) -> float:
        """The gradient of a tied head is held until the gradient of the embedding is added."""
        is_held = self.rank is None and self.facts.is_tied
        return float(self.facts.vocab * self.facts.hidden * self.compute_bytes) if is_held else 0.0

    def without_gradient(self) -> float:
        """Return the peak of a forward pass without gradient: the widest point of a block."""
        facts, c = self.facts, self.compute_bytes
        width = facts.intermediate * facts.active_experts + facts.shared_intermediate
        mlp = 2 * facts.hidden * c + 3 * width * c
        attention = facts.hidden * c + 3 * (facts.query_width + 2 * facts.key_width) * c
        return self.tokens * max(mlp, attention) + self._cells() * self._softmax_bytes()
