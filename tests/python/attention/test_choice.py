"""Which backend runs a call, how to choose one, and what is said when none can."""

from __future__ import annotations

import json
from typing import Any

import pytest
import torch
from lightvlm import attention, cli
from lightvlm.attention import backends, choice, flash_attn_func, flash_attn_with_kvcache, use_backend
from lightvlm.attention.call import Call
from torch import Tensor

from lightvlm_ext import _library


@pytest.fixture
def ran(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Names of the backends that ran a call."""
    names: list[str] = []

    def spy(backend: Any) -> None:
        run = backend.run

        def noted(call: Call) -> tuple[Tensor, Tensor]:
            names.append(backend.name)
            return run(call)

        monkeypatch.setattr(backend, "run", noted)

    for backend in choice.TABLE:
        spy(backend)
    return names


def tensors(rows: int = 4, width: int = 32) -> tuple[Tensor, Tensor, Tensor]:
    q, k, v = (torch.randn(1, n, h, width) for n, h in ((rows, 4), (6, 2), (6, 2)))
    return q, k, v


def test_the_table() -> None:
    found = {backend.name: backend for backend in backends()}
    assert list(found) == [
        "flash_attn_3", "flash_attn_4", "flash_attn_2", "decode", "torch_flash", "cpu_flash", "cudnn", "flex", "tiled",
    ]  # fmt: skip
    for name in ("decode", "cpu_flash", "tiled"):
        assert found[name].missing is None
    if torch.version.cuda is None:
        assert found["torch_flash"].missing == "torch is built without CUDA"
    assert all(backend.about for backend in found.values())


@pytest.mark.parametrize(
    ("options", "backend"),
    [
        ({}, "cpu_flash"),
        ({"causal": True}, "cpu_flash"),
        ({"causal": True, "window_size": (100, -1)}, "cpu_flash"),  # hides nothing
        ({"window_size": (2, 0)}, "tiled"),
        ({"softcap": 1.0}, "tiled"),
        ({"alibi_slopes": torch.rand(4)}, "tiled"),
    ],
)
def test_where_a_call_lands(ran: list[str], options: dict[str, Any], backend: str) -> None:
    flash_attn_func(*tensors(), **options)
    assert ran == [backend]


def test_where_a_decoding_step_lands(ran: list[str]) -> None:
    """On this package's own kernel, in every dtype, where it has the head_dim and there is one query a row."""

    def step(rows: int = 1, width: int = 32, dtype: torch.dtype = torch.bfloat16, **options: Any) -> str:
        flash_attn_with_kvcache(*(x.to(dtype) for x in tensors(rows, width)), cache_seqlens=5, **options)
        return ran.pop()

    index = torch.tensor([0], dtype=torch.int32)
    assert [step(), step(causal=True), step(window_size=(2, 0))] == ["decode"] * 3
    assert [step(width=40), step(rows=2)] == ["cpu_flash"] * 2
    assert step(rows=2, window_size=(2, 0)) == "tiled"
    assert step(dtype=torch.float32) == step(dtype=torch.float32, window_size=(2, 0)) == "decode"
    pages = [x.view(2, 16, 2, 32) for x in torch.randn(2, 2, 16, 64).unbind()]
    flash_attn_with_kvcache(tensors(1)[0], *pages, cache_seqlens=5, block_table=index[:, None])
    assert ran == ["decode"]


def test_use_backend(ran: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
    """The context comes before the environment variable, which comes before the table."""
    args = tensors()
    with use_backend("tiled"):
        flash_attn_func(*args)
        with use_backend("cpu_flash"):
            flash_attn_func(*args)
        flash_attn_func(*args)
    monkeypatch.setenv("LIGHTVLM_ATTENTION", "tiled")
    flash_attn_func(*args)
    with use_backend("cpu_flash"):
        flash_attn_func(*args)
    monkeypatch.setenv("LIGHTVLM_ATTENTION", "")
    flash_attn_func(*args)
    assert ran == ["tiled", "cpu_flash", "tiled", "tiled", "cpu_flash", "cpu_flash"]


def test_in_a_compiled_function(ran: list[str]) -> None:
    """The choice is made when the call runs, not when it is compiled."""
    compiled = torch.compile(
        lambda *args: flash_attn_func(*args, causal=True), fullgraph=True, backend="aot_eager"
    )
    args = tensors()
    compiled(*args)
    with use_backend("tiled"):
        compiled(*args)
    assert ran == ["cpu_flash", "tiled"]


def test_unknown_names(monkeypatch: pytest.MonkeyPatch) -> None:
    with (
        pytest.raises(ValueError, match="name: got 'flash', must be one of flash_attn_3, "),
        use_backend("flash"),
    ):
        pass
    monkeypatch.setenv("LIGHTVLM_ATTENTION", "fast")
    with pytest.raises(ValueError, match="LIGHTVLM_ATTENTION: got 'fast', must be one of"):
        flash_attn_func(*tensors())


def test_none_can() -> None:
    """The message has the call, and every backend with its reason."""
    with use_backend("cpu_flash"), pytest.raises(ValueError) as caught:  # noqa: PT011
        flash_attn_func(*tensors(), window_size=(2, 0))
    first, *lines = str(caught.value).splitlines()
    assert first.startswith(
        "cpu_flash, the attention backend asked for, cannot run this call (dense, cpu, float32, "
    )
    assert "query (1, 4, 4, 32), key (1, 6, 2, 32), window (2, 0), softcap 0, no ALiBi" in first
    names = [line.strip().split(":")[0] for line in lines]
    assert names == [backend.name for backend in backends()]
    assert "  cpu_flash: has no sliding window" in lines
    assert "  tiled: could, but was not asked for" in lines
    assert "  torch_flash: runs on CUDA, and query is on cpu" in lines


def test_no_backend_at_all(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(choice, "_ON_CPU", choice.TABLE[:1])
    with pytest.raises(ValueError, match="no attention backend can run this call"):
        flash_attn_func(*tensors())


def test_without_the_compiled_ops(ran: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
    """Everything works, decoding and importance too, on torch alone."""
    args = [x.bfloat16() for x in tensors(1)]
    options: dict[str, Any] = {"cache_seqlens": 5, "importance_window": 1}
    wanted = flash_attn_with_kvcache(*args, **options)
    prompts = [flash_attn_func(*tensors(), causal=causal, importance_window=2) for causal in (False, True)]
    monkeypatch.setattr(_library, "_loaded", None)
    monkeypatch.setenv("LIGHTVLM_LIBRARY", "/nowhere/_C.so")
    assert "missing at /nowhere" in {one.name: one.missing for one in backends()}["decode"]
    ran.clear()
    found = flash_attn_with_kvcache(*args, **options)
    assert ran == ["cpu_flash"]
    for a, b in zip(found, wanted, strict=True):
        torch.testing.assert_close(a, b, atol=1e-2, rtol=1e-2)  # two kernels' roundings of bf16
    torch.manual_seed(0)  # the same tensors once more
    tensors(1)
    for causal, prompt in zip((False, True), prompts, strict=True):
        _, scores = flash_attn_func(*tensors(), causal=causal, importance_window=2)
        torch.testing.assert_close(scores, prompt[1])


def test_doctor_shows_them(capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["doctor", "--json"]) == 0
    found = json.loads(capsys.readouterr().out)["attention_backends"]
    assert [(one["name"], one["missing"]) for one in found] == [(one.name, one.missing) for one in backends()]
    assert cli.main(["doctor"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert any(line.split() == ["attention", "backend:", "cpu_flash", "usable"] for line in lines)


def test_exports() -> None:
    assert all(hasattr(attention, name) for name in attention.__all__)
