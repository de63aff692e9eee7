"""One host read per prompt, none per layer or token: between the first layer and the last, nobody asks the device.

On a CPU a read costs nothing, so it is counted instead: what would be a read of a device tensor on a GPU. The ops'
own checks of values are left out, sparse attention row by row, and the layout; they happen on CPU tensors alone.
"""

from __future__ import annotations

import sys
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import lightvlm
import pytest
import torch
from lightvlm.methods.decode_compaction import DecodeCompaction
from lightvlm.methods.kv_precision import KVPrecision
from python.test_precision import LONG, ZIPVL
from python.test_prefill import OPTIONS, ROWS, lightvlm_plan, prompt
from python.tiny import DEPTH, LLAVA, QWEN, Family, extend, generate
from torch.utils._python_dispatch import TorchDispatchMode

READS = (
    "item",
    "tolist",
    "cpu",
    "numpy",
    "nonzero",
    "__bool__",
    "__int__",
    "__float__",
    "__index__",
)
DISPATCHED = ("_local_scalar_dense", "nonzero", "masked_select", "is_nonzero", "equal", "unique", "_unique2")


ON_HOST = ("lightvlm_ext", "lightvlm/layout.py", "methods/windows.py")
"""Code whose reads are no device's: the ops and their references, layouts of what has been read, and tables of LightKV
made of the host's numbers."""


def in_ops() -> bool:
    """Whether the caller is one of these, or what stands for a kernel on a CPU."""
    frame: Any = sys._getframe(2)
    while frame is not None:
        code = frame.f_code
        if any(part in code.co_filename for part in ON_HOST) or code.co_name == "_row_by_row":
            return True
        frame = frame.f_back
    return False


class _Counter(TorchDispatchMode):
    """Counts calls that wait for a value, in the dispatcher and on tensors."""

    def __init__(self, found: list[str]) -> None:
        super().__init__()
        self.found = found

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        name = func.overloadpacket.__name__
        indexed = name in ("index", "index_put_", "index_put") and any(
            x is not None and x.dtype == torch.bool for x in args[1]
        )
        if (name in DISPATCHED or indexed) and not in_ops():
            self.found.append(name)
        return func(*args, **(kwargs or {}))


@contextmanager
def counted_reads(model: Any, monkeypatch: pytest.MonkeyPatch, where: str = "layers") -> Iterator[list[str]]:
    """Reads between the entry of the first decoder layer and the end of the base model's call, hooks included.

    ``where``: "hooks" counts instead those of the hooks that attach put before the base model, while a cache is
    continued, and before its decoder; "prompt" those of the hook before the base model, while a prompt begins.
    """
    found: list[str] = []
    open_: list[_Counter] = []

    def watch(name: str) -> Any:
        original = getattr(torch.Tensor, name)

        def counting(self: torch.Tensor, *args: Any, **kwargs: Any) -> Any:
            if open_ and not in_ops():
                found.append(name)
            return original(self, *args, **kwargs)

        return counting

    def enter(module: Any, *_: Any) -> None:
        open_.append(_Counter(found))
        open_[0].__enter__()

    def enter_call(module: Any, args: Any, kwargs: Any) -> None:
        cache = kwargs.get("past_key_values")
        filled = cache is not None and cache.get_seq_length() > 0
        if filled == (where == "hooks"):
            enter(module)

    def leave(module: Any, *_: Any) -> None:
        if open_:
            open_.pop().__exit__(None, None, None)

    with monkeypatch.context() as patch:
        for name in READS:
            patch.setattr(torch.Tensor, name, watch(name))
        # ours come first at the layer and last at the model: registered before and after those of attach
        base, decoder = model.model, model.model.language_model
        if where in ("hooks", "prompt"):
            handles = [
                base.register_forward_pre_hook(enter_call, prepend=True, with_kwargs=True),
                base.register_forward_pre_hook(leave),
            ]
        if where == "hooks":
            handles += [
                decoder.register_forward_pre_hook(enter, prepend=True),
                decoder.register_forward_pre_hook(leave),
            ]
        if where == "layers":
            handles = [
                decoder.layers[0].register_forward_pre_hook(enter, prepend=True),
                base.register_forward_hook(leave),
            ]
        try:
            yield found
        finally:
            for handle in handles:
                handle.remove()


