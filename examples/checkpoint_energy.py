"""Hyperspherical energy of every matrix of a checkpoint: a safetensors file, or a Hugging Face folder or id.

Run: python examples/checkpoint_energy.py [CHECKPOINT]    (SmolLM2-135M by default)

Rows are taken for the neurons, which is right for nn.Linear. GPT-2's Conv1D stores the transpose; there,
`sphere-edit energy` knows which way round a weight is.
"""

import sys

from safetensors.torch import load_file

from sphere_edit import load_model
from sphere_kernels import hyperspherical_energy, orthogonal_energy

MOST_ROWS = 10_000  # the cost grows with the square of the rows; this leaves out embeddings of a vocabulary

checkpoint = sys.argv[1] if len(sys.argv) > 1 else "smollm2-135m"
is_file = checkpoint.endswith(".safetensors")
tensors = load_file(checkpoint) if is_file else load_model(checkpoint)[0].state_dict()

matrices = {name: t for name, t in tensors.items() if t.ndim == 2 and t.is_floating_point() and len(t) > 1}
print(f"{'energy':>12} {'over orthogonal':>16}  {'n × d':>12}  weight")
for name, weight in matrices.items():
    n, d = weight.shape
    if n > MOST_ROWS:
        print(f"{'–':>12} {'–':>16}  {n:>5} × {d:<4}  {name} (more than {MOST_ROWS} rows)")
        continue
    energy, orthogonal = float(hyperspherical_energy(weight)), orthogonal_energy(n)
    print(f"{energy:12.1f} {energy / orthogonal - 1:+16.4%}  {n:>5} × {d:<4}  {name}")
