"""``lightvlm bench decode``: steps of a whole decoder on long caches, ours and transformers', and what each holds.

Caches are synthesised, not read from a prompt (`decode_caches.py`), so that any length costs seconds. A step is one
token for every row: embedding, all layers, logits, through the model's forward as generate() calls it. All candidates
take turns, and a cache grows by the few tokens that are decoded on it. Rows of one layer's attention follow, measured
as ``bench ops`` does. With ``--generate``, whole answers instead: `decode_generate.py`.
"""

from __future__ import annotations

import argparse
import itertools
import math
import statistics
import sys
import time
from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

import torch

from ..kl import kl_divergence
from . import decode_generate, floors
from .cases import Case
from .cases._case import Geometry
from .cases.decode_attention import of_size
from .common import describe
from .cuda_device import CudaDevice
from .decode_caches import BITS, Candidate, Decoding, States, candidates, check
from .decoder import GEOMETRIES, build_model, synchronise
from .jobs import TIME_IS_OVER, failed, skipped
from .measure import Bench, measure, paired
from .memory import available, in_use, is_out_of_memory, storage_bytes
from .timing import Effort, in_turns

if TYPE_CHECKING:
    from rich.table import Table

Row = dict[str, Any]

VOCABULARY = 151936  # Qwen2.5's
_FREE = 0.85  # of what memory is available, so much is planned with
_PACKINGS = 3


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Options of the benchmark."""
    parser.add_argument("--geometry", choices=sorted(GEOMETRIES), default="qwen2.5-0.5b")
    parser.add_argument("--layers", type=int, default=None, help="fewer layers than the geometry has")
    parser.add_argument(
        "--vocabulary", type=int, help=f"tokens that the model knows (default: {VOCABULARY}; tiny: 1024)"
    )
    parser.add_argument("--tokens", type=int, nargs="+", default=[8192, 32768], help="that a cache holds")
    parser.add_argument("--batch", type=int, nargs="+", default=[1, 8, 32])
    parser.add_argument("--bits", choices=BITS, nargs="+", default=["16", "8", "4", "4/2"])
    parser.add_argument("--steps", type=int, default=4, help="tokens decoded in a round, timed together")
    parser.add_argument("--dtype", choices=["float32", "float16", "bfloat16"], default="bfloat16")
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--threads", type=int, default=None)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--seconds", type=float, default=math.inf, help="sizes left after this are skipped")
    parser.add_argument(
        "--attention",
        action=argparse.BooleanOptionalAction,
        default=True,
        help="rows of one layer's attention",
    )
    decode_generate.add_arguments(parser)


def run(args: argparse.Namespace) -> dict[str, Any]:
    """Run the benchmark; returns the JSON object of ``lightvlm bench decode``."""
    _check(args)
    if args.threads is not None:
        torch.set_num_threads(args.threads)
    about = describe(args.device)  # of the code that runs, whatever happens to the tree meanwhile
    if args.generate is not None:
        return {"kind": "decode", **about, "rows": decode_generate.run(args)}
    ceilings = floors.ceilings_of(torch.device(args.device))
    deadline = time.monotonic() + args.seconds
    rows = list(_steps(args, ceilings, deadline))
    if args.attention:
        rows += _attention(args, ceilings, deadline)
    for row in rows:
        if "error" in row:
            print(f"{row['method']}, {row['case']}: {row['error']}", file=sys.stderr)
    return {"kind": "decode", **about, "ceilings": floors.describe(ceilings), "rows": rows}


def exit_status(result: dict[str, Any]) -> int:
    """1 where a candidate was wrong or failed."""
    return int(any("error" in row for row in result["rows"]))


def vocabulary(args: argparse.Namespace) -> int:
    """What --vocabulary says, or the geometry's."""
    return args.vocabulary or (1024 if args.geometry == "tiny" else VOCABULARY)


def depth(args: argparse.Namespace) -> int:
    """Layers of the decoder that is measured."""
    return int(args.layers or GEOMETRIES[args.geometry][1])


