"""The attentive probe: it finds what an average hides, its numbers are those of attention, and it repeats itself."""

from types import SimpleNamespace

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from nepa_dist.model import Features
from nepa_dist.tasks.attentive import AttentiveProbe, attentive_accuracy
from nepa_dist.tasks.probe import probe_layers

CLASSES = (3, 7, 8, 20)
PATCHES = 12


class Backbone(nn.Module):
    """Layer 0 are the columns of the image as tokens, the end has forgotten them. Counts its passes."""

    def __init__(self):
        super().__init__()
        self.anchor = nn.Parameter(torch.zeros(()))
        self.config = SimpleNamespace(num_heads=2)
        self.calls = 0

    def forward(self, images, *, causal, taps=()):
        self.calls += 1
        tokens = F.pad(images[:, :, 0].transpose(1, 2), (0, 0, 1, 0)) + self.anchor
        return Features(tokens, torch.zeros_like(tokens), dict.fromkeys(taps, tokens), (1, PATCHES))


class Source:
    """Images in which one patch, with a flag in its last channel, tells the class, and eleven others tell lies."""

    def __init__(self, count, seed):
        generator = torch.Generator().manual_seed(seed)
        self.labels = torch.tensor(CLASSES)[torch.arange(count) % len(CLASSES)]
        shown = torch.randint(len(CLASSES), (count, PATCHES), generator=generator)
        place = torch.randint(PATCHES, (count,), generator=generator)
        shown[torch.arange(count), place] = torch.arange(count) % len(CLASSES)
        tokens = torch.zeros(count, PATCHES, 8)
        tokens[..., :4] = F.one_hot(shown, 4)
        tokens[torch.arange(count), place, 7] = 1
        tokens += 0.05 * torch.randn(tokens.shape, generator=generator)
        self.images = tokens.transpose(1, 2)[:, :, None]

    def __len__(self):
        return len(self.labels)

    def batches(self, order=None, *, batch_size=None):
        indices = torch.arange(len(self)) if order is None else torch.tensor(order)
        for part in indices.split(batch_size or 50):
            yield {"images": self.images[part], "labels": self.labels[part], "numbers": part}


def test_it_finds_the_token_that_the_mean_hides():
    rows = probe_layers(
        Backbone(), Source(800, 0), Source(200, 1), layers=[0, "final"], probes=["linear", "attentive"], cache_bytes=1 << 30
    )
    hidden, forgotten = (row.top1 for row in rows)
    assert hidden["attentive"] > 0.75
    assert hidden["linear"] < 0.6
    assert forgotten == {"linear": 0.25, "attentive": 0.25}


def test_memory_and_repetition_do_not_change_the_result():
    results = []
    for cache_bytes in (1 << 30, 0, 0):
        backbone = Backbone().train()
        found = attentive_accuracy(
            backbone, Source(300, 0), Source(150, 1), layers=[0, "final"], epochs=8, seed=5, cache_bytes=cache_bytes
        )
        results.append((found, backbone.calls))
        assert backbone.training
        assert backbone.anchor.grad is None
    assert results[0][0] == results[1][0] == results[2][0]
    assert 0.3 < results[0][0][0] < 1
    assert [calls for _, calls in results] == [3 + 2, 3 + 8 * 3 + 2, 3 + 8 * 3 + 2], (
        "from memory: one pass over the training set"
    )
    other = attentive_accuracy(Backbone(), Source(300, 0), Source(150, 1), layers=[0], epochs=8, seed=6, cache_bytes=1 << 30)
    assert other[0] != results[0][0][0]


def test_images_that_cannot_be_read_are_left_out_with_and_without_memory():
    class Spoilt(Source):
        def batches(self, order=None, *, batch_size=None):
            for batch in super().batches(order, batch_size=batch_size):
                good = (batch["numbers"] != 7) & (batch["numbers"] != 99)
                yield {name: values[good] for name, values in batch.items()}

    one, other = (
        attentive_accuracy(Backbone(), Spoilt(300, 0), Source(150, 1), layers=[0], epochs=8, cache_bytes=cache_bytes)
        for cache_bytes in (1 << 30, 0)
    )
    assert one == other


def test_layers_do_not_influence_each_other():
    one, both = (
        attentive_accuracy(Backbone(), Source(300, 0), Source(150, 1), layers=layers, epochs=4, cache_bytes=1 << 30)
        for layers in ([0], ["final", 0])
    )
    assert one[0] == both[0]


def test_it_is_multi_head_cross_attention_of_a_learned_query():
    B, N, D, H = 3, 5, 8, 2
    generator = torch.Generator().manual_seed(0)

    def draw(*shape):
        return torch.randn(*shape, generator=generator, dtype=torch.float64)

    mean, std, tokens = draw(D), draw(D).exp(), draw(B, N, D)
    query, keys, values = draw(H, 1, D // H), draw(D, D), draw(D, D)
    x = (tokens - mean) / std
    k, v = ((x @ weight).unflatten(-1, (H, D // H)).transpose(1, 2) for weight in (keys, values))
    expected = F.scaled_dot_product_attention(query.expand(B, -1, -1, -1), k, v).flatten(1)
    probe = AttentiveProbe(mean, std, num_heads=H, num_classes=D, seed=0).double()
    with torch.no_grad():
        scale = (D / (D // H)) ** 0.5
        probe.queries.copy_(torch.einsum("dhk,hk->hd", keys.unflatten(1, (H, D // H)), query[:, 0]) * scale)
        probe.values.copy_(values.unflatten(1, (H, D // H)).transpose(0, 1))
        probe.weight.copy_(torch.eye(D))
        torch.testing.assert_close(probe(tokens.float()).double(), expected, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda s: s.labels.fill_(-1), "training data has no labels"),
        (lambda s: s.labels[:5].fill_(-1), "5 of 100 training images have no label"),
        (lambda s: s.labels.fill_(3), "all 100 training images are of class 3"),
        (lambda s: s.images[3].fill_(float("nan")), "probe of layer embed: the training tokens are not finite"),
    ],
)
def test_data_that_cannot_be_probed(change, message):
    source = Source(100, 0)
    change(source)
    with pytest.raises(ValueError, match=message):
        attentive_accuracy(Backbone(), source, Source(50, 1), layers=["embed"], epochs=1)


def test_test_data_that_cannot_be_judged():
    source = Source(50, 1)
    source.images[3] = float("inf")
    with pytest.raises(ValueError, match="probe of layer embed: test tokens are not finite"):
        attentive_accuracy(Backbone(), Source(100, 0), source, layers=["embed"], epochs=1)
    source = Source(50, 1)
    source.labels[0] = -1
    with pytest.raises(ValueError, match="1 of 50 test images have no label"):
        attentive_accuracy(Backbone(), Source(100, 0), source, layers=["embed"], epochs=1)
