"""What was trained, used: a classifier with scikit-learn's manners, y of a new task, an export."""

from bomemeta.predict.classifier import FewShotClassifier, load_classifier
from bomemeta.predict.model import TrainedModel
from bomemeta.predict.regressor import FewShotRegressor
from bomemeta.predict.stream import StreamClassifier
from bomemeta.predict.trials import Trial, TrialOutcome, TrialsResult

__all__ = [
    "FewShotClassifier", "FewShotRegressor", "StreamClassifier", "TrainedModel", "Trial", "TrialOutcome", "TrialsResult", "load_classifier",
]  # fmt: skip
