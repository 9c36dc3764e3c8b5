"""The forms of linear attention against the T x T definition in float64."""

import pytest
import torch

from hedgehog import FEATURE_MAPS, GPTConfig, linear_attention
from linear import (EPS, FASTEST, SEGMENT, chunked_linear_attention, decayed_linear_attention,
                    linear_attention_weights, naive_linear_attention, recurrent_linear_attention,
                    recurrent_step)

LENGTHS = [1, 15, 16, 17, 63, 65, 130]


def features(name, T, B=2, H=3, d=4):
    """phi_q, phi_k, v in float64 as the map called name makes them."""
    torch.manual_seed(T)
    config = GPTConfig(n_head=H, n_embd=H * d, block_size=256, attention=name)
    q, k, v = torch.randn(3, B, H, T, d, dtype=torch.float64)
    phi_q, phi_k = FEATURE_MAPS[name](config).double()(q, k, torch.arange(T))
    return phi_q.detach(), phi_k.detach(), v


def error(x, reference):
    return ((x - reference).norm() / reference.norm()).item()


@pytest.mark.parametrize("name", FEATURE_MAPS)
@pytest.mark.parametrize("T", LENGTHS)
def test_three_forms_agree(name, T):
    phi_q, phi_k, v = features(name, T)
    y = naive_linear_attention(phi_q, phi_k, v)
    chunked, state = chunked_linear_attention(phi_q, phi_k, v, chunk=16)
    recurrent, last = recurrent_linear_attention(phi_q, phi_k, v)
    assert error(chunked, y) < 1e-10
    assert error(recurrent, y) < 1e-10
    for a, b in zip(state, last):
        assert error(a, b) < 1e-10


@pytest.mark.parametrize("form", [chunked_linear_attention, recurrent_linear_attention])
@pytest.mark.parametrize("cut", [1, 16, 37])
def test_state_carries_on(form, cut):
    x = features("hedgehog", 65)
    first, state = chunked_linear_attention(*(t[:, :, :cut] for t in x), chunk=16)
    second, _ = form(*(t[:, :, cut:] for t in x), state=state)
    assert error(torch.cat([first, second], dim=2), naive_linear_attention(*x)) < 1e-10


# -- decay -----------------------------------------------------------------------------------------


def decayed_weights(phi_q, phi_k, r, mask=None):
    """The definition, pair by pair and feature by feature."""
    i = torch.arange(phi_q.size(2))
    distance = (i[:, None] - i).clamp(min=0)[..., None]     # (T, T, 1)
    A = torch.einsum("bhif, bhjf, hijf -> bhij", phi_q, phi_k, (-r[:, :, None] * distance).exp())
    A = A.tril() if mask is None else A.tril() * mask[:, None, None, :]
    return A / (A.sum(-1, keepdim=True) + EPS)


def decayed_inputs(T):
    """phi_q, phi_k, v and rates from none to the fastest."""
    phi_q, phi_k, v = features("hedgehog", T)
    F = phi_q.size(-1)
    return phi_q, phi_k, v, FASTEST * torch.linspace(0, 1, F).double().expand(3, 1, F).contiguous()


