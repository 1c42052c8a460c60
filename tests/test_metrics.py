"""Metrics: closed forms, identities, refusals, and two processes."""
import hashlib
import json
import math
import warnings
from dataclasses import replace

import numpy as np
import pytest
import torch

from edm_nb import metrics as M
from edm_nb.files import DataError
from edm_nb import features, frechet
from edm_nb.data import find_cifar10


def gen(seed=0):
    return torch.Generator().manual_seed(seed)


def randn(*shape, seed=0):
    return torch.randn(*shape, generator=gen(seed), dtype=torch.float64)


def pair(d, decades, rank=None, seed=0):
    "Σ₁, Σ₂ = TΣ₁T and their exact distance tr (T−I)Σ₁(T−I)."
    q, r = (torch.linalg.qr(randn(d, d, seed=seed + i))[0] for i in range(2))
    spectrum = torch.logspace(0, -decades, d, dtype=torch.float64)
    if rank: spectrum[rank:] = 0
    cov, t = (q*spectrum) @ q.T, (r*torch.linspace(0.5, 1.5, d, dtype=torch.float64)) @ r.T
    cov, t = (cov + cov.T)/2, (t + t.T)/2
    other, move = t @ cov @ t, t - torch.eye(d, dtype=torch.float64)
    return cov, (other + other.T)/2, (move @ cov @ move).trace().item()


# --- the distance ------------------------------------------------------------------------------------------------------

@pytest.mark.parametrize("decades,rank", [(0, None), (2, None), (6, None), (10, None), (2, 10), (2, 1), (0, 63)])
def test_distance_equals_closed_form(decades, rank):
    a, b, exact = pair(64, decades, rank)
    mean = randn(64, seed=9)
    value = frechet.frechet_distance(mean, a, mean*0, b)
    size = (a.trace() + b.trace() + mean.square().sum()).item()
    assert abs(value - exact - mean.square().sum().item()) < 1e-12*size


def test_one_dimension_by_hand():
    # N(1, 4) and N(3, 9): (1 − 3)² + (2 − 3)²
    assert frechet.frechet_distance([1.0], [[4.0]], [3.0], [[9.0]]) == pytest.approx(5, rel=1e-14)


def test_commuting_covariances_by_hand():
    a, b = torch.tensor([1.0, 4.0, 0.0]), torch.tensor([9.0, 4.0, 16.0])
    assert frechet.frechet_distance(torch.zeros(3), a.diag(), torch.zeros(3), b.diag()) == pytest.approx(4 + 0 + 16, rel=1e-13)


@pytest.mark.parametrize("d", [5, 48])
def test_matches_matrix_square_root(d):
    linalg = pytest.importorskip("scipy.linalg")
    a, b = (torch.cov(randn(d, 4*d, seed=s)) for s in (1, 2))
    reference = (a.trace() + b.trace()).item() - 2*np.trace(linalg.sqrtm((a @ b).numpy())).real
    assert frechet.frechet_distance(torch.zeros(d), a, torch.zeros(d), b) == pytest.approx(reference, rel=1e-6)


@pytest.mark.parametrize("scale", [1e-8, 1.0, 1e8])
@pytest.mark.parametrize("n", [3, 20, 500])
def test_identical_statistics_are_at_zero(n, scale):
    x = scale*randn(n, 40)
    cov = torch.cov(x.T)
    assert frechet.frechet_distance(x.mean(0), cov, x.mean(0), cov) <= 1e-12*max(cov.trace().item(), 1e-30)


def test_symmetric_and_unaffected_by_rotation():
    a, b, exact = pair(20, 3)
    q = torch.linalg.qr(randn(20, 20, seed=5))[0]
    zero = torch.zeros(20)
    assert frechet.frechet_distance(zero, a, zero, b) == pytest.approx(frechet.frechet_distance(zero, b, zero, a), rel=1e-11)
    assert frechet.frechet_distance(zero, q @ a @ q.T, zero, q @ b @ q.T) == pytest.approx(exact, rel=1e-11)


def test_point_masses_and_disjoint_supports():
    zero = torch.zeros(4, 4)
    assert frechet.frechet_distance(torch.ones(4), zero, torch.zeros(4), zero) == 4
    one, two = torch.tensor([1.0, 1, 0, 0]).diag(), torch.tensor([0.0, 0, 2, 2]).diag()
    assert frechet.frechet_distance(torch.zeros(4), one, torch.zeros(4), two) == pytest.approx(6, abs=1e-12)


def nearly_diagonal(d, decades, mixing, ascending, lowest=0.5):
    "Σ₁ with its variances in order, slightly rotated, Σ₂ = TΣ₁T with T in [lowest, 1.5], and their exact distance."
    q, r = (torch.linalg.qr(torch.eye(d, dtype=torch.float64) + mixing*randn(d, d, seed=s))[0] for s in (1, 2))
    spectrum = torch.logspace(0, -decades, d, dtype=torch.float64)
    cov, t = (q*(spectrum.flip(0) if ascending else spectrum)) @ q.T, (r*torch.linspace(lowest, 1.5, d, dtype=torch.float64)) @ r.T
    cov, t = (cov + cov.T)/2, (t + t.T)/2
    other, move = t @ cov @ t, t - torch.eye(d, dtype=torch.float64)
    return cov, (other + other.T)/2, (move @ cov @ move).trace().item()


@pytest.fixture
def no_long_way(monkeypatch):
    "The singular values one by one are forbidden: the graded eigenvalues must do, and the check must know it."
    def refuse(*_): raise AssertionError("fell back to singular values")
    monkeypatch.setattr(torch.linalg, "svdvals", refuse)


