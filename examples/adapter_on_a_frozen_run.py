"""Teach a frozen run a new class with a small adapter.

The base knows the digits 0 to 5. A low-rank adapter on its linear maps, and its own row of the
label table, learn the digit 6 from 40 pictures; the base stays as it is.

    python examples/adapter_on_a_frozen_run.py --steps 300
"""

import argparse
import dataclasses

import coterie
from coterie.runs.measure.evaluation import held_out


def configuration(steps: int, classes: list[int], **changes: object) -> coterie.RunConfig:
    trunk = {"width": 64, "depth": 2, "heads": 4}
    backbone = {"kind": "dit", "image_size": 8, "patch": 2, "trunk": trunk}
    return coterie.RunConfig.from_dict(
        {
            "data": {"kind": "classes", "data": "digits", "classes": classes},
            "model": {"kind": "denoiser", "process": "rectified_flow", "backbone": backbone},
            "train": {"steps": steps, "lr": 2e-3, "warmup": 20, "ema": 0.95},
            "sample": {"solver": "heun", "steps": 12},
            **changes,
        }
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument(
        "--steps", type=int, default=300, help="steps of the base; the adapter: half"
    )
    parser.add_argument("--out", default="runs/adapter", help="folder of the runs")
    given = parser.parse_args()
    known = configuration(given.steps, [0, 1, 2, 3, 4, 5])
    base = coterie.start(known, f"{given.out}/base", progress=False)

    lora = {
        "targets": ["backbone.trunk.blocks.*"],
        "rank": 8,
        "embeddings": ["backbone.label.table"],
        "rows": [6],
    }
    init = {"path": str(base), "adapters": [{"name": "six", "lora": lora}]}
    data = {"kind": "classes", "data": "digits", "classes": [6], "count": 40}
    taught = configuration(given.steps // 2, [6], data=data, init=init)
    run = coterie.load_run(coterie.start(taught, f"{given.out}/six", progress=False))

    before = dataclasses.replace(run, model=coterie.load_run(base).model)
    print(f"held-out loss on the digit 6, base          {held_out(before).loss:.4f}")
    print(f"held-out loss on the digit 6, with adapter  {held_out(run).loss:.4f}")
    whole = sum(p.numel() for p in before.model.parameters())
    saved = sum(f.stat().st_size for f in run.path.glob("model/**/*.safetensors"))
    print(f"base: {whole:,} parameters; weights of the adapter's run: {saved / 1024:.0f} KiB")
    print(f"samples: {coterie.sample_run(run, num=8, labels=[6])}")


if __name__ == "__main__":
    main()
