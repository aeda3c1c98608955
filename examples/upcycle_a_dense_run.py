"""Make experts of a dense run: nothing is lost at the start, and training goes on from there.

python examples/upcycle_a_dense_run.py --steps 300
"""

import argparse

import coterie
from coterie.convert import check_preserved
from coterie.runs.measure.evaluation import held_out


def configuration(steps: int) -> coterie.RunConfig:
    trunk = {"width": 64, "depth": 2, "heads": 4}
    backbone = {"kind": "dit", "image_size": 8, "patch": 2, "trunk": trunk}
    model = {"kind": "denoiser", "process": "rectified_flow", "backbone": backbone}
    train = {"steps": steps, "lr": 2e-3, "warmup": 20, "ema": 0.99}
    return coterie.RunConfig.from_dict({"data": "digits", "model": model, "train": train})


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--steps", type=int, default=300, help="optimiser steps of the dense run")
    parser.add_argument("--out", default="runs/upcycling", help="folder of the runs")
    given = parser.parse_args()
    dense_path = coterie.start(configuration(given.steps), f"{given.out}/dense", progress=False)
    dense = coterie.load_run(dense_path)

    # Four copies of each feed-forward network, each cut into two experts.
    upcycling = coterie.UpcycleConfig(copies=4, slices=2)
    model_config, model = coterie.upcycle(dense.model, upcycling)
    kept = check_preserved(dense.model, model, dense.source.get(range(64)), upcycling)
    print(f"largest difference, relative to the largest answer: {kept.relative_error:.1e}")
    before, after = (sum(p.numel() for p in m.parameters()) for m in (dense.model, model))
    print(f"parameters: {before:,} -> {after:,}")

    # The same as a run that trains on, beside the dense run for as many steps.
    init = {"path": str(dense_path), "upcycle": upcycling.model_dump(mode="json")}
    plain = configuration(given.steps // 2).model_dump(mode="json")
    print(f"held-out loss, dense                {held_out(dense).loss:.4f}")
    for name, changes in (
        ("dense, trained on", {"init": {"path": str(dense_path)}}),
        ("experts, trained on", {"init": init, "model": model_config.model_dump(mode="json")}),
    ):
        config = coterie.RunConfig.from_dict({**plain, **changes})
        folder = f"{given.out}/{name.replace(', ', '-').replace(' ', '-')}"
        run = coterie.load_run(coterie.start(config, folder, progress=False))
        print(f"held-out loss, {name:20s} {held_out(run).loss:.4f}")


if __name__ == "__main__":
    main()
