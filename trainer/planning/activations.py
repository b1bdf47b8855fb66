"""Bytes that a pass keeps for its backward, counted from what each operation of a Llama-like block saves. No torch.

c is the size of the compute dtype, T the tokens of the micro-batch, N those that are trained. What is saved is read off
the operations themselves (docs/memory.md); nothing here is fitted.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Final, final

from trainer.planning.model_facts import OUTPUT_NORMS, ModelFacts

STATISTICS_BYTES: Final = 4
"""Norms, softmax and the loss compute in float32."""
EXPLICIT_MAX_TOKENS: Final = 384
"""Up to here the CPU's attention keeps its scores; the same number as in `trainer.model.attention`."""
TILE_CELLS: Final = 256 * 49_152
CPU_BLOCK_ROWS: Final = 32
"""Of the LM head's tiles; the same numbers as in `trainer.model.lm_head`."""


@final
@dataclass(frozen=True)
class Pass:
    """A forward and backward pass over one micro-batch."""

    facts: ModelFacts
    lengths: Sequence[int]
    """Of its sequences in tokens."""
    num_trained: int
    compute_bytes: int
    rank: int | None
    """Of the adapters; None where every parameter is trained."""
    is_cpu: bool
    is_quantized: bool = False
    """The base's weights are in 4 bits, and each is made whole for its products."""

    @property
    def tokens(self) -> int:
        """T."""
        return sum(self.lengths)

    def kept(self, *, is_checkpointed: bool) -> float:
        """What all blocks keep until the backward pass."""
        facts, c = self.facts, self.compute_bytes
        if is_checkpointed:
            return float(facts.layers * self.tokens * facts.hidden * c)
        first_norm = 0 if self.rank is None else self.tokens * facts.hidden * self._norm_input()  # asks for no gradient
        return facts.layers * self.block() - first_norm

    def moments(self, *, is_checkpointed: bool) -> dict[str, float]:
        """What lives beside it at the moments that can be the peak."""
        return {
            "head": self._head(),
            "backward of the last norm": self._last_norm(),
            "backward of a block": self._block_backward() + (self.block() if is_checkpointed else 0.0),
        }

    def block(self) -> float:
        """What one block keeps."""
        per_token = self._norms() + self._attention() + self._mlp() + self._adapters()
        return self.tokens * per_token + self._scores() + self._adapted_experts()

    def _norms(self) -> int:
        """A norm keeps its input, the layer behind it its output.

        What comes out of norms of queries and keys is rotated, of those behind attention and MLP added: not kept.
        """
        facts = self.facts
        behind = 2 * facts.hidden * self._norm_input() if facts.model_type in OUTPUT_NORMS else 0
        inner = (facts.query_width + facts.key_width) * self._norm_input() if facts.has_inner_norms else 0
        return 2 * facts.hidden * (self._norm_input() + self.compute_bytes) + inner + behind

    def _norm_input(self) -> int:
        """Bytes of a value that a norm keeps: ours its input, autograd's a float32 copy.

        Beside it autograd keeps the normalized value where the weight is trained.
        """
        if self.facts.has_fused_norms:
            return self.compute_bytes
        return STATISTICS_BYTES + (self.compute_bytes if self.rank is None else 0)

    def _attention(self) -> int:
        """Queries, keys and values as the kernel reads them, what comes out, and the copy that the next layer keeps."""
        facts, c = self.facts, self.compute_bytes
        inputs = facts.query_width + 2 * facts.key_width
        outputs = facts.query_width if self._is_explicit(max(self.lengths)) else 2 * facts.query_width
        return (inputs + outputs) * c

    def _is_explicit(self, length: int) -> bool:
        return self.is_cpu and (length <= EXPLICIT_MAX_TOKENS or self.facts.has_explicit_attention)

    def _scores(self) -> float:
        """Written-out attention keeps its probabilities; where it is capped, float32 ones too, and the tanh."""
        c = self.compute_bytes
        if self.facts.has_explicit_attention:
            return self._cells() * (self._softmax_bytes() + c)
        return self._cells() * c

    def _cells(self) -> float:
        """Of the scores that are written out."""
        return float(sum(length * length for length in self.lengths if self._is_explicit(length)) * self.facts.heads)

    def _softmax_bytes(self) -> int:
        """Of a cell: float32, and the same in a smaller compute dtype."""
        return STATISTICS_BYTES + (self.compute_bytes if self.compute_bytes < STATISTICS_BYTES else 0)

    def _mlp(self) -> int:
        """Gate, up, activation and product; of experts, whose outputs are scaled, what goes in and out too."""
        facts, c = self.facts, self.compute_bytes
        if facts.num_experts == 1:
            return 4 * facts.intermediate * c
        per_expert = 4 * facts.intermediate + 2 * facts.hidden
        return (facts.active_experts * per_expert + 4 * facts.shared_intermediate) * c

    def _adapted_experts(self) -> float:
        """PEFT makes W + s B A of every expert, and the product's backward keeps it."""
        facts = self.facts
        if not facts.has_adapted_experts or self.rank is None:
            return 0.0
        return float(facts.num_experts * 3 * facts.intermediate * facts.hidden * self.compute_bytes)

    def _adapters(self) -> int:
        """A x of every adapter."""
        return 0 if self.rank is None else len(self.facts.adapted_linears()) * self.rank * self.compute_bytes

    def _head(self) -> float:
        """The last norm and the head: forward with a frozen one, backward with a trained one."""
        facts, c = self.facts, self.compute_bytes
        hidden = self.tokens * facts.hidden * (self._norm_input() + c) + 2 * self.num_trained * facts.hidden * c
        rows = max(16, (1 << (TILE_CELLS // facts.vocab).bit_length()) >> 1)
        tiles = min(2, -(-self.num_trained // rows))  # the next one is made while the last one lives
        rows = min(rows, self.num_trained)
        block = min(rows, CPU_BLOCK_ROWS) if self.is_cpu else rows
        tile, statistics = rows * facts.vocab * c, 3 * block * facts.vocab * STATISTICS_BYTES
        forward = tiles * tile + statistics
        if self.rank is not None:
            return float(hidden + forward)
        weight = (
            facts.vocab * facts.hidden
        )  # a float32 sum, and beside it tiles, or a tile and its product, or the cast
        return float(hidden + STATISTICS_BYTES * weight + max(forward, tile + c * weight))

    def _last_norm(self) -> float:
        """What its backward makes and its kept input; a tied head's gradient waits meanwhile.

        Autograd makes five float32 tensors; ours the normalized value, the gradient times the weight, and two more.
        """
        facts, c = self.facts, self.compute_bytes
        made = (4 if facts.has_fused_norms else 5) * STATISTICS_BYTES + (c if facts.has_fused_norms else 0)
        norm = self.tokens * facts.hidden * (made + self._norm_input())
        return float(norm + self._waiting_gradient())

    def _block_backward(self) -> float:
        """Of the MLP's product, gate and up, less the product itself; the residual stream's; one weight's."""
        facts, c = self.facts, self.compute_bytes
        width = facts.intermediate * facts.active_experts + facts.shared_intermediate
        is_one_weight = self.rank is None or self.is_quantized
        weight = facts.intermediate * facts.hidden * c if is_one_weight else 2 * self._adapted_experts() / 3
        return self.tokens * (facts.hidden + 2 * width) * c + weight + self._waiting_gradient()

    def _waiting_gradient(self) -> float:
        """A tied head's gradient is held until the embedding has its own."""
        is_waiting = self.rank is None and self.facts.is_tied
        return float(self.facts.vocab * self.facts.hidden * self.compute_bytes) if is_waiting else 0.0

    def without_gradient(self) -> float:
        """A forward pass that keeps nothing: the widest place of a block."""
        facts, c = self.facts, self.compute_bytes
        width = facts.intermediate * facts.active_experts + facts.shared_intermediate
        mlp = 2 * facts.hidden * c + 3 * width * c
        attention = facts.hidden * c + 3 * (facts.query_width + 2 * facts.key_width) * c
        return self.tokens * max(mlp, attention) + self._cells() * self._softmax_bytes()
