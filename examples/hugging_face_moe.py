"""See and change the routers of a Hugging Face mixture-of-experts model.

The model is small, random and built here, so nothing is downloaded; a trained one from a folder is
read in the same way. Needs `pip install 'coterie[interop]'`.

    python examples/hugging_face_moe.py --tokens 256
"""

import argparse

import torch
import transformers

from coterie import Trace
from coterie.inspect import text_summary
from coterie.interop.transformers import find_moe_layers, selfcheck, tap


def small_olmoe() -> transformers.PreTrainedModel:
    torch.manual_seed(0)
    config = transformers.OlmoeConfig(
        vocab_size=256,
        hidden_size=64,
        intermediate_size=48,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=4,
        num_experts=8,
        num_experts_per_tok=2,
        eos_token_id=1,
    )
    return transformers.OlmoeForCausalLM(config).eval()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--tokens", type=int, default=256, help="length of each of 8 texts")
    given = parser.parse_args()
    model = small_olmoe()
    ids = torch.randint(0, 256, (8, given.tokens), generator=torch.Generator().manual_seed(0))

    # Each layer is computed a second time in plain loops: raises where what is read is not so.
    print("largest difference of the check:", f"{max(c.error for c in selfcheck(model)):.0e}")
    trace, routings = Trace(), []
    with tap(model, routings.append), torch.no_grad():
        plain = model(ids).logits
    trace.add(routings)
    print(text_summary(trace))

    # The second expert layer asks one expert per token instead of two.
    site = find_moe_layers(model)[1]
    fewer = site.router_config().replace(select={"kind": "top_k", "k": 1})
    with site.reroute(fewer), torch.no_grad():
        moved = (model(ids).logits - plain).abs().max()
    print(f"one expert per token in {site.path} moves a logit by up to {moved:.3f}")
    with torch.no_grad():
        print("the model as it was afterwards:", torch.equal(model(ids).logits, plain))


if __name__ == "__main__":
    main()
