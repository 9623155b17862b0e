"""A linear layer with a low-rank addition."""

import torch


class Model(torch.nn.Module):
    def __init__(self, inside, outside, rank):
        super().__init__()
        self.linear = torch.nn.Linear(inside, outside, bias=False)
        self.down = torch.nn.Linear(inside, rank, bias=False)
        self.up = torch.nn.Linear(rank, outside, bias=False)

    def forward(self, x):
        return self.linear(x) + self.up(self.down(x)) * 2.0


def get_inputs():
    return [torch.randn(64, 256)]


def get_init_inputs():
    return [256, 128, 8]
