"""Entries of RobustBench's CIFAR-10 leaderboards (Croce et al. 2021, arXiv 2010.09670) with their published figures.

Figures, budgets and file identifiers are those of RobustBench's own records. No checksums were published: a file's
SHA-256 is recorded in the lock file when it is first used. Imports no torch.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from advplug.errors import UsageError, did_you_mean

Family = Literal["wide", "wide-silu", "resnet18", "preact18", "preact18-bn"]
CIFAR_MEAN, CIFAR_STD = (0.4914, 0.4822, 0.4465), (0.2471, 0.2435, 0.2616)


@dataclass(frozen=True)
class Entry:
    """One row: `clean` and `robust` are per cent of the 10,000 test images, `drive` the file's identifier.

    `depth` and `width` are those of wide residual networks. `scaled`: pixels reach it normalised by CIFAR-10's mean and
    deviation.
    """

    name: str
    norm: str
    eps: str
    family: Family
    depth: int
    width: int
    clean: float
    robust: float
    drive: str
    paper: str

    @property
    def scaled(self) -> bool:
        return self.family in ("wide-silu", "preact18", "preact18-bn")

    @property
    def url(self) -> str:
        """The file itself: the usual address answers with a page that asks for a confirmation."""
        return f"https://drive.usercontent.google.com/download?id={self.drive}&export=download&confirm=t"

    @property
    def told(self) -> str:
        """The published figures in a sentence."""
        norm = {"linf": "L-inf", "l2": "L2"}[self.norm]
        return (
            f"RobustBench lists {self.robust:.2f} % robust at {norm} {self.eps} and {self.clean:.2f} % clean for "
            f"{self.name}, undefended, on CIFAR-10's 10,000 test images ({self.paper})"
        )


_CARMON, _HYDRA = "Carmon et al. 2019, arXiv 1905.13736", "Sehwag et al. 2020, arXiv 2002.10509"
_MART, _TRADES = "Wang et al. 2020, ICLR", "Zhang et al. 2019, arXiv 1901.08573"
_AWP, _PROXY = "Wu et al. 2020, arXiv 2004.05884", "Sehwag et al. 2021, arXiv 2104.09425"
_DAJAT, _GOWAL = "Addepalli et al. 2022, arXiv 2210.15318", "Gowal et al. 2020, arXiv 2010.03593"
_REBUFFI, _BETTER = "Rebuffi et al. 2021, arXiv 2103.01946", "Wang et al. 2023, arXiv 2302.04638"
_FAST, _RICE = "Wong et al. 2020, arXiv 2001.03994", "Rice et al. 2020, arXiv 2002.11569"

ENTRIES: tuple[Entry, ...] = (
    Entry("Standard", "linf", "8/255", "wide", 28, 10,
          94.78, 0.0, "1t98aEuzeTL8P7Kpd5DIrCoCL21BNZUhC", "RobustBench"),
    Entry("Carmon2019Unlabeled", "linf", "8/255", "wide", 28, 10,
          89.69, 59.53, "15tUx-gkZMYx7BfEOw1GY5OKC-jECIsPQ", _CARMON),
    Entry("Sehwag2020Hydra", "linf", "8/255", "wide", 28, 10,
          88.98, 57.14, "1pi8GHwAVkxVH41hEnf0IAJb_7y-Q8a2Y", _HYDRA),
    Entry("Wang2020Improving", "linf", "8/255", "wide", 28, 10,
          87.50, 56.29, "1T939mU4kXYt5bbvM55aT4fLBvRhyzjiQ", _MART),
    Entry("Zhang2019Theoretically", "linf", "0.031", "wide", 34, 10,
          84.92, 53.08, "1hPz9QQwyM7QSuWu-ANG_uXR-29xtL8t_", _TRADES),
    Entry("Wu2020Adversarial_extra", "linf", "8/255", "wide", 28, 10,
          88.25, 60.04, "1-WJWpAZLlmc4gJ8XXNf7IETjnSZzaCNp", _AWP),
    Entry("Sehwag2021Proxy", "linf", "8/255", "wide", 34, 10,
          85.85, 59.09, "1QFA5fPMj2Qw4aYNG33PkFqiv_RTDWvzm", _PROXY),
    Entry("Sehwag2021Proxy_R18", "linf", "8/255", "resnet18", 18, 1,
          84.38, 54.43, "1-ZgoSlD_AMhtXdnUElilxVXnzK2DcHuu", _PROXY),
    Entry("Addepalli2022Efficient_WRN_34_10", "linf", "8/255", "wide", 34, 10,
          88.71, 57.81, "1--dVDtZhAk4D2zMtTDwIGnImuCGxTcBA", _DAJAT),
    Entry("Addepalli2022Efficient_RN18", "linf", "8/255", "resnet18", 18, 1,
          85.71, 52.48, "1m5vhdzIUUKhDbsZdOG9z76Eyp6f4xe_f", _DAJAT),
    Entry("Wong2020Fast", "linf", "8/255", "preact18", 18, 1,
          83.34, 43.21, "1Re--_lf3jCEw9bnQqGkjw3J7v2tSZKrv", _FAST),
    Entry("Gowal2020Uncovering_28_10_extra", "linf", "8/255", "wide-silu", 28, 10,
          89.48, 62.76, "1MBAWGxiZxKt-GfqEqtLcXcd3tAxPhvV2", _GOWAL),
    Entry("Gowal2020Uncovering_70_16_extra", "linf", "8/255", "wide-silu", 70, 16,
          91.10, 65.87, "1GxryYj_Or-VCDca0wgiFLz4ssXSZXQoJ", _GOWAL),
    Entry("Rebuffi2021Fixing_28_10_cutmix_ddpm", "linf", "8/255", "wide-silu", 28, 10,
          87.33, 60.73, "1-0EChXbc6pOvx26O17av263bCeqIAz6s", _REBUFFI),
    Entry("Rebuffi2021Fixing_70_16_cutmix_extra", "linf", "8/255", "wide-silu", 70, 16,
          92.23, 66.56, "1qKDTp6IJ1BUXZaRtbYuo_t0tuDl_4mLg", _REBUFFI),
    Entry("Wang2023Better_WRN-28-10", "linf", "8/255", "wide-silu", 28, 10,
          92.44, 67.31, "1-6MYKJdECDVGaWjj6GgqvaT95BGKhUvI", _BETTER),
    Entry("Wang2023Better_WRN-70-16", "linf", "8/255", "wide-silu", 70, 16,
          93.25, 70.69, "1-RF7ZSS-PAh6bfQcuqx4lh9bc9BUGnap", _BETTER),
    Entry("Rice2020Overfitting", "l2", "0.5", "preact18-bn", 18, 1,
          88.67, 67.68, "1jo-31utiYNBVzLM0NxUEWz0teo3Z0xa7", _RICE),
    Entry("Sehwag2021Proxy", "l2", "0.5", "wide", 34, 10,
          90.31, 76.12, "1UviikNzpltVFsgMuqQ8YhpmvGczGRS4S", _PROXY),
    Entry("Sehwag2021Proxy_R18", "l2", "0.5", "resnet18", 18, 1,
          89.52, 73.39, "1zPjjZj9wujBNkAmHHHIikem6_aIjMhXG", _PROXY),
    Entry("Rebuffi2021Fixing_28_10_cutmix_ddpm", "l2", "0.5", "wide-silu", 28, 10,
          91.79, 78.69, "1-DUKcvfDzeWwt0NK7q2XvU-dIi8up8B0", _REBUFFI),
    Entry("Wang2023Better_WRN-28-10", "l2", "0.5", "wide-silu", 28, 10,
          95.16, 83.68, "1-fwKiJXEqHHUngt8wKsNnHuD4vAPvPXC", _BETTER),
)  # fmt: skip


def entry(name: str, norm: str) -> Entry:
    """The row of that name. Raises UsageError, with what there is, for one that is not there."""
    found = [e for e in ENTRIES if e.name == name]
    if not found:
        names = dict.fromkeys(e.name for e in ENTRIES)
        hint = did_you_mean(name, names) or f"; it has {', '.join(names)}"
        raise UsageError(f"no entry of RobustBench's is known here as '{name}'{hint}")
    for e in found:
        if e.norm == norm:
            return e
    raise UsageError(f"RobustBench's '{name}' is for {found[0].norm}; write norm={found[0].norm}")
