"""A convolution alone: an honest copy of Model."""

import torch


class Model(torch.nn.Module):
    def __init__(self, channels, features):
        super().__init__()
        self.conv = torch.nn.Conv2d(channels, features, 3, padding=1)

    def forward(self, x):
        return self.conv(x)


def get_inputs():
    return [torch.randn(2, 3, 16, 16)]


def get_init_inputs():
    return [3, 8]
