"""Hyperspherical energy as a regulariser: train a small network on digits without it and with it.

Needs scikit-learn. Run: python examples/energy_regulariser.py
"""

import torch
from sklearn.datasets import load_digits
from sklearn.model_selection import train_test_split
from torch.nn.functional import cross_entropy

from sphere_kernels import hyperspherical_energy, orthogonal_energy

SEEDS = 3
images, labels = load_digits(return_X_y=True)
split = train_test_split(images / 16, labels, test_size=0.5, random_state=0, stratify=labels)
train_x, test_x = (torch.tensor(part, dtype=torch.float32) for part in split[:2])
train_y, test_y = (torch.tensor(part) for part in split[2:])


def train(strength: float, seed: int) -> tuple[float, float]:
    """Train with ``strength`` times the energy added to the loss; return the test accuracy and the energy."""
    torch.manual_seed(seed)
    hidden, head = torch.nn.Linear(64, 128), torch.nn.Linear(128, 10)
    model = torch.nn.Sequential(hidden, torch.nn.ReLU(), head)
    adam = torch.optim.Adam(model.parameters(), lr=3e-3)
    for _ in range(20):
        for rows in torch.randperm(len(train_x)).split(64):
            energy = hyperspherical_energy(hidden.weight, reduction="mean")  # of the 128 neurons, its rows
            loss = cross_entropy(model(train_x[rows]), train_y[rows]) + strength * energy
            adam.zero_grad()
            loss.backward()
            adam.step()
    with torch.no_grad():
        accuracy = (model(test_x).argmax(1) == test_y).double().mean()
        return float(accuracy), float(hyperspherical_energy(hidden.weight, reduction="mean"))


for strength in (0.0, 10.0):
    results = torch.tensor([train(strength, seed) for seed in range(SEEDS)], dtype=torch.float64)
    accuracy, energy = results.mean(0).tolist()
    print(f"strength {strength:4.1f}: accuracy {accuracy:.4f}, energy per pair {energy:.5f} (mean of {SEEDS} seeds)")
print(f"orthogonal neurons: energy per pair {orthogonal_energy(128, reduction='mean'):.5f}")
