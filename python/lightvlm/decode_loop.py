"""lightvlm.generate: transformers' generate() with a decode loop of our own, for the latency that launches dominate.

transformers prepares inputs, processors of logits, criteria and cache as always, and then calls our function instead of
its own (``custom_generate``). The prompt is read by the model; after it each token is a :class:`DecodeStep`, on a GPU
the replay of a CUDA graph. Choosing tokens stays outside of it.
"""

from __future__ import annotations

import contextlib
import functools
import inspect
from typing import Any

import torch
from torch import Tensor, nn

from .cache import CompactCache
from .calls import replaceable
from .decode_step import DecodeStep, capture_on, why_not
from .models import find_adapter
from .models.base import attention_kinds
from .plan import Plan
from .runtime import Run, attach

_MODES = ("greedy_search", "sample")


def generate(model: nn.Module, *, plan: Plan | None = None, graph: bool | str = "auto", **inputs: Any) -> Any:
    """What ``model.generate(**inputs)`` returns, from a decode loop whose steps ask the host for nothing.

    The same tokens as ``model.generate`` on the same attached model, but for ties within rounding: attention reads the
    cache where it lies, also where transformers' own would be called. Greedy search and sampling, with everything that
    belongs to them: processors of logits, stopping criteria, a streamer, several returned sequences, scores and logits.

    Args:
        model: a VLM that lightvlm knows, attached or not.
        plan: to attach for this call, on a model that is not attached. None: what is attached; on a model that is not,
            nothing is left out. Attach it yourself to get a report.
        graph: "auto" captures the step in a CUDA graph on a GPU, and runs it as it is on a CPU. True does the same, and
            the report says where there is no graph. False captures nothing.
        inputs: arguments of ``model.generate``.

    Where a step cannot be done like that (a cache of another kind, a mask with holes, attentions asked for), the model
    is called for every token as ``model.generate`` does, and the report says why.

    Raises:
        TypeError: model, plan or graph of the wrong kind.
        ValueError: the model is attached and a plan is given; beams, an assistant or another decoding function is asked
            for, which ``model.generate`` does on an attached model.
    """
    if plan is not None and not isinstance(plan, Plan):
        raise TypeError(f"plan must be None or a lightvlm.Plan, got {type(plan).__name__}")
    if not isinstance(graph, bool) and graph != "auto":
        raise TypeError(f'graph must be "auto", True or False, got {graph!r}')
    for name in ("assistant_model", "custom_generate", "synced_gpus"):
        if inputs.get(name):
            raise ValueError(f"lightvlm.generate takes no {name}; use model.generate on an attached model")
    attached: Run | None = getattr(find_adapter(model).attentions[0], "_lightvlm_run", None)
    if attached is not None and plan is not None:
        raise ValueError("model is attached already; leave plan out, or detach the run first")
    run = attached if attached is not None else attach(model, plan if plan is not None else Plan())
    loop = functools.partial(_decode, run=run, graph=graph, streamer=inputs.get("streamer"))
    # inspect.signature of a partial is what transformers looks at: names that it does not know are ours
    with contextlib.nullcontext() if attached is not None else run:
        return run._adapter.model.generate(**_with_stop_strings(inputs), custom_generate=loop)


def _with_stop_strings(inputs: dict[str, Any]) -> dict[str, Any]:
    """transformers loses the tokenizer on its way to the criteria where another function decodes."""
    strings, tokenizer = inputs.get("stop_strings"), inputs.get("tokenizer")
    if strings is None or tokenizer is None:
        return inputs
    from transformers import StoppingCriteriaList, StopStringCriteria

    criterion = StopStringCriteria(stop_strings=strings, tokenizer=tokenizer)
    given = StoppingCriteriaList([*(inputs.get("stopping_criteria") or []), criterion])
    rest = {name: value for name, value in inputs.items() if name not in ("stop_strings", "tokenizer")}
    return {**rest, "stopping_criteria": given}


