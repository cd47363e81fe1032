"""What was trained, used: a classifier with scikit-learn's manners, y of a new task, an export."""

from bomemeta.predict.classifier import FewShotClassifier, load_classifier
from bomemeta.predict.model import TrainedModel

__all__ = ["FewShotClassifier", "TrainedModel", "load_classifier"]
