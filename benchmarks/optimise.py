"""Optimisation as conditional sampling: ask for reward a, and get what the data can give.

Data lie on a subspace, x = A z, z ~ N(0, I). A score and a linear reward are fitted to few of them
with noisy labels; the true reward bends, and punishes leaving the subspace. Samples are drawn at
target a by the conditional model (the exact Gaussian posterior of the fitted pair), by guidance
(the reward's gradient added to the score) and by weighted particles (the tilted density itself).
The true reward rises with a and then falls, as sub-optimality is regression error, which grows off
the data, plus the distance from the subspace (Chen et al. 2024, arXiv:2404.07771, section 4).

``python benchmarks/optimise.py [--json]`` writes results/bench/optimise.json and .png.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from coterie.core.folder import write_text
from coterie.core.machine import commit
from coterie.core.prediction import Condition, Prediction
from coterie.core.rng import SampleNoise, generator
from coterie.ensembles.product import compose
from coterie.process import PROCESSES
from coterie.solvers import GRIDS, SOLVERS, sample

F64 = torch.float64
VP = PROCESSES.parse("vp_linear").build()
WIDTH, INNER, SEEN = 16, 4, 64  # numbers of x, of z, and how many samples were seen
LABEL_NOISE = 0.4
BEND, LEAVING = 0.12, 2.0  # of the true reward: curvature, and price of leaving the subspace
TARGETS = (0.0, 1.0, 2.0, 3.0, 4.0, 6.0, 8.0, 10.0)
METHODS = ("conditional", "guided", "fkc-tilt")


class Gaussian:
    """The exact denoiser of N(mean, cov), x0 view."""

    def __init__(self, mean: Tensor, cov: Tensor) -> None:
        self.process, self.view, self.mean = VP, "x0", mean
        values, self.axes = torch.linalg.eigh(cov)
        self.values = values.clamp_min(0.0)

    def __call__(self, x: Tensor, t: Tensor, cond: Condition) -> Prediction:
        alpha, sigma = VP.alpha(t)[:, None].to(F64), VP.sigma(t)[:, None].to(F64)
        gain = alpha * self.values / (alpha.square() * self.values + sigma.square())
        rest = (x.to(F64) - alpha * self.mean) @ self.axes
        return Prediction((self.mean + (gain * rest) @ self.axes.T).to(x), "x0")


class Problem:
    """The truth, and what was fitted to few samples of it."""

    def __init__(self, seed: int) -> None:
        rng = generator(seed, "optimise")
        drawn = torch.randn(WIDTH, WIDTH, generator=rng, dtype=F64)
        self.axes = torch.linalg.qr(drawn)[0][:, :INNER]
        theta = torch.randn(INNER, generator=rng, dtype=F64)
        self.theta = self.axes @ (theta / theta.norm())
        z = torch.randn(SEEN, INNER, generator=rng, dtype=F64)
        x = z @ self.axes.T + 0.05 * torch.randn(SEEN, WIDTH, generator=rng, dtype=F64)
        labels = self.reward(x) + LABEL_NOISE * torch.randn(SEEN, generator=rng, dtype=F64)
        self.mean, self.cov = x.mean(0), torch.cov(x.T)
        ridge = x.T @ x + torch.eye(WIDTH, dtype=F64)
        self.fitted = torch.linalg.solve(ridge, x.T @ (labels - labels.mean()))
        self.offset = float(labels.mean())
        self.noise2 = float((labels - self.offset - x @ self.fitted).var())

    def reward(self, x: Tensor) -> Tensor:
        along = x @ self.theta
        return along - BEND * along.square() - LEAVING * self.leaving(x).square()

    def leaving(self, x: Tensor) -> Tensor:
        """Distance from the subspace."""
        return (x - (x @ self.axes) @ self.axes.T).norm(dim=1)

    def conditional(self, target: float) -> Gaussian:
        """N(mean, cov) given fitted reward + noise = target."""
        cross = self.cov @ self.fitted
        total = float(self.fitted @ cross) + self.noise2
        gap = target - self.offset - float(self.fitted @ self.mean)
        return Gaussian(
            self.mean + cross * gap / total, self.cov - torch.outer(cross, cross) / total
        )


def draw(problem: Problem, method: str, target: float, count: int, steps: int) -> Tensor:
    def asked(x: Tensor, t: Tensor, cond: Condition) -> Tensor:
        gap = problem.offset + x.to(F64) @ problem.fitted - target
        return -0.5 * gap.square() / problem.noise2

    if method == "conditional":
        made = compose([problem.conditional(target)], mode="anneal")  # type: ignore[list-item]
    else:
        corrector = "fkc" if method == "fkc-tilt" else "none"
        base = Gaussian(problem.mean, problem.cov)
        made = compose([base], mode="tilt", tilt=1.0, reward=asked, corrector=corrector)  # type: ignore[list-item]
    noise = SampleNoise(range(count))
    solver, grid = SOLVERS.parse("feynman_kac"), GRIDS.parse("lambda")
    x = made.initial((WIDTH,), noise).to(F64)
    return sample(made, x, Condition(), solver=solver, grid=grid, steps=steps, noise=noise)


def curves(seeds: int, count: int, steps: int) -> list[dict[str, Any]]:
    rows = []
    for method in METHODS:
        for target in TARGETS:
            found = []
            for seed in range(seeds):
                problem = Problem(seed)
                x = draw(problem, method, target, count, steps)
                fitted = problem.offset + x @ problem.fitted
                values = (problem.reward(x), fitted, problem.leaving(x))
                found.append([float(value.mean()) for value in values])
            reward, fitted_mean, leaving = (sum(column) / seeds for column in zip(*found))
            rows.append(
                {
                    "method": method,
                    "target": target,
                    "true_reward": reward,
                    "fitted_reward": fitted_mean,
                    "off_support": leaving,
                }
            )
    return rows


def picture(rows: list[dict[str, Any]], path: Path) -> None:
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, axes = pyplot.subplots(1, 2, figsize=(9, 3.6), layout="constrained")
    styles = {"conditional": ("o", "-"), "guided": ("s", "--"), "fkc-tilt": ("^", ":")}
    for method, (marker, line) in styles.items():
        mine = [row for row in rows if row["method"] == method]
        targets = [row["target"] for row in mine]
        for axis, field in zip(axes, ("true_reward", "off_support"), strict=True):
            values = [row[field] for row in mine]
            axis.plot(targets, values, marker=marker, linestyle=line, label=method)
    axes[0].set(title="Reward rises with what is asked, then falls", ylabel="true reward (mean)")
    axes[1].set(title="Samples leave the subspace", ylabel="distance from the subspace (mean)")
    for axis in axes:
        axis.set_xlabel("target a")
        axis.grid(alpha=0.3)
    axes[0].legend(frameon=False)
    figure.savefig(path, dpi=130)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--json", action="store_true", help="print JSON")
    parser.add_argument("--seeds", type=int, default=2)
    parser.add_argument("--count", type=int, default=200)
    parser.add_argument("--steps", type=int, default=40)
    parser.add_argument("--out", type=Path, default=Path("results/bench/optimise.json"))
    options = parser.parse_args()
    torch.set_num_threads(1)
    rows = curves(options.seeds, options.count, options.steps)
    result = {"commit": commit(), "seeds": options.seeds, "particles": options.count, "rows": rows}
    write_text(options.out, json.dumps(result, indent=1) + "\n")
    picture(rows, options.out.with_suffix(".png"))
    if options.json:
        print(json.dumps(result, indent=1))
        return
    for row in rows:
        print("  ".join(f"{key} {value}" for key, value in row.items()))


if __name__ == "__main__":
    main()
