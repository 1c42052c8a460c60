"""Train `cifar-features`, the small network behind the offline distance on 32×32 colour images.

    python studies/train_features.py --train TRAIN.zip --test TEST.zip [--epochs 10] [--second 6] [--threads 1]

A plain stack of convolutions (whitening layer, three blocks of two 3×3 convolutions, global mean) learns the ten classes
of CIFAR-10. Batch normalisation exists only while training: it has no gain, so it folds into the convolutions, and the
shipped network is convolution + GELU and nothing that depends on the batch. Writes

    edm_nb/assets/cifar_features.safetensors    fp16 weights
    edm_nb/assets/cifar_features.json           the training record: accuracy, seed, data, hardware, versions, hash

A checkpoint after every epoch makes the run resumable: start the same command again and it goes on.
"""
import argparse, copy, hashlib, json, sys, time
from pathlib import Path

import torch
import torch.nn.functional as F
from safetensors.torch import save as to_safetensors
from torch import nn

sys.path.insert(0, str(Path(__file__).resolve().parent.parent / "benchmarks"))
from record import ROOT, gpu_name, hardware_line, now, versions, write_json  # noqa: E402

from edm_nb.data import load_images  # noqa: E402
from edm_nb.files import file_hash, write_atomic  # noqa: E402

ASSETS = ROOT / "edm_nb" / "assets"
WIDTHS = (64, 128, 256)
WHITE = 24                      # channels of the whitening layer


def to_float(images):
    "uint8 to [-1, 1], channels last: what oneDNN and cuDNN like best."
    return (images.float()/127.5 - 1).contiguous(memory_format=torch.channels_last)


class Norm(nn.BatchNorm2d):
    "Batch normalisation with a bias and no gain: a positive scale, so it folds through the max pooling before it."
    def __init__(self, channels):
        super().__init__(channels, momentum=0.4)
        self.weight.requires_grad_(False)


class Block(nn.Module):
    "conv, pool, norm, GELU, conv, norm, GELU: half the resolution."
    def __init__(self, c_in, c_out):
        super().__init__()
        self.conv1, self.norm1 = nn.Conv2d(c_in, c_out, 3, padding=1, bias=False), Norm(c_out)
        self.conv2, self.norm2 = nn.Conv2d(c_out, c_out, 3, padding=1, bias=False), Norm(c_out)

    def forward(self, x):
        x = F.gelu(self.norm1(F.max_pool2d(self.conv1(x), 2)))
        return F.gelu(self.norm2(self.conv2(x)))


class Classifier(nn.Module):
    "The network while it trains."
    def __init__(self):
        super().__init__()
        self.white = nn.Conv2d(3, WHITE, 2)
        self.blocks = nn.ModuleList(Block(a, b) for a, b in zip((WHITE, *WIDTHS), WIDTHS))
        self.head = nn.Linear(WIDTHS[-1], 10)

    def forward(self, x):
        x = F.gelu(self.white(x))
        for block in self.blocks: x = block(x)
        return self.head(x.mean((2, 3)))


@torch.no_grad()
def whiten(conv, images):
    "Set the first layer to the scaled principal components of 2×2 patches, both signs (GELU passes only one)."
    patches = F.unfold(to_float(images), 2).transpose(1, 2).flatten(0, 1).double()      # [N·31·31, 12]
    mean = patches.mean(0)
    values, vectors = torch.linalg.eigh(torch.cov(patches.T))
    filters = (vectors/(values + 5e-4).sqrt()).T.flip(0)                                   # largest component first
    sign = filters.sum(1, keepdim=True).sign() + (filters.sum(1, keepdim=True) == 0)      # eigenvectors have no sign
    filters = torch.cat([filters*sign, -filters*sign])
    conv.weight.copy_(filters.view(WHITE, 3, 2, 2)); conv.bias.copy_(-filters @ mean)
    conv.requires_grad_(False)


