import pytest
import torch

from vqdm.codecs import kmeans as module
from vqdm.codecs.kmeans import assign, kmeans
from vqdm.seeds import torch_generator


def points(n=500, d=4, seed=0):
    return torch.randn(n, d, generator=torch_generator(seed, "test"))


def error(data, centroids):
    return float((data - centroids[assign(data, centroids)]).square().sum())


def test_assign_agrees_with_all_distances_in_small_chunks(monkeypatch):
    data, centroids = points(), points(17, seed=1)
    expected = torch.cdist(data.double(), centroids.double()).argmin(1)
    monkeypatch.setattr(module, "CHUNK", 100)
    assert torch.equal(assign(data, centroids), expected)
    assert assign(data.half(), centroids.half()).dtype == torch.int64


def test_finds_separated_clusters_exactly():
    centres = torch.tensor([[0.0, 0.0], [100.0, 0.0], [0.0, 100.0], [100.0, 100.0]])
    offsets = torch.tensor([[-1.0, 0.0], [1.0, 0.0]])
    data = (centres[:, None] + offsets).reshape(-1, 2)
    found = kmeans(data, 4, iterations=10, generator=torch_generator(3, "test"))
    assert torch.allclose(found[found.sum(1).sort().indices].sum(1), centres.sum(1).sort().values)
    assert error(data, found) == pytest.approx(8.0)


def test_same_generator_same_centroids_and_global_state_untouched():
    before = torch.get_rng_state()
    first, second, other = (kmeans(points(), 16, iterations=5, generator=torch_generator(s, "a")) for s in (1, 1, 2))
    assert torch.equal(first, second)
    assert not torch.equal(first, other)
    assert torch.equal(before, torch.get_rng_state())


def test_error_falls_with_iterations_and_with_k():
    errors = [
        error(points(), kmeans(points(), 16, iterations=i, generator=torch_generator(0, "a"))) for i in (0, 1, 20)
    ]
    assert errors[0] > errors[1] > errors[2]
    assert error(points(), kmeans(points(), 64, iterations=20, generator=torch_generator(0, "a"))) < errors[2] / 1.5


def test_means_of_a_step_are_the_clusters_means_and_empty_ones_take_the_worst_points():
    data = torch.tensor([[0.0], [1.0], [5.0], [50.0]]).double()
    labels, errors = torch.tensor([0, 0, 0, 0]), torch.tensor([0.0, 1.0, 25.0, 2500.0])
    assert module._means(data, labels, errors, k=3, unit=1.0).flatten().tolist() == [14.0, 50.0, 5.0]


@pytest.mark.parametrize("n", [1, 3, 8])
def test_fewer_points_than_centroids_are_served_exactly(n):
    data = points(n)
    found = kmeans(data, 8, iterations=5, generator=torch_generator(0, "a"))
    assert found.shape == (8, 4)
    assert error(data, found) == 0


def test_equal_points_and_no_points():
    found = kmeans(torch.ones(30, 2), 4, iterations=5, generator=torch_generator(0, "a"))
    assert torch.equal(found, torch.ones(4, 2))
    assert torch.equal(kmeans(torch.zeros(9, 2), 4, iterations=2, generator=torch_generator(0, "a")), torch.zeros(4, 2))
    with pytest.raises(ValueError, match="at least one point"):
        kmeans(torch.ones(0, 2), 4, iterations=5, generator=torch_generator(0, "a"))


def test_the_order_in_which_coordinates_are_added_does_not_matter():
    """Another order stands for another processor's kernels: in fp32 it parts after a few steps."""
    data, order = points(4000, 8), torch.randperm(8, generator=torch_generator(5, "test"))
    one, other = (kmeans(x, 64, iterations=30, generator=torch_generator(0, "a")) for x in (data, data[:, order]))
    assert torch.equal(one[:, order], other)
    assert torch.equal(assign(data, one), assign(data[:, order], other))
