"""The attacks of torchattacks 3.5.1, one row each. No torch.

Defaults are the library's unless they are constants in pixel units, which become shares of eps; other exceptions are
named in the README.
"""

from __future__ import annotations

from advplug.contracts import Access, Strength
from advplug_torchattacks.rows import (
    DECAY,
    DIVERSITY,
    EOT,
    NOISE,
    START,
    Row,
    alpha,
    choice,
    number,
    queries,
    steps,
    switch,
    whole,
)  # fmt: skip

LEFT_OUT = {
    "VANILA": "it returns the images as they are; the clean accuracy is in every result",
    "MultiAttack": "a list of attacks is an axis of advplug's matrix, and the worst case over it is reported",
    "LGV": "it trains surrogates from a data loader and the victim's weights; advplug's transfer takes surrogates",
}
"""Classes of torchattacks that are not registered, and why."""

MADRY = alpha("2.5 eps / steps")
SHARED = alpha("eps / steps")
OVERSHOOT = number("overshoot", 0.02, "how far beyond the boundary, as a share of the change", ge=0)
RESTARTS = whole("n_restarts", 1, "starts, later ones only for survivors")
RHO = number("rho", 0.75, "share of the steps that must improve, or the step is halved", gt=0, lt=1)
CROCE = "Croce and Hein 2020, arXiv 2003.01690"
LIN = "Lin et al. 2019, arXiv 1908.06281"
SALMAN = "Salman et al. 2019, arXiv 1906.04584"
VARIANCE = "Wang and He 2021, arXiv 2103.15571"
EAD = "Chen et al. 2017, arXiv 1709.04114"
EAD_PARAMS = (
    number("lr", 0.01, "learning rate", gt=0),
    whole("binary_search_steps", 9, "steps of the search for the loss's weight"),
    # Fewer than ten make the library divide by zero.
    whole("max_iterations", 100, "gradient steps for each weight", ge=10),
    switch("abort_early", True, "stop once the loss of the whole batch stalls"),
    number("initial_const", 0.001, "the loss's first weight", gt=0),
    number("beta", 0.001, "weight of the L1 distance", gt=0),
)
NEIGHBOURS = (
    whole("N", 5, "neighbours that the gradient's variance is taken from"),
    number("beta", 1.5, "how far neighbours may be, as a multiple of eps", gt=0),
)
AMPLIFIED = (
    steps(),
    number("amplification", 10.0, "steps as a multiple of eps / steps", gt=0),
)
AMPLIFIED_NAMES = {"steps": "num_iter_set"}

