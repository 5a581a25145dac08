#!/usr/bin/env python3
"""Speed and memory of spkid's Conformer beside other libraries'.

All models have the same sizes and a linear prenet, share one process and take
turns call by call, so that a machine's noise affects all alike. Times are
medians (``--statistic min`` where others use the machine, too); the last line
is JSON. SpeechBrain's and torchaudio's models are installed with spkid;
lucidrains' needs ``pip install --no-deps conformer einops``.

    python benchmarks/model_speed.py --quick
    python benchmarks/model_speed.py --measures step utterance
    python benchmarks/model_speed.py --device cuda --dropout 0

Two differences remain. SpeechBrain and torchaudio also apply dropout to the
attention weights, which spkid by default doesn't: ``--dropout 0`` compares
without it. And torchaudio requires lengths, so it always masks.
"""

from __future__ import annotations

import argparse
import gc
import json
import math
import os
import platform
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from importlib.util import find_spec
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

from spkid.models import ConformerEncoder

Times = dict[str, float | None]
Arguments = argparse.Namespace

BANDS, SPEAKERS, CROP, MIB = 40, 600, 128, 2**20
MEASURES = ("step", "utterance", "long", "memory", "utilisation")
OURS = ("spkid rope", "spkid relative", "spkid none")
OTHERS = (
    "speechbrain rope",
    "speechbrain relative",
    "torchaudio",
    "lucidrains",
)
LIMIT_MIB = 8192  # other models that would need more are not run
# Width, layers, heads, hidden width of feed-forward modules, kernel.
ARCHITECTURES = {"A": (256, 4, 4, 1024, 15), "B": (512, 6, 8, 2048, 15)}


class Encoder(nn.Module):
    """A prenet and a library's encoder, called in the library's own way.

    Arguments
    ---------
    prenet, core : nn.Module
        The modules.
    call : callable
        Gets the core and the prenet's output, [batch, frames, features].
    """

    def __init__(
        self, prenet: nn.Module, core: nn.Module, call: Callable
    ) -> None:
        super().__init__()
        self.prenet, self.core, self.call = prenet, core, call

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Maps [batch, frames, BANDS] to [batch, frames, d_model]."""
        return self.call(self.core, self.prenet(x))


def build(name: str, architecture: str, dropout: float) -> nn.Module:
    """A model by its name, e.g. "spkid rope"."""
    d_model, n_layers, heads, d_ff, kernel = ARCHITECTURES[architecture]
    library, position, *compiled = f"{name} ".split(" ")
    prenet = nn.Linear(BANDS, d_model)
    if library == "spkid":
        core = ConformerEncoder(
            BANDS, d_model, n_layers, heads, d_ff, kernel, dropout, position
        )
        model = Encoder(nn.Identity(), core, lambda core, x: core(x)[0])
        return torch.compile(model) if "compiled" in compiled else model
    if library == "speechbrain":
        from speechbrain.lobes.models.transformer import Conformer
        from speechbrain.nnet.attention import RelPosEncXL

        kind = {"rope": "RoPEMHA", "relative": "RelPosMHAXL"}[position]
        options = {"dropout": dropout, "attention_type": kind}
        core = Conformer.ConformerEncoder(
            n_layers, d_model, d_ff, heads, kernel, **options
        )
        core.pos = RelPosEncXL(d_model) if position == "relative" else None
        return Encoder(
            prenet,
            core,
            lambda core, x: core(x, pos_embs=core.pos and core.pos(x))[0],
        )
    if library == "torchaudio":
        from torchaudio.models import Conformer

        def call(core: nn.Module, x: torch.Tensor) -> torch.Tensor:
            return core(x, x.new_full(x.shape[:1], x.shape[1]).long())[0]

        core = Conformer(d_model, heads, d_ff, n_layers, kernel, dropout)
        return Encoder(prenet, core, call)
    from conformer import ConformerBlock

    options = {
        "dim": d_model,
        "dim_head": d_model // heads,
        "heads": heads,
        "ff_mult": d_ff // d_model,
        "conv_expansion_factor": 1,  # as wide as the others'
        "conv_kernel_size": kernel,
        "attn_dropout": dropout,
        "ff_dropout": dropout,
        "conv_dropout": dropout,
    }
    blocks = (ConformerBlock(**options) for _ in range(n_layers))
    return Encoder(prenet, nn.Sequential(*blocks), lambda core, x: core(x))


def training_step(
    name: str, architecture: str, batch: int, bf16: bool, args: Arguments
) -> Callable[[], None]:
    """A step that classifies the mean over frames and updates by AdamW."""
    device = args.device
    model = build(name, architecture, args.dropout).to(device).train()
    head = nn.Linear(ARCHITECTURES[architecture][0], SPEAKERS).to(device)
    weights = [*model.parameters(), *head.parameters()]
    optimizer = torch.optim.AdamW(weights, fused=True)
    x = torch.randn(batch, CROP, BANDS, device=device)
    target = torch.randint(SPEAKERS, (batch,), device=device)

    def step() -> None:
        with torch.autocast(device, torch.bfloat16, enabled=bf16):
            loss = F.cross_entropy(head(model(x).mean(dim=1)), target)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()

    return step


def evaluation(
    name: str, architecture: str, frames: int, args: Arguments
) -> Callable[[], torch.Tensor]:
    """One utterance in evaluation mode, float32."""
    model = build(name, architecture, args.dropout).to(args.device).eval()
    x = torch.randn(1, frames, BANDS, device=args.device)
    return torch.inference_mode()(lambda: model(x))


def milliseconds(call: Callable, device: str) -> float:
    """Duration of one call, by the GPU's own clock if there is a GPU."""
    if device == "cuda":
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        start.record()
        call()
        end.record()
        torch.cuda.synchronize()
        return start.elapsed_time(end)
    start = time.perf_counter()
    call()
    return 1e3 * (time.perf_counter() - start)


