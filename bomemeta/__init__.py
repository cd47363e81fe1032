"""bomemeta: bilevel meta-learning, distributed on Ray.

    import bomemeta as bm

    result = bm.train("quickstart", steps=100)
    print(result.metrics["test_accuracy"])

Everything here is imported when it is first used: `import bomemeta` imports neither torch nor Ray.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    __version__: str
    from bomemeta import doctor as doctor
    from bomemeta import errors as errors
    from bomemeta import profile as profile
    from bomemeta import tune as tune
    from bomemeta.api import Result as Result
    from bomemeta.api import evaluate as evaluate
    from bomemeta.api import extend as extend
    from bomemeta.api import load as load
    from bomemeta.api import resume as resume
    from bomemeta.api import train as train
    from bomemeta.contract import check_problem as check_problem
    from bomemeta.core.problem import Problem as Problem
    from bomemeta.core.problem import SharedProblem as SharedProblem
    from bomemeta.core.problem import StreamProblem as StreamProblem
    from bomemeta.core.solver import Solver as Solver
    from bomemeta.data.cifar10n import Cifar10N as Cifar10N
    from bomemeta.data.episodes_from import EpisodesFrom as EpisodesFrom
    from bomemeta.data.glyphs import Glyphs as Glyphs
    from bomemeta.data.image_folder import ImageFolder as ImageFolder
    from bomemeta.data.image_sets import Cifar10Subset as Cifar10Subset
    from bomemeta.data.image_sets import Cifar100 as Cifar100
    from bomemeta.data.image_sets import Digits as Digits
    from bomemeta.data.image_sets import MiniImagenet as MiniImagenet
    from bomemeta.data.l2l_tasksets import L2LFC100 as L2LFC100
    from bomemeta.data.l2l_tasksets import L2LCifarFS as L2LCifarFS
    from bomemeta.data.l2l_tasksets import L2LMiniImagenet as L2LMiniImagenet
    from bomemeta.data.l2l_tasksets import L2LOmniglot as L2LOmniglot
    from bomemeta.data.l2l_tasksets import L2LTieredImagenet as L2LTieredImagenet
    from bomemeta.data.labelled import FashionMnist as FashionMnist
    from bomemeta.data.labelled import LabelledArray as LabelledArray
    from bomemeta.data.labelled import Mnist as Mnist
    from bomemeta.data.newsgroups import TwentyNewsgroups as TwentyNewsgroups
    from bomemeta.data.omniglot import Omniglot as Omniglot
    from bomemeta.data.regression import RegressionArrays as RegressionArrays
    from bomemeta.data.regression import Sinusoid as Sinusoid
    from bomemeta.data.texts import InstalledTexts as InstalledTexts
    from bomemeta.inquiries import check as check
    from bomemeta.inquiries import write_report as write_report
    from bomemeta.predict import FewShotClassifier as FewShotClassifier
    from bomemeta.predict import load_classifier as load_classifier
    from bomemeta.problems.analytic import Analytic as Analytic
    from bomemeta.problems.continual import Continual as Continual
    from bomemeta.problems.continual_meta import ContinualMeta as ContinualMeta
    from bomemeta.problems.data_mixing import DataMixing as DataMixing
    from bomemeta.problems.few_shot import FewShot as FewShot
    from bomemeta.problems.few_shot_regression import FewShotRegression as FewShotRegression
    from bomemeta.problems.hyper_cleaning import HyperCleaning as HyperCleaning
    from bomemeta.problems.regularisation import Regularisation as Regularisation
    from bomemeta.problems.reweighting import Reweighting as Reweighting
    from bomemeta.solvers.agem import AGem as AGem
    from bomemeta.solvers.aid_cg import AidCG as AidCG
    from bomemeta.solvers.aid_neumann import AidNeumann as AidNeumann
    from bomemeta.solvers.amigo_cg import AmigoCG as AmigoCG
    from bomemeta.solvers.amigo_gd import AmigoGD as AmigoGD
    from bomemeta.solvers.anil import ANIL as ANIL
    from bomemeta.solvers.bome import BOME as BOME
    from bomemeta.solvers.ctn import CTN as CTN
    from bomemeta.solvers.f2sa import F2SA as F2SA
    from bomemeta.solvers.fomaml import FOMAML as FOMAML
    from bomemeta.solvers.itd import ITD as ITD
    from bomemeta.solvers.lancbio import LancBiO as LancBiO
    from bomemeta.solvers.lower_only import LowerOnly as LowerOnly
    from bomemeta.solvers.maml import MAML as MAML
    from bomemeta.solvers.meta_sgd import MetaSGD as MetaSGD
    from bomemeta.solvers.reptile import Reptile as Reptile
    from bomemeta.solvers.sl_bamm import SLBAMM as SLBAMM
    from bomemeta.solvers.soba import SOBA as SOBA
    from bomemeta.solvers.stocbio import StocBiO as StocBiO
    from bomemeta.solvers.subbio import SubBiO as SubBiO
    from bomemeta.solvers.vpbgd import VPBGD as VPBGD

# Where each name comes from; tests/test_objects.py compares it with the registries.
_NAMES = {
    "bomemeta.api": ["Result", "evaluate", "extend", "load", "resume", "train"],
    "bomemeta.contract": ["check_problem"],
    "bomemeta.core.problem": ["Problem", "SharedProblem", "StreamProblem"],
    "bomemeta.core.solver": ["Solver"],
    "bomemeta.predict": ["FewShotClassifier", "load_classifier"],
    "bomemeta.data.episodes_from": ["EpisodesFrom"],
    "bomemeta.inquiries": ["check", "write_report"],
    "bomemeta.solvers.agem": ["AGem"],
    "bomemeta.solvers.aid_cg": ["AidCG"],
    "bomemeta.solvers.aid_neumann": ["AidNeumann"],
    "bomemeta.solvers.amigo_cg": ["AmigoCG"],
    "bomemeta.solvers.amigo_gd": ["AmigoGD"],
    "bomemeta.solvers.anil": ["ANIL"],
    "bomemeta.solvers.bome": ["BOME"],
    "bomemeta.solvers.ctn": ["CTN"],
    "bomemeta.solvers.f2sa": ["F2SA"],
    "bomemeta.solvers.fomaml": ["FOMAML"],
    "bomemeta.solvers.itd": ["ITD"],
    "bomemeta.solvers.lancbio": ["LancBiO"],
    "bomemeta.solvers.lower_only": ["LowerOnly"],
    "bomemeta.solvers.maml": ["MAML"],
    "bomemeta.solvers.meta_sgd": ["MetaSGD"],
    "bomemeta.solvers.reptile": ["Reptile"],
    "bomemeta.solvers.sl_bamm": ["SLBAMM"],
    "bomemeta.solvers.soba": ["SOBA"],
    "bomemeta.solvers.stocbio": ["StocBiO"],
    "bomemeta.solvers.subbio": ["SubBiO"],
    "bomemeta.solvers.vpbgd": ["VPBGD"],
    "bomemeta.problems.analytic": ["Analytic"],
    "bomemeta.problems.continual": ["Continual"],
    "bomemeta.problems.continual_meta": ["ContinualMeta"],
    "bomemeta.problems.data_mixing": ["DataMixing"],
    "bomemeta.problems.few_shot": ["FewShot"],
    "bomemeta.problems.few_shot_regression": ["FewShotRegression"],
    "bomemeta.problems.hyper_cleaning": ["HyperCleaning"],
    "bomemeta.problems.regularisation": ["Regularisation"],
    "bomemeta.problems.reweighting": ["Reweighting"],
    "bomemeta.data.cifar10n": ["Cifar10N"],
    "bomemeta.data.glyphs": ["Glyphs"],
    "bomemeta.data.image_folder": ["ImageFolder"],
    "bomemeta.data.image_sets": ["Cifar100", "Cifar10Subset", "Digits", "MiniImagenet"],
    "bomemeta.data.l2l_tasksets": [
        "L2LCifarFS",
        "L2LFC100",
        "L2LMiniImagenet",
        "L2LOmniglot",
        "L2LTieredImagenet",
    ],
    "bomemeta.data.labelled": ["FashionMnist", "LabelledArray", "Mnist"],
    "bomemeta.data.newsgroups": ["TwentyNewsgroups"],
    "bomemeta.data.omniglot": ["Omniglot"],
    "bomemeta.data.texts": ["InstalledTexts"],
    "bomemeta.data.regression": ["RegressionArrays", "Sinusoid"],
}
_MODULE_OF = {name: module for module, names in _NAMES.items() for name in names}
_MODULES = ["doctor", "errors", "profile", "tune"]  # the first, third and fourth can be called

__all__ = [*_MODULE_OF, *_MODULES, "__version__"]


def __getattr__(name: str) -> Any:
    if name in _MODULES:
        return importlib.import_module(f"bomemeta.{name}")
    if name == "__version__":
        # Importing this takes five times as long as the rest of `import bomemeta`.
        from importlib.metadata import version

        return version("bomemeta")
    if name not in _MODULE_OF:
        raise AttributeError(f"module 'bomemeta' has no attribute {name!r}")
    found = getattr(importlib.import_module(_MODULE_OF[name]), name)
    globals()[name] = found
    return found


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
