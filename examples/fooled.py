# %% [markdown]
# # Fooled by a defense
#
# A network that reads handwritten digits is easy to fool. We attack it, look at what the attack did, put a defense in
# front that seems to help, see why it does not, and end with something that does. All of it takes a minute or two on a
# laptop: the digits come along with scikit-learn, and nothing is downloaded.
#
# Run it as it is, `python fooled.py`, or cell by cell: editors such as VS Code know the `# %%` marks, and
# `python notebook.py fooled.py` makes a notebook of it.

# %%
import matplotlib.pyplot as plt
import torch
from sklearn.datasets import load_digits
from torch import nn
from torch.nn import functional

import advplug

torch.manual_seed(0)
torch.set_num_threads(1)  # such small images leave nothing to share
pixels, classes = load_digits(return_X_y=True)
images = torch.tensor(pixels / 16).float().view(-1, 1, 8, 8)
images = functional.interpolate(images, scale_factor=2.0, mode="bilinear", align_corners=False)
order = torch.randperm(len(images))
images, labels = images[order], torch.tensor(classes)[order]
train, test = (images[:1400], labels[:1400]), (images[1400:1500], labels[1400:1500])

# %% [markdown]
# ## A network
#
# Pixels go in, between 0 and 1; ten numbers come out, the largest one says which digit it is. `harden` is for later.


# %%
def network():
    layers, before = [], 1
    for after in (16, 32, 64):
        layers += [nn.Conv2d(before, after, 3, padding=1), nn.BatchNorm2d(after), nn.ReLU(), nn.MaxPool2d(2)]
        before = after
    return nn.Sequential(*layers, nn.Flatten(), nn.Linear(4 * before, 10))


def trained(net, epochs, harden=None):
    optimizer = torch.optim.AdamW(net.parameters(), lr=2e-3)
    for _ in range(epochs):
        for rows in torch.randperm(len(train[0])).split(64):
            x, y = train[0][rows], train[1][rows]
            if harden is not None:
                x = harden(net.eval(), x, y)
            net.train()
            optimizer.zero_grad()
            functional.cross_entropy(net(x), y).backward()
            optimizer.step()
    return net.eval()


def accuracy(answer, x):
    with torch.no_grad():
        return 100 * (answer(x).argmax(1) == test[1]).float().mean().item()


net = trained(network(), epochs=10)
print(f"clean accuracy: {accuracy(net, test[0]):.0f} %")

# %% [markdown]
# ## Attack
#
# Training moves the weights so that the loss falls. An attack moves the *pixels* so that it grows: a step along the
# sign of the gradient, and back to where no pixel has changed by more than `eps`. That is projected gradient descent
# (PGD), and it fits in ten lines.

# %%
EPS = 1 / 10


def pgd(answer, x, y, eps=EPS, steps=20):
    moved = (x + eps * (2 * torch.rand_like(x) - 1)).clamp(0, 1)
    for _ in range(steps):
        moved.requires_grad_()
        loss = functional.cross_entropy(answer(moved), y, reduction="sum")
        (gradient,) = torch.autograd.grad(loss, moved)
        moved = moved.detach() + eps / 4 * gradient.sign()
        moved = torch.clamp(moved, x - eps, x + eps).clamp(0, 1)
    return moved


fooling = pgd(net, *test)
print(f"under attack: {accuracy(net, fooling):.0f} %")

# %% [markdown]
# ## Look
#
# What does a changed image look like, and what does the network take it for? The difference is drawn with all of its
# range: grey is no change, white is `+eps` and black is `-eps`.

# %%
with torch.no_grad():
    before, after = net(test[0]).argmax(1), net(fooling).argmax(1)
figure, places = plt.subplots(3, 6, figsize=(9, 4.8), layout="constrained")
for column, row in enumerate((before != after).nonzero().flatten()[:6].tolist()):
    shown = (
        (test[0][row], 0.0, 1.0, f"clean: {before[row]}"),
        (fooling[row], 0.0, 1.0, f"attacked: {after[row]}"),
        (fooling[row] - test[0][row], -EPS, EPS, "difference"),
    )
    for place, (image, low, high, title) in zip(places[:, column], shown, strict=True):
        place.imshow(image[0].numpy(), cmap="gray", vmin=low, vmax=high)
        place.set_title(title, fontsize=10)
