"""Names of metrics on the page, and whether larger or smaller is better."""

from __future__ import annotations

from typing import Literal, NamedTuple

Better = Literal["lower", "higher", ""]
ARROWS = {"lower": "↓ lower", "higher": "↑ higher", "": "–"}


class Name(NamedTuple):
    """``better`` is empty where a number is neither good nor bad by itself."""

    text: str
    better: Better = ""


_DISTANCES = {
    "cd": "Chamfer distance",
    "emd_squared": "squared earth mover's distance",
    "emd_euclidean": "earth mover's distance",
}
NAMES = {
    "frechet": Name("Frechet distance", "lower"),
    "kid": Name("kernel distance (KID)", "lower"),
    "precision": Name("precision", "higher"),
    "recall": Name("recall", "higher"),
    "label_accuracy": Name("accuracy of the classes asked for", "higher"),
    "in_classes": Name("share in the classes of the data", "higher"),
    "class_distance": Name("distance of the shares of classes (total variation)", "lower"),
    "island_distance": Name("distance of the shares of islands (total variation)", "lower"),
    "accuracy": Name("accuracy", "higher"),
    "answer_loss": Name("loss of answers (bits per token)", "lower"),
    "answer_accuracy": Name("answers that are right, token by token", "higher"),
    "cluster_accuracy": Name("accuracy of the router", "higher"),
    "cluster_accuracy_clean": Name("accuracy of the router, cleanest tenth", "higher"),
    "cluster_accuracy_noisy": Name("accuracy of the router, noisiest tenth", "higher"),
    "calibration_error": Name("calibration error", "lower"),
    "router_accuracy": Name("accuracy of the router", "higher"),
    "router_calibration_error": Name("calibration error of the router", "lower"),
    "psnr": Name("PSNR (dB)", "higher"),
    "ssim": Name("SSIM", "higher"),
    "milliseconds": Name("milliseconds per picture", "lower"),
    "time_over_dense": Name("time over that of the dense network", "lower"),
    "gauc": Name("AUC per user (GAUC)", "higher"),
    "auc": Name("AUC", "higher"),
    "dropped_users": Name("users without both kinds of answer, left out of GAUC"),
    "success": Name("episodes that reach their goal", "higher"),
    "success_low": Name("episodes that reach their goal, lower bound", "higher"),
    "success_high": Name("episodes that reach their goal, upper bound", "higher"),
    "steps_to_goal": Name("steps to the goal", "lower"),
    "mode_coverage": Name("starts from which both ways are taken", "higher"),
    "flops_per_call": Name("FLOPs per call", "lower"),
    "all_experts_flops_per_call": Name("FLOPs per call, all experts", "lower"),
    "cached_flops_per_call": Name("FLOPs per call with the cache", "lower"),
    "cache_difference": Name("largest difference that the cache makes", "lower"),
    **{f"one_nn_{key}": Name(f"1-NNA by {name}", "lower") for key, name in _DISTANCES.items()},
    **{
        f"coverage_{key}": Name(f"coverage by {name}", "higher") for key, name in _DISTANCES.items()
    },
    **{f"mmd_{key}": Name(f"MMD by {name}", "lower") for key, name in _DISTANCES.items()},
}


def metric_name(key: str) -> Name:
    """Of ``group / key`` and ``key/of what`` too; a key that is not known says itself in words."""
    *groups, last = key.split(" / ")
    base, slash, of = last.partition("/")
    found = NAMES.get(base)
    if found is None:
        text = last if " " in last else last.replace("_", " ")
        found = Name(text, "lower" if "loss" in last.lower() else "")
    elif slash:
        found = found._replace(text=f"{found.text}, {of}")
    return found._replace(text=" / ".join([*groups, found.text]))


def explained(key: str) -> str:
    """``Frechet distance (lower is better)``."""
    name = metric_name(key)
    return f"{name.text} ({name.better} is better)" if name.better else name.text