def test_narrow_spectrum_needs_no_qr(monkeypatch):
    a, b, exact = pair(64, 3)
    def refuse(*_, **__): raise AssertionError("the determinant did not confirm a plain product")
    monkeypatch.setattr(torch.linalg, "qr", refuse)
    size = (a.trace() + b.trace()).item()
    assert abs(size - 2*frechet.root_trace(a, b).item() - exact) < 1e-13*size


@pytest.mark.parametrize("decades,rank", [(2, None), (8, None), (2, 10), (6, 39)])
def test_both_factors_give_the_same_sum(decades, rank, no_long_way):
    a, b, exact = pair(40, decades, rank)
    low, other = frechet.pivoted_factor(a, block=7), frechet.pivoted_factor(b)
    assert low.shape == other.shape == (40, rank or 40)
    assert torch.allclose(low @ low.T, a, rtol=0, atol=1e-14) and torch.allclose(other @ other.T, b, rtol=0, atol=1e-14)
    size = (a.trace() + b.trace()).item()
    assert abs(size - 2*frechet.singular_sum(low.T @ other).item() - exact) < 1e-13*size
    assert frechet.root_trace(a, b).item() == pytest.approx(frechet.singular_sum(low.T @ other).item(), rel=1e-13)


@pytest.mark.parametrize("ascending", [False, True])
@pytest.mark.parametrize("mixing", [1e-6, 1e-3, 0.1])
@pytest.mark.parametrize("decades,lowest", [(4, 0.5), (8, 0.05), (11, 0.5)])
def test_nearly_independent_features_keep_all_digits(ascending, mixing, decades, lowest, no_long_way):
    # Features that hardly mix, smallest variance first, are the worst case for eigenvalues of a product:
    # the order L₁ᵀΣ₂L₁ arrives in costs half the digits. Sorting and QR must not.
    a, b, exact = nearly_diagonal(80, decades, mixing, ascending, lowest)
    size = (a.trace() + b.trace()).item()
    assert abs(size - 2*frechet.root_trace(a, b).item() - exact) < 1e-13*size


def test_pivoted_factors_come_sorted(no_long_way):
    a, b, exact = nearly_diagonal(60, 6, 1e-6, True)
    low, other = frechet.pivoted_factor(a, block=20), frechet.pivoted_factor(b, block=20)
    size = (a.trace() + b.trace()).item()
    assert abs(size - 2*frechet.singular_sum(low.T @ other).item() - exact) < 1e-13*size


def test_shortcut_would_fail_the_test_above():
    a, b, exact = nearly_diagonal(80, 8, 1e-3, True)
    l, size = torch.linalg.cholesky(a), (a.trace() + b.trace()).item()
    shortcut = torch.linalg.eigvalsh(l.T @ b @ l).clamp(min=0).sqrt().sum().item()
    assert abs(size - 2*shortcut - exact) > 1e-12*size


def test_determinant_check_catches_a_badly_ordered_matrix():
    a, b, _ = nearly_diagonal(80, 8, 1e-6, True)
    product = torch.linalg.cholesky(a).T @ torch.linalg.cholesky(b)        # ascending: nothing has sorted it
    exact, log_det = torch.linalg.svdvals(product), torch.linalg.slogdet(product)[1]*2
    gram = product @ product.T
    found = torch.linalg.eigvalsh(gram)
    wrong = abs(found.clamp(min=0).sqrt().sum()/exact.sum() - 1).item()
    assert wrong > 1e-12 and frechet.roots_sum(gram, log_det) is None
    assert frechet.singular_sum(product).item() == pytest.approx(exact.sum().item(), rel=1e-14)


@pytest.mark.parametrize("noise", [0, 1e-17, 1e-16, 1e-15, 1e-14, 1e-13, 1e-11, 1e-9, 1e-7])
def test_accepted_sums_of_roots_are_accurate(noise):
    # One symmetric disturbance of known size: what the determinant lets through must be right.
    values = torch.logspace(0, -6, 60, dtype=torch.float64)
    e = randn(60, 60)
    found = frechet.roots_sum(values.diag() + noise*(e + e.T)/2, values.log().sum())
    assert found is not None if noise <= 1e-16 else found is None if noise >= 1e-11 else True
    if found is not None: assert found.item() == pytest.approx(values.sqrt().sum().item(), rel=1e-12)


def test_negative_eigenvalue_is_not_accepted():
    values = torch.tensor([1.0, 0.5, -1e-18], dtype=torch.float64)
    assert frechet.roots_sum(values.diag(), torch.tensor(-40.0)) is None


@pytest.mark.parametrize("shape", [(30, 12), (12, 30), (30, 30), (1, 5), (30, 0), (0, 0)])
def test_sum_of_singular_values_of_any_shape(shape):
    x = randn(*shape, seed=3)*torch.logspace(0, -5, shape[1], dtype=torch.float64)
    assert frechet.singular_sum(x).item() == pytest.approx(torch.linalg.svdvals(x).sum().item() if x.numel() else 0, rel=1e-13)


def test_singular_matrix_of_full_shape():
    x = randn(20, 8) @ randn(8, 20, seed=1)
    assert frechet.singular_sum(x).item() == pytest.approx(torch.linalg.svdvals(x).sum().item(), rel=1e-13)


@pytest.mark.parametrize("d", [1, 5, 64, 100])
def test_triangle_product(d):
    a, b = randn(d, d).tril(), randn(d, d, seed=1).tril()
    assert torch.allclose(frechet.triangle_product(a, b, block=32), a.T @ b, rtol=0, atol=1e-13*d)
    assert torch.allclose(frechet.triangle_product(a, block=32).tril(), (a.T @ a).tril(), rtol=0, atol=1e-13*d)


