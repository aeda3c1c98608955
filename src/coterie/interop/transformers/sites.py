"""The expert layers of a Hugging Face model, found by structure and named by table.

    sites = find_moe_layers(model)
    with tap(model, trace_routing):
        model(ids, attention_mask=mask)
    with sites[3].edit_logits(delta):          # also masks, -inf, or any function of the logits
        ...
    with sites[3].reroute(sites[3].router_config().replace(select={"kind": "top_p", "p": 0.6})):
        ...

Legend: E experts, K choices, D width, F inner size, R rows.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from torch import Generator, Tensor, nn

from coterie.core.errors import ConfigError, describe
from coterie.core.routing import Routing
from coterie.experts import ExpertPool, RouterConfig
from coterie.interop.transformers.eager import around, run_eagerly
from coterie.interop.transformers.experts import PoolExperts
from coterie.interop.transformers.families import KNOWN, Family, Rule, family_of
from coterie.interop.transformers.hooks import Change, Collector, Control, EditFn

if TYPE_CHECKING:
    from collections.abc import Iterator

    from coterie.experts import ExpertLayer

ROUTER_NAMES = ("gate", "router")
_COUNTS = ("num_local_experts", "num_experts", "n_routed_experts", "moe_num_experts")


@dataclass(eq=False)
class MoESite:
    """One expert layer: ``block`` (at ``path`` in ``model``) holds its router and its experts.

    Numbers are read from the modules each time, so that a changed ``top_k`` is seen. ``slot``
    tells layers of equal number apart: "ffn", or "encoder" and "decoder" where both route.
    """

    model: nn.Module
    path: str
    layer: int
    slot: str
    family: Family
    block: Any
    router_name: str

    @property
    def kind(self) -> str:
        return self.family.kind

    @property
    def router(self) -> Any:
        """Their router module."""
        return getattr(self.block, self.router_name)

    @property
    def experts(self) -> Any:
        """Their experts module, or what stands in its place now."""
        return self.block.experts

    @property
    def rule(self) -> Rule:
        """Softmax or sigmoid, renormalisation, scale, groups, selection bias, expert scale."""
        return self.family.read(self.router)

    @property
    def num_experts(self) -> int:
        return self.rule.num_experts

    @property
    def top_k(self) -> int:
        return self.rule.top_k

    @property
    def width(self) -> int:
        """D."""
        return int(self.router_weight.shape[1])

    @property
    def hidden(self) -> int:
        """F, the inner size of one routed expert."""
        return int(self.expert(0)[0].shape[0])

    @property
    def router_weight(self) -> Tensor:
        """[E, D], the matrix that makes the logits."""
        named = self.family.logits
        weight: Tensor = (self.router if named == "output" else getattr(self.router, named)).weight
        return weight

    @property
    def shared(self) -> Any:
        """The MLP that is always on, or None."""
        return getattr(self.block, self.family.shared) if self.family.shared else None

    @property
    def shared_gate(self) -> Any:
        """The linear map whose sigmoid weighs ``shared``, or None."""
        return getattr(self.block, self.family.shared_gate) if self.family.shared_gate else None

    def expert(self, expert: int) -> tuple[Tensor, Tensor, Tensor]:
        """Views of one expert's gate [F, D], up [F, D] and down [D, F]."""
        if not 0 <= expert < self.num_experts:
            raise ConfigError(describe("expert", expert, f"0..{self.num_experts - 1}"))
        gate_up, down = _tensors(self, expert)
        gate, up = gate_up.chunk(2, dim=0)
        return gate, up, down

    def router_config(self) -> RouterConfig:
        """Our configuration of the same rule."""
        return self.rule.router_config()

    def tap(self, collector: Collector) -> Change:
        """Hand the collector one Routing per forward pass: what was really used, best first."""
        return self._add("taps", collector)

    def edit_logits(self, edit: EditFn | Tensor) -> Change:
        """Change the raw logits f32 [R, E] before the layer's own rule is applied to them.

        ``edit``: a function, or a tensor [E] that is added. A candidate at -inf is never chosen;
        where fewer than K are left, the rest of the row goes to nobody. An edit by zero changes
        no bit, and gradients reach what the edit is made of.
        """
        if isinstance(edit, Tensor):
            if edit.shape[-1:] != (self.num_experts,):
                allowed = f"[{self.num_experts}]"
                raise ConfigError(describe("edit", tuple(edit.shape), allowed))
            delta = edit
            return self._add("edits", lambda logits: logits + delta.float())
        return self._add("edits", edit)

    def reroute(
        self, by: RouterConfig | Callable[[Routing], Routing], rng: Generator | None = None
    ) -> Change:
        """Decide by another rule on the same logits, or change the layer's own Routing.

        A configuration's score is passed over. ``rng`` drives selections that draw (``random``).
        """
        if not isinstance(by, RouterConfig):
            return self._add("routes", by)
        by.check(self.num_experts)
        if by.num_reserved or by.routed_unit != "token":
            raise ConfigError(describe("router", "a partition or unit sample", "a rule of tokens"))
        return self._add("rules", (by, rng))

    def run_eagerly(self) -> Callable[[], None]:
        """Let hooks of this layer be seen, whatever has been compiled; the answer ends it."""
        parts = (self.block, self.router, *self.router.children(), self.experts)
        return run_eagerly([*around(self.model, self.path), *parts])

    def _add(self, entries: str, entry: Any) -> Change:
        def start() -> Callable[[], None]:
            control = Control.of(self)
            return control.add(getattr(control, entries), entry)

        return Change(start)

    def replace_experts(self, experts: nn.Module, slot_map: Sequence[int] | None = None) -> Change:
        """Put other experts in the place of theirs: a pool of ours, or any module called as
        ``experts(h [R, D], ids [R, K], weights [R, K])``; an id of E is nobody.

        ``slot_map``: candidate -> tensor of the pool (merged experts).
        """
        if isinstance(experts, ExpertPool):
            if experts.width != self.width:
                raise ConfigError(describe("pool.width", experts.width, str(self.width)))
            experts = PoolExperts(experts, self.num_experts, slot_map)
        elif slot_map is not None:
            raise ConfigError(describe("slot_map", slot_map, "None, unless experts are a pool"))
        return Change(lambda: _swap(self, experts))

    def to_expert_layer(self) -> ExpertLayer:
        """A copy of this layer as ours; see :mod:`coterie.interop.transformers.convert`."""
        from coterie.interop.transformers.convert import to_expert_layer

        return to_expert_layer(self)

    def load_expert_layer(self, layer: ExpertLayer) -> None:
        """Copy the tensors of one of ours, of the same shapes and rule, into this layer."""
        from coterie.interop.transformers.convert import load_expert_layer

        load_expert_layer(self, layer)


