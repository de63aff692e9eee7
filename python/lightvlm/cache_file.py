"""A CompactCache as a file: tensors in the safetensors format, the rest as JSON beside them."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from lightvlm_ext.ops import KVSegment, PackedKV

from .cache_layer import CompactLayer
from .packed_store import GrowingKV, PackedStore, PromptKV
from .plan import Plan
from .stored_layer import SLACK
from .transcript import Transcript

if TYPE_CHECKING:
    from transformers import PretrainedConfig

    from .cache import CompactCache

FORMAT = 2
_KEY = "lightvlm_cache"
_LAYER = ("starts", "ends", "seen", "tail", "ragged", "dropped", "scale")


def of_another_model(found: tuple[int, int, int], wanted: tuple[int, int, int]) -> str:
    """Words for a cache whose layers, heads and channels are not the model's."""
    return (
        "a cache of another model: it has {} layers of {} heads of {} channels, the model {} of {} of {}"
    ).format(*found, *wanted)


def save_cache(cache: CompactCache, path: str | Path) -> None:
    """Write what the cache stores, and the plan it follows; buffers without their free rows."""
    from safetensors.torch import save_file

    if cache.transcript is not None and cache.transcript.unfinished:
        raise ValueError("the cache's conversation was being read anew when a call failed; reset it")
    if any(layer.live is not None for layer in cache.layers):
        raise ValueError("the cache is being stepped; close the DecodeStep first")
    tensors: dict[str, Tensor] = {}
    layers = [
        _save_layer(layer.in_buffer(), f"{index}.", tensors) for index, layer in enumerate(cache.layers)
    ]
    about = {
        "format": FORMAT,
        "plan": cache.plan.to_json(),
        "heads": cache.heads,
        "leftpad": cache.leftpad,
        "since_compaction": cache.since_compaction,
        "layers": layers,
        "position_shifts": [layer for layer, _ in cache.position_shifts],
    }
    tensors |= {f"shift.{number}": shift for number, (_, shift) in enumerate(cache.position_shifts)}
    if cache.transcript is not None:
        about["transcript"], said = cache.transcript.state()
        tensors |= {f"transcript.{name}": x for name, x in said.items()}
    # no second copy on a GPU
    on_host = {
        name: x.contiguous().clone() if x.device.type == "cpu" else x.cpu() for name, x in tensors.items()
    }
    save_file({name: x.contiguous() for name, x in on_host.items()}, path, {_KEY: json.dumps(about)})


def load_cache(
    path: str | Path, config: PretrainedConfig, *, capacity: int | None, device: str | torch.device
) -> CompactCache:
    """What :func:`save_cache` wrote, for a model of this configuration."""
    from safetensors import safe_open

    from .cache import CompactCache

    device = torch.device(device)
    if device.type == "cuda" and device.index is None:
        device = torch.device("cuda", torch.cuda.current_device())
    # tensors made in inference mode could not be written outside it
    with torch.inference_mode(False), safe_open(path, framework="pt", device=str(device)) as file:
        about = json.loads((file.metadata() or {}).get(_KEY, "{}"))
        if about.get("format") != FORMAT:
            raise ValueError(
                f"{path} is not a cache of lightvlm in format {FORMAT}, got format {about.get('format')}"
            )
        cache = CompactCache(config, Plan.from_json(about["plan"]), capacity=capacity)
        found, wanted = (len(about["layers"]), *about["heads"]), (len(cache.layers), *cache.heads)
        if found != wanted:
            raise ValueError(f"{path} is {of_another_model(found, wanted)}")
        tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118  it has no __iter__
    if "transcript" in about:
        said = {
            name.removeprefix("transcript."): x.cpu()
            for name, x in tensors.items()
            if name.startswith("transcript.")
        }
        cache.transcript = Transcript.from_state(about["transcript"], said, device)
    cache.leftpad, cache.since_compaction = about["leftpad"], about["since_compaction"]
    cache.position_shifts = [
        (layer, tensors[f"shift.{number}"]) for number, layer in enumerate(about["position_shifts"])
    ]
    for index, (layer, state) in enumerate(zip(cache.layers, about["layers"], strict=True)):
        own = {
            name.removeprefix(f"{index}."): x for name, x in tensors.items() if name.startswith(f"{index}.")
        }
        _load_layer(layer, state, own)
    return cache