def _decode(
    model: Any,
    input_ids: Tensor,
    logits_processor: Any,
    stopping_criteria: Any,
    generation_config: Any,
    *,
    run: Run,
    graph: bool | str,
    streamer: Any = None,
    **model_kwargs: Any,
) -> Any:
    """The decoding function, with the arguments of transformers' ``_sample``."""
    mode = str(getattr(mode := generation_config.get_generation_mode(), "value", mode))
    if mode not in _MODES:
        raise ValueError(
            f"lightvlm.generate does greedy search and sampling, not {mode}; use model.generate on an attached model"
        )
    _give_compact_cache(run, model_kwargs)
    loop = _Loop(model, run, graph, input_ids, stopping_criteria, generation_config, model_kwargs)
    chosen = _Chosen(input_ids, logits_processor, stopping_criteria, generation_config, streamer)
    with loop:
        more = chosen.add(loop.read_prompt())
        with getattr(model, "_optimize_model_for_decode", contextlib.nullcontext)():
            while more:
                more = chosen.add(loop.next_logits(chosen.ids))
    return chosen.result(loop.model_kwargs.get("past_key_values"))


def _give_compact_cache(run: Run, model_kwargs: dict[str, Any]) -> None:
    """Put a CompactCache in the place of an empty one, which a plan without a cache part would leave."""
    cache: Any = model_kwargs.get("past_key_values")
    config = run._adapter.decoder.config
    if attention_kinds(config) != {"full_attention"} or isinstance(cache, CompactCache):
        return
    if cache is None and model_kwargs.get("use_cache"):  # older transformers leaves it to the model
        model_kwargs["past_key_values"] = CompactCache(config)
    elif cache is not None and replaceable(cache) and cache.get_seq_length() == 0:
        CompactCache(config).take_place_of(cache)


class _Loop:
    """Where logits come from: the model for the prompt, then live steps, or the model where these cannot be."""

    def __init__(
        self,
        model: Any,
        run: Run,
        graph: bool | str,
        input_ids: Tensor,
        stopping_criteria: Any,
        generation_config: Any,
        model_kwargs: dict[str, Any],
    ) -> None:
        self.model, self.run, self.graph = model, run, graph
        self.input_ids, self.config, self.model_kwargs = input_ids, generation_config, model_kwargs
        self.longest: int = stopping_criteria.max_length or generation_config.max_length
        self.step: DecodeStep | None = None
        self._asked = False

    def __enter__(self) -> _Loop:
        return self

    def __exit__(self, *error: object) -> None:
        if self.step is not None:
            self.step.close()

    def read_prompt(self) -> Any:
        output = self.model._prefill(self.input_ids, self.config, self.model_kwargs)
        return self._keep_up(output)

    def next_logits(self, ids: Tensor) -> Any:
        """The output, or the logits (B, V), for the last of ids (B, S)."""
        if not self._asked:
            self._asked = True
            self._go_live(ids)
        if self.step is not None:
            return self.step.step(ids[:, -1:])
        return self._keep_up(self.model(**self._inputs(ids), return_dict=True))

    def _keep_up(self, output: Any) -> Any:
        self.model_kwargs = self.model._update_model_kwargs_for_generation(
            output, self.model_kwargs, is_encoder_decoder=False
        )
        return output

    def _inputs(self, ids: Tensor) -> dict[str, Any]:
        prepare = self.model.prepare_inputs_for_generation
        if "next_sequence_length" in inspect.signature(prepare).parameters:
            last = 1 if self.model_kwargs["use_cache"] else None
            return prepare(ids, next_sequence_length=last, **self.model_kwargs)
        return prepare(ids, **self.model_kwargs)  # transformers 5.0 looks at cache_position

    def _go_live(self, ids: Tensor) -> None:
        cache = self.model_kwargs.get("past_key_values")
        reason = why_not(self.run, cache) or self._asks_for_more() or self._has_holes(cache)
        inputs = {} if reason is not None else self._inputs(ids)
        positions = inputs.get("position_ids")
        if reason is None and positions is None:
            reason = "transformers gives no positions"
        if reason is not None:
            self.run._stats.step_aside(f"lightvlm.generate calls the model for every token: {reason}")
            return
        assert isinstance(cache, CompactCache)
        assert isinstance(positions, Tensor)
        capture = capture_on(positions.device) if self.graph else None
        if self.graph is True and capture is None:
            self.run._stats.step_aside(f"no CUDA graph on a device of type {positions.device.type}")
        ahead = self.longest - ids.shape[1]
        self.step = DecodeStep(self.run, cache, positions=positions, ahead=ahead, capture=capture)

    def _asks_for_more(self) -> str | None:
        if self.config.output_attentions or self.config.output_hidden_states:
            return "attentions or hidden states are asked for"
        return None

    def _has_holes(self, cache: Any) -> str | None:
        """Whether a 2-D mask leaves out more than the padding that the cache knows of; read once a prompt."""
        mask = self.model_kwargs.get("attention_mask")
        length = cache.get_seq_length()
        if mask is None:
            valid = [length] * len(cache.leftpad)
        else:
            valid = mask[:, :length].sum(dim=1).tolist()
        if valid != [length - pad for pad in cache.leftpad]:
            return "the attention mask has holes"
        return None