def _check(args: argparse.Namespace) -> None:
    smallest = {
        "rounds": args.rounds,
        "steps": args.steps,
        "tokens": min(args.tokens),
        "batch": min(args.batch),
    }
    for name in ("layers", "threads", "vocabulary"):
        if getattr(args, name) is not None:
            smallest[name] = getattr(args, name)
    least = {"tokens": 256, "vocabulary": 16}  # below, nothing would be packed; and ids up to 7 are used
    for name, value in smallest.items():
        if value < least.get(name, 1):
            raise ValueError(f"--{name} must be at least {least.get(name, 1)}, got {value}")
    if torch.device(args.device).type == "cuda" and not torch.cuda.is_available():
        raise ValueError(f"--device {args.device}: this torch has no CUDA device")
    if not args.seconds > 0:
        raise ValueError(f"--seconds must be above 0, got {args.seconds}")
    if _room(args) > 96:
        raise ValueError(
            f"--rounds + 1 times --steps must be at most 95, before tokens are packed, got {_room(args) - 1}"
        )
    decode_generate.check(args)


def _room(args: argparse.Namespace) -> int:
    """Tokens that are decoded on a cache: the one that is checked, a round to warm up, and the rounds."""
    return int(1 + (args.rounds + 1) * args.steps)


def _sizes(args: argparse.Namespace) -> list[tuple[int, int]]:
    """(tokens, batch), the smallest first, so that time cuts the largest."""
    return sorted(itertools.product(args.tokens, args.batch), key=lambda size: size[0] * size[1])


# -- steps of the whole decoder ----------------------------------------------------------------------------------------


@torch.inference_mode()
def _steps(args: argparse.Namespace, ceilings: floors.Ceilings, deadline: float) -> Iterator[Row]:
    model = build_model(args.geometry, args.layers, getattr(torch, args.dtype), args.device, vocabulary(args))
    config = model.config.get_text_config(decoder=True)
    for tokens, batch in _sizes(args):
        case = f"{args.geometry}, {depth(args)} layers, {batch} x {tokens} tokens, {args.dtype}"
        if time.monotonic() > deadline:
            yield skipped("decode step", case, TIME_IS_OVER)
            continue
        try:
            states = States.random(batch, tokens, config, getattr(torch, args.dtype), args.device)
            yield from _Size(args, ceilings, model, case, states).rows()
        except Exception as error:  # one size's trouble is a row
            yield _problem("decode step", case, error)
        states = None  # type: ignore[assignment]


def _problem(method: str, case: str, error: Exception) -> Row:
    if is_out_of_memory(error):
        return skipped(method, case, "needs more memory than there is")
    return failed(method, case, f"{type(error).__name__}: {' '.join(str(error).split())[:500]}")


