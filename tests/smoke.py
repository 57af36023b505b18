"""Run by `make dist` in an environment that holds nothing but the built package and its base dependencies."""

import torch

import gdn2
from gdn2.ops import gated_delta_rule_2

model = gdn2.LanguageModel(gdn2.preset("gdn2-hybrid-tiny"))
tokens = torch.randint(0, 257, (2, 65))
model.loss(tokens[:, :-1], tokens[:, 1:]).backward()
q, k, v, g, b, w = (torch.rand(1, 70, 2, 8) for _ in range(6))
fast, exact = (gated_delta_rule_2(q, k, v, -g, b, w, backend=backend)[0] for backend in ("torch", "reference"))
torch.testing.assert_close(fast, exact)
print(f"gdn2 {gdn2.__version__} works with torch {torch.__version__}")