def test_noise_on_a_thin_covariance_is_not_rank():
    thin = pair(40, 2, rank=10)[0]
    assert frechet.cholesky_factor(thin) is None and frechet.pivoted_factor(thin).shape == (40, 10)
    almost = thin + 1e-14*torch.eye(40, dtype=torch.float64)     # Cholesky runs through on what is only noise
    assert not torch.linalg.cholesky_ex(almost).info and frechet.cholesky_factor(almost) is None
    assert frechet.pivoted_factor(thin, block=3).shape == (40, 10)
    wide = pair(40, 10)[0]
    assert frechet.cholesky_factor(wide) is not None and frechet.pivoted_factor(wide).shape == (40, 40)
    top = torch.linalg.eigvalsh(thin)[-1].item()
    assert 0.5 < frechet.rounding_noise(thin).item()/(40*torch.finfo(torch.float64).eps*top) <= 1 + 1e-12


def test_monotone_means_every_step():
    assert features.monotone([0, 1, 2], [1, 2, 3]) and not features.monotone([0, 1, 2], [1, 3, 2]) and not features.monotone([0, 1, 2], [1, 1, 2])


@pytest.mark.parametrize("change,message", [
    (dict(mean2=torch.zeros(3), cov2=torch.eye(3)), "feature dimensions differ: 4 and 3"),
    (dict(cov1=torch.eye(3)), r"expected mean \[d\]"),
    (dict(mean1=torch.tensor([0, 0, 0, math.nan])), "NaN or infinity"),
    (dict(cov2=torch.eye(4)*math.inf), "NaN or infinity"),
    (dict(cov1=torch.eye(4) + torch.ones(4, 4).triu(1)), "not symmetric"),
    (dict(cov1=-torch.eye(4)), "not a covariance"),
])
def test_bad_statistics_are_refused(change, message):
    good = dict(mean1=torch.zeros(4), cov1=torch.eye(4), mean2=torch.zeros(4), cov2=torch.eye(4))
    with pytest.raises(ValueError, match=message): frechet.frechet_distance(**(good | change))


# --- streaming ----------------------------------------------------------------------------------------------------------

@pytest.mark.parametrize("sizes", [[300], [1]*300, [7]*42 + [6], [299, 1]])
@pytest.mark.parametrize("rows", [1, 64, 10_000])
def test_any_split_gives_the_same(sizes, rows):
    x = randn(300, 9) + 100
    stats = frechet.FeatureStats(9, rows=rows)
    for batch in x.split(sizes): stats.update(batch)
    assert stats.n == 300
    torch.testing.assert_close(stats.mean, x.mean(0), rtol=1e-12, atol=0)
    torch.testing.assert_close(stats.cov, torch.cov(x.T), rtol=1e-10, atol=1e-10)
    assert torch.equal(stats.cov, stats.cov.T)


def test_blocks_cover_the_whole_matrix():
    x = randn(40, 600)
    torch.testing.assert_close(frechet.FeatureStats(600).update(x).cov, torch.cov(x.T), rtol=1e-10, atol=1e-12)


def test_merge_is_like_one_stream():
    x = randn(100, 6) + torch.arange(100)[:, None]          # parts with very different means
    parts = [frechet.FeatureStats(6).update(p) for p in x.split([1, 30, 69])]
    total = frechet.FeatureStats(6)
    for part in parts: total.merge(part)
    torch.testing.assert_close(total.cov, torch.cov(x.T), rtol=1e-12, atol=1e-10)
    assert total.n == 100 and parts[1].n == 30
    twice = frechet.FeatureStats(6).update(x); twice.merge(twice)
    torch.testing.assert_close(twice.cov, torch.cov(torch.cat([x, x]).T), rtol=1e-12, atol=1e-10)
    assert twice.n == 200


def test_updated_features_may_be_overwritten():
    x = randn(10, 3).float()
    kept, stats = x.clone(), frechet.FeatureStats(3)
    stats.update(x); x.zero_()
    torch.testing.assert_close(stats.mean, kept.double().mean(0))


def test_statistics_refuse_bad_input():
    stats = frechet.FeatureStats(3, "a", "1")
    with pytest.raises(ValueError, match="no features yet"): stats.mean
    stats.update(torch.zeros(1, 3))
    with pytest.raises(ValueError, match="at least 2 samples"): stats.cov
    for bad, message in ((torch.zeros(2, 4), r"\[B, 3\]"), (torch.zeros(2, 3, dtype=torch.uint8), "float features"),
                         (torch.full((1, 3), math.nan), "NaN")):
        with pytest.raises(ValueError, match=message): stats.update(bad)
    assert stats.n == 1
    with pytest.raises(ValueError, match="different features"): stats.merge(frechet.FeatureStats(3, "a", "2"))
    with pytest.raises(ValueError, match="without a sample count"): stats.merge(frechet.moments_stats(torch.zeros(3), torch.eye(3), None, "a", "1"))


