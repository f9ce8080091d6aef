"""Codecs beside hivemind's: bytes a parameter, speed of encoding and of decoding into a sum, and error.

    python -m benchmarks.codecs [--quick] [--json FILE]

One core. MB/s are megabytes (1e6) of float32 input or output a second of processor time; medians over rounds in which
every codec has its turn, so that a slow moment of the machine falls on all. hivemind's codecs get the tensor in parts
of 2^19 values, as its all-reduce hands it to them; Uniform8Bit also as a whole, which is slower. Data: standard normal
times a log-normal scale for every 256 values, seeded. The figures without a size are those at 16 M parameters; those
against Uniform8Bit are against parts unless they say whole.
"""

import os
import statistics
import time
import warnings
from collections.abc import Callable
from dataclasses import dataclass, field

import hivemind.compression
import numpy as np
import torch
from rich.console import Console
from rich.table import Table

from benchmarks.figures import Figure, parse_options, write_figures
from protocol.codecs import Codec, get_codec
from protocol.codecs.payload import Vector

MILLION = 1_000_000
FIGURES_SIZE = 16 * MILLION
HIVEMIND_PART_VALUES = 1 << 19
COEFFICIENT = 0.125
OURS = ("float32", "float16", "int8", "int4", "int2", "sign", "sparse")
UNIFORM = "hivemind Uniform8Bit"
HIVEMIND = {
    "hivemind Float16": (hivemind.compression.Float16Compression, HIVEMIND_PART_VALUES),
    UNIFORM: (hivemind.compression.Uniform8BitQuantization, HIVEMIND_PART_VALUES),
    f"{UNIFORM}, whole tensor": (hivemind.compression.Uniform8BitQuantization, None),
    "hivemind Quantile8Bit": (hivemind.compression.Quantile8BitQuantization, HIVEMIND_PART_VALUES),
}


@dataclass(kw_only=True)
class Subject:
    """One codec under measurement. `encode(vector) -> bytes on the wire`; `add(out)` decodes what was encoded."""

    name: str
    encode: Callable[[Vector], int]
    add: Callable[[Vector], None]
    max_rounds: int = 100
    encode_s: list[float] = field(default_factory=list)
    add_s: list[float] = field(default_factory=list)
    num_bytes: int = 0
    error: float = 0.0


def our_subject(codec: Codec) -> Subject:
    kept = [b""]

    def encode(vector: Vector) -> int:
        kept[0] = codec.encode(vector)
        return len(kept[0])

    return Subject(name=codec.name, encode=encode, add=lambda out: codec.accumulate(kept[0], COEFFICIENT, out))


def hivemind_subject(name: str) -> Subject:
    make_codec, part_values = HIVEMIND[name]
    codec = make_codec()
    kept: list[object] = []

    def encode(vector: Vector) -> int:
        parts = torch.split(torch.from_numpy(vector), part_values or vector.size)
        kept[:] = [codec.compress(part, hivemind.compression.CompressionInfo.from_tensor(part)) for part in parts]
        return sum(part.ByteSize() for part in kept)  # type: ignore[attr-defined]

    def add(out: Vector) -> None:
        totals = torch.split(torch.from_numpy(out), part_values or out.size)
        for part, total in zip(kept, totals, strict=True):
            total.add_(codec.extract(part), alpha=COEFFICIENT)

    return Subject(name=name, encode=encode, add=add, max_rounds=3 if "Quantile" in name else 100)


