"""attn_implementation="lightvlm" against transformers' own attention, on tiny models."""

from __future__ import annotations

import copy
import os
import subprocess
import sys
from typing import Any

import lightvlm
import pytest
import torch
from lightvlm import attention
from lightvlm.attention.choice import TABLE
from lightvlm.attention.row_spans import RowSpans
from lightvlm.attention.transformers_hook import attention as hook
from python.test_prefill import lightvlm_plan
from python.tiny import INTERNVL, LLAVA, QWEN, VOCABULARY, Family, Image, generate, generate_logits
from torch import Tensor, nn
from transformers import AttentionInterface, AttentionMaskInterface
from transformers.masking_utils import ALL_MASK_ATTENTION_FUNCTIONS

lightvlm.register_attention()
OURS = "lightvlm"
ROWS = [[1, 2, Image(0), 3, 4, 5], [6, 7, 8], [9, Image(1), 10, Image(2), 11, 12]]


@pytest.fixture(params=[LLAVA, INTERNVL, QWEN], ids=lambda family: family.name)
def family(request: pytest.FixtureRequest) -> Family:
    return request.param


def text_model(kind: str) -> Any:
    """A tiny decoder of another family: what its attention has besides, and the implementation that knows it."""
    import transformers

    sizes: dict[str, Any] = {
        "hidden_size": 32,
        "intermediate_size": 48,
        "num_hidden_layers": 4,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "head_dim": 8,
        "vocab_size": VOCABULARY,
        "max_position_embeddings": 256,
        "initializer_range": 0.25,
        "pad_token_id": 0,
        "bos_token_id": 1,
        "eos_token_id": None,
    }
    configs: dict[str, tuple[str, dict[str, Any], str]] = {
        "mistral": ("Mistral", {"sliding_window": 5}, "sdpa"),
        "gemma2": (
            "Gemma2",
            {"sliding_window": 5, "query_pre_attn_scalar": 8, "attn_logit_softcapping": 3.0},
            "eager",
        ),
        "gemma3": ("Gemma3Text", {"sliding_window": 5, "query_pre_attn_scalar": 8}, "sdpa"),
        "gpt_oss": (
            "GptOss",
            {"sliding_window": 5, "num_local_experts": 2, "num_experts_per_tok": 1},
            "eager",
        ),
    }
    name, options, reference = configs[kind]
    config = getattr(transformers, f"{name}Config")(**sizes | options)
    classes = {"Gemma3Text": "Gemma3ForCausalLM"}
    torch.manual_seed(5)
    model = getattr(transformers, classes.get(name, f"{name}ForCausalLM"))(config).eval()
    for parameter_name, parameter in model.named_parameters():
        if parameter_name.endswith("sinks"):  # whose own start is nearly nothing
            parameter.data.normal_(1.0, 1.0)
    model.generation_config.eos_token_id = None
    model.set_attn_implementation(reference)
    return model


KINDS = ("mistral", "gemma2", "gemma3", "gpt_oss")


def ours_of(model: Any) -> Any:
    other = copy.deepcopy(model)
    other.set_attn_implementation(OURS)
    return other


def explicit(
    query: Tensor, key: Tensor, value: Tensor, seen: Tensor, scale: float, cap: float, sinks: Tensor | None
) -> Tensor:
    """(B, Sq, Hq, D) in float64, from the formula; 0 for a row that sees nothing."""
    group = query.shape[1] // key.shape[1]
    k, v = (x.double().repeat_interleave(group, dim=1) for x in (key, value))
    logits = query.double() @ k.transpose(2, 3) * scale
    logits = cap * torch.tanh(logits / cap) if cap else logits
    logits = logits.masked_fill(~seen, -torch.inf)
    if sinks is not None:
        logits = torch.cat(
            [logits, sinks.double()[:, None, None].expand(len(logits), -1, logits.shape[2], 1)], -1
        )
    weights = logits.softmax(-1)[..., : k.shape[2]].nan_to_num(0.0)
    return (weights @ v).transpose(1, 2)


def exact_attention(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    **options: Any,
) -> tuple[Tensor, None]:
    """What transformers' masks say, in float64. (Its eager attention takes softmax in fp32, whatever the model is.)"""
    rows, keys = query.shape[2], key.shape[2]
    causal = options.get("is_causal")
    causal = module.is_causal if causal is None else causal
    seen = attention_mask
    if seen is None:
        seen = torch.ones(rows, keys, dtype=torch.bool)
        seen = seen.tril(keys - rows) if causal else seen
    scale = options.get("scaling") or query.shape[-1] ** -0.5
    return explicit(query, key, value, seen, scale, options.get("softcap") or 0.0, options.get("s_aux")), None


