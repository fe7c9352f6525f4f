"""Usual wrong answers: a solution with a piece replaced, and what the hint to it says; or None.

Each is refused for every data; a test holds that every hint of every exercise is here.
"""

from batchnorm import exercises


def made(number, *pieces):
    """The solution with each (old, new) replaced, one after the other."""
    text = exercises.find(number).solution
    for old, new in pieces:
        assert old in text, (number, old)
        text = text.replace(old, new)
    return text


MEAN, VAR = "x.mean(0)", "x.var(0, correction=0)"

WRONG = [
    (1, "unbiased variance", made(1, (VAR, "x.var(0)"))),
    (1, "unbiased variance", made(1, (VAR, "torch.var(x, dim=0)"))),
    (
        1,
        "ε added to the standard deviation",
        made(
            1,
            ("sqrt(var + eps)", "sqrt(var) + eps"),
            ("/ torch.sqrt(var) + eps", "/ (torch.sqrt(var) + eps)"),
        ),
    ),
    (1, "the result without ε", made(1, ("var + eps", "var"))),
    (1, "result for ε = 1e-5", made(1, ("var + eps", "var + 1e-5"))),
    (
        1,
        "layer normalization",
        made(1, (MEAN, "x.mean(1, keepdim=True)"), (VAR, "x.var(1, correction=0, keepdim=True)")),
    ),
    (1, "for all channels", made(1, (MEAN, "x.mean()"), (VAR, "x.var(correction=0)"))),
    (1, "Was the mean subtracted", made(1, ("(x - mean)", "x"))),
    (1, "divided by the variance", made(1, ("torch.sqrt(var + eps)", "(var + eps)"))),
    (1, "without γ", made(1, ("gamma * ", ""))),
    (1, "without β", made(1, (" + beta", ""))),
    (1, "γ and β are swapped", made(1, ("(x, gamma, beta", "(x, beta, gamma"))),
    (
        2,
        "The buffer is as it was",
        """
def update(m, v, x, momentum=0.1):
    m = m + 1
""",
    ),
    (
        2,
        "The buffer is as it was",
        made(2, ("running_mean.mul_(1 - momentum)", "running_mean.mul(1 - momentum)")),
    ),
    (
        2,
        "wrong way round",
        made(2, ("mul_(1 - momentum)", "mul_(momentum)"), ("alpha=momentum", "alpha=1 - momentum")),
    ),
    (2, "storing the biased", made(2, ("correction=1", "correction=0"))),
    (2, "the standard deviation", made(2, ("x.var(", "x.std("))),
    (
        2,
        "old value is gone",
        made(2, ("mul_(1 - momentum)", "mul_(0)"), ("alpha=momentum", "alpha=1")),
    ),
    (2, "will grow", made(2, ("mul_(1 - momentum)", "mul_(1)"))),
    (
        2,
        "not the number of samples",
        made(2, ("x.var(axes, correction=1)", "x.var(axes, correction=0) * len(x) / (len(x) - 1)")),
    ),
    (2, "graph of every step", made(2, ("@torch.no_grad()\n", ""))),
    (3, "unbiased variance", made(3, ("x.var(axes, correction=0)", "x.var(axes)"))),
    (3, "storing the biased", made(3, ("count / (count - 1)", "1"))),
    (3, "Put the update into", made(3, ("with torch.no_grad():", "if True:"))),
    (
        3,
        "Only the update goes",
        made(3, ("    def forward", "    @torch.no_grad()\n    def forward")),
    ),
    (
        3,
        "with mean and variance as constants",
        made(
            3,
            (
                "x.mean(axes), x.var(axes, correction=0)",
                "x.detach().mean(axes), x.detach().var(axes, correction=0)",
            ),
        ),
    ),
    (
        3,
        "With less than 2 values",
        made(3, ("count < 2", "count < 1"), ("count / (count - 1)", "count / max(count - 1, 1)")),
    ),
    (
        3,
        "With less than 2 values",
        made(
            3, ("if count < 2:", "if count < 2:\n                self.running_mean.zero_().add_(1)")
        ),
    ),
    (
        3,
        "removes assert",
        made(3, ("if count < 2:", "assert count > 1\n            if count < 2:")),
    ),
    (3, "Compare x.shape[1] with features", made(3, ("or x.shape[1] != self.features", ""))),
    (4, "The old bias is normalized", made(4, ("(bias - mean) * scale", "bias - mean * scale"))),
    (4, "The old bias is normalized", made(4, ("(bias - mean) * scale", "bias - mean"))),
    (4, "without ε", made(4, ("var + eps", "var"))),
    (4, "divided by the variance", made(4, ("torch.sqrt(var + eps)", "(var + eps)"))),
    (
        4,
        "γ is not in the weight",
        made(
            4,
            ("weight * rows", "weight * rows / gamma.reshape(-1, *(1 for _ in weight.shape[1:]))"),
        ),
    ),
    (
        4,
        "output channel",
        made(
            4, ("weight * rows", "weight * (scale if weight.shape[0] == weight.shape[1] else rows)")
        ),
    ),
    (4, "mean was not subtracted", made(4, ("bias - mean", "bias"))),
    (4, "β was not added", made(4, (" + beta", " + 0 * beta"))),
    (4, "old bias is gone", made(4, ("bias is None", "True"))),
    (
        5,
        "So fails E[x²] − E[x]²",
        """
def variance(x):
    return (x**2).mean(0) - x.mean(0) ** 2
""",
    ),
    (
        5,
        "So fails E[x²] − E[x]²",
        """
def variance(x):
    return ((x * x).mean(0) - x.mean(0).square()).clamp(min=0)
""",
    ),
    (
        5,
        "So fails E[x²] − E[x]²",
        """
def variance(x):
    w = x.double()
    return ((w**2).mean(0) - w.mean(0) ** 2).to(x.dtype)
""",
    ),
    (
        5,
        "Constants have no variance",
        """
def variance(x):
    return (x**2).mean(0) - x.mean(0) ** 2
""",
    ),
    (
        5,
        "unbiased variance",
        """
def variance(x):
    return x.double().var(0).to(x.dtype)
""",
    ),
    (
        5,
        "the standard deviation",
        made(
            5,
            ("return torch", "return torch.sqrt(torch"),
            (".mean(0)).mean(0)", ".mean(0)).mean(0))"),
        ),
    ),
    (
        5,
        "Each channel has its own",
        """
def variance(x):
    return (x - x.mean()).square().mean()
""",
    ),
    (6, "mean of the two means", made(6, ("a[1] + share * d", "(a[1] + b[1]) / 2"))),
    (6, "M_a + M_b alone", made(6, (" + a[0] * share * d**2", ""))),
    (6, "do not average", made(6, ("a[2] + b[2] + a[0] * share * d**2", "(a[2] + b[2]) / 2"))),
    (6, "The factor of d²", made(6, ("a[0] * share * d**2", "d**2"))),
    (6, "The factor of d²", made(6, ("a[0] * share * d**2", "a[0] * b[0] * d**2"))),
    (
        6,
        "both are empty",
        """
import torch
def merge(a, b):
    n = torch.tensor(a[0] + b[0])
    d = b[1] - a[1]
    return n, a[1] + b[0] / n * d, a[2] + b[2] + a[0] * b[0] / n * d**2
""",
    ),
    (
        6,
        "mean of a billion",
        """
def merge(a, b):
    n = a[0] + b[0]
    if not n:
        return a
    m = (a[0] * a[1] + b[0] * b[1]) / n
    return n, m, a[2] + a[0] * a[1]**2 + b[2] + b[0] * b[1]**2 - n * m**2
""",
    ),
    (
        7,
        "mean of the batches' means",
        """
import torch
def pooled(batches):
    b = list(batches)
    return torch.stack([x.mean(0) for x in b]).mean(0), torch.cat(b).var(0)
""",
    ),
    (
        7,
        "mean of the batches' variances",
        """
import torch
def pooled(batches):
    b = list(batches)
    v = torch.stack([x.var(0, correction=0) for x in b])
    return torch.cat(b).mean(0), v.mean(0)
""",
    ),
    (
        7,
        "mean of the batches' variances",
        """
import torch
def pooled(batches):
    b = list(batches)
    v = torch.stack([x.var(0) for x in b])
    return torch.cat(b).mean(0), v.mean(0)
""",
    ),
    (
        7,
        "The weights are right",
        """
import torch
def pooled(batches):
    b = list(batches)
    n = sum(map(len, b))
    v = sum(len(x) / n * x.var(0, correction=0) for x in b)
    return torch.cat(b).mean(0), v
""",
    ),
    (7, "This is the biased variance", made(7, ("(count - 1)", "count"))),
    (
        7,
        "last batch alone",
        """
def pooled(batches):
    for x in batches:
        pass
    return x.mean(0), x.var(0)
""",
    ),
    (
        7,
        "moving average",
        """
def pooled(batches):
    m, v = 0.0, 1.0
    for x in batches:
        m, v = 0.9 * m + 0.1 * x.mean(0), 0.9 * v + 0.1 * x.var(0)
    return m, v
""",
    ),
    (
        7,
        "0/0",
        """
import torch
def pooled(batches):
    b = list(batches)
    v = torch.stack([x.var(0) for x in b])
    return torch.cat(b).mean(0), v.mean(0)
""",
    ),
    (
        7,
        "is a generator",
        """
def pooled(batches):
    n = sum(len(x) for x in batches)
    m = sum(x.sum(0) for x in batches) / n
    return m, sum((x - m).square().sum(0) for x in batches) / (n - 1)
""",
    ),
    (8, "whole batch", made(8, ("x.split(size)", "[x]"))),
    (
        8,
        "was dropped",
        made(
            8,
            (
                "for group in x.split(size)",
                "for group in x.split(size) if len(group) == size or len(x) < size",
            ),
        ),
    ),
    (
        8,
        "samples that are apart",
        made(
            8,
            (
                "    return torch.cat([normalized(group) for group in x.split(size)])",
                """\
    k, y = -(-len(x) // size), torch.empty_like(x)
    for i in range(k):
        y[i::k] = normalized(x[i::k])
    return y""",
            ),
        ),
    ),
    (8, "out evenly", made(8, ("x.split(size)", "x.chunk(-(-len(x) // size))"))),
    (
        8,
        "came back as it was",
        made(
            8,
            (
                "[normalized(group) for",
                "[normalized(group) if len(group) == size or len(x) < size else group for",
            ),
        ),
    ),
    (
        8,
        "padded with zeros",
        made(
            8,
            (
                "    return torch.cat",
                """\
    n = len(x)
    if n > size:
        x = torch.cat([x, x.new_zeros(-n % size, *x.shape[1:])])
    return torch.cat""",
            ),
            ("x.split(size)])", "x.split(size)])[:n]"),
        ),
    ),
    (
        8,
        "group before",
        made(8, ("x.split(size)", "x.tensor_split([size * i for i in range(1, len(x) // size)])")),
    ),
    (8, "unbiased variance", made(8, ("correction=0", "correction=1"))),
    (
        9,
        "mask was not used",
        made(
            9,
            ("mask.sum()", "mask.numel()"),
            ("torch.where(keep, x, 0.0)", "x"),
            ("torch.where(keep, x - mean.unsqueeze(-1), 0.0)", "x - mean.unsqueeze(-1)"),
        ),
    ),
    (9, "Divide by how many", made(9, ("mask.sum()", "mask.numel()"))),
    (
        9,
        "Divide by how many",
        made(
            9,
            ("sum((0, 2)) / count\n", "sum((0, 2)) / mask.numel()\n"),
            ("mean = x.sum((0, 2)) / mask.numel()", "mean = x.sum((0, 2)) / count"),
        ),
    ),
    (9, "wrong way round", made(9, ("keep = mask", "mask = ~mask\n    keep = mask"))),
    (
        9,
        "still in the variance",
        made(9, ("torch.where(keep, x - mean.unsqueeze(-1), 0.0)", "x - mean.unsqueeze(-1)")),
    ),
    (
        9,
        "the unbiased variance",
        made(
            9,
            (
                "torch.square(centred).sum((0, 2)) / count",
                "torch.square(centred).sum((0, 2)) / (count - 1)",
            ),
        ),
    ),
    (
        9,
        "each sequence's mean",
        made(
            9,
            (
                "x.sum((0, 2)) / count",
                "(x.sum(2) / mask.sum(1, keepdim=True))[mask.any(1)].mean(0)",
            ),
        ),
    ),
    (9, "To multiply by mask does not help", made(9, ("torch.where(keep, x, 0.0)", "x * keep"))),
    (
        9,
        "where came after",
        made(
            9,
            (
                "mean = x.sum((0, 2)) / count",
                "mean = torch.where(keep, x, 0.0).sum((0, 2)) / count",
            ),
            ("    x = torch.where(keep, x, 0.0)\n", ""),
            ("torch.where(keep, x - mean.unsqueeze(-1), 0.0)", "x - mean.unsqueeze(-1)"),
            ("torch.square(centred).sum", "torch.where(keep, torch.square(centred), 0.0).sum"),
        ),
    ),
    (
        10,
        "Autograd is off here",
        """
import torch
def backward(dy, x, gamma, eps=1e-5):
    x, gamma = x.requires_grad_(), gamma.requires_grad_()
    y = gamma * (x - x.mean(0)) / (x.var(0, correction=0) + eps).sqrt()
    return *torch.autograd.grad(y, (x, gamma), dy), dy.sum(0)
""",
    ),
    (10, "gradient in evaluation", made(10, (" - dy.mean(0) - x_hat * (dy * x_hat).mean(0)", ""))),
    (10, "way through the mean", made(10, ("dy - dy.mean(0)", "dy"))),
    (10, "way through the variance", made(10, (" - x_hat * (dy * x_hat).mean(0)", ""))),
    (10, "γ is missing", made(10, ("gamma / scale", "1 / scale"))),
    (10, "not divided by s", made(10, ("gamma / scale", "gamma"))),
    (
        10,
        "brackets hold means",
        made(
            10,
            (
                "(dy - dy.mean(0) - x_hat * (dy * x_hat).mean(0))",
                "(dy - dy.sum(0) - x_hat * (dy * x_hat).sum(0))",
            ),
        ),
    ),
    (10, "unbiased variance", made(10, (", correction=0", ""))),
    (10, "without ε", made(10, (" + eps", ""))),
    (10, "not of dy·x.", made(10, ("return dx, (dy * x_hat)", "return dx, (dy * x)"))),
    (
        10,
        "without the division by s",
        made(10, ("return dx, (dy * x_hat)", "return dx, (dy * x_hat * scale)")),
    ),
    (
        10,
        "dγ and dβ are swapped",
        made(10, ("(dy * x_hat).sum(0), dy.sum(0)", "dy.sum(0), (dy * x_hat).sum(0)")),
    ),
    (
        10,
        "sums, not means",
        made(10, ("(dy * x_hat).sum(0), dy.sum(0)", "(dy * x_hat).mean(0), dy.mean(0)")),
    ),
    (3, None, made(3, ("if axis != 1]", "if axis == 0]"))),
    (4, None, made(4, ("weight * rows", "weight * scale[:, None]"))),
    (4, None, made(4, ("    if bias is None:\n        bias = torch.zeros_like(mean)\n", ""))),
    (6, None, made(6, ("a[2] +", "a[2] / (a[0] - 1) * (a[0] - 1) +"))),
    (8, None, made(8, ("axis for axis in range(x.dim()) if axis != 1", "0"))),
    (
        8,
        None,
        made(8, ("[normalized(group) for", "[x] if len(x) < size else [normalized(group) for")),
    ),
    (9, None, made(9, ("    keep =", "    mask = x[:, 0] != 0\n    keep ="))),
]
