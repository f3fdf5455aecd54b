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
        # Written out over the rows: broadcasting costs more than the memory. Order i, f, o.
        wide = peephole[[0, 2, 1], None].expand(-1, rows, -1).contiguous()
        to_i_and_f, to_o = wide[:2].transpose(0, 1).contiguous(), wide[2]  # (B, 2, H), (B, H)
        hs, cs = (projected.new_empty(n_steps + 1, rows, size) for _ in range(2))
        gates, squashed = torch.empty_like(projected), projected.new_empty(n_steps, rows, size)
        hs[0], cs[0] = h, c
        transposed = weight.t().contiguous()
        steps = (projected, gates, hs[:-1], hs[1:], cs[:-1], cs[1:], squashed)
        for part, gate, h0, h1, c0, c1, squash in zip(*(s.unbind(0) for s in steps), strict=True):
            torch.addmm(part, h0, transposed, out=gate)
            i_and_f, g, o = gate[:, : 2 * size], gate[:, 2 * size : 3 * size], gate[:, 3 * size :]
            i_and_f.view(rows, 2, size).addcmul_(to_i_and_f, c0[:, None])
            i_and_f.sigmoid_()
            torch.mul(i_and_f[:, size:], c0, out=c1)
            c1.addcmul_(i_and_f[:, :size], g.tanh_())
            o.addcmul_(to_o, c1).sigmoid_()
            torch.mul(o, torch.tanh(c1, out=squash), out=h1)
        ctx.save_for_backward(hs, cs, gates, squashed, weight, wide)
        ctx.set_materialize_grads(False)
        return hs[1:], cs[1:]

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, grad_h: Tensor | None, grad_c: Tensor | None) -> tuple[Tensor, ...]:
        hs, cs, gates, squashed, weight, (to_i, to_f, to_o) = ctx.saved_tensors
        rows, size = hs.shape[1:]
        grad_gates = torch.empty_like(gates)
        dh, dc = torch.zeros_like(hs[0]), torch.zeros_like(hs[0])
        steps = (grad_gates, gates, *_slopes(cs, gates, squashed))
        backwards = zip(*(s.unbind(0)[::-1] for s in steps), strict=True)
        for t, (grad, gate, slope_o, slope_c, slope_others) in zip(
            range(len(gates) - 1, -1, -1), backwards, strict=True
        ):
            d_i, d_f, d_o = grad[:, :size], grad[:, size : 2 * size], grad[:, 3 * size :]
            if grad_h is not None:
                dh += grad_h[t]
            if grad_c is not None:
                dc += grad_c[t]
            torch.mul(dh, slope_o, out=d_o)
            dc.addcmul_(dh, slope_c).addcmul_(d_o, to_o)
            torch.mul(dc[:, None], slope_others, out=grad[:, : 3 * size].view(rows, 3, size))
            dc *= gate[:, size : 2 * size]
            dc.addcmul_(d_i, to_i).addcmul_(d_f, to_f)
            torch.mm(grad, weight, out=dh)
        grad_weight = grad_gates.flatten(0, 1).t() @ hs[:-1].flatten(0, 1)
        return grad_gates, dh, dc, grad_weight, _grad_peephole(grad_gates, cs)


def _slopes(cs: Tensor, gates: Tensor, squashed: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """What one unit of dh or dc does to each gate before its squashing, for all steps at once.

    Returns:
        dh to o, dh to c, both (T, B, H), and dc to i, f and g, (T, B, 3, H).
    """
    i, f, g, o = gates.chunk(4, dim=2)
    slopes = gates.new_empty(*i.shape[:2], 3, i.shape[2])
    for place, (outer, gate) in enumerate(((g * i, i), (cs[:-1] * f, f))):
        torch.addcmul(outer, outer, gate, value=-1, out=slopes[:, :, place])
    torch.addcmul(i, i * g, g, value=-1, out=slopes[:, :, 2])
    answer = squashed * o  # h
    return torch.addcmul(answer, answer, o, value=-1), torch.addcmul(o, answer, squashed, value=-1), slopes


def _grad_peephole(grad_gates: Tensor, cs: Tensor) -> Tensor:
    """(3, H), for i, o, f: gradients of the gates times the cells they saw."""
    d_i, d_f, _, d_o = grad_gates.chunk(4, dim=2)
    return torch.stack([(d * seen).sum(dim=(0, 1)) for d, seen in ((d_i, cs[:-1]), (d_o, cs[1:]), (d_f, cs[:-1]))])