def test_files(tmp_path):
    stats = frechet.FeatureStats(5, "net", "abc").update(randn(30, 5))
    back = frechet.FeatureStats.load(stats.save(tmp_path/"sub"/"s.npz"))
    assert (back.n, back.name, back.hash) == (30, "net", "abc") and torch.equal(back.mean, stats.mean)
    torch.testing.assert_close(back.cov, stats.cov, rtol=1e-14, atol=0)
    torch.testing.assert_close(back.update(randn(7, 5, seed=3)).cov, torch.cov(torch.cat([randn(30, 5), randn(7, 5, seed=3)]).T), rtol=1e-10, atol=1e-12)
    np.savez(tmp_path/"ref.npz", mu=np.zeros(5), sigma=np.eye(5))        # the published form
    assert frechet.load_stats(tmp_path/"ref.npz").n is None
    np.savez(tmp_path/"wrong.npz", images=np.zeros(5))
    with pytest.raises(ValueError, match="mu and sigma"): frechet.load_stats(tmp_path/"wrong.npz")
    with pytest.raises(FileNotFoundError): frechet.load_stats(tmp_path/"none.npz")
    assert [p.name for p in (tmp_path/"sub").iterdir()] == ["s.npz"]


def test_failed_write_leaves_the_old_file(tmp_path):
    path = tmp_path/"x.npz"
    path.write_bytes(b"old")
    def fails(file): file.write_bytes(b"half"); raise OSError("disk full")
    with pytest.raises(OSError): frechet.write_atomic(path, fails)
    assert path.read_bytes() == b"old" and len(list(tmp_path.iterdir())) == 1


def test_distance_of_statistics_warns_and_refuses():
    a, b = frechet.FeatureStats(8, "x", "1").update(randn(5, 8)), frechet.FeatureStats(8, "x", "1").update(randn(50, 8, seed=1))
    with pytest.warns(UserWarning, match="5 samples for 8-dimensional"): features.stats_distance(a, b)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert features.stats_distance(b, b) < 1e-8
    with pytest.raises(ValueError, match="different feature networks"): features.stats_distance(b, frechet.FeatureStats(8, "x", "2").update(randn(50, 8)))


def drawn(batch):
    "Random pictures by seed, in the way of `generate`: this process's share, a batch at a time."
    def draw(seeds, rank=0, world=1):
        mine = list(seeds)[rank::world]
        for part in (mine[i:i + batch] for i in range(0, len(mine), batch)):
            yield part, torch.stack([torch.randint(256, (1, 2, 2), generator=gen(int(s))) for s in part]).byte(), None
    return draw


def _process(rank, world, folder):
    import torch.distributed as dist
    dist.init_process_group("gloo", init_method=f"file://{folder}/store", rank=rank, world_size=world)
    part = frechet.FeatureStats(4, "x", "1").update(randn(101, 4)[rank::world])
    total = frechet.gather_stats(part)
    assert part.n == len(range(rank, 101, world))
    net = features.pixels((1, 2, 2))
    reference = frechet.moments_stats(torch.zeros(4), torch.eye(4), 100, net.name, net.hash)
    *_, score = M.measure(drawn(4), reference, net, n=21, repeats=2)
    torch.save(dict(mean=total.mean, cov=total.cov, n=total.n, values=score.values), f"{folder}/{rank}.pt")
    dist.destroy_process_group()


def test_two_processes_agree_with_one(tmp_path):
    torch.multiprocessing.spawn(_process, (2, str(tmp_path)), nprocs=2)
    a, b = (torch.load(tmp_path/f"{r}.pt", weights_only=True) for r in range(2))
    assert torch.equal(a["cov"], b["cov"]) and a["n"] == 101 and a["values"] == b["values"]
    torch.testing.assert_close(a["cov"], torch.cov(randn(101, 4).T), rtol=1e-12, atol=1e-12)
    net = features.pixels((1, 2, 2))
    *_, score = M.measure(drawn(5), frechet.moments_stats(torch.zeros(4), torch.eye(4), 100, net.name, net.hash), net, n=21, repeats=2)
    assert a["values"] == pytest.approx(score.values, rel=1e-12)


def test_one_process_needs_no_group():
    stats = frechet.FeatureStats(4).update(randn(10, 4))
    torch.testing.assert_close(frechet.gather_stats(stats).cov, stats.cov, rtol=1e-12, atol=1e-14)
    assert frechet.world() == (0, 1)


# --- pixels -------------------------------------------------------------------------------------------------------------

def test_quantise_is_the_published_rule():
    x = torch.linspace(-1, 1, 1001, dtype=torch.float64).view(1, 1, 1, -1)
    expected = np.clip(x.numpy()*127.5 + 128, 0, 255).astype(np.uint8)
    assert (features.quantise(x).numpy() == expected).all()
    assert features.quantise(torch.tensor([-1.0, 0, 1]).view(1, 1, 1, 3)).flatten().tolist() == [0, 128, 255]
    assert features.quantise(torch.tensor([-1.5, 1.5]).view(1, 1, 1, 2), clip=True).flatten().tolist() == [0, 255]


@pytest.mark.parametrize("images,message", [
    (torch.zeros(1, 1, 2, 2, dtype=torch.uint8), "bytes need no quantising"),
    (torch.full((1, 1, 2, 2), 200.0), "bytes stored as floats"),
    (torch.full((1, 1, 2, 2), 1.01), r"leave \[-1, 1\]"),
    (torch.full((1, 1, 2, 2), math.nan), "NaN"),
])
def test_quantise_refuses(images, message):
    with pytest.raises(ValueError, match=message): features.quantise(images)


def test_bytes_as_floats_are_refused_even_with_clip():
    with pytest.raises(ValueError, match="bytes stored as floats"): features.quantise(torch.full((1, 1, 2, 2), 200.0), clip=True)