def alternate(
    calls: dict[str, Callable], rounds: int, args: Arguments
) -> Times:
    """Milliseconds of calls that take turns; None for one that fails."""
    times = {}
    for name, call in calls.items():
        try:
            for _ in range(2):  # kernels are chosen, caches filled
                milliseconds(call, args.device)
            times[name] = []
        except Exception as error:
            reason = (str(error) or type(error).__name__).splitlines()[0]
            print(f"  {name}: left out ({reason})", flush=True)
    for _ in range(rounds):
        for name, so_far in times.items():
            so_far.append(milliseconds(calls[name], args.device))
    typical = {"median": statistics.median, "min": min}[args.statistic]
    figures = {name: round(typical(t), 3) for name, t in times.items()}
    return {name: figures.get(name) for name in calls}


def show(times: Times, batch: int = 1) -> None:
    """Prints a table of times."""
    for name, ms in times.items():
        if ms is not None:
            speed = f"{1e3 * batch / ms:,.1f} utterances/s"
            print(f"  {name:<28}{ms:>10,.1f} ms {speed:>24}", flush=True)


def ratio(over: float | None, under: float | None) -> float | None:
    """A quotient, None where a part is missing."""
    return round(over / under, 3) if over and under else None


def fastest_other(times: Times) -> dict:
    """The fastest model that isn't spkid, and how much faster spkid is."""
    others = {n: t for n, t in times.items() if t and n not in OURS}
    others.pop("spkid rope compiled", None)
    name = min(others, key=others.get, default=None)
    faster = ratio(others.get(name), times.get("spkid rope"))
    return {"fastest_other": name, "spkid_times_faster": faster}


def measure_step(names: list[str], args: Arguments) -> dict:
    """Training steps of architecture A, float32 and bfloat16 autocast."""
    print(f"Training step, A, {args.batch} x {CROP} frames", flush=True)
    calls = {
        f"{name}, {kind}": training_step(
            name, "A", args.batch, kind == "bf16", args
        )
        for name in names
        for kind in ("fp32", "bf16")
    }
    times = alternate(calls, args.rounds, args)
    show(times, args.batch)
    ours = [times.get(f"spkid rope, {kind}") for kind in ("fp32", "bf16")]
    figures = {"batch": args.batch, "spkid_bf16_times_fp32": ratio(*ours)}
    for kind in ("fp32", "bf16"):
        ms = {name: times[f"{name}, {kind}"] for name in names}
        speed = {name: ratio(1e3 * args.batch, t) for name, t in ms.items()}
        figures[kind] = fastest_other(ms)
        figures[kind] |= {"ms": ms, "utterances_per_s": speed}
    return figures