for place in places.flat:
    place.set_axis_off()
plt.show()

# %% [markdown]
# We still read the same digits. The network does not.
#
# ## Defend
#
# The changes are small, and JPEG throws small things away. So compress every image before the network sees it, a lot,
# and show the system images that fool the network without compression. `advplug.evaluate` takes our network and images;
# `jpeg` is one of its defenses, and `apgd` a stronger relative of our attack. To leave the defense a chance, the budget
# is a quarter smaller.

# %%
LESS = 3 / 4 * EPS


def percent(estimate):
    return f"{100 * estimate.value:.0f} % [{100 * estimate.low:.0f}, {100 * estimate.high:.0f}]"


result = advplug.evaluate(net, "apgd", "jpeg:quality=20", dataset=test, eps=LESS)
found = {cell.defense: cell.metrics for cell in result.cells}
bare, defended = found["none"], found["jpeg:quality=20"]
print(f"not attacked, with JPEG:                {percent(defended['clean_accuracy'])}")
print(f"attacked, without JPEG:                 {percent(bare['robust_accuracy'])}")
print(f"the same attacked images, with JPEG:    {percent(defended['static_robust_accuracy'])}")

# %% [markdown]
# ## Be fooled
#
# This looks like a defense, at next to no cost, and many would stop here. But the images were made for the network
# *without* JPEG. Whoever attacks this system knows that it compresses, and attacks the two together.
#
# ## Adapt
#
# Compression rounds, and rounding has no gradient that helps. The attacker passes forward through real JPEG and
# backward through something smooth that is much like it. advplug's `jpeg` says how that is done, and `evaluate` has
# done it:

# %%
print(f"images made for the network with JPEG:  {percent(defended['adaptive_robust_accuracy'])}\n")
for threat in result.threats:
    print(f"{threat.defense}: worst case {percent(threat.worst_case_accuracy)}, {threat.verdict}")
    for flag in threat.flags:
        print(f"    {flag.name}: {flag.detail}")

# %% [markdown]
# The number that counts is the worst case: an image holds if *nothing* that was tried fools the system. `trusted` says
# that the attack was a strong one and that no check found a sign of its having failed. One such sign would be that
# images for the bare network do better than those made for the defended one. `upper bound` says that another attack may
# break more; `not-converged`, for example, that more steps of the same one do. A weak attack never gives anything else:

# %%
weak = advplug.evaluate(net, "fgsm", "jpeg:quality=20", dataset=test, eps=LESS)
for threat in weak.threats:
    print(f"{threat.defense}: {percent(threat.worst_case_accuracy)} under FGSM, {threat.verdict}")

# %% [markdown]
# ## What really helps
#
# Train on attacked images, made anew for every batch against the network as it is then. It takes longer to train, and
# it is the network itself that changes, so there is nothing left to get around. Now at the full budget:

# %%
hardened = trained(network(), epochs=15, harden=lambda net, x, y: pgd(net, x, y, steps=5))
final = advplug.evaluate([net, hardened], "apgd", dataset=test, eps=EPS)
for name, threat in zip(("as usual", "on attacked images"), final.threats, strict=True):
    clean, worst = threat.clean_accuracy, threat.worst_case_accuracy
    print(f"trained {name}: clean {percent(clean)}, worst case {percent(worst)}, {threat.verdict}")

# %% [markdown]
# It is no full defense either: some digits still fall, and the network was trained for this budget and no larger one.
# But the number stands against an attacker who knows everything.
#
# ## Try it yourself
#
# - Larger and smaller `EPS`: where does the hardened network break?
# - Another defense: `advplug list defenses`. Does `bit-depth:bits=2` hold?
# - Remove the `defense` and give no attack: `advplug.evaluate(net, dataset=test)` runs AutoAttack.