@pytest.mark.parametrize("batch_size", [1, 3, 7, 100])
def test_no_image_is_dropped(batch_size):
    images = torch.randint(256, (10, 1, 3, 3), generator=gen()).byte()
    stats = features.feature_stats(images, features.pixels((1, 3, 3)), batch_size)
    assert stats.n == 10 and stats.name == "pixels-1x3x3"
    torch.testing.assert_close(stats.mean, (images.flatten(1).double()/127.5 - 1).mean(0), atol=1e-6, rtol=0)
    assert len(features.extract([images, images[:3]], features.pixels((1, 3, 3)), batch_size)) == 13


def test_feature_networks_take_bytes_only():
    for bad, message in ((torch.zeros(2, 1, 8, 8), "uint8"), (torch.zeros(2, 64, dtype=torch.uint8), r"\[B, C, H, W\]"),
                         (torch.zeros(2, 3, 8, 8, dtype=torch.uint8), r"reads images \(1, 8, 8\)")):
        with pytest.raises(ValueError, match=message): features.pixels()(bad)


# --- the shipped network ------------------------------------------------------------------------------------------------

def test_shipped_network_matches_its_record():
    record, net = features.cifar_features_record(), features.cifar_features()
    path = features.assets()/"cifar_features.safetensors"
    assert hashlib.sha256(path.read_bytes()).hexdigest() == record["sha256"] == net.hash
    assert path.stat().st_size <= 4e6 and record["test_accuracy"] >= 0.88 and net.dim == record["feature_dim"]
    assert {"seed", "seconds", "hardware", "versions", "date", "data", "n_train", "n_test"} <= set(record)


def test_features_do_not_depend_on_the_batch():
    net, images = features.cifar_features(), torch.randint(256, (9, 3, 32, 32), generator=gen()).byte()
    together, alone = net(images), torch.cat([net(i[None]) for i in images])
    torch.testing.assert_close(together, alone, rtol=1e-4, atol=1e-4)
    assert torch.equal(net(images), together) and together.shape == (9, net.dim) and together.dtype == torch.float32


def test_shipped_network_refuses_other_sizes():
    with pytest.raises(ValueError, match=r"\(3, 32, 32\)"): features.cifar_features()(torch.zeros(1, 3, 64, 64, dtype=torch.uint8))


def test_damaged_weights_are_noticed(tmp_path, monkeypatch):
    source = features.assets()
    for name in ("cifar_features.safetensors", "cifar_features.json"): (tmp_path/name).write_bytes((source/name).read_bytes())
    data = bytearray((tmp_path/"cifar_features.safetensors").read_bytes()); data[-1] ^= 1
    (tmp_path/"cifar_features.safetensors").write_bytes(data)
    monkeypatch.setattr(features, "assets", lambda: tmp_path)
    with pytest.raises(ValueError, match="training record"): features.cifar_features()


@pytest.mark.cifar
@pytest.mark.skipif(find_cifar10("test") is None, reason="set EDM_NB_CIFAR10")
def test_shipped_network_classifies():
    from edm_nb.data import cifar10
    test, net = cifar10("test").take(slice(0, 1000)), features.cifar_features()
    right = torch.cat([net.logits(b).argmax(1) for b in test.images.split(250)]) == test.labels
    assert right.double().mean() > 0.85                      # 0.88 on all 10,000; n = 1000 has a standard error of 0.01


@pytest.mark.cifar
@pytest.mark.skipif(find_cifar10("test") is None, reason="set EDM_NB_CIFAR10")
def test_damage_raises_the_distance():
    from edm_nb.data import cifar10
    images, net = cifar10("test").images[:1000], features.cifar_features()
    reference = features.feature_stats(images[450:], net)
    probe = images[:450]
    ladders = {"noise": [features.add_noise(probe, l, gen()) for l in (0, 0.05, 0.2)], "blur": [features.blur(probe, l) for l in (0, 0.8, 2)],
               "jpeg": [probe, features.jpeg(probe, 20), features.jpeg(probe, 4)]}
    for name, ladder in ladders.items():
        values = [features.stats_distance(features.feature_stats(x, net), reference) for x in ladder]
        assert features.monotone([0, 1, 2], values), (name, values)


# --- inception ----------------------------------------------------------------------------------------------------------

def test_missing_extra_is_explained(monkeypatch):
    import sys
    monkeypatch.setitem(sys.modules, "torch_fidelity", None)
    monkeypatch.setitem(sys.modules, "torch_fidelity.feature_extractor_inceptionv3", None)
    with pytest.raises(ImportError, match=r"edm_nb\[fid\]"): features.inception()


def test_only_the_known_weights_are_opened(tmp_path):
    path = tmp_path/"weights.pth"
    path.write_bytes(b"not the weights")
    with pytest.raises(ValueError, match="not the published Inception"): features.inception_weights(path)
    assert features.inception_weights(path, hashlib.sha256(b"not the weights").hexdigest()) == path
    with pytest.raises(FileNotFoundError, match="no Inception weights"): features.inception_weights(tmp_path/"none.pth")


def test_inception_wrapper_reads_a_checked_file(tmp_path, monkeypatch):
    module = pytest.importorskip("torch_fidelity.feature_extractor_inceptionv3")
    with monkeypatch.context() as patch:                    # a network with random weights stands in for the download
        patch.setattr(module, "load_state_dict_from_url", lambda *a, **k: {})
        patch.setattr(module.FeatureExtractorInceptionV3, "load_state_dict", lambda *a, **k: None)
        torch.manual_seed(0)
        weights = module.FeatureExtractorInceptionV3("inception-v3-compat", ["2048"]).state_dict()
    torch.save(weights, tmp_path/"w.pth")
    net = features.inception(tmp_path/"w.pth", sha256=M.file_hash(tmp_path/"w.pth"))
    images = torch.randint(256, (2, 3, 32, 32), generator=gen()).byte()
    assert net(images).shape == (2, 2048) and net(images).dtype == torch.float32
    torch.testing.assert_close(net(images)[:1], net(images[:1]), rtol=1e-3, atol=1e-3)
    assert net(images[:, :1]).shape == (2, 2048)
    with pytest.raises(ValueError, match="uint8"): net(images.float())
    with pytest.raises(ValueError, match="not the published Inception"): features.inception(tmp_path/"w.pth")


