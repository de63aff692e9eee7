"""How far ``attn_implementation="lightvlm"`` is from float64, beside transformers' own: docs/attention.md's table.

PYTHONPATH=tests python benchmarks/attention_fidelity.py: logits of the tests' small random models of every family, one
left-padded batch of four prompts (one image, none, two, one almost last), and whether eight greedy tokens are the same.
"""

from __future__ import annotations

import lightvlm
import torch
from python.tiny import INTERNVL, LLAVA, QWEN, Image, generate

ROWS = [[1, 2, Image(0), 3, 4, 5], [6, 7, 8], [1, Image(1), 9, Image(2), *range(10, 20)], [22, Image(3), 21]]


@torch.no_grad()
def main() -> None:
    """Print a line for each family and dtype."""
    torch.set_num_threads(1)
    lightvlm.register_attention()
    for family in (LLAVA, INTERNVL, QWEN):
        exact = family.build().double()
        for dtype in (torch.float32, torch.bfloat16):
            inputs = family.batch(ROWS, dtype)
            valid = inputs["attention_mask"].bool()
            doubled = {key: x.double() if x.is_floating_point() else x for key, x in inputs.items()}
            wanted, errors, answers = exact(**doubled).logits[valid], {}, []
            for name in ("sdpa", "lightvlm"):
                model = family.build(dtype, attention=name)
                far = model(**inputs).logits[valid].double() - wanted
                errors[name] = f"{far.pow(2).mean().sqrt():.2e}"
                answers.append(generate(model, inputs, 8))
            print(family.name, dtype, errors, "same tokens:", torch.equal(*answers))


if __name__ == "__main__":
    main()