def measure_evaluation(
    names: list[str], architecture: str, frames: int, args: Arguments
) -> dict:
    """Evaluation of one utterance."""
    print(f"One utterance, {architecture}, {frames} frames", flush=True)
    calls = {n: evaluation(n, architecture, frames, args) for n in names}
    rounds = 3 * args.rounds if architecture == "A" else args.rounds
    times = alternate(calls, rounds, args)
    show(times)
    return {"frames": frames, "ms": times} | fastest_other(times)


def process_mib(field: str) -> float:
    """VmRSS (now) or VmHWM (peak) of this process, in MiB."""
    status = Path("/proc/self/status").read_text()
    return int(status.split(f"{field}:")[1].split()[0]) / 1024


def peak_of(name: str, frames: int, args: Arguments) -> float:
    """Peak MiB of one forward beyond weights and input, in this process.

    On CPU it is resident memory, what the allocator keeps included: repeated
    figures differ by some 10 MiB.
    """
    evaluation(name, "B", 64, args)()  # libraries load, pools fill
    call = evaluation(name, "B", frames, args)
    gc.collect()
    if args.device == "cuda":
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        call()
        return (torch.cuda.max_memory_allocated() - before) / MIB
    Path("/proc/self/clear_refs").write_text("5")  # the peak falls to now
    before = process_mib("VmRSS")
    call()
    return process_mib("VmHWM") - before


def extra_memory(name: str, frames: int, args: Arguments) -> float | None:
    """:func:`peak_of` in a process of its own; None where that fails."""
    command = [sys.executable, __file__, "--memory-of", name]
    command += ["--frames", str(frames), "--device", args.device]
    command += ["--threads", str(args.threads)]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    mib = float(done.stdout.split()[-1]) if done.returncode == 0 else None
    shown = "failed" if mib is None else f"{mib:,.0f} MiB"
    print(f"  {name:<28}{frames:>6} frames {shown:>12}", flush=True)
    return mib and round(mib, 1)


def measure_memory(names: list[str], args: Arguments) -> dict:
    """Peak extra memory of architecture B, one utterance long, one longest."""
    long, longest = args.long_frames
    print("Peak extra memory of one utterance, B", flush=True)
    at_long, at_longest, left_out = {}, {}, {}
    for name in names:
        at_long[name] = extra_memory(name, long, args)
        # Tables of frames x frames grow so; models without them use far less.
        expected = (at_long[name] or math.inf) * (longest / long) ** 2
        if name in OURS or expected < LIMIT_MIB:
            at_longest[name] = extra_memory(name, longest, args)
        else:
            at_longest[name] = None
            left_out[name] = f"would need some {expected:,.0f} MiB"
    lucidrains, ours = at_long.get("lucidrains"), at_long.get("spkid rope")
    return {
        "lucidrains_times_spkid": ratio(lucidrains, ours),
        f"mib_at_{long}_frames": at_long,
        f"mib_at_{longest}_frames": at_longest,
        "left_out": left_out,
    }