def make_vector(num_parameters: int) -> Vector:
    rng = np.random.default_rng(0)
    vector = rng.standard_normal(num_parameters, dtype=np.float32)
    scales = np.exp(rng.standard_normal(-(-num_parameters // 256), dtype=np.float32))
    vector *= np.repeat(scales, 256)[:num_parameters]
    return vector


def measure(num_parameters: int, num_rounds: int) -> list[Subject]:
    """Every codec at one size: one turn to warm up and to measure the error, then the rounds that are timed."""
    vector = make_vector(num_parameters)
    out = np.zeros(num_parameters, np.float32)
    subjects = [our_subject(get_codec(name)) for name in OURS] + [hivemind_subject(name) for name in HIVEMIND]
    norm = float(np.linalg.norm(vector))
    for subject in subjects:
        subject.num_bytes = subject.encode(vector)
        out[:] = 0
        subject.add(out)
        subject.error = float(np.linalg.norm(out / np.float32(COEFFICIENT) - vector)) / norm
    for round_index in range(num_rounds):
        for subject in subjects:
            if round_index < subject.max_rounds:
                start = time.process_time()
                subject.encode(vector)
                middle = time.process_time()
                subject.add(out)
                subject.encode_s.append(middle - start)
                subject.add_s.append(time.process_time() - middle)
    return subjects


def show(console: Console, num_parameters: int, subjects: list[Subject]) -> None:
    table = Table(title=f"{num_parameters // MILLION} M parameters, one core")
    table.add_column("codec")
    for column in ("bytes/parameter", "under float32", "encode MB/s", "decode + merge MB/s", "relative error"):
        table.add_column(column, justify="right")
    megabytes = 4 * num_parameters / 1e6
    for subject in subjects:
        table.add_row(
            subject.name,
            f"{subject.num_bytes / num_parameters:.4f}",
            f"{4 * num_parameters / subject.num_bytes:.1f}x",
            f"{megabytes / statistics.median(subject.encode_s):,.0f}",
            f"{megabytes / statistics.median(subject.add_s):,.0f}",
            f"{subject.error:.4f}",
        )
    console.print(table)


def figures_of(num_parameters: int, subjects: list[Subject], suffix: str = "") -> dict[str, Figure]:
    by_name = {subject.name: subject for subject in subjects}
    sparse, parts, whole = by_name["sparse"], by_name[UNIFORM], by_name[f"{UNIFORM}, whole tensor"]
    encode_s, add_s = statistics.median(sparse.encode_s), statistics.median(sparse.add_s)
    megabytes = 4 * num_parameters / 1e6
    figures: dict[str, Figure] = {
        "sparse_bytes_per_param": sparse.num_bytes / num_parameters,
        "sparse_under_float32": 4 * num_parameters / sparse.num_bytes,
        "sparse_encode_mb_per_s": megabytes / encode_s,
        "sparse_decode_merge_mb_per_s": megabytes / add_s,
        "encode_vs_uniform8": statistics.median(parts.encode_s) / encode_s,
        "decode_merge_vs_uniform8": statistics.median(parts.add_s) / add_s,
        "encode_vs_uniform8_whole": statistics.median(whole.encode_s) / encode_s,
        "decode_merge_vs_uniform8_whole": statistics.median(whole.add_s) / add_s,
    }
    return {name + suffix: value for name, value in figures.items()}


def main() -> None:
    options = parse_options("Codecs beside hivemind's: size, speed on one core, error.")
    torch.set_num_threads(1)
    if hasattr(os, "sched_setaffinity"):
        os.sched_setaffinity(0, {max(os.sched_getaffinity(0))})  # for libraries that start threads of their own
    warnings.filterwarnings("ignore", module=r"hivemind\..*")  # it uses what numpy and torch have deprecated
    console = Console()
    sizes = {MILLION: 15, FIGURES_SIZE: 5} if options.quick else {MILLION: 31, FIGURES_SIZE: 9, 100 * MILLION: 3}
    figures: dict[str, Figure] = {}
    for num_parameters, num_rounds in sizes.items():
        subjects = measure(num_parameters, num_rounds)
        show(console, num_parameters, subjects)
        figures |= figures_of(num_parameters, subjects, f"_{num_parameters // MILLION}m")
        if num_parameters == FIGURES_SIZE:
            figures |= figures_of(num_parameters, subjects)
    write_figures(options.json, figures)


if __name__ == "__main__":
    main()