@pytest.mark.parametrize("name", [*OPTIONS, "random"])
def test_no_reads_between_layers(
    model: Any, family: Family, name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    part = (
        lightvlm_plan(**OPTIONS[name]).prefill
        if name in OPTIONS
        else lightvlm.Random(0.3, min_image_tokens=0).prefill
    )
    plan = lightvlm.Plan(
        prefill=part, cache=DecodeCompaction(keep=0.2, interval=3, sinks=1, recent=4, rows=3)
    )
    with lightvlm.attach(model, plan) as run, counted_reads(model, monkeypatch) as found:
        generate(model, family.batch(ROWS), 10)
    assert run.report().compactions == 3
    assert found == []


@pytest.mark.parametrize("called", ["forward", "generate"])
def test_reads_of_a_prompt(model: Any, family: Family, called: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Where the image tokens are, once; and once the grids of images of any size, where they come with the pixels."""
    with lightvlm.attach(model, lightvlm_plan()) as run, counted_reads(model, monkeypatch, "prompt") as found:
        if called == "generate":
            generate(model, family.batch(ROWS), 2)
        else:
            with torch.no_grad():
                model(**prompt(family, ROWS))
    # __bool__: whether there are image tokens at all, which the host knows by then
    layout, grids = ["cpu", "__bool__", "_local_scalar_dense"], ["tolist"] * (family is QWEN)
    # generate() of newer transformers has encoded the images by then, and brings no grids
    assert found == layout + grids or (called == "generate" and found == layout)
    assert run.report().prefills == len(ROWS)


@pytest.mark.parametrize("keep", ["offload", "quantize"])
def test_a_transcript_reads_nothing(
    model: Any, family: Family, keep: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Noting what is said at every token, with beams that change places, and putting it back when it is read anew."""
    cache = DecodeCompaction(keep=0.2, interval=3, sinks=1, recent=4, rows=3)
    plan = lightvlm.Plan(prefill=lightvlm_plan().prefill, cache=cache, keep_for_later=keep)  # type: ignore[arg-type]
    with lightvlm.attach(model, plan) as run:
        with counted_reads(model, monkeypatch, where="hooks") as found:
            generate(model, family.batch(ROWS), 10, num_beams=2)
        assert found == []
        # whether there is padding among a question's tokens is asked once before it is read, so only here not counted
        inputs = {"past_key_values": None, **prompt(family, ROWS)}
        with torch.no_grad(), counted_reads(model, monkeypatch) as found:
            out = model(**inputs)
            question = torch.tensor([[21, 22], [23, 24], [25, 26], [27, 28]])
            extend(family, model, inputs["attention_mask"], question, past_key_values=out.past_key_values)
        assert found == []
        assert run.report().reread == 1
        assert run.report().later_bytes > 0


def test_reads_of_the_hooks_are_counted(llava: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    from lightvlm.transcript import Transcript

    add = Transcript.add

    def reading(self: Any, ids: Any, *args: Any) -> None:
        ids.sum().item()
        add(self, ids, *args)

    monkeypatch.setattr(Transcript, "add", reading)
    with lightvlm.attach(llava, lightvlm_plan()), counted_reads(llava, monkeypatch, where="hooks") as found:
        generate(llava, LLAVA.batch(ROWS[:1]), 3)
    assert found.count("item") == 3


@pytest.fixture(scope="module")
def wide() -> Any:
    """Heads of 32 channels, which a packed cache needs."""
    return LLAVA.build(head_dim=32)


PACKED: dict[str, tuple[dict[str, Any], dict[str, Any] | None, int]] = {
    # of the precision part, of the cache part, reads in 140 tokens
    "mass": ({}, {"keep": 0.3, "interval": 70}, 0),
    "packed": ({"interval": 64}, None, 0),
    # the prompt, whose important tokens the device counts, and 128 generated ones
    "low-bits": ({"interval": 128, "low_bits": 2}, None, 2),
    # two compactions, each of all layers and segments together
    "drop": ({"interval": 64}, {"limit": 8, "interval": 70}, 2),
    "demote": ({"interval": 64}, {"limit": 8, "interval": 70, "others": "demote"}, 2),
    "edges": ({"interval": 64, "edge_bits": 16}, {"limit": 8, "interval": 70}, 2),
    "low-bits-drop": ({"interval": 128, "low_bits": 2}, {"limit": 8, "interval": 70}, 4),
}


@pytest.mark.parametrize("name", PACKED)
def test_reads_of_a_packed_cache(wide: Any, name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """One for all layers where the device alone knows how many tokens get which bits, or stay; none otherwise."""
    stored, kept, reads = PACKED[name]
    always = {"sinks": 2, "recent": 6}
    plan = lightvlm.Plan(
        prefill=ZIPVL if "low_bits" in stored else None,
        cache=None if kept is None else DecodeCompaction(**always, **kept),
        precision=KVPrecision(4, **always, **stored) if stored else None,
    )
    with lightvlm.attach(wide, plan) as run, counted_reads(wide, monkeypatch) as found:
        generate(wide, LLAVA.batch(LONG), 141)
    assert found == ["tolist"] * reads
    assert run.report().compactions == (0 if kept is None else 2)
    if stored:
        # once for the prompt of each packed layer, once for its generated tokens and bits
        assert run.report().op_calls["quantize_kv"] >= 2 * (DEPTH - 2)


def test_the_counter_counts(llava: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """Reads of every kind, put into a layer, are found."""
    layer = llava.model.language_model.layers[2]

    def read(module: Any, args: Any) -> None:
        x = args[0]
        x.sum().item()
        x[0, 0].tolist()
        bool((x > 0).any())
        x[x > 0]
        (x > 0).nonzero()
        x.cpu()

    with counted_reads(llava, monkeypatch) as found:
        handle = layer.register_forward_pre_hook(read)
        generate(llava, LLAVA.batch(ROWS[:1]), 1)
        handle.remove()
    assert {"item", "tolist", "__bool__", "index", "nonzero", "cpu"} <= set(found)
