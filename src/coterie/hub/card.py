"""The model card: description, sizes, how to load the model, and its training data."""

from __future__ import annotations

import json
import re

from coterie.hub.layout import Manifest, model_config


def model_card(manifest: Manifest, name: str, description: str, data_licence: str) -> str:
    """Markdown with the front matter of the Hugging Face Hub."""
    config = manifest.config
    facts = {**config, **manifest.extra}
    recipe = _plain(facts.get("recipe")) or "none (built from its configuration)"
    preset = _plain(facts.get("preset"))
    total, active = manifest.parameters["total"], manifest.parameters["active"]
    lines = [
        "---",
        "library_name: coterie",
        "tags: [diffusion, mixture-of-experts]",
        "---",
        f"# {_plain(name)}",
        "",
        description or f"A `{manifest.model_class}` made with coterie.",
        "",
        f"- Recipe: {recipe}{f', preset {preset}' if preset else ''}",
        f"- Parameters: {total:,} in all, {active:,} active per unit",
        f"- Data: {_data(facts)}",
        f"- Licence of the data: {data_licence or 'not stated'}",
        f"- Made with: {', '.join(f'{k} {v}' for k, v in sorted(manifest.libraries.items()))}",
        "",
        "## Experts",
        "",
        *_experts(manifest),
        "",
        "One file per expert: `coterie.hub.load_expert(path, pool, index)` reads one alone.",
        "",
        "## Loading",
        "",
        "```python",
        *_usage(manifest, name),
        "```",
        "",
        "## Configuration",
        "",
        "```json",
        json.dumps(config, indent=2, sort_keys=True),
        "```",
    ]
    return "\n".join(lines) + "\n"


def _plain(text: object) -> str:
    """A name in one line of Markdown, nothing in it a link, HTML or a heading."""
    line = " ".join(str(text or "").split())
    return re.sub(r"([\\`*_{}\[\]<>()#|!])", r"\\\1", line)


def _experts(manifest: Manifest) -> list[str]:
    members = [m["name"] for m in manifest.config.get("members", []) if m["model"] is not None]
    files = [
        f"| {name} | `{file}` |" for name, file in zip(members, manifest.members, strict=False)
    ]
    pools = [f"| `{pool}` | {len(names)} |" for pool, names in manifest.pools.items()]
    return [
        *(["| member | file |", "|---|---|", *files, ""] if files else []),
        *(["| pool | experts |", "|---|---|", *pools] if pools else []),
        *([] if files or pools else ["None: a dense model."]),
    ]


def _data(facts: dict[str, object]) -> str:
    data = facts.get("data")
    return str(data.get("kind", "not stated")) if isinstance(data, dict) else "not stated"


def _usage(manifest: Manifest, name: str) -> list[str]:
    if model_config(manifest.config) is not None:
        return [
            "from coterie.hub import load_pretrained",
            "",
            f'model = load_pretrained("{name}")  # a folder',
        ]
    return [
        "from coterie.hub import load_into, load_manifest",
        "",
        f'manifest = load_manifest("{name}")',
        f"model = ...  # a {manifest.model_class}, built from manifest.config",
        f'load_into(model, "{name}")',
    ]