def augment(images, shift, generator):
    "Random flip and translation by up to `shift` pixels with reflected borders."
    n, _, h, w = images.shape
    flip = torch.rand(n, generator=generator) < 0.5
    images = torch.where(flip[:, None, None, None], images.flip(3), images)
    padded = F.pad(images.float(), (shift,)*4, mode="reflect").byte()
    y = torch.randint(2*shift + 1, (n,), generator=generator)[:, None] + torch.arange(h)
    x = torch.randint(2*shift + 1, (n,), generator=generator)[:, None] + torch.arange(w)
    rows = torch.arange(n)[:, None, None]
    return padded.permute(0, 2, 3, 1)[rows, y[:, :, None], x[:, None, :]].permute(0, 3, 1, 2)


@torch.no_grad()
def recalibrate(model, images, device, batches=20, size=500):
    "Batch-norm statistics of the averaged weights: one exact pass, cumulative."
    norms = [m for m in model.modules() if isinstance(m, nn.BatchNorm2d)]
    for norm in norms: norm.reset_running_stats(); norm.momentum = None
    model.train()
    for i in range(batches): model(to_float(images[i*size:(i+1)*size]).to(device))
    return model.eval()


@torch.no_grad()
def fold(model):
    "Plain convolutions that compute what the network with batch normalisation computes in eval mode."
    tensors = {"conv0.weight": model.white.weight, "conv0.bias": model.white.bias}
    pairs = [(c, n) for b in model.blocks for c, n in ((b.conv1, b.norm1), (b.conv2, b.norm2))]
    for i, (conv, norm) in enumerate(pairs, 1):
        scale = (norm.running_var + norm.eps).rsqrt()
        tensors[f"conv{i}.weight"] = conv.weight*scale[:, None, None, None]
        tensors[f"conv{i}.bias"] = norm.bias - norm.running_mean*scale
    tensors |= {"head.weight": model.head.weight, "head.bias": model.head.bias}
    return {k: v.detach().cpu().half().contiguous() for k, v in tensors.items()}


@torch.no_grad()
def accuracy(logits, images, labels):
    "Share of right answers of a function from uint8 images to class scores."
    answers = torch.cat([logits(batch).argmax(1).cpu() for batch in images.split(500)])
    return (answers == labels).double().mean().item()


def train(args):
    "The whole run; returns the averaged, recalibrated model and its seconds."
    device = torch.device(args.device)
    torch.manual_seed(args.seed)
    data = load_images(args.train)
    images, labels = data.images, data.labels
    if args.limit: images, labels = images[:args.limit], labels[:args.limit]
    model = Classifier()
    whiten(model.white, images[:5000])
    model = model.to(device, memory_format=torch.channels_last)
    ema = copy.deepcopy(model)
    decay = [p for p in model.parameters() if p.requires_grad and p.ndim > 1]
    plain = [p for p in model.parameters() if p.requires_grad and p.ndim == 1]
    optimiser = torch.optim.SGD([dict(params=decay, weight_decay=args.weight_decay), dict(params=plain, weight_decay=0.0)],
                                lr=args.lr, momentum=0.9, nesterov=True)
    per_epoch = len(images)//args.batch
    start, seconds = 0, 0.0
    checkpoint = Path(args.checkpoint)
    if checkpoint.exists():
        state = torch.load(checkpoint, weights_only=True)
        model.load_state_dict(state["model"]); ema.load_state_dict(state["ema"]); optimiser.load_state_dict(state["optimiser"])
        start, seconds = state["epoch"], state["seconds"]
        print(f"resumed after epoch {start}", flush=True)
    step = start*per_epoch
    for epoch in range(start, args.epochs + args.second):
        clock = time.perf_counter()
        generator = torch.Generator().manual_seed(args.seed*1000 + epoch)      # an epoch is the same after a resume
        order, losses = torch.randperm(len(images), generator=generator), []
        model.train()
        for i in range(per_epoch):
            index = order[i*args.batch:(i+1)*args.batch]
            x = to_float(augment(images[index], args.shift, generator)).to(device)
            for group in optimiser.param_groups: group["lr"] = learning_rate(step, per_epoch, args)
            with torch.autocast(device.type, torch.bfloat16, enabled=args.bf16):
                logits = model(x)
            loss = F.cross_entropy(logits.float(), labels[index].to(device), label_smoothing=0.1)
            optimiser.zero_grad(set_to_none=True); loss.backward(); optimiser.step()
            beta = min(args.ema, (step + 1)/(step + 10))
            with torch.no_grad():
                for a, b in zip(ema.parameters(), model.parameters()): a.lerp_(b, 1 - beta)
            losses.append(loss.item()); step += 1
            if args.max_steps and step >= args.max_steps: break
        seconds += time.perf_counter() - clock
        print(f"epoch {epoch + 1}/{args.epochs + args.second}  loss {sum(losses)/len(losses):.4f}  {seconds:.0f} s", flush=True)
        state = dict(model=model.state_dict(), ema=ema.state_dict(), optimiser=optimiser.state_dict(), epoch=epoch + 1, seconds=seconds)
        write_atomic(checkpoint, lambda file: torch.save(state, file))
        if args.max_steps and step >= args.max_steps: break
    return recalibrate(ema.float(), images, device), seconds, len(images)