def _tensors(site: MoESite, expert: int) -> tuple[Tensor, Tensor]:
    """One expert's gate_up [2F, D] and down [D, F], in their module or in a pool of ours."""
    held = site.experts
    if isinstance(held, PoolExperts):
        stacks, expert = held.pool.adapted().stacks(), held.tensor_of(expert)
        return stacks["gate_up"][expert], stacks["down"][expert]
    if not hasattr(held, "gate_up_proj"):
        raise ConfigError(f"{site.path}: its experts are replaced by {type(held).__name__}")
    return held.gate_up_proj[expert], held.down_proj[expert]


def _swap(site: MoESite, experts: nn.Module) -> Callable[[], None]:
    before = site.experts

    def put(module: nn.Module) -> None:
        site.block.experts = module
        control = Control.of(site)
        if control.active:
            control.attach()

    put(experts)
    return lambda: put(before)


def find_moe_layers(model: nn.Module) -> list[MoESite]:
    """All expert layers, in the order of the model's modules.

    ConfigError: no expert layers (a dense model), or one of an unknown kind. A model with an
    unknown layer is refused as a whole, since a rule that is guessed gives numbers that are wrong.
    """
    model = getattr(model, "_orig_mod", model)  # of a compiled one
    sites = []
    for path, block in model.named_modules():
        if _holds_experts(block):
            sites.append(_site(model, path, block))
    if not sites:
        counts = _counts(model)
        if counts:
            told = ", ".join(f"{name}={value}" for name, value in counts.items())
            raise ConfigError(
                f"{type(model).__name__}: its configuration says {told}, but no layer has a "
                f"structure known here; known: {', '.join(KNOWN)}"
            )
        raise ConfigError(f"{type(model).__name__}: no MoE layers; this is a dense model")
    return sites


@contextmanager
def tap(model: nn.Module | Sequence[MoESite], collector: Collector) -> Iterator[list[MoESite]]:
    """Tap every expert layer of a model (or the given ones): one Routing per layer and pass."""
    sites = find_moe_layers(model) if isinstance(model, nn.Module) else list(model)
    with ExitStack() as stack:
        for site in sites:
            stack.enter_context(site.tap(collector))
        yield sites


def _holds_experts(block: nn.Module) -> bool:
    """A child named ``experts`` that stacks several, or anything in its place in a known block."""
    children = dict(block.named_children())
    held = children.get("experts")
    if held is None:
        return False
    if any(family_of(children.get(name), block) for name in ROUTER_NAMES):
        return True
    if any(parameter.dim() == 3 for parameter in held.parameters(recurse=False)):
        return True
    return isinstance(held, nn.ModuleList | nn.ModuleDict) and len(held) > 1


def _site(model: nn.Module, path: str, block: nn.Module) -> MoESite:
    children = dict(block.named_children())
    name = next((name for name in ROUTER_NAMES if name in children), None)
    router = children[name] if name else None
    family = None if router is None else family_of(router, block)
    if name is None or family is None or not _fused(children["experts"]):
        raise ConfigError(
            f"{path or 'model'}: {type(block).__name__} with router "
            f"{'none' if router is None else type(router).__name__} is of no known kind; "
            f"known: {', '.join(KNOWN)}"
        )
    numbers = re.findall(r"\d+", path)
    slot = "ffn"
    if family.kind == "diffusion_gemma":
        slot = "encoder" if "Encoder" in type(block).__name__ else "decoder"
    layer = int(numbers[-1]) if numbers else 0
    site = MoESite(model, path, layer, slot, family, block, name)
    site.rule.router_config("given")  # a rule that cannot be is refused here, not in a forward pass
    return site


def _fused(experts: Any) -> bool:
    """``gate_up_proj`` [E, 2F, D], gate rows first and no biases, as all of the table have it."""
    fused = getattr(experts, "gate_up_proj", None)
    if fused is None:  # replaced by something of the same call
        return True
    plain = not getattr(experts, "is_transposed", False) and not getattr(experts, "has_bias", False)
    return fused.dim() == 3 and plain and getattr(experts, "is_concatenated", True)


def _counts(model: nn.Module) -> dict[str, int]:
    """What the model's own configuration says about numbers of experts above one."""
    config: Any = getattr(model, "config", None)
    text = config.get_text_config() if hasattr(config, "get_text_config") else config
    found = {name: getattr(text, name, None) for name in _COUNTS}
    return {name: value for name, value in found.items() if isinstance(value, int) and value > 1}
