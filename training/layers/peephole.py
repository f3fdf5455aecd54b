"""The loop of an LSTM with peepholes, forwards and backwards by hand.

No kernel of torch's knows peepholes, and autograd over a plain loop spends most of its time on bookkeeping. Here
everything that does not depend on the step before is done for all steps at once: the local derivatives before the
backward loop, the weights' gradients after it.
"""

from typing import Any

import torch
from torch import Tensor


class PeepholeLstm(torch.autograd.Function):
    """c_t = s(f + p_f c_{t-1}) c_{t-1} + s(i + p_i c_{t-1}) tanh(g), h_t = s(o + p_o c_t) tanh(c_t).

    Call `apply(projected, h, c, weight, peephole)`:
        projected: (T, B, 4 H), the input's part of the gates i, f, g, o, biases included.
        h, c: (B, H).
        weight: (4 H, H).
        peephole: (3, H), for i, o, f.

    Returns h and c of every step, (T, B, H) each.
    """

    @staticmethod
    def forward(
        ctx: Any, projected: Tensor, h: Tensor, c: Tensor, weight: Tensor, peephole: Tensor
    ) -> tuple[Tensor, Tensor]:
        n_steps, rows, width = projected.shape
        size = width // 4
        to_i, to_o, to_f = peephole
        hs, cs = (projected.new_empty(n_steps + 1, rows, size) for _ in range(2))
        gates, squashed = torch.empty_like(projected), projected.new_empty(n_steps, rows, size)
        hs[0], cs[0] = h, c
        transposed = weight.t().contiguous()
        for t in range(n_steps):
            torch.addmm(projected[t], hs[t], transposed, out=gates[t])
            i, f, g, o = gates[t].chunk(4, dim=1)
            i.addcmul_(to_i, cs[t])
            f.addcmul_(to_f, cs[t])
            gates[t, :, : 2 * size].sigmoid_()
            torch.mul(f, cs[t], out=cs[t + 1])
            cs[t + 1].addcmul_(i, g.tanh_())
            o.addcmul_(to_o, cs[t + 1]).sigmoid_()
            torch.mul(o, torch.tanh(cs[t + 1], out=squashed[t]), out=hs[t + 1])
        ctx.save_for_backward(hs, cs, gates, squashed, weight, peephole)
        return hs[1:], cs[1:]

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, grad_h: Tensor, grad_c: Tensor) -> tuple[Tensor, ...]:
        hs, cs, gates, squashed, weight, peephole = ctx.saved_tensors
        to_i, to_o, to_f = peephole
        i, f, g, o = gates.chunk(4, dim=2)
        size = i.shape[2]
        # What one unit of dh or dc does to each gate before its squashing, for all steps at once.
        slope_o = squashed * o * (1 - o)
        slope_c = o * (1 - squashed * squashed)
        slopes = torch.stack([g * i * (1 - i), cs[:-1] * f * (1 - f), i * (1 - g * g)], dim=2)  # (T, B, 3, H)
        grad_gates = torch.empty_like(gates)
        dh, dc = torch.zeros_like(hs[0]), torch.zeros_like(hs[0])
        for t in range(gates.shape[0] - 1, -1, -1):
            dh = dh + grad_h[t]
            d_i, d_f, _, d_o = grad_gates[t].chunk(4, dim=1)
            torch.mul(dh, slope_o[t], out=d_o)
            dc = (dc + grad_c[t]).addcmul_(dh, slope_c[t]).addcmul_(d_o, to_o)
            torch.mul(dc[:, None], slopes[t], out=grad_gates[t, :, : 3 * size].view(-1, 3, size))
            dc = (dc * f[t]).addcmul_(d_i, to_i).addcmul_(d_f, to_f)
            dh = grad_gates[t] @ weight
        grad_weight = grad_gates.flatten(0, 1).t() @ hs[:-1].flatten(0, 1)
        d_i, d_f, _, d_o = grad_gates.chunk(4, dim=2)
        seen = ((d_i, cs[:-1]), (d_o, cs[1:]), (d_f, cs[:-1]))
        grad_peephole = torch.stack([(d * cell).sum(dim=(0, 1)) for d, cell in seen])
        return grad_gates, dh, dc, grad_weight, grad_peephole