def test_names_never_say_fid_for_another_network():
    assert features.metric_name("inception") == "FID"
    for name in ("cifar-features", "pixels-1x8x8"): assert "FID" not in features.metric_name(name) and name in features.metric_name(name)


# --- n, KID, precision and recall, neighbours -----------------------------------------------------------------------------

def test_extrapolation_recovers_a_line():
    sizes = [100, 200, 400, 1000]
    line = M.extrapolate(sizes, [3 + 50/n for n in sizes])
    assert line.value == pytest.approx(3) and line.slope == pytest.approx(50) and line.error < 1e-10
    with pytest.raises(ValueError, match="at least 3 different sizes"): M.extrapolate([10, 10, 20], [1, 1, 1])


def test_kid_equals_the_sum_over_pairs():
    a, b = randn(7, 3), randn(5, 3, seed=1) + 0.5
    k = lambda x, y: (x @ y/3 + 1)**3
    def naive(a, b):
        own = lambda s: np.mean([k(x, y) for i, x in enumerate(s) for j, y in enumerate(s) if i != j])
        return own(a) + own(b) - 2*np.mean([k(x, y) for x in a for y in b])
    value, error = M.kid(a, b, chunk=2)
    assert value == pytest.approx(naive(a, b), rel=1e-12)
    leave_a = np.array([naive(a[torch.arange(7) != i], b) for i in range(7)])
    leave_b = np.array([naive(a, b[torch.arange(5) != i]) for i in range(5)])
    spread = 6/7*((leave_a - leave_a.mean())**2).sum() + 4/5*((leave_b - leave_b.mean())**2).sum()
    assert error == pytest.approx(math.sqrt(spread), rel=1e-9)


def test_kid_is_unbiased():
    values = np.array([M.kid(randn(20, 4, seed=2*s), randn(20, 4, seed=2*s + 1)).value for s in range(400)])
    assert abs(values.mean()) < 4*values.std()/20
    assert values.min() < 0


def test_precision_recall_by_hand():
    real = torch.tensor([[0.0], [1], [2], [10]])            # radii with k = 1: 1, 1, 1, 8
    samples = torch.tensor([[-0.5], [3.5], [30.0], [31.0]]) # radii: 4, 4, 1, 1
    result = M.precision_recall(samples, real, k=1, chunk=3)
    assert result.precision == 0.5 and result.recall == 0.75
    assert M.precision_recall(real, real, k=1) == (1.0, 1.0)
    with pytest.raises(ValueError, match="k = 3 needs more"): M.precision_recall(real[:3], real)


def test_neighbours_equal_brute_force():
    a, b = randn(17, 4), randn(40, 4, seed=1)
    b[5] = a[3]
    found, index = M.nearest_neighbours(a, b, k=3, chunk=5)
    brute = torch.cdist(a, b, compute_mode="donot_use_mm_for_euclid_dist").sort(1)
    assert torch.equal(index, brute.indices[:, :3])
    torch.testing.assert_close(found, brute.values[:, :3], rtol=1e-12, atol=1e-12)
    assert found[3, 0] == 0 and index[3, 0] == 5


def test_damage_leaves_level_zero_alone_and_keeps_the_mean():
    images = torch.randint(60, 200, (4, 3, 16, 16), generator=gen()).byte()
    assert torch.equal(features.add_noise(images, 0, gen()), images) and torch.equal(features.blur(images, 0), images)
    noisy = features.add_noise(images, 0.05, gen()).float() - images.float()
    assert abs(noisy.std() - 0.05*255) < 0.5 and abs(noisy.mean()) < 0.7
    assert abs(features.blur(images, 1.5).float().mean() - images.float().mean()) < 2
    flat = torch.full((1, 1, 9, 9), 77, dtype=torch.uint8)
    assert torch.equal(features.blur(flat, 2.0), flat) and features.jpeg(images, 90).shape == images.shape
    spot = torch.zeros(1, 1, 33, 33, dtype=torch.uint8); spot[0, 0, 16, 16] = 255
    ring = features.blur(spot, 1.0)[0, 0]
    assert ring[16, 16] == round(255/(2*math.pi)) and torch.equal(ring, ring.T) and torch.equal(ring, ring.flip(0))


@pytest.mark.parametrize("offset", [0, 4, 3])
def test_jpeg_blocks_lie_where_the_offset_puts_them(offset):
    faint = torch.randint(90, 130, (8, 1, 32, 32), generator=gen()).byte()
    worst = features.jpeg(faint, 1, offset).float()                          # faint detail is gone: only the mean of each block is left
    step = worst.diff(dim=3).abs().mean((0, 1, 2))                    # step[i]: between columns i and i + 1
    borders = [i for i in range(31) if (i + 1 + offset) % 8 == 0]
    inside = [i for i in range(31) if i not in borders]
    assert worst.shape == faint.shape and step[inside].max() == 0 < step[borders].min()


