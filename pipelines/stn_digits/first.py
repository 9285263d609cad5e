"""A first convolution whose gradient into the image is quick on a CPU.

oneDNN computes the gradient of one channel by padding it to sixteen. Sixteen pixels (4×4) of that channel can be sixteen channels
of every fourth place instead: the same numbers in a quarter of the time. Only nets behind a transformer need this gradient.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

STRIDE = 4


class _Convolve(torch.autograd.Function):
    """images (N, 1, H, W), weight (C, 1, k, k), bias (C,) → (N, C, H - k + 1, W - k + 1); H and W divide by 4."""

    @staticmethod
    def forward(ctx, images: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
        ctx.save_for_backward(images, weight)
        return F.conv2d(images, weight, bias)

    @staticmethod
    def backward(ctx, gradient: Tensor) -> tuple[Tensor | None, Tensor, Tensor]:
        images, weight = ctx.saved_tensors
        gradient = gradient.contiguous(memory_format=torch.channels_last)
        _, into_weight, into_bias = torch.ops.aten.convolution_backward(
            gradient, images, weight, [len(weight)], [1, 1], [0, 0], [1, 1], False, [0, 0], 1, [False, True, True])
        if not ctx.needs_input_grad[0]:
            return None, into_weight, into_bias
        turned = weight.flip(2, 3)[:, 0]
        each = [F.pad(turned, (column, STRIDE - 1 - column, row, STRIDE - 1 - row)) for row in range(STRIDE) for column in range(STRIDE)]
        kernel = torch.stack(each).contiguous(memory_format=torch.channels_last)
        found = F.conv2d(gradient, kernel, stride=STRIDE, padding=weight.shape[-1] - 1)
        return F.pixel_shuffle(found, STRIDE), into_weight, into_bias


class FirstConv(nn.Conv2d):
    """A convolution of one-channel images; what nn.Conv2d gives, and its gradients."""

    def forward(self, input: Tensor) -> Tensor:
        weight, bias = self.weight, self.bias
        if torch.is_autocast_enabled("cpu"):  # which does not look into a function of one's own
            half = torch.get_autocast_dtype("cpu")
            input, weight, bias = input.to(half), weight.to(half), bias.to(half)
        return _Convolve.apply(input, weight, bias)