@pytest.mark.parametrize("T", [1, 2, 65, SEGMENT, SEGMENT + 1, 2 * SEGMENT + 44])
@pytest.mark.parametrize("padded", [False, True])
def test_decay_is_its_definition(T, padded):
    """Weights, output, gradients, and queries that stand last."""
    *x, r = decayed_inputs(T)
    mask = None
    if padded:
        mask = torch.rand(2, T) < 0.7
        mask[:, 0] = True
    x = [t.requires_grad_() for t in (*x, r)]
    exact = decayed_weights(*x[:2], r, mask)
    a = linear_attention_weights(*x[:2], True, mask, r)
    y, _ = decayed_linear_attention(chunked_linear_attention, *x, key_mask=mask)
    assert error(a, exact) < 1e-10 and error(y, exact @ x[2]) < 1e-10
    last = slice(T // 2, None)
    assert error(linear_attention_weights(x[0][:, :, last], x[1], True, mask, r),
                 exact[:, :, last]) < 1e-10
    dy = torch.randn_like(y)
    references = torch.autograd.grad(exact @ x[2], x, dy)
    for form in (y, a @ x[2]):
        for g, reference in zip(torch.autograd.grad(form, x, dy), references):
            assert (g - reference).norm() < 1e-10 * (1 + reference.norm())


@pytest.mark.parametrize("padding", [0, 1, SEGMENT + 10])
def test_decay_in_fp32_at_the_fastest_rate(padding):
    """exp(-FASTEST SEGMENT) is 0 in fp32; neither that nor its gradient may spoil anything, nor may
    the gradient of padding on the left, which sees no key."""
    *x, r = decayed_inputs(2 * SEGMENT)
    x = [t.float().requires_grad_() for t in (*x, torch.full_like(r, FASTEST))]
    mask = torch.arange(2 * SEGMENT).expand(2, -1) >= padding
    y, state = decayed_linear_attention(chunked_linear_attention, *x, key_mask=mask)
    ys = [t.detach().double().requires_grad_() for t in x]
    exact = decayed_weights(*ys[:2], ys[3], mask) @ ys[2]
    assert error(y, exact) < 1e-5
    assert error(linear_attention_weights(*x[:2], True, mask, x[3]) @ x[2], exact) < 1e-5
    dy = torch.randn_like(y)
    for g, reference in zip(torch.autograd.grad(y, x, dy, retain_graph=True),
                            torch.autograd.grad(exact, ys, dy.double())):
        assert error(g, reference) < 1e-5
    for g in torch.autograd.grad(sum(s.sum() for s in state), x[1:]):
        assert g.isfinite().all()


@pytest.mark.parametrize("cuts", [(1, 2), (40, 41), (SEGMENT, 200), (SEGMENT + 22, 200)])
def test_decayed_state_carries_on(cuts):
    """In pieces of any length, that of a single token too, and with padding where they begin."""
    *x, r = decayed_inputs(2 * SEGMENT + 10)
    mask = torch.rand(2, 2 * SEGMENT + 10) < 0.7
    mask[:, 0], mask[:, list(cuts)] = True, False
    state, y = None, []
    for i, j in zip((0, *cuts), (*cuts, None)):
        piece, state = decayed_linear_attention(chunked_linear_attention,
                                                *(t[:, :, i:j] for t in x), r,
                                                key_mask=mask[:, i:j], state=state)
        y.append(piece)
    assert error(torch.cat(y, dim=2), decayed_weights(*x[:2], r, mask) @ x[2]) < 1e-10


def test_decay_with_rates_in_bf16():
    """As in a model cast to bf16: a slow feature still fades, token by token too."""
    *x, r = decayed_inputs(300)
    r, state, y = (r / 100).bfloat16(), None, []
    for i in range(300):
        y_i, state = decayed_linear_attention(chunked_linear_attention, *(
            t[:, :, i:i + 1].float() for t in x), r, state=state)
        y.append(y_i)
    exact = decayed_weights(*x[:2], r.double()) @ x[2]
    assert error(torch.cat(y, dim=2), exact) < 1e-5
    assert error(linear_attention_weights(*(t.float() for t in x[:2]), r=r) @ x[2].float(),
                 exact) < 1e-5


def test_decay_of_no_tokens():
    *x, r = decayed_inputs(0)
    y, _ = decayed_linear_attention(chunked_linear_attention, *x, r)
    assert y.shape == x[2].shape and linear_attention_weights(*x[:2], r=r).shape == (2, 3, 0, 0)


def test_decay_is_causal():
    *x, r = decayed_inputs(5)
    for form in (lambda: linear_attention_weights(*x[:2], False, None, r),
                 lambda: decayed_linear_attention(chunked_linear_attention, *x, r, False)):
        with pytest.raises(ValueError, match="causal"):
            form()


# -- masks, sums, precision ------------------------------------------------------------------------


def test_bidirectional_and_padding():
    phi_q, phi_k, v = features("hedgehog", 20)
    mask = torch.ones(2, 20, dtype=torch.bool)
    mask[0, 13:] = False
    for causal in (False, True):
        y = naive_linear_attention(phi_q, phi_k, v, causal, mask)
        chunked, _ = chunked_linear_attention(phi_q, phi_k, v, causal, mask, chunk=8)
        assert error(chunked, y) < 1e-10
        short = naive_linear_attention(*(t[:1, :, :13] for t in (phi_q, phi_k, v)), causal)
        assert error(y[:1, :, :13], short) < 1e-10          # as if the padding were not there
    state = chunked_linear_attention(*(t[:, :, :7] for t in (phi_q, phi_k, v)), causal=False)[1]
    rest, _ = chunked_linear_attention(phi_q[:, :, :7], phi_k[:, :, 7:], v[:, :, 7:], causal=False,
                                       state=state)
    assert error(rest, naive_linear_attention(phi_q, phi_k, v, causal=False)[:, :, :7]) < 1e-10


def test_causal():
    phi_q, phi_k, v = features("hedgehog", 40)
    before, _ = chunked_linear_attention(phi_q, phi_k, v, chunk=16)
    phi_q[:, :, 25], phi_k[:, :, 25], v[:, :, 25] = 7, 7, 7
    after, _ = chunked_linear_attention(phi_q, phi_k, v, chunk=16)
    assert torch.equal(before[:, :, :25], after[:, :, :25])
    assert not torch.equal(before[:, :, 25:], after[:, :, 25:])


def test_gradients():
    x = [t.requires_grad_() for t in features("hedgehog", 21, B=1, H=2)]
    state = tuple(s.detach().requires_grad_() for s in chunked_linear_attention(*x)[1])
    assert torch.autograd.gradcheck(
        lambda *t: chunked_linear_attention(*t[:3], state=t[3:], chunk=8)[0], (*x, *state))


def test_weights_are_a_mean():
    phi_q, phi_k, _ = features("hedgehog", 9)
    a = linear_attention_weights(phi_q, phi_k)
    assert torch.allclose(a.sum(-1), torch.ones(2, 3, 9, dtype=torch.float64))
    assert (a.triu(1) == 0).all() and (a >= 0).all()


def test_no_match_is_zero_and_not_nan():
    phi_q, phi_k, v = features("relu", 9)
    for y in (naive_linear_attention(0 * phi_q, phi_k, v),
              chunked_linear_attention(0 * phi_q, phi_k, v)[0],
              chunked_linear_attention(0 * phi_q, phi_k, v, causal=False)[0],
              recurrent_linear_attention(0 * phi_q, phi_k, v)[0]):
        assert (y == 0).all()


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_low_precision_sums_in_fp32(dtype):
    """Thousands of equal terms: a sum kept in bf16 would stop growing at 256."""
    one = torch.ones(1, 1, 4096, 1, dtype=dtype)
    v = torch.linspace(0, 1, 4096).to(dtype).view(1, 1, -1, 1)
    for form in (chunked_linear_attention, recurrent_linear_attention):
        y, (S, z) = form(one, one, v)
        assert y.dtype == dtype and z.dtype == torch.float32
        assert z.item() == 4096
        assert abs(y[0, 0, -1].item() - 0.5) < 0.005
    with torch.autocast("cpu", torch.bfloat16):
        S, z = chunked_linear_attention(one, one, v)[1]
        assert z.item() == 4096
        assert S.untyped_storage().nbytes() == z.untyped_storage().nbytes() == 4    # no views
        state = torch.full((1, 1, 1, 1), 2049.0), torch.full((1, 1, 1), 4097.0)
        y, (S, z) = recurrent_step(*(x[:, :, 0] for x in (one, one, v)), state)
        assert y.item() == 0.5 and z.item() == 4098


@pytest.mark.parametrize("c", [1e-9, 1e9])
def test_a_common_factor_of_the_keys_cancels(c):
    phi_q, phi_k, v = (x.float() for x in features("hedgehog", 40))
    for form in (naive_linear_attention, lambda *xs: chunked_linear_attention(*xs, chunk=16)[0],
                 lambda *xs: recurrent_linear_attention(*xs)[0]):
        assert error(form(phi_q, c * phi_k, v), form(phi_q, phi_k, v)) < 1e-5


def test_a_single_key_gives_its_value():
    """However small its features are: exp with the key shifted by -30."""
    q, k, v = torch.randn(3, 1, 1, 1, 4)
    phi_q, phi_k = FEATURE_MAPS["exp"](GPTConfig(n_head=1, n_embd=4))(q, k - 30, None)
    assert torch.allclose(naive_linear_attention(phi_q, phi_k, v), v, rtol=1e-5)


def test_one_token_honours_the_mask():
    phi_q, phi_k, v = features("hedgehog", 12)
    mask = torch.ones(2, 12, dtype=torch.bool)
    mask[0, 5] = False
    exact, state, y = naive_linear_attention(phi_q, phi_k, v, key_mask=mask), None, []
    for t in range(12):
        now = slice(t, t + 1)
        y_t, state = linear_attention(phi_q[:, :, now], phi_k[:, :, now], v[:, :, now], True,
                                      mask[:, now].long(), state)       # ints as well as bools
        y.append(y_t)
    assert error(torch.cat(y, dim=2), exact) < 1e-10


def test_no_tokens():
    x = torch.rand(2, 3, 0, 4)
    y, (S, z) = linear_attention(x, x, x)
    assert y.shape == x.shape and not S.any() and not z.any()
    state = torch.rand(2, 3, 4, 4), torch.rand(2, 3, 4)
    after = linear_attention(x, x, x, state=state)[1]
    assert all(torch.equal(a, b) for a, b in zip(after, state))
