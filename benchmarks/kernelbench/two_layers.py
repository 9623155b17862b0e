"""Two linear layers and what is between them, in a Sequential."""

import torch


class Model(torch.nn.Module):
    def __init__(self, inside, hidden, outside):
        super().__init__()
        self.layers = torch.nn.Sequential(
            torch.nn.Linear(inside, hidden), torch.nn.SiLU(), torch.nn.Linear(hidden, outside)
        )

    def forward(self, x):
        return self.layers(x)


def get_inputs():
    return [torch.randn(64, 256)]


def get_init_inputs():
    return [256, 128, 32]
