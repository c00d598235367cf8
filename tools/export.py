"""Export a backbone and check what was written: safetensors, torch.export, ONNX, AOTInductor."""

import argparse
import contextlib
import json
import sys
import time
import warnings
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from vilma.extras import require
from vilma.report import source_commit
from vilma.tools._backbone import Loaded, load_backbone
from vilma.training.checkpoint import replace_text
from vilma.training.classification import save_timm
from vilma.vil.portable import portable

__all__ = ["FORMATS", "export", "main"]

FORMATS = ("safetensors", "torch", "onnx", "aoti")
INPUT, OUTPUT = "images", "logits"

Program = Callable[[Tensor], Tensor]


def main(arguments: Sequence[str] | None = None) -> int:
    options = _parser().parse_args(arguments)
    unknown = [name for name in options.formats.split(",") if name not in FORMATS]
    if unknown:
        raise ValueError(f"--formats has {', '.join(unknown)}, wanted some of {','.join(FORMATS)}")
    batches = [int(text) for text in options.batches.split(",")]
    extra = {} if options.num_classes is None else {"num_classes": options.num_classes}
    loaded = load_backbone(options.model, random=options.random, **extra)
    size = options.size or loaded.data["input_size"][-1]
    out = options.out or Path("exports") / Path(options.model).resolve().name
    chosen = [name for name in FORMATS if name in options.formats.split(",")]
    results = export(loaded, size, out, chosen, batches, options.tolerance)
    failed = [name for name, result in results.items() if not result["met"]]
    if failed:
        print(
            f"differ from the model by more than {options.tolerance:g}: {', '.join(failed)}", file=sys.stderr
        )
    return 1 if failed else 0


def export(
    loaded: Loaded,
    size: int,
    out: Path,
    formats: Sequence[str],
    batches: Sequence[int],
    tolerance: float = 1e-4,
) -> dict[str, dict[str, Any]]:
    """Write ``formats`` to ``out`` and compare each with the model at every batch size of ``batches``.

    The programs take normalised images (B, C, size, size) float32 of any B. Differences are relative to the
    largest value of the model's output. ``export.json`` keeps them, and what a user of the files must know.
    """
    out.mkdir(parents=True, exist_ok=True)
    model = loaded.model.eval()
    channels = loaded.data["input_size"][0]
    generator = torch.Generator().manual_seed(0)
    inputs = [torch.randn(b, channels, size, size, generator=generator) for b in batches]
    with torch.no_grad():
        wanted = [model(x) for x in inputs]
    results: dict[str, dict[str, Any]] = {}
    program = None
    for name in formats:
        began = time.perf_counter()
        if name != "safetensors" and program is None:
            with _quiet():
                program = portable(_traced(model, channels, size))
        with _quiet():
            file, made = _WRITERS[name](loaded, program, out)
            error = max(_error(made(x), y) for x, y in zip(inputs, wanted))
        results[name] = {"file": file, "error": error, "met": error <= tolerance}
        print(
            f"{name}: {out / file}, largest difference {error:.1e} of the output at batches of "
            f"{', '.join(map(str, batches))} [{time.perf_counter() - began:.0f} s]",
            flush=True,
        )
    facts = {
        "model": loaded.source,
        "input": {"name": INPUT, "shape": ["batch", channels, size, size], "type": "float32, normalised"},
        "output": {"name": OUTPUT, "shape": ["batch", *wanted[0].shape[1:]]},
        "mean": list(loaded.data["mean"]),
        "std": list(loaded.data["std"]),
        "classes": list(loaded.classes),
        "batches": list(batches),
        "tolerance": tolerance,
        "commit": source_commit(),
        "formats": results,
    }
    replace_text(out / "export.json", json.dumps(facts, indent=1) + "\n")
    return results


def _traced(model: nn.Module, channels: int, size: int) -> torch.export.ExportedProgram:
    batch = torch.export.Dim("batch", min=1, max=65_536)
    example = torch.zeros(2, channels, size, size)
    with torch.no_grad():
        return torch.export.export(model, (example,), dynamic_shapes=({0: batch},))


def _error(got: Tensor, wanted: Tensor) -> float:
    if got.shape != wanted.shape:
        return float("inf")
    return float((got - wanted).abs().max() / wanted.abs().max())


def _write_safetensors(loaded: Loaded, program: Any, out: Path) -> tuple[str, Program]:
    """In timm's form: ``timm.create_model("local-dir:DIR", pretrained=True)`` reads it."""
    save_timm(loaded.model, out, loaded.classes)
    again = load_backbone(str(out)).model
    return "model.safetensors", lambda x: _no_grad(again, x)


def _write_torch(loaded: Loaded, program: Any, out: Path) -> tuple[str, Program]:
    torch.export.save(program, out / "model.pt2")
    module = torch.export.load(out / "model.pt2").module()
    return "model.pt2", lambda x: _no_grad(module, x)


def _write_onnx(loaded: Loaded, program: Any, out: Path) -> tuple[str, Program]:
    require("onnx", "export")
    require("onnxscript", "export")
    runtime = require("onnxruntime", "export")
    written = torch.onnx.export(
        program, dynamo=True, input_names=[INPUT], output_names=[OUTPUT], verbose=False
    )
    written.save(out / "model.onnx")
    session = runtime.InferenceSession(str(out / "model.onnx"), providers=["CPUExecutionProvider"])
    return "model.onnx", lambda x: torch.from_numpy(session.run(None, {INPUT: x.numpy()})[0])


def _write_aoti(loaded: Loaded, program: Any, out: Path) -> tuple[str, Program]:
    path = str((out / "model_aoti.pt2").resolve())
    torch._inductor.aoti_compile_and_package(program, package_path=path)
    compiled = torch._inductor.aoti_load_package(path)
    return "model_aoti.pt2", lambda x: _no_grad(compiled, x)


_WRITERS = {
    "safetensors": _write_safetensors,
    "torch": _write_torch,
    "onnx": _write_onnx,
    "aoti": _write_aoti,
}


def _no_grad(model: Any, x: Tensor) -> Tensor:
    with torch.no_grad():
        return model(x)


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """Exporters warn of their own internals."""
    with warnings.catch_warnings(), contextlib.redirect_stdout(sys.stderr):
        warnings.simplefilter("ignore")
        yield


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="vilma export",
        description=__doc__,
        epilog="The programs run without vilma. A Vision-LSTM in them takes the parallel form of its mLSTM, "
        "whose cost grows with the square of the number of tokens.",
    )
    parser.add_argument("model", metavar="MODEL", help="a run, a checkpoint's folder, or a name of timm")
    parser.add_argument("--out", type=Path, metavar="DIR", help="default: exports/<name>")
    parser.add_argument("--formats", default=",".join(FORMATS), help=f"default: {','.join(FORMATS)}")
    parser.add_argument("--size", type=int, metavar="PIXELS", help="default: as trained")
    parser.add_argument("--batches", default="1,3", help="sizes to compare at (default: 1,3)")
    parser.add_argument("--num-classes", type=int, metavar="N", help="0 exports the features")
    parser.add_argument("--tolerance", type=float, default=1e-4)
    parser.add_argument("--random", action="store_true", help="a name of timm without its weights")
    return parser


if __name__ == "__main__":
    raise SystemExit(main())