def test_class_shares():
    labels = torch.arange(10).repeat_interleave(50)
    index = features.pick_classes(labels, [0, 0] + [1]*8, 160, gen())
    assert torch.bincount(labels[index], minlength=10).tolist() == [0, 0] + [20]*8 and len(index.unique()) == 160
    with pytest.raises(ValueError, match="class 0 has 50"): features.pick_classes(labels, [1], 60, gen())


def test_rank_correlation_by_hand():
    assert features.rank_correlation([1, 2, 3], [5, 6, 7]) == pytest.approx(1) and features.rank_correlation([1, 2, 3], [7, 6, 5]) == pytest.approx(-1)
    with pytest.raises(ValueError): features.rank_correlation([1, 1], [1, 2])


# --- protocol -----------------------------------------------------------------------------------------------------------

PROTOCOL = M.Protocol("cifar-features", "abc", 1000, "CIFAR-10", sampler="heun", nfe=35)


def test_protocols_must_agree_unless_named():
    a, b = M.Score((2.0,), PROTOCOL), M.Score((3.0,), replace(PROTOCOL, sampler="euler", nfe=18))
    assert M.compare(b, a, ("sampler", "nfe")) == 1
    for varying in ((), ("sampler",), ("nfe",)):
        with pytest.raises(ValueError, match="not comparable"): M.compare(a, b, varying)
    with pytest.raises(ValueError, match="no such protocol entries"): M.compare(a, b, ("smapler",))


@pytest.mark.parametrize("entry", list(json.loads(PROTOCOL.to_json())))
def test_every_entry_of_the_protocol_counts(entry):
    other = 77 if entry in ("n", "nfe", "reference_n") else "other"
    with pytest.raises(ValueError, match=entry): M.compare(M.Score((1.0,), PROTOCOL), M.Score((1.0,), replace(PROTOCOL, **{entry: other})))


def test_records_survive_json():
    score = M.Score((2.0, 4.0, 3.0), PROTOCOL, 1.5, 105_000)
    record = json.loads(json.dumps(score.to_dict()))
    assert M.Score.from_dict(record) == score and (record["min"], record["mean"], record["max"], record["std"]) == (2, 3, 4, 1)
    assert M.Protocol.from_json(PROTOCOL.to_json()) == PROTOCOL and "FID" not in record["metric"]
    with pytest.raises(ValueError, match="not a protocol record"): M.Protocol.from_json('{"colour": 1}')


def test_seed_ranges_follow_each_other():
    assert M.seed_ranges(10, 3, 5) == [range(5, 15), range(15, 25), range(25, 35)] and M.describe_seeds(M.seed_ranges(10, 2)) == "0-9, 10-19"
    with pytest.raises(ValueError): M.seed_ranges(1)
    for too_many in (dict(n=50_000, first_seed=2**32 - 7), dict(n=2, repeats=10**10), dict(n=10, first_seed=-1)):
        with pytest.raises(ValueError, match="seeds outside"): M.seed_ranges(**too_many)


def test_measure_reports_progress_and_a_score():
    net = features.pixels((1, 2, 2))
    sample = lambda seeds: next(drawn(1000)(seeds))[1]
    reference = features.feature_stats(sample(range(100, 200)), net)
    events = {b: list(M.measure(drawn(b), reference, net, n=20, repeats=3, reference_name="noise", nfe=4)) for b in (3, 20)}
    score = events[3][-1]
    assert [e["done"] for e in events[20][:-1]] == [20, 40, 60] and len(score.values) == 3 and score.evaluations == 240
    assert score.protocol.seeds == "0-19, 20-39, 40-59" and score.protocol.reference_n == 100
    assert events[20][-1].values == pytest.approx(score.values, rel=1e-10)
    exact = [features.stats_distance(features.feature_stats(sample(r), net), reference) for r in M.seed_ranges(20, 3)]
    assert score.values == pytest.approx(exact, rel=1e-10)
    cost = M.sampling_cost(1000, 35, 3, drawn(10), 10)
    assert cost["evaluations"] == 105_000 and cost["seconds"] > 0
    with pytest.raises(ValueError, match="was not made with"): next(M.measure(drawn(3), frechet.moments_stats(torch.zeros(4), torch.eye(4), 9, "other", "1"), net))


def test_references_from_images_and_files(tmp_path):
    from edm_nb.data import ImageSet, write_zip
    net = features.pixels((3, 4, 4))
    images = torch.randint(256, (12, 3, 4, 4), generator=gen()).byte()
    write_zip(tmp_path/"set.zip", ImageSet(images))
    computed = M.reference_stats(tmp_path/"set.zip", net)
    torch.testing.assert_close(computed.cov, features.feature_stats(images, net).cov)
    computed.save(tmp_path/"ref.npz")
    with pytest.warns(UserWarning, match="12 samples"): score = M.image_distance(tmp_path/"set.zip", tmp_path/"ref.npz", net)
    assert score.values[0] < 1e-8 and score.protocol.n == 12 and score.protocol.reference == "ref"
    with pytest.raises(ValueError, match="did not make"): M.reference_stats(tmp_path/"ref.npz", features.pixels((3, 8, 8)))


# --- kinds of fault: files that are broken, numbers that are none --------------------------------------------------------

def saved(folder, **arrays):
    "An npz with these arrays."
    np.savez(folder/"s.npz", **arrays)
    return folder/"s.npz"