class _Size:
    """All candidates on caches of one size."""

    def __init__(
        self, args: argparse.Namespace, ceilings: floors.Ceilings, model: Any, case: str, states: States
    ) -> None:
        self.args, self.ceilings, self.model, self.case, self.states = args, ceilings, model, case, states
        self.device = torch.device(args.device)
        self.found: dict[str, Row] = {}
        self.times: dict[str, list[float]] = {}
        self._wanted: torch.Tensor | None = None

    def rows(self) -> Iterator[Row]:
        """One row a candidate."""
        listed = candidates(self.args.bits)
        dense, room = self.states.nbytes * depth(self.args), _FREE * available(self.device)
        # a layer that is copied, and what is not packed yet of a cache that is being filled
        spare = 4 * self.states.nbytes
        together = dense + spare + sum(dense * one.share() for one in listed) <= room
        fitting = [one for one in listed if dense * one.most() + spare <= room]
        if not fitting or fitting[0] is not listed[0]:  # the first is what all are checked against
            yield skipped("decode step", self.case, "needs more memory than there is")
            return
        for group in [listed] if together else [[one] for one in fitting]:
            self._measure(group)
        rivals = [name for name in self.times if name.startswith("transformers")]
        fastest = min(rivals, key=lambda name: statistics.median(self.times[name]))
        for one in listed:
            if one.name in self.times:
                yield self._row(one.name, fastest, rivals, together)
            else:
                yield skipped(one.name, self.case, "needs more memory than there is")

    def _measure(self, group: list[Candidate]) -> None:
        """Fill, check and time caches that are in memory together."""
        decodings = {one.name: self._prepared(one) for one in group}
        times: dict[str, list[float]] = {name: [] for name in decodings}
        for turn, name in in_turns(list(decodings), self.args.rounds + 1):
            with decodings[name].ready():
                synchronise(self.args.device)
                start = time.perf_counter()
                for _ in range(self.args.steps):
                    decodings[name].step()
                synchronise(self.args.device)
            if turn:
                times[name].append((time.perf_counter() - start) / self.args.steps)
        self.times |= times
        for name, decoding in decodings.items():
            if decoding.candidate.kind == "compact" and decoding.candidate.bits != "16":
                self.found[name]["packing_seconds"] = self._packing(decoding)

    def _prepared(self, candidate: Candidate) -> Decoding:
        before = in_use(self.device)
        decoding = Decoding(candidate, self.model, self.states, _room(self.args))
        after = in_use(self.device)
        growth = after - before if before is not None and after is not None else None
        stored = storage_bytes(decoding.cache)
        on_gpu = self.device.type == "cuda"
        with decoding.ready():
            logits = decoding.step()
        if self._wanted is None:  # the dynamic cache comes first
            self._wanted = logits
        error = check(decoding, logits, self._wanted, self.states)
        self.found[candidate.name] = {
            "bits": candidate.bits,
            "logits_error": error,
            "kl": float(kl_divergence(self._wanted, logits).mean()),
            "kv_bytes_allocated": growth if on_gpu else stored,
            "kv_bytes_stored": stored,
            "kv_bytes_resident": None if on_gpu else growth,
            "bound_bytes": decoding.read_bytes() + self._weight_bytes(),
        }
        return decoding

    def _packing(self, decoding: Decoding) -> float:
        times = []
        for _ in range(_PACKINGS):
            with decoding.ready():
                decoding.make_ready_to_pack()
                synchronise(self.args.device)
                start = time.perf_counter()
                decoding.pack()
                synchronise(self.args.device)
            times.append(time.perf_counter() - start)
        return statistics.median(times)

    def _weight_bytes(self) -> int:
        """Weights that a step reads: all layers, and the head; of the embedding only a row."""
        decoder = self.model.model.language_model
        parts = [*decoder.layers.parameters(), *decoder.norm.parameters(), *self.model.lm_head.parameters()]
        return sum(one.nbytes for one in parts)

    def _row(self, name: str, fastest: str, rivals: list[str], together: bool) -> Row:
        found, seconds = self.found[name], statistics.median(self.times[name])
        baseline = statistics.median(self.times[fastest])
        dense = self.found["transformers sdpa, dynamic cache"]["kv_bytes_allocated"]
        bound = found["bound_bytes"] / self.ceilings.bytes_per_second(found["bound_bytes"])
        row = {
            "case": self.case,
            "method": name,
            "baseline": fastest,
            "seconds": seconds,
            "baseline_seconds": baseline,
            "ratio": paired(self.times[fastest], self.times[name]),
            "baselines": {rival: statistics.median(self.times[rival]) for rival in rivals},
            **found,
            "kv_bytes_baseline": dense,
            "kv_ratio": dense / found["kv_bytes_allocated"],
            "weight_bytes": self._weight_bytes(),
            "bound_seconds": bound,
            "share_of_bound": bound / seconds,
            "in_turns": together,
            "decoded_tokens": _room(self.args),
            "runs": self.times[name],
        }
        if "packing_seconds" in row:
            row["seconds_with_packing"] = seconds + row["packing_seconds"] / 128
        return row


# -- attention of one layer --------------------------------------------------------------------------------------------


def _attention(args: argparse.Namespace, ceilings: floors.Ceilings, deadline: float) -> Iterator[Row]:
    """One layer's decode attention in each number of bits against torch's and transformers', keys in 16 bits."""
    width, layers, heads, kv_heads, _ = GEOMETRIES[args.geometry]
    geometry = Geometry(width, layers, heads, kv_heads, width // heads)
    device = torch.device(args.device)
    cuda = None
    if device.type == "cuda":
        device = torch.device("cuda", device.index or 0)
        cuda = CudaDevice(device)
    bench = Bench(device, Effort(args.rounds), ceilings, cuda)
    for tokens, batch in _sizes(args):
        if time.monotonic() > deadline:
            yield skipped("decode_attention", f"{batch} x {tokens} tokens", TIME_IS_OVER)
            continue
        listed = of_size(batch, tokens, args.geometry, geometry, device)
        try:
            for case in listed:
                if case.parameters["mass"] == "no" and case.parameters["bits"] in args.bits:
                    yield from _measured(case, bench)
        except Exception as error:
            yield _problem("decode_attention", f"{batch} x {tokens} tokens", error)


@torch.inference_mode()
def _measured(case: Case, bench: Bench) -> list[Row]:
    try:
        return measure("decode_attention", case, bench)
    except Exception as error:
        return [_problem("decode_attention", case.name, error)]


def table(result: dict[str, Any]) -> Table:
    """One line for each row; a row without figures says why it has none."""
    from .decode_table import table as made

    return made(result)