def learning_rate(step, per_epoch, args):
    "A triangle over the first `epochs`, then a second one of half the height over the `second` epochs."
    first, second = args.epochs*per_epoch, args.second*per_epoch
    at, total, peak = (step, first, args.lr) if step < first else (step - first, second, args.lr/2)
    warm = max(1, int(0.2*total))
    return peak*(at/warm if at < warm else (total - at)/(total - warm))


def main():
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--train", required=True); parser.add_argument("--test", required=True)
    parser.add_argument("--epochs", type=int, default=10); parser.add_argument("--second", type=int, default=6, help="epochs of the second, lower cycle")
    parser.add_argument("--batch", type=int, default=512)
    parser.add_argument("--lr", type=float, default=0.4); parser.add_argument("--weight-decay", type=float, default=5e-4)
    parser.add_argument("--ema", type=float, default=0.99); parser.add_argument("--shift", type=int, default=2)
    parser.add_argument("--seed", type=int, default=0); parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--bf16", action=argparse.BooleanOptionalAction, default=True)
    parser.add_argument("--limit", type=int, default=0, help="use only the first images (for trying the script)")
    parser.add_argument("--max-steps", type=int, default=0, help="stop early (for timing)")
    parser.add_argument("--checkpoint", default="runs/cifar_features.pt"); parser.add_argument("--out", default=str(ASSETS))
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    model, seconds, n_train = train(args)
    test = load_images(args.test)
    exact = accuracy(lambda u8: model(to_float(u8).to(args.device)), test.images, test.labels)
    tensors = fold(model)
    content = to_safetensors(tensors, metadata={"format": "pt", "licence": "Apache-2.0"})
    from edm_nb.features import CifarFeatures
    shipped = CifarFeatures({k: v.float() for k, v in tensors.items()}, hashlib.sha256(content).hexdigest())
    record = dict(
        name="cifar-features", test_accuracy=accuracy(shipped.logits, test.images, test.labels),
        test_accuracy_flip_averaged=accuracy(lambda u8: shipped.logits(u8) + shipped.logits(u8.flip(3)), test.images, test.labels),
        test_accuracy_before_folding_and_fp16=exact, n_train=n_train, n_test=len(test.images), feature_dim=CifarFeatures.dim,
        parameters=sum(v.numel() for v in tensors.values()), seed=args.seed, seconds=round(seconds), hardware=gpu_name() if args.device.startswith("cuda") else hardware_line(),
        settings={k: getattr(args, k) for k in ("epochs", "second", "batch", "lr", "weight_decay", "ema", "shift", "bf16", "limit")},
        data=dict(train=dict(file=Path(args.train).name, sha256=file_hash(args.train)), test=dict(file=Path(args.test).name, sha256=file_hash(args.test)),
                  note="CIFAR-10 stored as JPEG (quality 75, 4:2:0): not bit-identical to the original images"),
        versions=versions(), date=now(),
        sha256=hashlib.sha256(content).hexdigest(), bytes=len(content), licence="Apache-2.0")
    write_atomic(Path(args.out)/"cifar_features.safetensors", lambda file: file.write_bytes(content))
    write_json(Path(args.out)/"cifar_features.json", record)
    print(json.dumps(record, indent=1))


if __name__ == "__main__":
    main()