AttentionInterface.register("float64", exact_attention)
AttentionMaskInterface.register("float64", ALL_MASK_ATTENTION_FUNCTIONS["sdpa"])


def exact_of(model: Any) -> Any:
    other = copy.deepcopy(model).double()
    other.set_attn_implementation("float64")
    if hasattr(other, "set_experts_implementation"):
        other.set_experts_implementation("eager")  # the quick ones know no float64
    return other


def token_batch(left: bool) -> dict[str, Tensor]:
    """Rows of 14, 4 and 9 tokens: longer than the windows, and shorter."""
    lists = [list(range(2, 16)), [20, 21, 22, 23], list(range(30, 39))]
    inputs = LLAVA.batch(lists, left=left)
    return {"input_ids": inputs["input_ids"], "attention_mask": inputs["attention_mask"]}


def logits_of(model: Any, inputs: dict[str, Tensor]) -> Tensor:
    """(tokens, V) float64, of all tokens that are no padding."""
    with torch.no_grad():
        logits: Tensor = model(**inputs).logits
    assert logits.isfinite().all()
    return logits.double()[inputs["attention_mask"].bool()]


def check_noise(found: Tensor, reference: Tensor, exact: Tensor) -> None:
    """Our error's root mean square, against the model in float64, is at most twice the reference's: both are the same
    roundings in another order, over thousands of logits."""
    ours, theirs = ((x - exact).square().mean().sqrt().item() for x in (found, reference))
    assert theirs > 0
    assert ours <= 2 * theirs, (ours, theirs)