SIGN_STEPS = [
    Row("fgsm", "FGSM", "Fast gradient sign method: one step of length eps", "Goodfellow et al. 2014, arXiv 1412.6572",
        strength=Strength.ONE_STEP),
    Row("ffgsm", "FFGSM", "FGSM from a random start", "Wong et al. 2020, arXiv 2001.03994",
        strength=Strength.ONE_STEP, draws="batch", params=(alpha("1.25 eps"),), step=1.25),
    Row("bim", "BIM", "Iterative FGSM: small steps from the clean image", "Kurakin et al. 2016, arXiv 1607.02533",
        params=(steps(), MADRY), step=2.5),
    Row("rfgsm", "RFGSM", "Iterative FGSM after one random sign step", "Tramer et al. 2017, arXiv 1705.07204",
        draws="batch", params=(steps(), MADRY), step=2.5),
    Row("pgd", "PGD", "Projected gradient descent from a random start", "Madry et al. 2017, arXiv 1706.06083",
        draws="batch", params=(steps(), MADRY, START), step=2.5),
    Row("pgdl2", "PGDL2", "Projected gradient descent in L2", "Madry et al. 2017, arXiv 1706.06083",
        norms=("l2",), draws="batch", params=(steps(), MADRY, START), step=2.5),
    Row("eotpgd", "EOTPGD", "PGD on gradients averaged over a randomised victim",
        "Zimmermann 2019, arXiv 1907.00895", draws="batch",
        params=(steps(), MADRY, whole("eot_iter", 2, "gradients that are averaged in a step"), START), step=2.5),
    Row("tpgd", "TPGD", "PGD on the divergence from the clean answer, without labels (TRADES)",
        "Zhang et al. 2019, arXiv 1901.08573", draws="batch", targeted=False, strength=Strength.ONE_STEP,
        params=(steps(), MADRY), step=2.5),
    Row("jitter", "Jitter", "PGD on a jittered squared loss of rescaled logits",
        "Schwinn et al. 2021, arXiv 2105.10304", draws="batch",
        params=(steps(), MADRY, number("scale", 10.0, "scale of the logits", gt=0),
                number("std", 0.1, "standard deviation of the noise on the outputs", ge=0), START), step=2.5),
    Row("pgdrs", "PGDRS", "PGD on the mean answer under noise, for smoothed models; weak on others", SALMAN,
        draws="batch", strength=Strength.FLOOR, params=(steps(), MADRY, *NOISE), step=2.5),
    Row("pgdrsl2", "PGDRSL2", "PGD in L2 on the mean answer under noise, for smoothed models; weak on others", SALMAN,
        norms=("l2",), draws="batch", strength=Strength.FLOOR, params=(steps(), MADRY, *NOISE), step=2.5),
]  # fmt: skip

TRANSFERABLE = [
    Row("mifgsm", "MIFGSM", "Momentum iterative FGSM", "Dong et al. 2017, arXiv 1710.06081",
        params=(steps(), SHARED, DECAY), step=1.0),
    Row("nifgsm", "NIFGSM", "Momentum iterative FGSM with Nesterov's look ahead", LIN,
        params=(steps(), SHARED, DECAY), step=1.0),
    Row("sinifgsm", "SINIFGSM", "NI-FGSM averaged over darkened copies, made to transfer", LIN,
        params=(steps(), SHARED, DECAY, whole("m", 5, "copies, each half as bright as the one before")), step=1.0),
    Row("vmifgsm", "VMIFGSM", "MI-FGSM tuned by the gradient's variance nearby, made to transfer", VARIANCE,
        draws="batch", params=(steps(), SHARED, DECAY, *NEIGHBOURS), step=1.0),
    Row("vnifgsm", "VNIFGSM", "NI-FGSM tuned by the gradient's variance nearby, made to transfer", VARIANCE,
        draws="batch", params=(steps(), SHARED, DECAY, *NEIGHBOURS), step=1.0),
    Row("upgd", "UPGD", "PGD with momentum and a choice of loss", "torchattacks 3.5.1, unpublished", draws="batch",
        params=(steps(), SHARED, switch("random_start", False, START.info.help),
                choice("loss", "ce", "loss that is maximised; dlr needs 3 classes, targeted 4", "dlr"), DECAY, EOT),
        step=1.0, both_labels=True),
    Row("difgsm", "DIFGSM", "Iterative FGSM on resized and padded copies, made to transfer; square images",
        "Xie et al. 2018, arXiv 1803.06978", draws="batch", strength=Strength.ONE_STEP,
        params=(steps(), SHARED, number("decay", 0.0, DECAY.info.help, ge=0), *DIVERSITY,
                switch("random_start", False, START.info.help)), step=1.0),
    Row("tifgsm", "TIFGSM", "Iterative FGSM on blurred gradients, made to transfer; square images",
        "Dong et al. 2019, arXiv 1904.02884", draws="batch", strength=Strength.ONE_STEP, colour=True,
        params=(steps(), SHARED, number("decay", 0.0, DECAY.info.help, ge=0),
                choice("kernel_name", "gaussian", "how gradients are blurred", "linear", "uniform"),
                whole("len_kernel", 15, "side of the blur in pixels, odd"),
                number("nsig", 3, "how many standard deviations the Gaussian spans", gt=0), *DIVERSITY,
                switch("random_start", False, START.info.help)), step=1.0),
    Row("pifgsm", "PIFGSM", "Amplified FGSM that spreads what leaves the ball over patches, made to transfer",
        "Gao et al. 2020, arXiv 2007.06765", targeted=False, colour=True, strength=Strength.ONE_STEP,
        params=AMPLIFIED, budget="max_epsilon", rename=AMPLIFIED_NAMES),
    Row("pifgsmpp", "PIFGSMPP", "PI-FGSM on blurred gradients, made to transfer", "Gao et al. 2020, arXiv 2012.15503",
        colour=True, strength=Strength.ONE_STEP, budget="max_epsilon", rename=AMPLIFIED_NAMES,
        params=(*AMPLIFIED, number("project_factor", 0.8, "share of the excess that is spread", ge=0))),
]  # fmt: skip

