"""Read the routing of any model and print which experts serve which class.

The routing comes with every prediction, so this works for any run, of whatever router:

    python examples/who_serves_which_class.py --run runs/mine
    python examples/who_serves_which_class.py --steps 300          # trains ProMoE on digits first
"""

import argparse

import torch

import coterie
from coterie.core.rng import SampleNoise


def trained(steps: int, out: str) -> str:
    """ProMoE on 8 x 8 digits: prototypes choose the experts of a token."""
    preset = coterie.get_recipe("promoe").config("tiny")
    plain = preset.model_dump(mode="json")
    plain["data"] = {"kind": "digits"}
    plain["model"]["backbone"] |= {"image_size": 8, "patch": 2}
    plain["train"] |= {"steps": steps, "warmup": 20}
    return str(coterie.start(coterie.RunConfig.from_dict(plain), out, progress=False))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--run", help="a run directory; without it one is trained")
    parser.add_argument("--steps", type=int, default=300, help="optimiser steps of that one")
    parser.add_argument("--out", default="runs/promoe-digits", help="where that one is put")
    given = parser.parse_args()
    run = coterie.load_run(given.run or trained(given.steps, given.out))

    batch = run.source.get(range(min(500, len(run.source))))
    noise = SampleNoise(range(len(batch.x))).normal(batch.x.shape[1:])
    t = torch.full((len(batch.x),), 0.5)
    x = run.model.process.diffuse(batch.x, noise, t)
    with torch.no_grad():
        routings = run.model(x, t, batch.cond).routings
    for routing in routings:
        chosen = routing.one_hot()  # [R, E]: 1 where a row chose an expert
        label = batch.cond.label
        if routing.unit == "token":
            label = label.repeat_interleave(routing.batch[1])
        print(f"layer {routing.layer}, {routing.num_experts} experts, top {routing.top_k}")
        for index, name in enumerate(run.source.class_names):
            shares = chosen[label == index].sum(0)
            shares = " ".join(f"{100 * share:3.0f}" for share in shares / shares.sum())
            print(f"  class {name}: {shares} %")


if __name__ == "__main__":
    main()
