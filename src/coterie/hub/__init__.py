"""Model directories: saving and loading models, also one expert at a time.

``` manifest.json                     format, class, configuration, pools, size and SHA-256 of each
file trunk.safetensors                 everything that is neither an expert nor a router
router.safetensors                parameters and buffers of the routers
experts/<pool>/e000.safetensors   one file per expert of each pool members/00.safetensors
of an ensemble: one file per member, in place of the trunk README.md                         the
model card ``` Only safetensors and JSON are ever read; every file is checked against the manifest
first.
"""

from coterie.hub.ensembles import load_ensemble, load_member, save_ensemble
from coterie.hub.layout import Manifest, load_manifest, verify
from coterie.hub.load import (
    MissingExpert,
    ModelTensors,
    load_expert,
    load_into,
    load_pretrained,
    load_tensors,
)
from coterie.hub.push import push_to_hub
from coterie.hub.save import save_pretrained

__all__ = [
    "Manifest",
    "MissingExpert",
    "ModelTensors",
    "load_ensemble",
    "load_expert",
    "load_into",
    "load_manifest",
    "load_member",
    "load_pretrained",
    "load_tensors",
    "push_to_hub",
    "save_ensemble",
    "save_pretrained",
    "verify",
]