@pytest.mark.parametrize("kind", ["cut short", "a flipped byte", "empty", "a page of HTML", "an array"])
def test_broken_file_is_one_line_that_names_it(tmp_path, kind):
    whole = saved(tmp_path, mu=np.zeros(40), sigma=np.eye(40)).read_bytes()
    middle = len(whole)//2
    path = tmp_path/("case.npy" if kind == "an array" else "case.npz")
    path.write_bytes({"cut short": whole[:-60], "a flipped byte": whole[:middle] + bytes([whole[middle] ^ 1]) + whole[middle + 1:],
                      "empty": b"", "a page of HTML": b"<html>not found</html>", "an array": b"\x93NUMPY"}[kind])
    with pytest.raises(DataError) as caught: frechet.load_stats(path)
    assert str(path) in str(caught.value) and "\n" not in str(caught.value) and "allow_pickle" not in str(caught.value)


@pytest.mark.parametrize("arrays", [
    dict(mu=np.zeros(3) + 1j), dict(sigma=np.eye(3)*1j), dict(mu=np.array(["a", "b", "c"])), dict(n=np.float64(10.5)), dict(n=np.str_("many")),
    dict(n=np.int64(1)), dict(name=np.int64(3)), dict(mu=np.float64(1.0)), dict(mu=np.zeros(3, [("x", float)])), dict(sigma=np.eye(4)),
    dict(mu=np.array([0, np.nan, 0])), dict(n=np.arange(3))], ids=str)
def test_statistics_that_cannot_be_are_refused_with_the_name_of_the_file(tmp_path, arrays):
    path = saved(tmp_path, **dict(dict(mu=np.zeros(3), sigma=np.eye(3), n=np.int64(9)), **arrays))
    with pytest.raises(DataError, match="s.npz"): frechet.load_stats(path)


def test_memory_of_an_npz_is_bounded_by_its_size(tmp_path):
    "A header may declare what it likes; 200 kB of zip do not become 200 MB."
    np.savez_compressed(tmp_path/"bomb.npz", mu=np.zeros(25_000_000), sigma=np.eye(2))
    assert (tmp_path/"bomb.npz").stat().st_size < 300_000
    with pytest.raises(DataError, match="at most"): frechet.load_stats(tmp_path/"bomb.npz")
    np.savez_compressed(tmp_path/"extra.npz", mu=np.zeros(2), sigma=np.eye(2), unwanted=np.zeros(25_000_000))
    assert frechet.load_stats(tmp_path/"extra.npz").dim == 2             # what nobody asked for is not read


@pytest.mark.parametrize("call", [
    lambda: M.kid(torch.zeros(5, 0), torch.zeros(5, 0)), lambda: M.kid(randn(5, 2).numpy(), randn(5, 2)), lambda: M.kid(randn(5, 2), randn(5, 2), chunk=0),
    lambda: M.precision_recall(randn(5, 2), randn(5, 2), k=0), lambda: M.precision_recall(randn(5, 2).numpy(), randn(5, 2)),
    lambda: M.extrapolate([1, 2, 3], [1, float("nan"), 2]), lambda: M.extrapolate([0, 2, 3], [1, 1, 2]),
    lambda: features.rank_correlation([1, float("nan")], [1, 2]), lambda: features.pick_classes(torch.arange(4), [0, 0], 2),
    lambda: features.add_noise(torch.zeros(1, 1, 8, 8, dtype=torch.uint8), float("nan")), lambda: features.blur(torch.zeros(1, 1, 8, 8, dtype=torch.uint8), -1),
    lambda: features.jpeg(torch.zeros(1, 1, 8, 8, dtype=torch.uint8), 0), lambda: frechet.moments_stats(np.zeros(2), np.eye(2), 2.5),
    lambda: M.Protocol("x", "", float("nan"), "r"), lambda: frechet.FeatureStats(2).update(np.zeros((3, 2)))])
def test_nonsense_is_a_value_error_and_no_number(call):
    with pytest.raises(ValueError): call()


def test_pixel_statistics_of_large_images_say_what_they_cost():
    assert features.pixels((3, 32, 32)).dim == 3072
    with pytest.raises(ValueError, match=r"12,288 pixel values.*1\.1 GiB.*inception"): features.pixels((3, 64, 64))
    assert features.pixels((3, 64, 64), most=12_288).dim == 12_288


@pytest.mark.parametrize("call", ["fsync", "chmod"])
def test_file_systems_that_lack_an_operation_still_take_files(tmp_path, monkeypatch, call):
    import errno
    import os
    from edm_nb import files
    def lacking(code):
        def f(*args): raise OSError(code, os.strerror(code))
        return f
    for code in (errno.EPERM, errno.ENOSYS, errno.EINVAL, errno.EOPNOTSUPP):
        monkeypatch.setattr(os, call, lacking(code))
        assert files.write_atomic(tmp_path/"x", lambda path: path.write_text("whole")).read_text() == "whole"
    monkeypatch.setattr(os, call, lacking(errno.EIO))             # a real fault is still one
    with pytest.raises(OSError): files.write_atomic(tmp_path/"y", lambda path: path.write_text("whole"))
    assert sorted(p.name for p in tmp_path.iterdir()) == ["x"]


def test_blur_and_rank_correlation_agree_with_their_definitions():
    x = torch.zeros(1, 1, 33, 33, dtype=torch.uint8)
    x[0, 0, 16, 16] = 255
    row = features.blur(x, 1.0)[0, 0, 16].double()
    from math import exp, pi
    assert row[16].item() == pytest.approx(255/(2*pi), abs=0.6) and row[18].item() == pytest.approx(255*exp(-2)/(2*pi), abs=0.6)
    assert features.rank_correlation([1, 2, 3, 4], [10, 20, 40, 30]) == pytest.approx(0.8)      # 1 - 6 * 2 / (4 * 15)
