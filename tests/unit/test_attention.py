"""Packed attention: a sequence attends to itself and its past, whatever lies beside it."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from tiny import HIDDEN, VOCAB_SIZE, tiny_model
from torch import Tensor
from torch.nn.attention.flex_attention import create_block_mask

from trainer.errors import ModelError
from trainer.model import attention, flex
from trainer.model.attention import EAGER_MAX_TOKENS, PACKED_ATTENTION, packed_attention
from trainer.model.eager_attention import AttentionOptions
from trainer.model.layout import BUCKET_RATIO, PackedLayout

CPU = torch.device("cpu")
HEADS, KV_HEADS, WIDTH = 4, 2, 8
SHORT = (5, 1, 9, 3, 9)
LONG = (EAGER_MAX_TOKENS + 40, 30, EAGER_MAX_TOKENS + 1)
FORMS = {
    "plain": {},
    "window": {"sliding_window": 4},
    "wide-window": {"sliding_window": 4096},
    "softcap": {"softcap": 1.5},
    "sinks": {"s_aux": torch.tensor([1.0, -2.0, 0.5, 3.0])},
    "all": {"sliding_window": 4, "softcap": 1.5, "s_aux": torch.tensor([1.0, -2.0, 0.5, 3.0])},
}


def make_pack(
    lengths, *, heads: int = HEADS, kv_heads: int = KV_HEADS, width: int = WIDTH, seed: int = 0
) -> tuple[Tensor, Tensor, Tensor]:
    """Queries [1, H, T, D], keys and values [1, H_kv, T, D]."""
    generator = torch.Generator().manual_seed(seed)
    total = sum(lengths)
    shapes = [(1, heads, total, width), (1, kv_heads, total, width), (1, kv_heads, total, width)]
    query, key, value = (torch.randn(shape, generator=generator) for shape in shapes)
    return query, key, value


def attend(query: Tensor, key: Tensor, value: Tensor, lengths, **form) -> Tensor:
    layout = PackedLayout.of_lengths(lengths, CPU)
    output, weights = packed_attention(torch.nn.Module(), query, key, value, None, packed=layout, **form)
    assert weights is None
    return output


def naive_alone(query: Tensor, key: Tensor, value: Tensor, lengths, **form) -> Tensor:
    """Each sequence by itself in float64, with a mask made of two loops."""
    query, key, value = query[0].double(), key[0].double(), value[0].double()
    key, value = (tensor.repeat_interleave(query.shape[0] // key.shape[0], 0) for tensor in (key, value))
    outputs, start = [], 0
    for length in lengths:
        piece = slice(start, start + length)
        scores = query[:, piece] @ key[:, piece].transpose(1, 2) * form.get("scaling", query.shape[-1] ** -0.5)
        if "softcap" in form:
            scores = form["softcap"] * torch.tanh(scores / form["softcap"])
        window = form.get("sliding_window") or length
        distance = torch.arange(length)[:, None] - torch.arange(length)
        scores = scores.masked_fill((distance < 0) | (distance >= window), -torch.inf)
        weights = scores.exp()
        total = weights.sum(-1, keepdim=True)
        if "s_aux" in form:
            total = total + form["s_aux"].double().exp()[:, None, None]
        outputs.append((weights / total) @ value[:, piece])
        start += length
    return torch.cat(outputs, 1).transpose(0, 1)[None]


@pytest.mark.parametrize("lengths", [SHORT, LONG, (7,), (1, 1, 1)], ids=str)
@pytest.mark.parametrize("form", FORMS.values(), ids=FORMS)
def test_packed_equals_each_sequence_alone_in_value_and_gradient(form, lengths):
    packed, alone = make_pack(lengths), make_pack(lengths)
    for tensor in (*packed, *alone):
        tensor.requires_grad_()
    factor = torch.randn(1, sum(lengths), HEADS, WIDTH, generator=torch.Generator().manual_seed(1))

    ours, exact = attend(*packed, lengths, **form), naive_alone(*alone, lengths, **form)
    (ours * factor).sum().backward()
    (exact * factor).sum().backward()

    torch.testing.assert_close(ours.double(), exact, rtol=1e-5, atol=1e-5)
    for mine, theirs in zip(packed, alone, strict=True):
        torch.testing.assert_close(mine.grad, theirs.grad, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("length", [EAGER_MAX_TOKENS, EAGER_MAX_TOKENS + 1])
def test_both_sides_of_the_kernel_border_agree_with_float64(length):
    pack = make_pack((length,))
    torch.testing.assert_close(attend(*pack, (length,)).double(), naive_alone(*pack, (length,)), rtol=1e-5, atol=1e-5)


def test_only_long_plain_sequences_take_the_fused_kernel(monkeypatch):
    taken = []

    def kernel(query, key, value, **settings):
        taken.append(query.shape[2])
        return torch.nn.functional.scaled_dot_product_attention(query, key, value, **settings)

    monkeypatch.setattr(attention, "scaled_dot_product_attention", kernel)
    attend(*make_pack(LONG), LONG)
    attend(*make_pack(LONG), LONG, softcap=2.0)  # the kernel knows no soft cap
    assert taken == [EAGER_MAX_TOKENS + 40]  # the two long ones are one bucket


@pytest.mark.parametrize(("heads", "kv_heads"), [(4, 4), (4, 2), (6, 2), (4, 1)])
@pytest.mark.parametrize("lengths", [SHORT, LONG], ids=["short", "long"])
def test_grouped_queries_share_keys(heads, kv_heads, lengths):
    pack = make_pack(lengths, heads=heads, kv_heads=kv_heads)
    torch.testing.assert_close(attend(*pack, lengths).double(), naive_alone(*pack, lengths), rtol=1e-5, atol=1e-5)


def test_scaling_of_the_layer_is_used():
    pack = make_pack(SHORT)
    ours = attend(*pack, SHORT, scaling=0.9)
    torch.testing.assert_close(ours.double(), naive_alone(*pack, SHORT, scaling=0.9), rtol=1e-5, atol=1e-5)


def test_a_neighbour_changes_no_bit():
    pack = make_pack(SHORT)
    before = attend(*pack, SHORT)
    for tensor in pack:
        tensor[:, :, : SHORT[0]] += 1.0
    assert torch.equal(attend(*pack, SHORT)[:, SHORT[0] :], before[:, SHORT[0] :])


def test_buckets_hold_every_token_once_and_sequences_of_like_length():
    lengths = (300, 2, 100, 280, 1, 40)
    layout = PackedLayout.of_lengths(lengths, CPU)
    # 300 with 280; 100 alone (300 > 1.6 * 100 + 16); 40 alone (100 > 80); 1 and 2 (40 > 1.6 * 2 + 16).
    assert [tuple(bucket.gather.shape) for bucket in layout.buckets] == [(2, 300), (1, 100), (1, 40), (2, 2)]
    cells = torch.cat([bucket.gather.flatten()[bucket.cells] for bucket in layout.buckets])
    assert sorted(cells.tolist()) == list(range(sum(lengths)))
    assert torch.equal(cells[layout.order], torch.arange(sum(lengths)))
    assert layout.trees == tuple((length, ()) for length in lengths)
    assert layout.max_len == 300


def test_padding_is_bounded_by_the_bucket_ratio():
    lengths = [length for length in range(20, 400, 13) for _ in range(2)]
    for bucket in PackedLayout.of_lengths(lengths, CPU).buckets:
        assert bucket.gather.numel() <= BUCKET_RATIO * len(bucket.cells) + 16 * len(bucket.gather)


@pytest.mark.parametrize("form", [{}, {"sliding_window": 4}, {"softcap": 1.5}], ids=str)
@pytest.mark.filterwarnings("ignore:flex_attention called without torch.compile:UserWarning")
def test_the_gpu_path_computes_what_the_cpu_path_does(form):
    query, key, value = make_pack(SHORT)
    layout = PackedLayout.of_lengths(SHORT, CPU)
    settings = AttentionOptions(0.3, form.get("sliding_window"), form.get("softcap"), None)
    try:
        found = flex.attend_flex(query, key, value, layout, settings)
    except (RuntimeError, NotImplementedError) as error:
        pytest.skip(f"this torch has no FlexAttention on CPU: {error}")
    torch.testing.assert_close(found, attend(query, key, value, SHORT, scaling=0.3, **form), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("window", [None, 1, 100, 128, 129, 255, 256, 300])
@pytest.mark.parametrize(
    "lengths", [(128,), (700,), (256, 256), (640, 3), (90, 300, 1, 250, 127, 2), (5,) * 90, (129, 383)], ids=str
)
def test_blocks_of_the_mask_are_those_of_the_whole_mask(lengths, window):
    """What torch finds by looking at every cell, found from the ends of each block."""
    layout = PackedLayout.of_lengths(lengths, CPU)
    ours = flex.block_mask_of(layout, window)
    total = sum(lengths)
    whole = create_block_mask(ours.mask_mod, None, None, total, total, device="cpu")
    for name in (
        "kv_num_blocks",
        "kv_indices",
        "full_kv_num_blocks",
        "full_kv_indices",
        "q_num_blocks",
        "q_indices",
        "full_q_num_blocks",
        "full_q_indices",
    ):
        mine, theirs = getattr(ours, name), getattr(whole, name)
        assert mine.dtype == theirs.dtype, name
        assert torch.equal(mine, theirs), name
    assert ours.seq_lengths == whole.seq_lengths


@pytest.mark.filterwarnings("ignore:flex_attention called without torch.compile:UserWarning")
def test_the_gpu_path_is_compiled_once_for_packs_of_any_length(monkeypatch):
    """What the compiler hands to its back end: scale and soft cap are constants, lengths and window are not."""
    graphs = []

    def keep(graph, _inputs):
        graphs.append(graph)
        return graph.forward

    torch._dynamo.reset()
    kernel = flex._flex_kernel("cuda", keep)
    monkeypatch.setattr(flex, "_flex_kernel", lambda _device: kernel)
    lengths = [(200, 70), (300, 5, 129), (150, 151, 99), (131,)]
    forms: list[dict[str, Any]] = [{}, {"sliding_window": 50}, {"sliding_window": 50, "softcap": 1.5}]
    for number, form in enumerate(forms):
        settings = AttentionOptions(0.3, form.get("sliding_window"), form.get("softcap"), None)
        for own in lengths:
            pack = make_pack(own)
            with torch.no_grad():
                ours = flex.attend_flex(*pack, PackedLayout.of_lengths(own, CPU), settings)
            torch.testing.assert_close(ours, attend(*pack, own, scaling=0.3, **form), rtol=1e-5, atol=1e-5)
        assert len(graphs) == number + 1, f"{form} was compiled again for another length"
        (call,) = (node for node in graphs[-1].graph.nodes if str(node.target) == "flex_attention")
        assert 0.3 in call.args, "the scale is an input that the kernel would have to read"
        code = "".join(module.code for module in graphs[-1].modules() if isinstance(module, torch.fx.GraphModule))
        assert ".item()" not in code


@pytest.mark.filterwarnings("ignore:flex_attention called without torch.compile:UserWarning")
@pytest.mark.parametrize("window", [None, 4])
def test_sinks_on_the_gpu_path_are_those_of_the_cpu(window):
    sinks = torch.linspace(-2.0, 3.0, HEADS)
    pack = make_pack(SHORT)
    ours = flex.attend_flex(*pack, PackedLayout.of_lengths(SHORT, CPU), AttentionOptions(0.3, window, None, sinks))
    theirs = attend(*pack, SHORT, scaling=0.3, sliding_window=window, s_aux=sinks)
    torch.testing.assert_close(ours, theirs, rtol=1e-5, atol=1e-5)


def test_a_module_that_passes_no_layout_is_refused():
    with pytest.raises(ModelError, match="Module does not pass the pack's layout to attention"):
        packed_attention(torch.nn.Module(), *make_pack((3,)), None)


def test_a_module_with_a_mask_of_its_own_is_refused():
    layout = PackedLayout.of_lengths((3,), CPU)
    with pytest.raises(ModelError, match="builds a mask of its own"):
        packed_attention(torch.nn.Module(), *make_pack((3,)), torch.ones(1, 1, 3, 3), packed=layout)


def test_a_padded_batch_is_refused():
    layout = PackedLayout.of_lengths((3,), CPU)
    query, key, value = (tensor.expand(2, -1, -1, -1) for tensor in make_pack((3,)))
    with pytest.raises(ModelError, match="builds a mask of its own"):
        packed_attention(torch.nn.Module(), query, key, value, None, packed=layout)


def test_attention_dropout_is_refused():
    layout = PackedLayout.of_lengths((3,), CPU)
    with pytest.raises(ModelError, match="set attention_dropout to 0"):
        packed_attention(torch.nn.Module(), *make_pack((3,)), None, dropout=0.1, packed=layout)


@pytest.mark.parametrize("arch", ["llama", "qwen2", "qwen3", "mistral", "mixtral", "gemma2", "gpt_oss"])
def test_a_packed_model_equals_transformers_on_each_sequence_alone(arch):
    attention.register()
    lengths = (30, 4, 13)  # windows in tiny models are 8 tokens
    generator = torch.Generator().manual_seed(0)
    ids = torch.randint(VOCAB_SIZE, (sum(lengths),), generator=generator)
    positions = torch.cat([torch.arange(length) for length in lengths])
    factor = torch.randn(sum(lengths), HIDDEN, generator=generator)

    def run(model, *, packed: bool) -> tuple[Tensor, dict[str, Tensor]]:
        backbone = model.model
        if packed:
            layout = PackedLayout.of_lengths(lengths, CPU)
            output = backbone(input_ids=ids[None], position_ids=positions[None], use_cache=False, packed=layout)
            hidden = output.last_hidden_state[0]
        else:
            pieces = [backbone(input_ids=piece[None], use_cache=False) for piece in ids.split(lengths)]
            hidden = torch.cat([piece.last_hidden_state[0] for piece in pieces])
        (hidden * factor).sum().backward()
        return hidden, {name: parameter.grad for name, parameter in backbone.named_parameters()}

    ours, theirs = tiny_model(arch, scale=4.0), tiny_model(arch, scale=4.0)
    ours.set_attn_implementation(PACKED_ATTENTION)
    theirs.set_attn_implementation("eager")
    hidden, gradients = run(ours, packed=True)
    expected, expected_gradients = run(theirs, packed=False)

    torch.testing.assert_close(hidden, expected, rtol=1e-5, atol=2e-5)
    for name, gradient in gradients.items():
        scale = expected_gradients[name].abs().max()
        assert (gradient - expected_gradients[name]).abs().max() <= 1e-4 * scale, name


def test_a_window_known_only_to_the_mask_is_refused_where_it_matters():
    # Qwen2-MoE puts its window into the mask alone; within 8 tokens a window of 8 changes nothing.
    attention.register()
    model = tiny_model("qwen2_moe")
    model.set_attn_implementation(PACKED_ATTENTION)

    def run(length: int) -> None:
        ids = torch.arange(length)[None]
        model.model(input_ids=ids, position_ids=ids, use_cache=False, packed=PackedLayout.of_lengths((length,), CPU))

    run(8)
    with pytest.raises(ModelError, match="Qwen2MoeAttention does not pass its window of 8 tokens to attention"):
        run(9)
