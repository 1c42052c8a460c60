"""What the stages share: a clock, data, features, and samples by seed with their distance."""
import contextlib
import copy
import statistics
import time

import torch

from edm_nb.data import cifar10, hash_buffer, ImageSet, load_images
from edm_nb.features import cifar_features, stats_distance
from edm_nb.framework import LINEAR
from edm_nb.frechet import FeatureStats
from edm_nb.generation import generate, Sampling
from edm_nb.ode_solvers import heun
from edm_nb.stochastic import Churn, sample
from edm_nb.updates import compiled
from record import wait
from studies.gpu.session import in_words, Session

NO_CHURN = Churn()


def clock(device, work, repeats, warmup=3, seconds=6.0):
    "Median and extremes of the seconds that `work()` takes; at least three calls, no new one after `seconds`."
    for _ in range(warmup):
        work()
    times, end = [], time.perf_counter() + seconds
    while len(times) < min(3, repeats) or (len(times) < repeats and time.perf_counter() < end):
        wait(device)
        start = time.perf_counter()
        work()
        wait(device)
        times.append(time.perf_counter() - start)
    return dict(median=statistics.median(times), low=min(times), high=max(times), n=len(times))


def relative(value, reference):
    "‖value − reference‖ / ‖reference‖ in float64 on the CPU; NaN never passes a comparison."
    reference = reference.double().cpu()
    return float((value.double().cpu() - reference).norm() / reference.norm())


@contextlib.contextmanager
def tf32(allowed):
    "Whether fp32 products may be rounded to ten bits on the way in."
    before = torch.backends.cuda.matmul.allow_tf32, torch.backends.cudnn.allow_tf32
    torch.backends.cuda.matmul.allow_tf32 = torch.backends.cudnn.allow_tf32 = allowed
    try:
        yield
    finally:
        torch.backends.cuda.matmul.allow_tf32, torch.backends.cudnn.allow_tf32 = before


class Report(Session):
    "A session with its images, its feature network and the way it samples."
    def __init__(self, args):
        super().__init__(args)
        self._sets, self._features, self._reference = {}, None, None

    @property
    def features(self):
        "The feature network, on the device."
        self._features = self._features or cifar_features(self.device)
        return self._features

    def data(self, split):
        "The image set of a split, read once; a toy run without data draws its own."
        if split not in self._sets:
            self._sets[split] = self._read(split)
        return self._sets[split]

    def _read(self, split):
        path = self.args.data if split == "train" else self.args.test
        if path or not self.toy:
            found = load_images(path) if path else cifar10(split)
            return found.take(slice(256)) if self.toy else found
        generator = torch.Generator().manual_seed(len(split))
        coarse = torch.rand(256, 3, 4, 4, generator=generator)
        images = torch.nn.functional.interpolate(coarse, 32, mode="bilinear").mul(255).to(torch.uint8)
        return ImageSet(images, torch.arange(256) % 10, "blobs", tuple("0123456789"))

    def stats(self, batches):
        "Feature statistics of batches of bytes, in full fp32: they must be the same on every machine."
        stats = FeatureStats(self.features.dim)
        for images in batches:
            with tf32(False):
                stats.update(self.features(images.to(self.device)).cpu())
        return stats

    def reference(self):
        "Statistics of the training set, computed once."
        if self._reference is None:
            self._reference = self.stats(self.data("train").images.split(500))
        return self._reference

    def measured_against(self):
        "What a distance of this run compares with; another value here means other numbers."
        data = self.data("train")
        return dict(features=self.features.name, features_hash=self.features.hash, reference=data.name, reference_n=len(data),
                    reference_hash=hash_buffer(data.images.contiguous().numpy()))

    def fast(self, denoise, batch=None):
        "The denoiser as it samples fastest: channels-last, a copy with our kernels; or as it is, with the reason in `compile_errors`."
        if self.device.type == "cuda":
            denoise = denoise.to(memory_format=torch.channels_last)
        if self.compile_errors:
            return denoise
        batch, shape = batch or self.args.sample_batch, (denoise.net.channels, denoise.net.resolution, denoise.net.resolution)
        try:
            ready = compiled(copy.deepcopy(denoise), "fused")
            with torch.no_grad(), self.autocast():
                ready(torch.zeros(batch, *shape, dtype=torch.float64, device=self.device),
                      torch.ones((), dtype=torch.float64, device=self.device),
                      class_labels=torch.zeros(batch, denoise.net.label_dim, device=self.device))
            wait(self.device)
            return ready
        except Exception as error:
            self.compile_errors.append(in_words(error))
            print(f"  without our kernels: {self.compile_errors[-1]}", flush=True)
            return denoise

    def autocast(self):
        "bf16 inside the network, on a GPU."
        return torch.autocast(self.device.type, torch.bfloat16, enabled=self.device.type == "cuda")

    def draw(self, denoise, n, sigmas, churn=NO_CHURN, solver=heun, schedule=LINEAR):
        """Samples as bytes, a batch at a time; class = number mod 10. Image i is that of seed 10^6 --seed + i, whatever the batch;
        its noise is drawn on the device."""
        def sampler(model, noise, levels, randn_like, **cond):
            with self.autocast():
                return sample(model, noise, levels, churn, randn_like, schedule, solver, round_sigma=denoise.round_sigma, **cond)
        seeds = range(self.args.seed * 10**6, self.args.seed * 10**6 + n)
        for _, images, _ in generate(denoise, seeds, Sampling(levels=tuple(sigmas.tolist())), range(10), sampler=sampler,
                                     batch=self.args.sample_batch, noise_on=self.device):
            yield images

    def distance(self, denoise, n, sigmas, churn=NO_CHURN, solver=heun, schedule=LINEAR):
        "Fréchet distance of n samples against the training statistics, and the seconds that drawing them took."
        start = time.perf_counter()
        stats, reference = self.stats(self.draw(denoise, n, sigmas, churn, solver, schedule)), self.reference()
        return dict(distance=stats_distance(stats, reference), n=n,
                    seconds=round(time.perf_counter() - start, 1))
