"""Restarting a run that stopped at non-finite values, from before them, with the advised
settings."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from coterie.train import checkpoint
from coterie.train.run_directory import RunDir, config_hash, differences, fixed

ADVISED = ("train.lr", "train.clip")
"""What may change then: it is what the message of the stop advises."""


def is_bad(scalars: Mapping[str, Any]) -> bool:
    """Whether a checkpoint was saved amid steps that were skipped for non-finite values."""
    return bool(scalars.get("skipped_in_a_row", 0))


def take_advice(run_dir: RunDir, config: Mapping[str, Any]) -> None:
    """If ``config`` differs from the run's only as advised, make it the run's, and its newest good
    checkpoint the newest one. Otherwise do nothing.

    The earlier configuration is kept as ``config-until-STEP.json``. If killed, call it again.
    """
    old = run_dir.stored_config()
    found = checkpoint.steps(run_dir.path)
    if old is None or not found:
        return
    changes = {line.partition(": ")[0] for line in differences(fixed(old), fixed(config))}
    if not changes or not changes <= {*ADVISED}:
        return
    new_hash, newest = config_hash(config), checkpoint.verify(found[-1][1])
    if not is_bad(newest["scalars"]) and newest["config_hash"] != new_hash:
        return
    for step, path in reversed(found):
        header = checkpoint.verify(path)
        if not is_bad(header["scalars"]) or step == found[0][0]:
            break
    if header["config_hash"] != new_hash:
        whole = checkpoint.load(path)
        scalars = {**whole.scalars, "skipped_in_a_row": 0}
        checkpoint.save(
            run_dir.path, whole.state, scalars, step=step, config_hash=new_hash, keep=len(found)
        )
    checkpoint.drop_later(run_dir.path, step)
    run_dir.write_json(f"config-until-{step}.json", old)
    run_dir.write_json("config.json", config)