ADAPTIVE = [
    Row("apgd", "APGD", "Auto-PGD as torchattacks has it, with the published 100 steps", CROCE,
        norms=("linf", "l2"), draws="batch", targeted=False,
        params=(steps(100), RESTARTS, choice("loss", "ce", "loss that is maximised; dlr needs 3 classes", "dlr"), EOT,
                RHO)),
    Row("apgdt", "APGDT", "Auto-PGD toward each of the best-scoring wrong classes, with the published 100 steps",
        CROCE, norms=("linf", "l2"), draws="batch", targeted=False, min_classes=4, rename={"n_targets": None},
        params=(steps(100), RESTARTS, whole("n_targets", 9, "wrong classes to try, best-scoring first"), EOT, RHO)),
    Row("autoattack", "AutoAttack", "torchattacks' AutoAttack: 10 steps, not the published AutoAttack (100)", CROCE,
        norms=("linf", "l2"), draws="batch", targeted=False, min_classes=4,
        params=(choice("version", "standard", "which attacks are run", "plus", "rand"),)),
]  # fmt: skip

SMALLEST = [
    Row("fab", "FAB", "Fast adaptive boundary attack", "Croce and Hein 2019, arXiv 1907.02044",
        norms=("linf", "l2", "l1"), targeted=False, minimum_norm=True, budget=None,
        params=(steps(10), number("alpha_max", 0.1, "largest pull toward the clean image", gt=0, le=1),
                number("eta", 1.05, "overshoot across the boundary", ge=1),
                number("beta", 0.9, "how far a success is drawn back", gt=0, lt=1))),
    Row("deepfool", "DeepFool", "Newton steps to the nearest linearised boundary; some end at the edge of [0, 1]",
        "Moosavi-Dezfooli et al. 2015, arXiv 1511.04599", norms=("l2",), targeted=False, minimum_norm=True,
        budget=None, strength=Strength.ONE_STEP, params=(steps(50), OVERSHOOT)),
    Row("cw", "CW", "Carlini and Wagner's L2 attack with one fixed weight; pixels at 0 and 1 cannot move",
        "Carlini and Wagner 2016, arXiv 1608.04644", norms=("l2",), minimum_norm=True, budget=None, coupled=True,
        positive=True, strength=Strength.ONE_STEP,
        params=(number("c", 1.0, "weight of the loss against the distance", gt=0),
                steps(200),
                number("lr", 0.01, "learning rate", gt=0))),
    Row("eadl1", "EADL1", "Elastic-net attack that keeps the success of smallest L1 norm", EAD, norms=("l1",),
        minimum_norm=True, budget=None, coupled=True, positive=True, strength=Strength.ONE_STEP, params=EAD_PARAMS),
    Row("eaden", "EADEN", "Elastic-net attack that keeps the success of smallest elastic-net distance", EAD,
        norms=("l2", "l1"), minimum_norm=True, budget=None, coupled=True, positive=True, strength=Strength.ONE_STEP,
        params=EAD_PARAMS),
    Row("sparsefool", "SparseFool", "DeepFool's boundary, reached with few pixels",
        "Modas et al. 2018, arXiv 1811.02248", norms=("l1", "l0"), targeted=False, minimum_norm=True, budget=None,
        strength=Strength.ONE_STEP,
        params=(steps(10), number("lam", 3.0, "how far beyond DeepFool's point the boundary is put", ge=1), OVERSHOOT)),
    Row("jsma", "JSMA", "Raises the pair of values that favours the next class most, again and again",
        "Papernot et al. 2015, arXiv 1511.07528", norms=("l0",), minimum_norm=True, budget=None,
        strength=Strength.ONE_STEP,
        params=(number("theta", 1.0, "how much a value is changed, negative to darken", ge=-1, le=1),
                number("gamma", 0.1, "largest share of the values that is changed", gt=0, le=1))),
]  # fmt: skip

