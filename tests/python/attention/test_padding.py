"""unpad_input, pad_input, index_first_axis: there and back."""

from __future__ import annotations

import inspect

import pytest
import torch
from lightvlm.flash_attn_interface import (
    bert_padding,
    flash_attn_func,
    flash_attn_varlen_func,
    index_first_axis,
    pad_input,
    unpad_input,
)

MASK = torch.tensor([[0, 1, 1, 1, 0], [0, 0, 0, 0, 0], [1, 1, 1, 1, 1], [1, 0, 0, 1, 0]])


def test_signatures() -> None:
    """flash_attn.bert_padding's, of 2.8.3."""
    found = {
        name: list(inspect.signature(getattr(bert_padding, name)).parameters)
        for name in ("unpad_input", "pad_input", "index_put_first_axis")
    }
    assert found == {
        "unpad_input": ["hidden_states", "attention_mask", "unused_mask"],
        "pad_input": ["hidden_states", "indices", "batch", "seqlen"],
        "index_put_first_axis": ["values", "indices", "first_axis_dim"],
    }


@pytest.mark.parametrize("mask", [MASK, MASK.bool()], ids=["int", "bool"])
@pytest.mark.parametrize("rest", [(3,), (2, 4)], ids=str)
def test_there_and_back(mask: torch.Tensor, rest: tuple[int, ...]) -> None:
    x = torch.randn(4, 5, *rest)
    tokens, indices, cu_seqlens, longest, used = unpad_input(x, mask)
    assert torch.equal(tokens, x[mask.bool()])
    assert cu_seqlens.tolist() == [0, 3, 3, 8, 10]
    assert cu_seqlens.dtype == used.dtype == torch.int32
    assert longest == 5
    assert used.tolist() == [3, 0, 5, 2]
    assert torch.equal(index_first_axis(x.flatten(0, 1), indices), tokens)
    again = pad_input(tokens, indices, 4, 5)
    assert torch.equal(again, x * mask.view(4, 5, *(1 for _ in rest)))
    assert torch.equal(bert_padding.index_put_first_axis(tokens, indices, 20), again.flatten(0, 1))


def test_unused_tokens() -> None:
    """They stay in the result and are no tokens of the mask."""
    x = torch.randn(4, 5, 3)
    unused = torch.zeros_like(MASK)
    unused[1, 2] = 1
    tokens, _, cu_seqlens, longest, used = unpad_input(x, MASK, unused)
    assert torch.equal(tokens, x[(MASK + unused).bool()])
    assert cu_seqlens.tolist() == [0, 3, 4, 9, 11]
    assert longest == 5
    assert used.tolist() == [3, 0, 5, 2]


def test_bad_input() -> None:
    x = torch.randn(4, 5, 3)
    with pytest.raises(ValueError, match=r"attention_mask: has shape \(4, 4\), must be \(4, 5\)"):
        unpad_input(x, MASK[:, :4])
    with pytest.raises(ValueError, match=r"indices: has shape \(2,\), must be \(4,\)"):
        pad_input(x, torch.tensor([0, 1]), 4, 5)


def test_a_padded_batch() -> None:
    """Unpadded, attended to and padded again: each row as alone."""
    q, k, v = (torch.randn(4, 5, heads, 32) for heads in (4, 2, 2))
    packed = [unpad_input(x, MASK)[0] for x in (q, k, v)]
    _, indices, at, longest, _ = unpad_input(q, MASK)
    out = pad_input(flash_attn_varlen_func(*packed, at, at, longest, longest, causal=True), indices, 4, 5)
    for row, mask in enumerate(MASK.bool()):
        alone = flash_attn_func(*(x[row : row + 1, mask] for x in (q, k, v)), causal=True)
        torch.testing.assert_close(out[row, mask], alone[0])
        assert not out[row, ~mask].any()