def _save_layer(layer: CompactLayer, prefix: str, tensors: dict[str, Tensor]) -> dict[str, Any]:
    if not layer.is_initialized:
        return {}
    key, value = layer.buffer()
    tensors |= {f"{prefix}key": key, f"{prefix}value": value}
    queries = layer.recent_queries()
    if queries.shape[1]:
        tensors[f"{prefix}queries"] = queries
    if layer.mass is not None:
        tensors[f"{prefix}mass"] = layer.mass[:, :, : key.shape[1]]
    state: dict[str, Any] = {name: getattr(layer, name) for name in _LAYER}
    store = layer.packed
    if store is None:
        return state
    parts: list[dict[str, Any]] = []
    if store.sinks is not None:
        parts.append(_save_segment(store.sinks, f"{prefix}packed.0.", tensors) | {"kind": "sinks"})
        parts[-1]["counts"] = store.sink_counts
    for prompt in store.prompt:
        name = f"{prefix}packed.{len(parts)}."
        parts.append(
            _save_segment(prompt.packed, name, tensors) | {"kind": "prompt", "counts": prompt.counts}
        )
        if prompt.mass is not None:
            tensors[f"{name}mass"] = prompt.mass
    for bits, storage in store.generated.items():
        if storage.packed is not None and storage.used:
            name = f"{prefix}packed.{len(parts)}."
            kept = dataclasses.replace(storage.packed.narrow(0, storage.used), lens=storage.packed.lens)
            parts.append(_save_segment(kept, name, tensors) | {"kind": "generated", "used": storage.used})
            parts[-1]["bits"] = bits
            if storage.mass is not None:
                tensors[f"{name}mass"] = storage.mass[:, :, : storage.used]
    return state | {"packed": {"batch": store.batch, "in_order": store.in_order, "parts": parts}}


def _save_segment(segment: KVSegment | PackedKV, prefix: str, tensors: dict[str, Tensor]) -> dict[str, Any]:
    """Tensors go to ``tensors``; returns the rest."""
    rest = {}
    for item in dataclasses.fields(segment):
        value = getattr(segment, item.name)
        if isinstance(value, Tensor):
            tensors[prefix + item.name] = value
        elif value is not None:
            rest[item.name] = value
    return rest


def _load_layer(layer: CompactLayer, state: dict[str, Any], tensors: dict[str, Tensor]) -> None:
    if not state:
        return
    key, value = tensors["key"], tensors["value"]
    if "packed" in state:
        layer.packed = _load_store(state["packed"], tensors)
    layer.restore(key, value, tensors.get("mass"), {name: state[name] for name in _LAYER}, SLACK)
    if "queries" in tensors:
        layer.remember_queries(tensors["queries"], state["scale"])


def _load_store(state: dict[str, Any], tensors: dict[str, Tensor]) -> PackedStore:
    store = PackedStore(state["batch"], in_order=state["in_order"])
    for number, part in enumerate(state["parts"]):
        prefix = f"packed.{number}."
        own: dict[str, Any] = {
            name.removeprefix(prefix): x for name, x in tensors.items() if name.startswith(prefix)
        }
        mass = own.pop("mass", None)
        rest = {name: value for name, value in part.items() if name not in ("kind", "counts", "used")}
        if part["kind"] == "sinks":
            store.sinks, store.sink_counts = KVSegment(**own, **rest), part["counts"]
        elif part["kind"] == "prompt":
            store.prompt.append(PromptKV(PackedKV(**own, **rest), part["counts"], mass))
        else:
            grown = store.generated[part["bits"]] = GrowingKV()
            grown.packed, grown.mass, grown.used = PackedKV(**own, **rest), mass, part["used"]
    return store