BLACK_BOX = [
    Row("square", "Square", "Random search with squares, on scores", "Andriushchenko et al. 2019, arXiv 1912.00049",
        norms=("linf", "l2"), access=Access.SCORE, draws="batch", rename={"queries": None},
        params=(whole("queries", 5000, "images an image's search may ask for", ge=4),
                number("p_init", 0.8, "share of the image that the first square covers", gt=0, le=1),
                choice("loss", "margin", "what is minimised", "ce"),
                switch("resc_schedule", True, "fit the shrinking of the squares to the queries"))),
    Row("spsa", "SPSA", "Gradients estimated from score differences", "Uesato et al. 2018, arXiv 1802.05666",
        access=Access.SCORE, draws="image", rename={"queries": None},
        params=(whole("nb_iter", 20, "gradient steps"), whole("nb_sample", 128, "random directions for a gradient"),
                number("lr", None, "step in pixel units; none: 2.5 eps / nb_iter", gt=0),
                number("delta", 0.01, "how far apart the probes are, half, in pixel units", gt=0),
                whole("max_batch_size", 64, "directions that are asked at once"),
                queries("2 x nb_iter x nb_sample"))),
    Row("onepixel", "OnePixel", "Differential evolution over as many pixels as the budget allows, on scores",
        "Su et al. 2017, arXiv 1710.08864", norms=("l0",), access=Access.SCORE, draws="image", budget="pixels",
        strength=Strength.FLOOR, rename={"queries": None},
        params=(steps(10), whole("popsize", 10, "candidates, at least 5 for each pixel (3 in gray images)"),
                whole("inf_batch", 128, "images that are asked at once"), queries("as many as the evolution takes"))),
    Row("pixle", "Pixle", "Copies pixels of patches elsewhere, whatever the budget, on scores; changes are counted",
        "Pomponi et al. 2022, arXiv 2202.02236", norms=("l0",), access=Access.SCORE, draws="image", budget=None,
        minimum_norm=True, strength=Strength.FLOOR, rename={"patch_min": None, "patch_max": None, "queries": None},
        params=(whole("patch_min", 2, "smallest side of a patch in pixels"),
                whole("patch_max", 10, "largest side of a patch in pixels"),
                choice("pixel_mapping", "random", "where pixels go", "similarity", "similarity_random", "distance",
                       "distance_random"),
                whole("restarts", 20, "patches that are kept, one after the other"),
                whole("max_iterations", 10, "patches to choose each from"),
                queries("2 x restarts x max_iterations + 1"))),
    Row("gn", "GN", "Gaussian noise of any size", "torchattacks 3.5.1", norms=("unrestricted",),
        access=Access.DECISION, targeted=False, strength=Strength.FLOOR, draws="batch", budget=None,
        params=(number("std", 0.1, "standard deviation in pixel units", gt=0),)),
]  # fmt: skip

ROWS = [*SIGN_STEPS, *TRANSFERABLE, *ADAPTIVE, *SMALLEST, *BLACK_BOX]