def measure_utilisation(names: list[str], args: Arguments) -> dict:
    """Share of the measured bfloat16 matmul rate in training steps of B."""
    batch, device = args.utilisation_batch, args.device
    side = 8192 if device == "cuda" else 1024
    square = torch.randn(side, side, device=device, dtype=torch.bfloat16)
    best = min(milliseconds(lambda: square @ square, device) for _ in range(20))
    rate = 2 * side**3 / best / 1e9
    print(f"Training step, B, {batch} x {CROP} frames, bf16", flush=True)
    print(f"  matmuls reach {rate:,.2f} TFLOP/s", flush=True)
    models = {}
    for name in names:  # one after the other: together they may not fit
        with FlopCounterMode(display=False) as counter:
            evaluation(name.removesuffix(" compiled"), "B", CROP, args)()
        # Thrice the forward, as the counter takes the backward of a depthwise
        # convolution for that of a dense one.
        tflop = 3 * counter.get_total_flops() * batch / 1e12
        calls = {name: training_step(name, "B", batch, True, args)}
        times = alternate(calls, args.rounds, args)
        show(times, batch)
        used = ratio(tflop, times[name] and times[name] / 1e3 * rate)
        models[name] = {"ms": times[name], "tflop": tflop, "utilisation": used}
        del calls
        gc.collect()
    return {"batch": batch, "matmul_tflop_per_s": rate, "models": models}


def machine(args: Arguments) -> dict:
    """What the figures depend on."""
    info, card = Path("/proc/cpuinfo"), args.device == "cuda"
    flags = info.read_text().split() if info.exists() else []
    return {
        "device": torch.cuda.get_device_name() if card else platform.machine(),
        "threads": torch.get_num_threads(),
        "torch": torch.__version__,
        "avx512_bf16": "avx512_bf16" in flags,
        "amx_bf16": "amx_bf16" in flags,
        "load": os.getloadavg()[0],
        "dropout": args.dropout,
        "statistic": args.statistic,
        "quick": args.quick,
    }


def parse() -> Arguments:
    """Reads the command line."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    add = parser.add_argument
    add("--measures", nargs="+", choices=MEASURES, help="default: all")
    add("--models", nargs="+", choices=OURS + OTHERS, help="default: all")
    add("--device", choices=("cpu", "cuda"), default="cpu")
    add("--threads", type=int, default=2)
    add("--dropout", type=float, default=0.1)
    add("--batch", type=int, help="of the training step (default: 32)")
    add("--utilisation-batch", type=int, help="default: 512; CPU: 8")
    add("--statistic", choices=("median", "min"), default="median")
    add("--rounds", type=int, help="default: 9; quick: 2")
    add("--quick", action="store_true", help="a smoke test, under a minute")
    add("--memory-of", help=argparse.SUPPRESS)
    add("--frames", type=int, help=argparse.SUPPRESS)
    args = parser.parse_args()
    card = args.device == "cuda"
    args.batch = args.batch or (4 if args.quick else 32)
    args.utilisation_batch = args.utilisation_batch or (512 if card else 8)
    args.rounds = args.rounds or (2 if args.quick else 9)
    args.long_frames = (500, 1000) if args.quick else (2000, 7193)
    # On a CPU the rate of matmuls says little.
    args.measures = args.measures or MEASURES[: 5 if card else 4]
    args.models = args.models or [*OURS, *OTHERS]
    if "lucidrains" in args.models and not find_spec("conformer"):
        print("lucidrains left out: pip install --no-deps conformer einops")
        args.models.remove("lucidrains")
    return args


def main() -> None:
    """Measures what the command line asks for."""
    args = parse()
    torch.set_num_threads(args.threads)
    torch.manual_seed(0)
    if args.memory_of:
        print(peak_of(args.memory_of, args.frames, args))
        return
    names = [name for name in args.models if name != "spkid none"]
    pair = [name for name in names if name in ("spkid rope", "lucidrains")]
    if args.device == "cuda" and "spkid rope" in names:
        names, pair = ([*n, "spkid rope compiled"] for n in (names, pair))
    frames, long = 300 if args.quick else 1000, args.long_frames[0]
    for_memory = pair if args.quick else args.models
    measures = {
        "step": lambda: measure_step(names, args),
        "utterance": lambda: measure_evaluation(names, "A", frames, args),
        "long": lambda: measure_evaluation(pair, "B", long, args),
        "memory": lambda: measure_memory(for_memory, args),
        "utilisation": lambda: measure_utilisation(pair, args),
    }
    figures = {"machine": machine(args)}
    for name in args.measures:
        figures[name] = measures[name]()
    print(json.dumps(figures))


if __name__ == "__main__":
    main()