@pytest.mark.parametrize("left", [True, False], ids=["left", "right"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"])
def test_families(family: Family, dtype: torch.dtype, left: bool) -> None:
    """Tower and decoder, padded on either side."""
    model = family.build(dtype, "sdpa")
    inputs = family.batch(ROWS, dtype, left)
    exact = exact_of(model)
    wide = {key: x.double() if x.is_floating_point() else x for key, x in inputs.items()}
    reference = logits_of(model, inputs)
    check_noise(logits_of(ours_of(model), inputs), reference, logits_of(exact, wide))


@pytest.mark.parametrize("left", [True, False], ids=["left", "right"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"])
@pytest.mark.parametrize("kind", KINDS)
def test_windows_softcap_and_sinks(kind: str, dtype: torch.dtype, left: bool) -> None:
    model = text_model(kind).to(dtype)
    inputs = token_batch(left)
    exact = exact_of(model)
    reference = logits_of(model, inputs)
    check_noise(logits_of(ours_of(model), inputs), reference, logits_of(exact, inputs))


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"use_cache": False},
        {"cache_implementation": "static"},
        {"num_beams": 3},
        {"prompt_lookup_num_tokens": 2},
    ],
    ids=["dynamic", "no cache", "static", "beams", "drafts"],
)
def test_generate(family: Family, options: dict[str, Any]) -> None:
    model = family.build(torch.float32, "sdpa")
    rows = ROWS[:1] if "prompt_lookup_num_tokens" in options else ROWS
    if options.get("use_cache") is False and family is QWEN:
        pytest.skip("transformers gives Qwen2.5-VL its pixels only once")
    inputs = family.batch(rows)
    expected = generate(model, inputs, 8, **options)
    assert torch.equal(generate(ours_of(model), inputs, 8, **options), expected)


@pytest.mark.parametrize("cache", [None, "static"])
@pytest.mark.parametrize("kind", KINDS)
def test_generate_past_the_window(kind: str, cache: str | None) -> None:
    model = text_model(kind)
    inputs = token_batch(True)
    options = {} if cache is None else {"cache_implementation": cache, "disable_compile": True}
    expected = generate(model, inputs, 8, **options)
    assert torch.equal(generate(ours_of(model), inputs, 8, **options), expected)


def test_a_part_of_a_model(llava: Any) -> None:
    """The decoder alone, or the tower alone; and off is off."""
    inputs = LLAVA.batch(ROWS)
    expected = logits_of(llava, inputs)
    for parts in (
        {"text_config": OURS, "vision_config": "sdpa"},
        {"text_config": "sdpa", "vision_config": OURS},
    ):
        llava.set_attn_implementation(parts)
        assert llava.config.text_config._attn_implementation == parts["text_config"]
        assert llava.config.vision_config._attn_implementation == parts["vision_config"]
        torch.testing.assert_close(logits_of(llava, inputs), expected, atol=1e-4, rtol=1e-5)
    llava.set_attn_implementation("sdpa")
    assert torch.equal(logits_of(llava, inputs), expected)


def test_a_cache_that_is_padded_amid_a_row(llava: Any) -> None:
    """Right padding, then more tokens: the mask has a hole, which goes by an explicit mask."""
    inputs = LLAVA.batch([[1, 2, 3, 4, 5], [6, 7, 8]], left=False)
    more = torch.tensor([[10, 11], [12, 13]])
    mask = torch.cat([inputs["attention_mask"], torch.ones_like(more)], dim=1)
    positions = (mask.cumsum(-1) - 1).clamp_min(0)

    def answer(model: Any) -> Tensor:
        with torch.no_grad():
            cache = model(**inputs, use_cache=True).past_key_values
            options = {"attention_mask": mask, "position_ids": positions[:, -2:], "past_key_values": cache}
            return model(input_ids=more, **options).logits

    expected = answer(llava)
    torch.testing.assert_close(answer(ours_of(llava)), expected, atol=1e-4, rtol=1e-5)
    # and the row is what it is alone
    alone = torch.tensor([[6, 7, 8, 12, 13]])
    with torch.no_grad():
        row = ours_of(llava)(input_ids=alone).logits[:, -2:]
    torch.testing.assert_close(row, expected[1:], atol=1e-4, rtol=1e-5)


def test_packed_sequences(llava: Any) -> None:
    """Told apart by position_ids, as transformers does it without a cache and a mask."""
    inputs = {
        "input_ids": torch.tensor([[1, 2, 3, 4, 5, 6, 7]]),
        "position_ids": torch.tensor([[0, 1, 2, 3, 0, 1, 2]]),
        "use_cache": False,
    }
    with torch.no_grad():
        found = ours_of(llava)(**inputs).logits
        apart = [llava(input_ids=ids).logits for ids in inputs["input_ids"].split([4, 3], dim=1)]
    torch.testing.assert_close(found, torch.cat(apart, dim=1), atol=1e-4, rtol=1e-5)


class Module(nn.Module):
    is_causal = True


def qkv(*sizes: int, heads: int = 4, width: int = 8) -> list[Tensor]:
    generator = torch.Generator().manual_seed(1)
    rows, keys = sizes
    shapes = [(1, heads, rows, width), (1, 2, keys, width), (1, 2, keys, width)]
    return [torch.randn(*shape, generator=generator) for shape in shapes]


@pytest.mark.parametrize("window", [None, 2])
def test_lengths_as_flash_attention_gets_them(window: int | None) -> None:
    """cu_seq_lens_q and so on, as transformers hands them to attention functions."""
    query, key, value = qkv(7, 7)
    ends = torch.tensor([0, 4, 7], dtype=torch.int32)
    lengths = {"cu_seq_lens_q": ends, "cu_seq_lens_k": ends, "max_length_q": 4, "max_length_k": 4}
    found, _ = hook(Module(), query, key, value, None, sliding_window=window, **lengths)
    parts = [
        hook(Module(), *(x[:, :, a:b] for x in (query, key, value)), None, sliding_window=window)[0]
        for a, b in ((0, 4), (4, 7))
    ]
    torch.testing.assert_close(found, torch.cat(parts, dim=1))


@pytest.mark.parametrize("cap", [0.0, 2.0])
@pytest.mark.parametrize("sinks", [False, True])
@pytest.mark.parametrize("form", ["none", "bool", "additive", "heads"])
def test_every_way_through_the_function(form: str, sinks: bool, cap: float) -> None:
    """Without a mask, last rows at the last keys; with an explicit one, that alone, also where a row sees nothing."""
    query, key, value = qkv(3, 6)
    sink = torch.tensor([0.5, -1.0, 2.0, 0.0]) if sinks else None
    seen = torch.ones(3, 6, dtype=torch.bool).tril(3)[None, None]
    mask = None
    if form != "none":
        seen = (
            torch.rand(1, 4 if form == "heads" else 1, 3, 6, generator=torch.Generator().manual_seed(2)) < 0.5
        )
        seen[:, :, 1] = False
        mask = seen if form != "additive" else torch.zeros(seen.shape).masked_fill(~seen, -torch.inf)
    found, weights = hook(Module(), query, key, value, mask, softcap=cap or None, s_aux=sink)
    assert weights is None
    expected = explicit(query, key, value, seen, 8**-0.5, cap, sink)
    torch.testing.assert_close(found.double(), expected, atol=1e-6, rtol=1e-5)


def band(rows: int, keys: int, left: int, right: int, begin: int = 0, end: int | None = None) -> Tensor:
    """(Sq, Sk) bool: row i stands at key i + end - Sq and sees keys [begin, end) within left and right of it."""
    end = keys if end is None else end
    at = torch.arange(rows)[:, None] + end - rows
    key = torch.arange(keys)
    seen = (key >= begin) & (key < end) & ((left < 0) | (key >= at - left))
    return seen & ((right < 0) | (key <= at + right))


@pytest.mark.parametrize("causal", [True, False])
@pytest.mark.parametrize("window", [-1, 1, 2])
@pytest.mark.parametrize("sinks", [False, True])
@pytest.mark.parametrize(("begin", "end"), [(0, 6), (2, 6), (1, 5), (6, 6)])
def test_row_spans(begin: int, end: int, sinks: bool, window: int, causal: bool) -> None:
    """What the mask says, whatever the module says of causality; a causal window may be the mask's or the layer's."""
    query, key, value = qkv(4, 6)
    sink = torch.tensor([0.5, -1.0, 2.0, 0.0]) if sinks else None
    module = Module()
    module.is_causal = not causal
    seen = band(4, 6, window, 0 if causal else window, begin, end)
    expected = explicit(query, key, value, seen, 8**-0.5, 0.0, sink)
    cases = [(window, None), (window, 7)]
    cases.append((-1, window + 1 if window >= 0 else None) if causal else (window, 1))
    for of_mask, of_layer in cases:
        spans = RowSpans(torch.tensor([begin]), torch.tensor([end]), causal, of_mask)
        found, _ = hook(module, query, key, value, spans.as_mask(), sliding_window=of_layer, s_aux=sink)
        torch.testing.assert_close(found.double(), expected, atol=1e-6, rtol=1e-5)


@pytest.mark.parametrize("causal", [True, False])
def test_a_window_without_a_mask(causal: bool) -> None:
    """The layer's sliding_window counts the row's own key; where rows look both ways, only masks have windows."""
    query, key, value = qkv(4, 6)
    found, _ = hook(Module(), query, key, value, None, sliding_window=2, is_causal=causal)
    seen = band(4, 6, 1, 0) if causal else torch.ones(4, 6, dtype=torch.bool)
    expected = explicit(query, key, value, seen, 8**-0.5, 0.0, None)
    torch.testing.assert_close(found.double(), expected, atol=1e-6, rtol=1e-5)


def test_a_bidirectional_window_is_the_masks() -> None:
    """T5Gemma's encoder tells its layers a window that is one narrower, as FlashAttention counts, than its mask's."""
    from transformers import T5GemmaConfig, T5GemmaForConditionalGeneration, T5GemmaModuleConfig

    sizes: dict[str, Any] = {
        "vocab_size": VOCABULARY, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2,
        "num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 8, "sliding_window": 3,
        "query_pre_attn_scalar": 8, "attn_logit_softcapping": None, "initializer_range": 0.25, "pad_token_id": 0,
        "bos_token_id": 1, "eos_token_id": None,
    }  # fmt: skip
    torch.manual_seed(5)
    halves = {"encoder": T5GemmaModuleConfig(**sizes), "decoder": T5GemmaModuleConfig(**sizes)}
    model: Any = T5GemmaForConditionalGeneration(T5GemmaConfig(**halves, vocab_size=VOCABULARY)).eval()
    model.set_attn_implementation("eager")  # it has no other
    other = ours_of(model)
    for length in (4, 9):  # 4: the mask hides nothing, and yet the window of the layers would
        tokens = torch.randint(2, VOCABULARY, (2, length))
        mask = torch.ones_like(tokens)
        for padding in (slice(0), slice(-1, None), slice(2)):
            mask[0] = 1
            mask[0, padding] = 0
            args = {"input_ids": tokens, "attention_mask": mask, "decoder_input_ids": tokens[:, :3]}
            with torch.no_grad():
                expected, found = model(**args).logits, other(**args).logits
            torch.testing.assert_close(found, expected, atol=1e-4, rtol=1e-4)


def test_values_of_another_width() -> None:
    query, key, value = qkv(3, 5)
    found, _ = hook(Module(), query, key, value[..., :5], None)
    whole, _ = hook(Module(), query, key, value, None)
    assert found.shape == (1, 3, 4, 5)
    torch.testing.assert_close(found, whole[..., :5])


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"dropout": 0.1}, "dropout: got 0.1, must be 0"),
        ({"position_bias": torch.zeros(1, 4, 3, 3)}, "position_bias: a learned bias"),
        ({"cache": object()}, "cache: continuous batching"),
        ({"output_attentions": True}, "output_attentions: lightvlm's attention has no weights"),
        ({"attention_mask": torch.ones(1, 3, dtype=torch.bool)}, "attention_mask: has shape"),
        ({"attention_mask": torch.ones(1, 1, 3, 4, dtype=torch.bool)}, "attention_mask: has shape"),
    ],
)
def test_refusals(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        hook(Module(), *qkv(3, 3), **{"attention_mask": None, **options})


def test_refuses_masks_of_another_kind() -> None:
    with pytest.raises(TypeError, match="attention_mask: got object, must be a tensor"):
        hook(Module(), *qkv(3, 3), object())
    with pytest.raises(TypeError, match=r"attention_mask: has dtype torch\.int64"):
        hook(Module(), *qkv(3, 3), torch.ones(1, 1, 3, 3, dtype=torch.int64))


@pytest.mark.parametrize("padded", [False, True])
def test_compiled(llava: Any, padded: bool) -> None:
    """In one graph, without a break; padding by an explicit mask, as nothing can be read while it is traced."""
    from transformers import DynamicCache

    inputs = token_batch(True)
    if not padded:
        inputs = {"input_ids": inputs["input_ids"], "attention_mask": None}
    text = ours_of(llava).model.language_model
    torch._dynamo.reset()
    compiled = torch.compile(text, backend="eager", fullgraph=True)
    with torch.no_grad():
        found = compiled(**inputs, past_key_values=DynamicCache(config=text.config)).last_hidden_state
        expected = llava.model.language_model(**inputs).last_hidden_state
    torch._dynamo.reset()
    kept = inputs["attention_mask"].bool() if padded else torch.ones_like(inputs["input_ids"]).bool()
    torch.testing.assert_close(found[kept], expected[kept], atol=1e-4, rtol=1e-5)


def test_training_is_refused(llava: Any) -> None:
    model = ours_of(llava)
    with pytest.raises(ValueError, match="requires grad, but lightvlm's attention has no backward"):
        model(**LLAVA.batch(ROWS))


def test_the_backends_are_asked(monkeypatch: pytest.MonkeyPatch, llava: Any) -> None:
    """A model's calls go where any other call goes."""
    model = ours_of(llava)
    ran = []
    for backend in TABLE:
        run = type(backend).run
        monkeypatch.setattr(
            type(backend), "run", lambda self, call, run=run: ran.append(self.name) or run(self, call)
        )
    with attention.use_backend("tiled"):
        logits_of(model, LLAVA.batch(ROWS))
    assert set(ran) == {"tiled"}
    ran.clear()
    generate(model, LLAVA.batch(ROWS), 2)
    assert "tiled" not in ran
    assert "cpu_flash" in ran


@pytest.mark.parametrize("rows", [ROWS[:1], ROWS], ids=["one", "padded"])
def test_a_plan_is_the_same_on_it(family: Family, rows: list[Any]) -> None:
    """LightVLM keeps the same tokens as on sdpa and gives the same answers."""
    model = family.build(torch.float32, "sdpa")
    inputs = family.batch(rows)
    plan = lightvlm_plan()
    with lightvlm.attach(model, plan) as run:
        expected, expected_logits = generate_logits(model, inputs, 6)
        layers = run.report().tokens_per_layer
    ours = ours_of(model)
    plain = logits_of(ours, inputs)
    with lightvlm.attach(ours, plan) as run:
        found, found_logits = generate_logits(ours, inputs, 6)
        assert run.report().tokens_per_layer == layers
        assert not run.report().stepped_aside
    assert torch.equal(found, expected)
    torch.testing.assert_close(found_logits, expected_logits, atol=1e-4, rtol=1e-5)
    assert ours.config.get_text_config()._attn_implementation == OURS
    assert torch.equal(logits_of(ours, inputs), plain)


def test_nothing_is_registered_by_an_import() -> None:
    code = (
        "import sys, lightvlm, lightvlm.attention\n"
        "lightvlm.replace_flash_attn\n"
        "assert 'transformers' not in sys.modules\n"
        "from transformers import AttentionInterface, AttentionMaskInterface\n"
        "assert 'lightvlm' not in AttentionInterface()\n"
        "lightvlm.register_attention(); lightvlm.register_attention()\n"
        "assert 'lightvlm' in AttentionInterface() and 'lightvlm' in AttentionMaskInterface()\n"
    )
    path = os.pathsep.join(sys.path)
    subprocess.run([sys.executable, "-c", code], check=True, env={**os.environ, "PYTHONPATH": path})