class _Chosen:
    """Tokens chosen so far, and all that is said about them; as transformers' ``_sample`` does it."""

    def __init__(
        self, ids: Tensor, logits_processor: Any, stopping_criteria: Any, config: Any, streamer: Any
    ) -> None:
        self.ids, self._streamer = ids, streamer
        self._processor, self._criteria, self._config = logits_processor, stopping_criteria, config
        self._unfinished = torch.ones(ids.shape[0], dtype=torch.long, device=ids.device)
        pad = config._pad_token_tensor  # None where there is no end of a sequence either
        self._pad: Any = pad.to(ids.device) if pad is not None else None
        self._pads = any(hasattr(criterion, "eos_token_id") for criterion in stopping_criteria)
        wanted = config.return_dict_in_generate
        self._scores: tuple[Tensor, ...] | None = () if wanted and config.output_scores else None
        self._logits: tuple[Tensor, ...] | None = () if wanted and config.output_logits else None
        self._attentions: tuple[Any, ...] | None = () if wanted and config.output_attentions else None
        self._hidden: tuple[Any, ...] | None = () if wanted and config.output_hidden_states else None

    def add(self, output: Any) -> bool:
        """Choose the next token from an output of the model, or from logits (B, V); whether more are to come."""
        last = output if isinstance(output, Tensor) else output.logits[:, -1]
        logits = last.to(copy=True, dtype=torch.float32, device=self.ids.device)
        scores = self._processor(self.ids, logits)
        if self._scores is not None:
            self._scores += (scores,)
        if self._logits is not None:
            self._logits += (logits,)
        if self._attentions is not None:
            self._attentions += (output.attentions,)
        if self._hidden is not None:
            self._hidden += (output.hidden_states,)
        if self._config.do_sample:
            tokens = torch.multinomial(scores.softmax(dim=-1), num_samples=1).squeeze(1)
        else:
            tokens = scores.argmax(dim=-1)
        if self._pads:
            tokens = tokens * self._unfinished + self._pad * (1 - self._unfinished)
        self.ids = torch.cat([self.ids, tokens[:, None]], dim=-1)
        if self._streamer is not None:
            self._streamer.put(tokens.cpu())
        self._unfinished = self._unfinished & ~self._criteria(self.ids, self._scores)
        return bool(self._unfinished.max() != 0)

    def result(self, cache: Any) -> Any:
        if self._streamer is not None:
            self._streamer.end()
        if not self._config.return_dict_in_generate:
            return self.ids
        from transformers.generation.utils import GenerateDecoderOnlyOutput

        found: dict[str, Any] = {
            "scores": self._scores,
            "logits": self._logits,
            "attentions": self._attentions,
        }
        found |= {"sequences": self.ids, "hidden_states": self._hidden, "past_key_values": cache}
        return GenerateDecoderOnlyOutput(**found)
